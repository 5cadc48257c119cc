"""The place is gone, or we are, while a reply is due: one refusal, a final state, and nobody else notices."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.discord_server import Fault as DiscordFault
from tests.fakes.telegram_server import Fault as TelegramFault
from tests.faults.hostile import Wires, wires

ON_DISCORD: list[tuple[str, list[Any]]] = [
    ("THREAD_UPDATE", [400, 50083, "Thread is archived"]),
    ("CHANNEL_DELETE", [404, 10003, "Unknown Channel"]),
    ("CHANNEL_UPDATE", [403, 50013, "Missing Permissions"]),
    ("GUILD_DELETE", [403, 50001, "Missing Access"]),
]
ON_TELEGRAM = [
    [403, "Forbidden: bot was kicked from the supergroup chat"],
    [403, "Forbidden: user is deactivated"],
    [400, "Bad Request: chat not found"],
    [400, "Bad Request: message thread not found"],
    [400, "Bad Request: TOPIC_CLOSED"],
    [400, "Bad Request: not enough rights to send text messages to the chat"],
]


async def settled(house: Wires, abandoned: int) -> None:
    await house.settled(60)
    counts = await house.app.journal.counts()
    assert counts["replies"] == {"abandoned": abandoned, "sent": house.given.total()}
    assert counts["messages"] == {"answered": abandoned + house.given.total()}


async def test_channels_deleted_threads_archived_and_servers_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with wires(tmp_path, seed=1) as house:
        server, rooms = house.discord, [house.discord.channel("thread", thread_of=house.rooms[0]), *house.rooms[1:]]
        for room, (event, refusal) in zip(rooms, ON_DISCORD, strict=False):
            server.faults += [
                DiscordFault("error", method, path, channel=room, times=-1, value=refusal)
                for method, path in (("POST", "/messages"), ("POST", "/typing"), ("GET", "/messages"))
            ]
            server.say(room, "ann", "are you there?", mention=True)
            place = {**server.channels[room]}
            if "thread_metadata" in place:
                place["thread_metadata"] = {**place["thread_metadata"], "archived": True, "locked": True}
            server.publish_raw(event, {"id": server.guild} if event == "GUILD_DELETE" else place)
        for room in rooms[-3:]:
            server.say(room, "ann", "and you?", mention=True)
            house.given["discord"] += 1
        await server.until(3)
        await settled(house, len(ON_DISCORD))
        tries = Counter(path.split("/")[2] for method, path, _ in server.calls if path.endswith("/messages"))
        assert [tries[room] for room in rooms[: len(ON_DISCORD)]] == [1] * len(ON_DISCORD)
        await house.answers()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_thrown_out_of_groups_and_topics_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with wires(tmp_path, seed=1) as house:
        server, chats = house.telegram, house.chats[::-1]
        for chat, refusal in zip(chats, ON_TELEGRAM, strict=False):
            server.faults += [
                TelegramFault("error", method, chat, times=-1, value=refusal)
                for method in ("sendMessage", "sendChatAction")
            ]
            server.say(chat, max(chat, 99), "@palaver_bot are you there?")
            member = {
                "chat": server.chats[chat],
                "from": server.user(1),
                "date": 1,
                "new_chat_member": {"status": "kicked"},
            }
            server.update(my_chat_member=member)
        for chat in chats[-3:]:
            server.say(chat, chat, "and you?")
            house.given["telegram"] += 1
        await server.until(3)
        await settled(house, len(ON_TELEGRAM))
        tries = Counter(int(call["chat_id"]) for call in server.called("sendMessage"))
        assert [tries[chat] for chat in chats[: len(ON_TELEGRAM)]] == [1] * len(ON_TELEGRAM)
        await house.answers()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
