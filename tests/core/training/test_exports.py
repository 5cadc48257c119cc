"""What is taken of exports shaped as Telegram Desktop and DiscordChatExporter write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.training.datasets import BadData, read_dialogues


def telegram(number: int, minute: int, who: str | None, text: Any, **more: Any) -> dict[str, Any]:
    date = f"2024-03-01T{10 + minute // 60}:{minute % 60:02}:00"
    said = {"id": number, "type": "message", "date": date, "from": who, "from_id": f"user{who}", "text": text}
    return said | {"date_unixtime": "1709287200", "text_entities": []} | more


def discord(number: int, minute: int, who: str, text: str, *, bot: bool = False, kind: str = "Default") -> Any:
    author = {"id": who, "name": who, "discriminator": "0000", "nickname": who, "isBot": bot, "roles": []}
    time = f"2024-03-01T10:{minute:02}:00.123+00:00"
    return {"id": f"{number}", "type": kind, "timestamp": time, "content": text, "author": author, "attachments": []}


def read(path: Path, whole: Any, encoding: str = "utf-8") -> list[list[str]]:
    path.write_bytes(json.dumps(whole, ensure_ascii=False, indent=1).encode(encoding))
    return [[text for _, text in dialogue] for dialogue in read_dialogues(path)]


def test_a_telegram_group(tmp_path: Path) -> None:
    hello = telegram(2, 0, "Ann", ["Hi ", {"type": "mention", "text": "@bob"}, ", ", {"type": "bold", "text": "look!"}])
    messages = [
        {"id": 1, "type": "service", "date": "2024-03-01T09:00:00", "actor": "Ann", "action": "create_group"},
        hello,
        hello,
        telegram(3, 1, "Ann", "Are you there?", edited="2024-03-01T10:02:00", author="Ann"),
        telegram(4, 2, None, "Who asks? 😂", reply_to_message_id=3),
        telegram(5, 3, "Ann", "", media_type="sticker", sticker_emoji="😂"),
        telegram(6, 4, "Bob", "What a picture"),
        telegram(7, 5, "Ann", "From elsewhere", forwarded_from=None),
        telegram(8, 6, "Bob", [{"type": "bot_command", "text": "/reset"}]),
        telegram(9, 90, "Bob", "", photo="photos/1.jpg"),
        telegram(10, 91, "Ann", "Nice one, wherever that is."),
        telegram(11, 92, "Bob", "Спасибо"),
        telegram(12, 300, "Ann", "Alone, to the end."),
    ]
    group = {"name": "Group", "type": "private_supergroup", "id": 7, "messages": messages}
    talks = [
        ["Hi look ! Are you there ?", "Who asks ? haha", "", "What a picture", "", ""],
        ["", "Nice one , wherever that is .", ""],
    ]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert read(tmp_path / "result.json", group, encoding) == talks
    private = {"type": "personal_chat", "messages": [telegram(1, 0, "Ann", "My secret"), telegram(2, 1, "Bob", "Oh.")]}
    account = {"about": "", "contacts": {}, "chats": {"list": [private, group]}, "left_chats": {"list": []}}
    assert read(tmp_path / "result.json", account) == talks


def test_topics_are_talks_of_their_own(tmp_path: Path) -> None:
    messages = [
        {"id": 5, "type": "service", "date": "2024-03-01T09:00:00", "action": "topic_created", "title": "Cats"},
        telegram(6, 0, "Ann", "Cats?", reply_to_message_id=5),
        telegram(7, 1, "Bob", "Rain?"),
        telegram(8, 2, "Cid", "My cat sleeps.", reply_to_message_id=6),
        telegram(9, 3, "Dan", "Sun."),
    ]
    talks = read(tmp_path / "result.json", {"type": "private_supergroup", "messages": messages})
    assert talks == [["Cats ?", "My cat sleeps ."], ["Rain ?", "Sun ."]]


def test_a_folder_of_discord_channels(tmp_path: Path) -> None:
    messages = [
        discord(1, 0, "Ann", "hey <@42> :)"),
        discord(2, 1, "Bob", "", kind="ChannelPinnedMessage"),
        discord(3, 2, "Bob", "hey!", kind="Reply"),
        discord(4, 3, "Music", "Now playing", bot=True),
        discord(5, 4, "Ann", "thanks"),
    ]
    head = {"guild": {"id": "1"}, "channel": {"id": "2", "type": "GuildTextChat"}, "messageCount": 5}
    talk = ["hey :)", "hey !", "", "thanks"]
    assert read(tmp_path / "a.json", head | {"messages": messages}) == [talk]
    assert read(tmp_path / "b.json", head | {"messages": messages[::-1]}) == [talk]
    (tmp_path / "c.json").write_text(json.dumps(head | {"messages": []}))
    (tmp_path / "notes.txt").write_text("no export")
    assert [[text for _, text in found] for found in read_dialogues(tmp_path)] == [talk, talk]


@pytest.mark.parametrize(
    "text", ["", "[]", '["hi", "ho"]', '{"messages": [{}]}', '{"chats": {}}', '{"messages": [', "[" * 10**5]
)
def test_what_is_no_export_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(BadData, match=r"result.json is no whole export of Telegram Desktop or DiscordChatExporter"):
        list(read_dialogues(tmp_path / "result.json"))
