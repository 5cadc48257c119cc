"""As long as you like: load, faults on both wires, deaths, and every other trouble in turn; afterwards the ledgers.

The first half of the time lives are short. The second half is one life, so that its memory can be watched.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.fakes.discord_server import Fault as DiscordFault
from tests.fakes.telegram_server import Fault as TelegramFault
from tests.faults.descriptors import limit
from tests.faults.kills import Tally, close, open_town
from tests.faults.town import PATIENCE, Town

DEADLY = ("kill", "kill while starting", "stop")
OTHER = ("cut", "descriptors", "down", "frozen", "calm")
EVERY = 8.0
"""Seconds of ordinary trouble between two of these."""


@dataclass
class Soak:
    tally: Tally = field(default_factory=Tally)
    troubles: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, float, int]] = field(default_factory=list)
    """Of the last life: seconds since its start, MiB of it and its children, file descriptors."""

    def growth(self) -> float:
        """MiB an hour, a straight line through what came after the first third; 0 for a life too short to tell."""
        late = self.memory[len(self.memory) // 3 :]
        if len(late) < 10:
            return 0.0
        at, size = sum(m[0] for m in late) / len(late), sum(m[1] for m in late) / len(late)
        return 3600 * sum((m[0] - at) * (m[1] - size) for m in late) / sum((m[0] - at) ** 2 for m in late)


async def soak(
    folder: Path,
    seed: int,
    minutes: float,
    engine: str = "echo",
    tell: Callable[[str], None] = lambda line: None,
    private: int = 24,
    rooms: int = 10,
) -> Soak:
    outcome = Soak()
    async with Town(folder, seed, {"ENGINE": engine}, private, rooms) as town:
        await open_town(town)
        town.chaos(True)
        people = [asyncio.create_task(town.talk(0.1)), asyncio.create_task(town.cut(10.0))]
        began, half = time.monotonic(), 30 * minutes
        await _troubles(town, outcome, DEADLY + OTHER, began, half, tell)
        await _running(town)
        await town.stop()
        town.killed.append(time.monotonic())
        await town.start()
        watching = asyncio.create_task(_watch(town, outcome))
        await _troubles(town, outcome, OTHER, began, 2 * half, tell)
        watching.cancel()
        for person in people:
            person.cancel()
        await asyncio.gather(watching, *people, return_exceptions=True)
        town.chaos(False)
        await close(town, outcome.tally, echo=engine == "echo")
    return outcome


async def _troubles(
    town: Town, outcome: Soak, kinds: tuple[str, ...], began: float, end: float, tell: Callable[[str], None]
) -> None:
    """One after another until `end` seconds after `began`, and one at least, however slow the machine is."""
    now = time.monotonic() - began
    while True:
        await asyncio.sleep(min(end - now, town.dice.uniform(0.5, 1.0) * EVERY))
        await _trouble(town, town.dice.choice(kinds), outcome)
        now = time.monotonic() - began
        tell(_line(town, outcome, now))
        if now >= end:
            return


async def _running(town: Town) -> None:
    """While it starts, a signal ends it at once, and so does a lack of descriptors."""
    await town.discord.until(connected=True, timeout=PATIENCE)


async def _trouble(town: Town, what: str, outcome: Soak) -> None:
    outcome.troubles[what] += 1
    assert town.process is not None
    match what:
        case "kill":
            await town.kill()
            await town.start()
        case "kill while starting":
            await town.kill()
            await town.start()
            await asyncio.sleep(town.dice.uniform(0.0, 3.0))
            await town.kill()
            await town.start()
        case "stop":
            await _running(town)
            outcome.tally.stops.append(await town.stop())
            town.killed.append(time.monotonic())  # what was on its way when its time was over is in doubt
            await asyncio.sleep(town.dice.uniform(0.0, 5.0))
            await town.start()
        case "cut":
            await town.cut_all()
        case "descriptors":
            await _running(town)
            limit(town, 1)
            await town.cut_all()
            await asyncio.sleep(3.0)
            limit(town, 1024)
        case "down":
            town.telegram.faults += [TelegramFault("page", m, times=-1) for m in ("sendMessage", "getUpdates")]
            town.discord.faults.append(DiscordFault("error", times=-1, value=[503, 0, "down"]))
            await asyncio.sleep(5.0)
            town.telegram.faults.clear()
            town.discord.faults.clear()
        case "frozen":
            town.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(3.0)
            town.process.send_signal(signal.SIGCONT)


async def _watch(town: Town, outcome: Soak) -> None:
    """Until cancelled: the process's size, once in two seconds."""
    assert town.process is not None
    began, page = time.monotonic(), resource.getpagesize()
    while True:
        await asyncio.sleep(2.0)
        root = Path("/proc") / str(town.process.pid)
        children = (root / "task" / root.name / "children").read_text().split()
        sizes = [int((Path("/proc") / id / "statm").read_text().split()[1]) * page for id in (root.name, *children)]
        outcome.memory.append((time.monotonic() - began, sum(sizes) / 2**20, len(os.listdir(root / "fd"))))


def _line(town: Town, outcome: Soak, seconds: float) -> str:
    asked = sum(map(len, town.asked.values()))
    size = f", {outcome.memory[-1][1]:.1f} MiB, {outcome.memory[-1][2]} descriptors" if outcome.memory else ""
    return f"{seconds:.0f} s: {asked:,} asked, {len(town.owed())} open, {len(town.killed)} deaths{size}"
