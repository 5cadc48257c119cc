"""What a Discord message says to us, read from its raw JSON (pure): the same for the gateway and for the history.

Source: discord.com/developers/docs/resources/message.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from core.messages import Author, Channel, Kind, Message
from core.text import MAX_CHARS, clean

PLATFORM = "discord"
SPOKEN = (0, 19)
"""Message types that a person typed: default and reply."""
EPOCH_MS = 1_420_070_400_000


def read(event: Mapping[str, Any], me: str, kind: Kind = "ask", roles: Collection[str] = ()) -> Message | None:
    """The message if it is said to us: in a direct message, with our mention, or as a reply to what we said.

    None for everything else: other bots, webhooks, system messages, @everyone, a text with nothing in it. An edit is
    read whoever it mentions, since only the journal knows whether its message was ours; one that leaves no text that we
    are shown takes the message back. `roles` are ours alone. Raises KeyError, TypeError or ValueError for what is no
    message.
    """
    author = event["author"]
    if event.get("type", 0) not in SPOKEN or author.get("bot") or event.get("webhook_id"):
        return None
    direct = not event.get("guild_id") and not event.get("member")
    if kind != "edit" and not direct and not mentions(event, me, roles) and not replies_to(event, me):
        return None
    text = strip_mention(str(event.get("content") or "")[: 4 * MAX_CHARS], me, roles)
    if not text and kind != "edit":
        return None
    name = clean(str(author.get("global_name") or author.get("username") or ""))
    return Message(
        Channel(PLATFORM, str(int(event["channel_id"]))),
        str(int(event["id"])),
        Author(str(int(author["id"])), " ".join(name.split())),
        text,
        sent_at(event["id"]),
        kind if text else "delete",
        str(event.get("guild_id") or ""),
    )


def mentions(event: Mapping[str, Any], me: str, roles: Collection[str] = ()) -> bool:
    """Us by name or by our own role; @everyone and other roles are not us."""
    named = any(str(user.get("id")) == me for user in event.get("mentions") or ())
    named = named or any(str(role) in roles for role in event.get("mention_roles") or ())
    return named or bool(re.search(rf"<@!?{me}>", str(event.get("content") or "")))


def replies_to(event: Mapping[str, Any], me: str) -> bool:
    earlier = event.get("referenced_message")
    return earlier is not None and str(earlier["author"]["id"]) == me


def answers(event: Mapping[str, Any], me: str) -> str | None:
    """The id of the message that this one of ours replies to; None when it is no reply or not ours."""
    reference = event.get("message_reference") or {}
    return str(reference["message_id"]) if is_by(event, me) and reference.get("message_id") else None


def is_by(event: Mapping[str, Any], user: str) -> bool:
    return str((event.get("author") or {}).get("id")) == user


def own_role(role: Mapping[str, Any], me: str) -> bool:
    """Discord makes one for each bot that is invited, of the same name."""
    return str((role.get("tags") or {}).get("bot_id")) == me


def strip_mention(text: str, me: str, roles: Collection[str] = ()) -> str:
    """Without our mention, and without the comma that followed it."""
    bare, found = re.subn("|".join([rf"<@!?{me}>", *(f"<@&{role}>" for role in roles)]), " ", text)
    return re.sub(r"[ \t]{2,}", " ", bare).strip().lstrip(",:;").strip() if found else text.strip()


def sent_at(snowflake: str | int) -> datetime:
    """The time inside an id."""
    return datetime.fromtimestamp(((int(snowflake) >> 22) + EPOCH_MS) / 1000, UTC)


def gone(channel: str | int, id: str | int) -> Message:
    """A delete."""
    place = Channel(PLATFORM, str(int(channel)))
    return Message(place, str(int(id)), Author("", ""), "", sent_at(id), "delete")


def unread(event: Any, why: str) -> Message:
    """The row that stands for an event nobody could read."""
    fields = event if isinstance(event, dict) else {}
    place = Channel(PLATFORM, str(fields.get("channel_id") or "unknown")[:64])
    id = f"event {fields.get('id') or why}"[:64]
    return Message(place, id, Author("", ""), clean(repr(event)[:500]), datetime.now(UTC))
