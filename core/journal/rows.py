"""Messages as rows and rows as messages: which row is whose, and what a row can hold."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, and_

from core.journal.schema import channels, messages, waiting
from core.messages import Author, Channel, Message, Request

KEY = (messages.c.platform, messages.c.account, messages.c.channel, messages.c.platform_id)


def key(message: Message) -> tuple[str, str, str, str]:
    """What makes it one message, however often it comes: the values of KEY."""
    return message.channel.platform, message.account, message.channel.id, message.id


def same(message: Message) -> Any:
    """The row of this message."""
    return named(message.channel, message.id, message.account)


def named(channel: Channel, id: str, account: str) -> Any:
    """The row with this name: all of it, or no index finds it."""
    name = (channel.platform, account, channel.id, id)
    return and_(*(column == value for column, value in zip(KEY, name, strict=True)))


def inside(channel: Channel) -> Any:
    """The messages of this channel."""
    return and_(messages.c.platform == plain(channel.platform), messages.c.channel == plain(channel.id))


def few(column: Any) -> Any:
    """The column, such that no index is chosen by it: without statistics SQLite would read all of a channel, or of a
    platform, rather than the index of the few that wait or are due."""
    return column.concat("")


def kept_for(channel: Channel) -> Any:
    """The row of the channel itself."""
    return and_(channels.c.platform == channel.platform, channels.c.channel == channel.id)


def waits(request: Request) -> Any:
    """Its row, while it waits."""
    return and_(messages.c.id == request.row, waiting)


def plain(text: str) -> str:
    """What both databases can hold: no lone surrogate, no NUL (illegal in PostgreSQL)."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "")


def storable(message: Message) -> Message:
    """As both databases hold it; of ids, too, since an event nobody can read may have anything for one."""
    channel, author = message.channel, message.author
    return replace(
        message,
        channel=Channel(channel.platform, plain(channel.id)[:128]),
        id=plain(message.id)[:128],
        author=replace(author, id=plain(author.id)[:64], name=plain(author.name)[:200]),
        text=plain(message.text),
        server=plain(message.server)[:64],
        account=plain(message.account)[:64],
    )


def row_of(message: Message, received_at: float, deadline: float) -> dict[str, Any]:
    """A new row. Times are seconds since 1970."""
    platform, account, channel, id = key(message)
    return {
        "platform": platform,
        "account": account,
        "channel": channel,
        "platform_id": id,
        "server": message.server,
        "author": message.author.id,
        "author_name": message.author.name,
        "author_is_bot": message.author.is_bot,
        "text": message.text,
        "sent_at": message.sent_at.timestamp(),
        "received_at": received_at,
        "deadline": deadline,
        "state": "waiting" if message.kind == "ask" else "heard",
        "attempts": 0,
        "deleted": False,
        "note": "",
    }


def request_of(row: Row[Any]) -> Request:
    """The question in a row of `messages`."""
    message = Message(
        Channel(row.platform, row.channel),
        row.platform_id,
        Author(row.author, row.author_name, row.author_is_bot),
        row.text,
        datetime.fromtimestamp(row.sent_at, UTC),
        server=row.server,
        account=row.account,
    )
    return Request(row.id, message, datetime.fromtimestamp(row.deadline, UTC), row.attempts)


def exported(row: Row[Any], answers: list[Row[Any]]) -> dict[str, object]:
    """A message with its replies, as people read it."""
    return {
        "id": row.platform_id,
        "at": datetime.fromtimestamp(row.sent_at, UTC).isoformat(),
        "author": row.author_name,
        "text": row.text,
        "state": row.state,
        "replies": [
            {"text": reply.text, "state": reply.state, "id": reply.platform_id, "seed": reply.seed} for reply in answers
        ],
    }
