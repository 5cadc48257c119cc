"""Hostile inputs over real sockets: Telegram's long poll, Discord's gateway, the page's WebSocket.

Everything stands in this process, so that each log record and each exception nobody caught is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
import unicodedata
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import SecretStr

from bots.discord import DiscordSettings, open_discord
from bots.telegram import TelegramSettings, open_telegram
from bots.telegram_api import Pace
from bots.web import WebBot, WebSettings, open_web
from core.app import App, open_app
from core.settings import Settings
from tests.fakes.discord_server import DiscordServer
from tests.fakes.telegram_server import TelegramServer
from tests.faults.nasty import mutated, texts

WAVE = 120
"""Inputs between two looks at whether all was dealt with."""
BIDI = {"\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


class Ears(logging.Handler):
    """Records that tell of an exception nobody expected."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            told = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
            self.heard.append(f"{record.name}: {record.getMessage()[:300]} {told[-1500:]}")


class AtOnce(Pace):
    """Telegram's limits, lifted: the inputs are tested here, and not our patience."""

    async def turn(self, chat: int) -> None:
        await asyncio.sleep(0)


class Wires:
    def __init__(self, app: App, telegram: TelegramServer, discord: DiscordServer, page: WebBot, seed: int) -> None:
        self.app, self.telegram, self.discord, self.page = app, telegram, discord, page
        self.dice = random.Random(seed)
        self.given = Counter[str]()
        self.chats = [telegram.private(100 + number) for number in range(20)] + [telegram.group(-1001000000001)]
        self.rooms = [discord.channel(f"room {number}") for number in range(20)] + [discord.direct("ann")]

    def post(self, text: str) -> None:
        """A text or a broken event to Telegram."""
        chat, name = self.dice.choice(self.chats), text[:64] or "x"
        user = {"id": max(chat, 99), "is_bot": False, "first_name": name, "last_name": name, "username": name}
        said = f"@palaver_bot {text}" if chat < 0 else text
        if self.dice.random() < 0.7:
            fields: dict[str, Any] = {"from": user}
            self.telegram.say(chat, max(chat, 99), said, **fields)
        else:
            message = self.telegram._message(chat, user, said)
            kind = self.dice.choice(("message", "edited_message", "my_chat_member", "callback_query"))
            self.telegram.update(**{kind: mutated(message, self.dice)})
        self.given["telegram"] += 1

    def publish(self, text: str) -> None:
        """A text or a broken event to Discord."""
        room = self.dice.choice(self.rooms)
        user = {**self.discord.user("ann"), "username": text[:32], "global_name": text[:32]}
        if self.dice.random() < 0.7:
            self.discord.say(room, "ann", text, mention=True, author=user)
        else:
            message = {**self.discord._message(room, user, text), **self.discord._where(room)}
            message["mentions"] = [self.discord.me]
            kind = self.dice.choice(("MESSAGE_CREATE", "MESSAGE_UPDATE", "MESSAGE_DELETE", "MESSAGE_DELETE_BULK"))
            for session in self.discord._sessions.values():  # past what the server would read of it
                self.discord._queue(session, kind, mutated(message, self.dice))
        self.given["discord"] += 1

    async def type(self, some: list[str]) -> None:
        """Texts, broken frames and noise on the page's socket, by a new visitor."""
        async with aiohttp.ClientSession() as session:
            with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                async with session.ws_connect(self.page.address + "/ws") as socket:
                    for number, text in enumerate(some):
                        frame: Any = {"id": f"question-{number}", "text": text}
                        match self.dice.randrange(6):
                            case 0:
                                await socket.send_str(json.dumps(mutated(frame, self.dice)))
                            case 1:
                                await socket.send_str(text.encode("utf-8", "replace").decode()[:20_000])
                            case 2:
                                await socket.send_bytes(text.encode("utf-8", "surrogatepass")[:20_000])
                            case 3:
                                await socket.send_str('{"id":' + "[" * 5000)
                            case _:
                                await socket.send_str(json.dumps(frame))
                        self.given["web"] += 1
                    await socket.send_json({"hello": True})
                    async with asyncio.timeout(30):
                        while not socket.closed and (await socket.receive()).type is not aiohttp.WSMsgType.CLOSED:
                            break

    async def settled(self, patience: float = 180.0) -> None:
        """Wait until nothing waits and nothing is on its way."""
        async with asyncio.timeout(patience):
            while True:
                await asyncio.sleep(0.05)
                counts = await self.app.journal.counts()
                waiting = counts["messages"].get("waiting", 0)
                if not self.telegram.pending and not waiting and not counts["replies"].keys() & {"pending", "sending"}:
                    return

    async def answers(self) -> None:
        """After all that, each still answers a plain question."""
        self.telegram.say(self.chats[0], 100, "still there, telegram")
        self.discord.say(self.rooms[0], "ann", "still there, discord", mention=True)
        async with asyncio.timeout(60):
            while not any("Still there, telegram" in sent.text for sent in self.telegram.ledger):
                await asyncio.sleep(0.05)
            while not any("Still there, discord" in sent.text for sent in self.discord.ledger):
                await asyncio.sleep(0.05)
            async with aiohttp.ClientSession() as session:
                async with session.ws_connect(self.page.address + "/ws") as socket:
                    await socket.send_json({"id": "question-1", "text": "still there, page"})
                    while "Still there, page" not in str((await socket.receive_json()).get("reply")):
                        pass

    def said_badly(self) -> list[str]:
        """What should never have gone out."""
        plain = {"parse": [], "replied_user": False}
        bad = [f"it may mention: {s.body}" for s in self.discord.ledger if s.body.get("allowed_mentions") != plain]
        for text in [s.text for s in self.discord.ledger] + [s.text for s in self.telegram.ledger]:
            wrong = {c for c in text if c in BIDI or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")}
            if wrong or self.telegram.token in text or self.discord.token in text:
                bad.append(f"{wrong} in {text[:80]!r}")
        return bad


@contextlib.asynccontextmanager
async def wires(folder: Path, seed: int) -> AsyncIterator[Wires]:
    """Three bots, the echo engine and a journal in `folder`."""
    settings = Settings(database_url=SecretStr(f"sqlite:///{folder / 'palaver.db'}"), engine="echo")
    async with TelegramServer(seed=seed) as telegram, DiscordServer(seed=seed) as discord, open_app(settings) as app:
        talker = open_telegram(
            TelegramSettings(telegram_token=SecretStr(telegram.token), telegram_api_base=telegram.base)
        )
        talker._pace = AtOnce()
        chatter = open_discord(
            DiscordSettings(
                discord_token=SecretStr(discord.token),
                discord_api_base=discord.base,
                discord_gateway_url=discord.gateway,
            )
        )
        chatter.guild_ready_timeout = 0.1
        page = open_web(WebSettings(web_port=0))
        running = asyncio.create_task(app.run([talker, chatter, page]))
        try:
            await discord.until(connected=True)
            async with asyncio.timeout(30):
                while not page.address:
                    await asyncio.sleep(0.01)
            yield Wires(app, telegram, discord, page, seed)
        finally:
            app.stop()
            await running


async def storm(folder: Path, seed: int, count: int, progress: bool = False) -> tuple[Counter[str], list[str]]:
    """`count` inputs over the three wires: how many each got, and what went wrong."""
    ears, said = Ears(), time.monotonic()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: ears.heard.append(f"loop: {context}"))
    logging.getLogger().addHandler(ears)
    try:
        async with wires(folder, seed) as all_three:
            source: Iterator[str] = texts(seed)
            while all_three.given.total() < count:
                wave = [next(source) for _ in range(WAVE)]
                for number, text in enumerate(wave):
                    if number % 3 == 0:
                        all_three.post(text)
                    elif number % 3 == 1:
                        all_three.publish(text)
                visitors = [wave[2::3][start : start + 15] for start in range(0, WAVE // 3, 15)]
                await asyncio.gather(*(all_three.type(some) for some in visitors))
                await all_three.settled()
                if progress and time.monotonic() - said > 5:
                    said = time.monotonic()
                    print(f"{all_three.given.total():,}/{count:,} inputs, {len(ears.heard)} unhandled", flush=True)
            await all_three.answers()
            return all_three.given, ears.heard + all_three.said_badly()
    finally:
        logging.getLogger().removeHandler(ears)
        asyncio.get_running_loop().set_exception_handler(None)
