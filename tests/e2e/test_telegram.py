"""The whole house on Telegram: real settings, journal, courier and client, the echo engine, a Bot API server.

Many conversations at once; tests/faults/ kills the process in the middle of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from pydantic import SecretStr

from bots.telegram import GREETING, UNHEARD, TelegramSettings, open_telegram
from core.app import App, open_app
from core.settings import Settings
from tests.fakes.telegram_server import Sent, TelegramServer

ROOT = Path(__file__).parents[2]


@contextlib.asynccontextmanager
async def house(server: TelegramServer, folder: Path) -> AsyncIterator[App]:
    database = SecretStr(f"sqlite+aiosqlite:///{folder / 'palaver.db'}")
    telegram = TelegramSettings(telegram_token=SecretStr(server.token), telegram_api_base=server.base)
    async with open_app(Settings(database_url=database, engine="echo")) as app:
        running = asyncio.create_task(app.run([open_telegram(telegram)]))
        try:
            yield app
        finally:
            app.stop()
            assert await running == 0


def places(server: TelegramServer) -> Iterator[tuple[int, int, int | None]]:
    """20 conversations (chat, who, topic): private chats, groups, topics of forums."""
    for number in range(12):
        yield server.private(100 + number), 100 + number, None
    for number in range(4):
        yield server.group(-1001000000000 - number), 200 + number, None
    for number in range(4):
        yield server.group(-1009000000000 - number, topics=(5,)), 300 + number, 5


def line(place: int, number: int) -> str:
    return f"room {place} says number {number}"


def check(server: TelegramServer, asked: dict[tuple[int, int], str], sent: list[Sent]) -> None:
    """Each reply repeats the question it replies to, and each channel's replies come in the order of its questions."""
    rooms: dict[tuple[int, int | None], list[int]] = {}
    for reply in sent:
        assert reply.reply_to is not None
        assert reply.text.lower().rstrip(".") == asked[reply.chat, reply.reply_to]
        rooms.setdefault((reply.chat, reply.thread), []).append(reply.reply_to)
    assert all(numbers == sorted(numbers) for numbers in rooms.values())


async def test_twenty_conversations_of_ten_messages_at_once(tmp_path: Path) -> None:
    async with TelegramServer(seed=3) as server:
        rooms, asked = list(places(server)), dict[tuple[int, int], str]()
        async with house(server, tmp_path) as app:
            for number in range(10):
                for place, (chat, who, topic) in enumerate(rooms):
                    text = line(place, number)
                    said = server.say(chat, who, text if chat > 0 else f"@palaver_bot {text}", topic=topic)
                    asked[chat, said["message_id"]] = text
            sent = list(await server.until(200, timeout=120))
            await server.confirmed()
            assert app.serving == {"telegram": ""}
        assert sent == server.ledger and len(sent) == 200
        assert len({(reply.chat, reply.reply_to) for reply in sent}) == 200
        check(server, asked, sent)
        assert {(chat, thread) for _, chat, thread in server.typing} <= {(chat, topic) for chat, _, topic in rooms}
        assert server.typing
        for chat in {chat for chat, _, _ in rooms if chat < 0}:
            times = [reply.at for reply in sent if reply.chat == chat]
            assert all(late - early >= 60 for early, late in zip(times, times[20:], strict=False))


async def test_a_conversation_with_reset_edit_and_a_user_who_blocks(tmp_path: Path) -> None:
    async with TelegramServer() as server:
        server.private(7, "Ann")
        server.private(8, "Bob")
        async with house(server, tmp_path) as app:
            server.say(7, 7, "/start")
            await server.until(1)
            server.blocked.add(8)
            server.say(8, 8, "hello?")
            server.say(7, 7, "one")
            await server.until(2)
            server.say(7, 7, "/reset")
            await server.until(3)
            server.say(7, 7, "two")
            await server.until(4)
            await server.confirmed()
            assert await app.courier.drain(30)
            counts = await app.journal.counts()
        assert [(reply.chat, reply.text) for reply in server.ledger[1:]] == [
            (7, "One"),
            (7, "Forgotten. We start fresh."),
            (7, "Two"),
        ]
        assert counts["messages"] == {"answered": 3, "heard": 1} and counts["replies"] == {"sent": 2, "abandoned": 1}


async def test_what_an_edit_puts_to_us_is_answered_once(tmp_path: Path) -> None:
    async with TelegramServer() as server:
        server.private(7, "Ann")
        server.private(8, "Bob")
        server.group(-1001)
        async with house(server, tmp_path) as app:
            for chat, before, after in (
                (-1001, "one", "@palaver_bot one"),
                (7, "\u043f\u0440\u0438\u0432\u0435\u0442", "two"),
                (7, "three", "four"),
            ):
                said = server.say(chat, 7, before)
                for _ in range(2):
                    server.edit(chat, said["message_id"], after)
            server.edit(8, server.say(8, 8, "/start")["message_id"], "/start!")
            sent = await server.until(4)
            await server.confirmed()
            assert (await app.journal.counts())["messages"] == {"answered": 2, "heard": 1}
        assert len(sent) == 4 and {reply.text for reply in sent} >= {"One", UNHEARD, GREETING}


async def test_another_bot_on_an_old_journal_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    """Telegram counts the messages of a private chat for each bot anew, from 1."""
    for token, text in (("111:first", "hello"), ("222:second", "good morning")):
        async with TelegramServer(token) as server:
            server.private(7, "Ann")
            async with house(server, tmp_path):
                server.say(7, 7, text)
                [reply] = await server.until(1)
                await server.confirmed()
            assert reply.text.lower().rstrip(".") == text


async def test_offline_for_longer_than_telegram_keeps_updates(tmp_path: Path) -> None:
    """What it threw away nobody can know of; what it still has is stored and answered, however old."""
    async with TelegramServer() as server:
        server.private(7, "Ann")
        server.say(7, 7, "two days ago", date=int(time.time()) - 48 * 3600)
        server.pending.clear()
        server.say(7, 7, "23 hours ago", date=int(time.time()) - 23 * 3600)
        async with house(server, tmp_path) as app:
            await server.until(1)
            server.say(7, 7, "now")
            await server.until(2)
            await server.confirmed()
            assert (await app.journal.counts())["messages"] == {"answered": 2}
        assert [reply.text for reply in server.ledger] == ["23 hours ago", "Now"]


async def test_every_fault_at_once_and_all_are_answered(tmp_path: Path) -> None:
    async with TelegramServer(seed=1) as server:
        server.chaos = {"page": 0.1, "reset_before": 0.1, "reset_after": 0.1, "flood": 0.05, "delay": 0.2}
        server.duplicates, server.reordered = 0.3, 0.0
        asked = dict[tuple[int, int], str]()
        async with house(server, tmp_path):
            for number in range(3):
                for place in range(10):
                    chat = server.private(100 + place)
                    asked[chat, server.say(chat, chat, line(place, number))["message_id"]] = line(place, number)
            async with asyncio.timeout(120):
                while {(reply.chat, reply.reply_to) for reply in server.ledger} != set(asked):
                    await asyncio.sleep(0.05)
            await server.confirmed()
        check(server, asked, server.ledger)
        in_doubt = sum(1 for method, _ in server.calls if method == "sendMessage") - len(server.ledger)
        assert in_doubt > 0
