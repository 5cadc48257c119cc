"""What a group said, out of its export: Telegram Desktop's result.json and the JSON of DiscordChatExporter. Of the
export of a whole Telegram account, the groups alone: what was said in private is not for a bot to repeat.

A dialogue ends where nobody speaks for SILENCE; a topic has its own. What one person says in a row is one turn. What is
not a person's own words (a bot's, a command to one, what was forwarded, a picture) is a turn without text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from operator import itemgetter
from pathlib import Path
from typing import Any

SILENCE = timedelta(minutes=30)


def read_export(path: Path) -> Iterator[list[str]]:
    """The turns of each dialogue of two or more. Raises OSError; whatever a look at another JSON raises."""
    whole = json.loads(path.read_bytes())
    account = [whole[name]["list"] for name in ("chats", "left_chats") if name in whole]
    groups = [chat for chats in account for chat in chats if chat["type"].endswith("group")]
    for chat in groups if account else [whole]:
        yield from (talk for talk in _talks(chat["messages"]) if len(talk) > 1)


def _talks(messages: list[dict[str, Any]]) -> Iterator[list[str]]:
    topics: dict[Any, Any] = {}
    spoken = []
    for message in messages:
        if (number := message["id"]) in topics:
            continue  # said once, however often it is there
        begins = message.get("action") == "topic_created"
        topics[number] = topic = number if begins else topics.get(message.get("reply_to_message_id"))
        if said := _said(message):
            spoken.append((topic, *said))
    talks: dict[Any, list[str]] = {}
    last: dict[Any, tuple[datetime, str]] = {}
    for topic, when, who, text in sorted(spoken, key=itemgetter(1)):  # Discord's may begin with the newest
        before, whose = last.get(topic, (when, None))
        last[topic] = (when, who)
        if when - before > SILENCE:
            yield talks.pop(topic)
            whose = None
        talk = talks.setdefault(topic, [])
        if who == whose:
            talk[-1] = f"{talk[-1]} {text}".strip()
        else:
            talk.append(text)
    yield from talks.values()


def _said(message: dict[str, Any]) -> tuple[datetime, str, str] | None:
    """(when, who, what) of a message, None where nobody spoke."""
    if "timestamp" in message:  # Discord
        author, spoke = message["author"], message["type"] in ("Default", "Reply")
        text = "" if author.get("isBot") else message["content"]
        return (datetime.fromisoformat(message["timestamp"]), author["id"], text) if spoke else None
    if message["type"] != "message":
        return None
    parts = [message["text"]] if isinstance(message["text"], str) else message["text"]
    own = not message.keys() & {"forwarded_from", "via_bot"}
    text = "".join(map(_plain, parts)) if own else ""
    return datetime.fromisoformat(message["date"]), str(message.get("from_id")), text


def _plain(part: str | dict[str, str]) -> str:
    """Of a Telegram text, which is in parts where some of it is marked."""
    if isinstance(part, str):
        return part
    return "" if part["type"] in ("bot_command", "pre") else part["text"]
