"""Reading Telegram's updates: raw JSON in, what a person said, asked of the bot or did to the chat out. Pure.

A topic of a forum is a channel of its own, "-100123:45". Ids of messages are unique in their channel for ever: when a
group becomes a supergroup its messages count from 1 again, so those of a basic group are spelt "g17"; and since private
chats count anew for each bot, a message has the bot's own id with it, as its `account`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

from core.messages import Author, Channel, Message
from core.text import clean

PLATFORM = "telegram"
MAX_TEXT = 4096
"""UTF-16 units in one message, both ways: https://core.telegram.org/bots/api#sendmessage"""
WANTED = ["message", "edited_message"]
SPEAKS_FOR_A_CHAT = (1087968824, 136817688)
"""GroupAnonymousBot and Channel_Bot: people who write in the name of their group or channel, not bots."""
EDITED_SECONDS = 300
"""A message that an edit makes one to us is heard when it was no older than that."""
MEDIA = {
    "audio", "contact", "dice", "document", "location", "paid_media", "photo", "poll", "sticker", "story", "venue",
    "video", "video_note", "voice",
}  # fmt: skip
"""What people say without words; an animation is a document, too. Of an album one has the words."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Me:
    """The bot itself."""

    id: int
    username: str


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    message: Message


@dataclass(frozen=True, slots=True)
class Moved:
    """A group became a supergroup."""

    old: Channel
    new: Channel


COMMANDS = {"start": "say hello", "help": "say what I am", "reset": "forget this conversation and start anew"}


def read(update: Mapping[str, Any], me: Me) -> Message | Command | Moved | None:
    """What the update means for us; None is nothing. ValueError when it is not as the Bot API has it.

    An edit that leaves no text takes the message back. In a private chat, media alone are a question without text.
    """
    if "unreadable" in update:
        raise ValueError("it is no JSON")
    edited = "edited_message" in update
    message = _get(update, "edited_message" if edited else "message", dict)
    if message is None:
        return None
    chat = _need(message, "chat", dict)
    chat_id, kind = _need(chat, "id", int), _need(chat, "type", str)
    if moved := _moved(message, chat_id):
        return moved
    author, text = _author(message), _text(message)
    if kind not in ("private", "group", "supergroup") or author is None or author.is_bot:
        return None
    wordless = kind == "private" and MEDIA & message.keys() and "media_group_id" not in message
    if not (text or edited or wordless):
        return None
    if chat.get("is_direct_messages") is True:
        return None  # a channel's: one chat for all who write to it, each alone, and we would mix them up
    channel, id = _channel(message, chat_id), spelt(_need(message, "message_id", int), kind)
    server = "" if kind == "private" else channel.id.partition(":")[0]

    def said(what: str) -> Message:
        return Message(channel, id, author, what.strip(), _date(message), server=server, account=str(me.id))

    left, command, target = strip_mention(text, me), "", ""
    if match := _command(left):
        command, target = match[1].lower(), (match[2] or me.username).lower()
        if command not in COMMANDS and target == me.username.lower():
            left = match[1] + left[match.end() :]
    if edited:
        return replace(said(left), kind="edit" if left else "delete")
    if command and target != me.username.lower():
        return None
    if command in COMMANDS:
        return Command(command, replace(said(text), kind="heard"))
    named = kind == "private" or bool(match and match[2]) or mentioned(message, text, me)
    if named or (not command and _replied(message, me)):  # a command that names nobody is some other bot's
        return said(left)
    return None


def failed(update: object, me: Me) -> Message:
    """The row that stands for an update nobody could read: its own JSON, cut; where it came from if that is clear."""
    event: Any = {}
    number: object = None
    if isinstance(update, dict):
        number = update.get("update_id")
        event = next((value for name, value in update.items() if name != "update_id"), {})
    chat = event.get("chat") if isinstance(event, dict) else None
    where = chat.get("id") if isinstance(chat, dict) else None
    try:
        text = update if isinstance(update, str) else json.dumps(update)
    except (ValueError, RecursionError, TypeError):
        text = "too deep to be shown"
    channel = Channel(PLATFORM, str(where) if isinstance(where, int) else "unknown")
    id, now = f"update {number}"[:64], datetime.now(UTC)
    return Message(channel, id, Author("", ""), clean(text[:MAX_TEXT])[:500], now, account=str(me.id))


def spelt(message_id: int, chat_type: str) -> str:
    return f"g{message_id}" if chat_type == "group" else str(message_id)


def target(id: str, chat: int) -> int | None:
    """The number of the message to reply to in `chat`; None when it did not come along into the supergroup."""
    if id.startswith("g") and chat < -(10**12):
        return None
    number = id.removeprefix("g")
    return int(number) if number.isdecimal() else None


def mentioned(message: Mapping[str, Any], text: str, me: Me) -> bool:
    """@username anywhere, in any case, or the bot's name made a link to it."""
    return bool(_at(me.username).search(text)) or any(
        isinstance(entity, dict)
        and entity.get("type") == "text_mention"
        and isinstance(entity.get("user"), dict)
        and entity["user"].get("id") == me.id
        for entity in _get(message, "entities", list) or _get(message, "caption_entities", list) or ()
    )


