"""Two platforms full of people who talk with one `palaver run`: what was said, what became visible, when it died.

async with Town(folder, seed=1) as town:
    await town.start()
    town.say(town.places[0])
    await town.settled()
    await town.stop()
    assert judge(town) == []                 # tests/faults/judge.py
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import string
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.fakes.discord_server import DiscordServer
from tests.fakes.telegram_server import Fault, TelegramServer

ROOT = Path(__file__).parents[2]
PATIENCE = 240.0
"""Seconds until what is owed must have come; the machine may be busy."""
IN_A_PLACE = 4
"""Questions open in one place at most: nothing is shed, so that each must be answered."""
TELEGRAM_CHAOS: dict[Any, float] = {
    "page": 0.05,
    "reset_before": 0.05,
    "reset_after": 0.05,
    "flood": 0.03,
    "delay": 0.2,
}
DISCORD_CHAOS: dict[Any, float] = {
    "delay": 0.1,
    "flood": 0.03,
    "error": 0.05,
    "reset_before": 0.05,
    "reset_after": 0.05,
}


class Telegram(TelegramServer):
    """Also writes down when it broke a connection after the message had arrived."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.broken: list[tuple[float, int]] = []

    def _due(self, method: str, chat: int | None) -> list[Fault]:
        due = super()._due(method, chat)
        if chat is not None and any(fault.kind == "reset_after" for fault in due):
            self.broken.append((time.monotonic(), chat))
        return due


@dataclass(frozen=True)
class Place:
    """Somewhere people talk; `canary` is a word that is said nowhere else."""

    platform: str
    id: str
    """As the journal spells it."""
    canary: str


@dataclass(frozen=True)
class Seen:
    """A message of the bot that people see."""

    at: float
    to: str
    text: str


@dataclass
class Asked:
    id: str
    text: str


@dataclass
class Town:
    folder: Path
    seed: int
    settings: dict[str, str] = field(default_factory=dict)
    """More of the process's environment."""
    private: int = 24
    rooms: int = 10

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.telegram, self.discord = Telegram(self.seed), DiscordServer(seed=self.seed)
        self.places: list[Place] = []
        self.asked: dict[Place, list[Asked]] = {}
        self._seen: dict[tuple[str, str], list[Seen]] = {}
        self._open: dict[tuple[str, str], dict[str, None]] = {}
        self._read = {"telegram": 0, "discord": 0}
        self.killed: list[float] = []
        self.process: asyncio.subprocess.Process | None = None
        self.log = self.folder / "log"

    async def __aenter__(self) -> Self:
        await self.telegram.__aenter__()
        await self.discord.__aenter__()
        for number in range(self.private):
            self._found("telegram", str(self.telegram.private(100 + number)))
        self._found("telegram", str(self.telegram.group(-1001000000001)))
        self.telegram.group(-1001000000002, topics=(5, 6))
        for topic in (5, 6):
            self._found("telegram", f"-1001000000002:{topic}")
        for number in range(self.rooms):
            self._found("discord", self.discord.channel(f"room {number}"))
        self._found("discord", self.discord.channel("thread", thread_of=self.discord.channel("room 0")))
        for name in ("ann", "bob"):
            self._found("discord", self.discord.direct(name))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        await self.telegram.__aexit__()
        await self.discord.__aexit__()

    def _found(self, platform: str, id: str) -> None:
        letters, number = "", len(self.places)
        for _ in range(3):
            number, letter = divmod(number, 20)
            letters += string.ascii_lowercase[letter]
        place = Place(platform, id, f"canary{letters}")
        self.places.append(place)
        self.asked[place] = []
        self._seen[platform, id], self._open[platform, id] = [], {}

    # -- people --------------------------------------------------------------------------------------------------

    def say(self, place: Place) -> None:
        """Someone asks the bot; the text holds the place's canary and a number."""
        text = f"{place.canary} says number {len(self.asked[place])}"
        if place.platform == "discord":
            direct = self.discord.channels[place.id]["type"] == 1
            who = self.discord.channels[place.id]["recipients"][0]["username"] if direct else "ann"
            id = self.discord.say(place.id, who, text, mention=not direct)
        else:
            chat, _, topic = place.id.partition(":")
            said = f"@palaver_bot {text}" if int(chat) < 0 else text
            user = max(int(chat), 99)
            message = self.telegram.say(int(chat), user, said, topic=int(topic) if topic else None)
            id = str(message["message_id"])
        self.asked[place].append(Asked(id, text))
        self._open[place.platform, place.id][id] = None

    def _look(self) -> None:
        """Read on in both ledgers."""
        for sent in self.telegram.ledger[self._read["telegram"] :]:
            where = str(sent.chat) if sent.thread is None else f"{sent.chat}:{sent.thread}"
            self._note(("telegram", where), Seen(sent.at, str(sent.reply_to or ""), sent.text))
        for said in self.discord.ledger[self._read["discord"] :]:
            self._note(("discord", said.channel), Seen(said.at, said.reply_to or "", said.text))
        self._read = {"telegram": len(self.telegram.ledger), "discord": len(self.discord.ledger)}

    def _note(self, where: tuple[str, str], seen: Seen) -> None:
        if where in self._seen:
            self._seen[where].append(seen)
            self._open[where].pop(seen.to, None)

    def seen(self, place: Place) -> list[Seen]:
        """What people see of the bot in a place, in order."""
        self._look()
        return self._seen[place.platform, place.id]

    def owed(self) -> list[tuple[Place, str]]:
        """Questions nobody sees a reply to."""
        self._look()
        return [(place, id) for place in self.places for id in self._open[place.platform, place.id]]

    def sends(self, platform: str) -> int:
        return len(self.telegram.ledger) if platform == "telegram" else len(self.discord.ledger)

    async def talk(self, pause: float) -> None:
        """People talk until cancelled, `pause` seconds apart on average."""
        while True:
            await asyncio.sleep(self.dice.expovariate(1 / pause))
            open_here = dict.fromkeys(self.places, 0)
            for place, _ in self.owed():
                open_here[place] += 1
            free = [place for place, count in open_here.items() if count < IN_A_PLACE]
            if free:
                self.say(self.dice.choice(free))

    # -- trouble -------------------------------------------------------------------------------------------------

    def chaos(self, on: bool) -> None:
        self.telegram.chaos = TELEGRAM_CHAOS if on else {}
        self.discord.chaos = DISCORD_CHAOS if on else {}
        self.telegram.duplicates = self.discord.duplicates = 0.1 if on else 0.0

    async def cut(self, pause: float) -> None:
        """Now and then the gateway breaks off, asks for a new connection, or forgets the session; until cancelled."""
        while True:
            await asyncio.sleep(self.dice.expovariate(1 / pause))
            match self.dice.choice(("drop", "break", "reconnect", "invalid", "lost")):
                case "drop":
                    await self.discord.drop()
                case "break":
                    await self.discord.drop(1006)
                case "reconnect":
                    await self.discord.ask_to_reconnect()
                case "invalid":
                    await self.discord.invalidate()
                case "lost":
                    await self.discord.invalidate(resumable=True)

    async def cut_all(self) -> None:
        """Every connection breaks off, on both platforms: what was just sent may have arrived."""
        self.telegram.broken += [(time.monotonic(), chat) for chat in self.telegram.chats]
        await self.discord.drop(1006)
        for server in (self.telegram, self.discord):
            assert server._runner is not None and server._runner.server is not None
            for connection in server._runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()

    # -- the process ---------------------------------------------------------------------------------------------

    async def start(self, only: str = "", **settings: str) -> None:
        """`only`: the one platform that it serves this time."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        environment = kept | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "ENGINE": "echo",
            "WEB_ENABLED": "false",
            "QUEUE__DEADLINE": "900",
            "DISCORD_TOKEN": self.discord.token,
            "DISCORD_API_BASE": self.discord.base,
            "DISCORD_GATEWAY_URL": self.discord.gateway,
            "TELEGRAM_TOKEN": self.telegram.token,
            "TELEGRAM_API_BASE": self.telegram.base,
        }
        if only:
            del environment["DISCORD_TOKEN" if only == "telegram" else "TELEGRAM_TOKEN"]
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "bots", "run"),
                cwd=self.folder,
                env=environment | self.settings | settings,
                stdout=log,
                stderr=log,
            )

    async def kill(self) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        code = await self.process.wait()
        assert code == -signal.SIGKILL, f"it had ended before, with {code}: {self.last_words()}"
        self.killed.append(time.monotonic())

    async def died(self) -> None:
        """Wait until it kills itself."""
        assert self.process is not None
        async with asyncio.timeout(PATIENCE):
            code = await self.process.wait()
        assert code == -signal.SIGKILL, f"it ended with {code}: {self.last_words()}"
        self.killed.append(time.monotonic())

    async def stop(self) -> float:
        """SIGTERM; the seconds it took."""
        assert self.process is not None
        began = time.monotonic()
        self.process.terminate()
        async with asyncio.timeout(60):
            code = await self.process.wait()
        assert code == 0, f"it ended with {code}: {self.last_words()}"
        return time.monotonic() - began

    async def settled(self, patience: float = PATIENCE) -> None:
        """Wait until everyone has a reply, and Telegram's updates are confirmed."""
        try:
            async with asyncio.timeout(patience):
                while (owed := self.owed()) or self.telegram.pending:
                    await asyncio.sleep(0.1)
        except TimeoutError:
            names = [(place.platform, place.id, id) for place, id in owed[:5]]
            raise AssertionError(f"{len(owed)} without a reply, first {names}; {self.last_words()}") from None

    async def news(self, platform: str, sends: int, patience: float = PATIENCE) -> None:
        """Wait until there are so many messages of the bot there."""
        try:
            async with asyncio.timeout(patience):
                while self.sends(platform) < sends:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"nothing comes any more on {platform}; {self.last_words()}") from None

    async def logged(self, words: str, times: int) -> None:
        """Wait until the log has so many lines with them."""
        async with asyncio.timeout(PATIENCE):
            while self.log.read_text(errors="replace").count(words) < times:
                await asyncio.sleep(0.05)

    def last_words(self) -> str:
        return "its last words:\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