def strip_mention(text: str, me: Me) -> str:
    """The text without @username, and without the comma that followed it."""
    found = _at(me.username)
    if not found.search(text):
        return text.strip()
    return re.sub(r"[ \t]{2,}", " ", found.sub(" ", text)).strip().lstrip(",:;").strip()


@cache
def _at(username: str) -> re.Pattern[str]:
    name = re.escape(username) if username else r"(?!)"  # no name, no mention
    return re.compile(rf"(?<![\w@])@{name}(?!\w)", re.IGNORECASE)


def _command(text: str) -> re.Match[str] | None:
    return re.match(r"/([A-Za-z0-9_]{1,32})(?:@(\w{1,64}))?(?=[.,:;!?]*(?:\s|$))", text)


def _channel(message: Mapping[str, Any], chat_id: int) -> Channel:
    thread = _get(message, "message_thread_id", int)
    topic = thread if message.get("is_topic_message") is True else None  # else it is only a chain of replies
    return Channel(PLATFORM, str(chat_id) if topic is None else f"{chat_id}:{topic}")


def _author(message: Mapping[str, Any]) -> Author | None:
    """None for posts that a linked channel passed on."""
    if message.get("is_automatic_forward") is True:
        return None
    user, chat = _get(message, "from", dict), _get(message, "sender_chat", dict)
    if chat is not None and (user is None or user.get("id") in SPEAKS_FOR_A_CHAT):
        return Author(str(_need(chat, "id", int)), _name(chat, "title"))
    if user is None:
        return None
    name = f"{_name(user, 'first_name')} {_name(user, 'last_name')}".strip()
    return Author(str(_need(user, "id", int)), name, user.get("is_bot") is True)


def _name(person: Mapping[str, Any], field: str) -> str:
    return " ".join(clean((_get(person, field, str) or "")[:128]).split())


def _text(message: Mapping[str, Any]) -> str:
    """Text or caption; "" for service messages and bare media."""
    text = _get(message, "text", str) or _get(message, "caption", str) or ""
    return text[:MAX_TEXT].encode("utf-8", "ignore").decode().replace("\0", "").strip()


def _replied(message: Mapping[str, Any], me: Me) -> bool:
    """To a message of the bot; in a topic every message replies to the one that opened it, which says nothing."""
    earlier = _get(message, "reply_to_message", dict)
    if earlier is None or "forum_topic_created" in earlier:
        return False
    author = _get(earlier, "from", dict)
    return author is not None and author.get("id") == me.id


def _moved(message: Mapping[str, Any], chat_id: int) -> Moved | None:
    new, old = _get(message, "migrate_to_chat_id", int), _get(message, "migrate_from_chat_id", int)
    if new is None and old is None:
        return None
    pair = (chat_id, new) if new is not None else (old, chat_id)
    return Moved(Channel(PLATFORM, str(pair[0])), Channel(PLATFORM, str(pair[1])))


def edited_soon(message: Mapping[str, Any]) -> bool:
    """Was it edited soon after it was sent? Nobody expects an answer to what was said long ago."""
    try:
        return bool(message["edit_date"] - message["date"] <= EDITED_SECONDS)
    except (KeyError, TypeError):
        return False


def _date(message: Mapping[str, Any]) -> datetime:
    try:
        return datetime.fromtimestamp(message["date"], UTC)
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return datetime.now(UTC)


def _get(fields: Mapping[str, Any], name: str, kind: type[T]) -> T | None:
    value = fields.get(name)
    if value is None or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise ValueError(f"{name} is no {kind.__name__}")


def _need(fields: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = _get(fields, name, kind)
    if value is None:
        raise ValueError(f"{name} is missing")
    return value
