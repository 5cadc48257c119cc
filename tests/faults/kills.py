"""Dying: at random moments under load, and at every named point; and who takes over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.judge import Ledger, doubled, judge
from tests.faults.town import PATIENCE, Town

POINTS = ("before T1", "after T1", "before T2", "after T2", "after T3", "before T4")


@dataclass
class Tally:
    """What one or more runs came to."""

    kills: int = 0
    asked: int = 0
    states: Counter[str] = field(default_factory=Counter)
    doubled: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)
    """Seconds from a start to the first visible reply on a platform, where something was owed there."""
    stops: list[float] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def __iadd__(self, other: Tally) -> Tally:
        self.kills += other.kills
        self.asked += other.asked
        self.states += other.states
        self.doubled += other.doubled
        self.recoveries += other.recoveries
        self.stops += other.stops
        self.broken += other.broken
        return self


async def kill_at_random(folder: Path, seed: int, kills: int, engine: str = "echo", chaos: bool = True) -> Tally:
    """So many SIGKILLs under load, most of them while replies go out, some while it starts."""
    tally = Tally()
    async with Town(folder, seed, {"ENGINE": engine}) as town:
        await open_town(town)
        town.chaos(chaos)
        people = [asyncio.create_task(town.talk(0.05)), asyncio.create_task(town.cut(4.0))]
        began = time.monotonic()
        for _ in range(kills):
            platform = town.dice.choice(("telegram", "discord"))
            before, owing = town.sends(platform), any(place.platform == platform for place, _ in town.owed())
            if town.dice.random() < 0.15:
                await asyncio.sleep(town.dice.uniform(0.0, 4.0))
            else:
                await town.news(platform, before + 1)
                if owing:
                    tally.recoveries.append(time.monotonic() - began)
                await town.news(platform, before + town.dice.randint(1, 12))
                await asyncio.sleep(town.dice.uniform(0.0, 0.2))
            await town.kill()
            began = time.monotonic()
            await town.start()
        for person in people:
            person.cancel()
        await asyncio.gather(*people, return_exceptions=True)
        town.chaos(False)
        await close(town, tally, echo=engine == "echo")
    return tally


async def kill_at_points(
    folder: Path, seed: int, times: int, telegram: tuple[str, ...], discord: tuple[str, ...]
) -> Tally:
    """These named points, so many times on each platform: one life ends there, the next goes on from there."""
    tally = Tally()
    async with Town(folder, seed, private=6, rooms=3) as town:
        await open_town(town)
        for platform, points in (("telegram", telegram), ("discord", discord)):
            await town.stop()
            mine = [place for place in town.places if place.platform == platform]
            for point in points * times:
                for place in town.dice.sample(mine, 2):
                    town.say(place)
                await town.start(platform, PALAVER_CRASH_AT=point)
                await town.died()
            await town.start(platform)
            await town.settled()
        await close(town, tally)
    return tally


async def stop_when_full(folder: Path, seed: int, waiting: int) -> Tally:
    """SIGTERM while so many questions are open; the next start answers the rest."""
    tally = Tally()
    async with Town(folder, seed, private=20, rooms=5) as town:
        await open_town(town)
        for number in range(waiting):
            town.say(town.places[number % len(town.places)])
        await town.news("telegram", town.sends("telegram") + 1)
        tally.stops.append(await town.stop())
        await town.start()
        town.say(town.places[0])  # all others may have been answered before the stop; this one needs the next start
        await close(town, tally)
    return tally


async def two_on_one_journal(folder: Path, seed: int) -> Tally:
    """The second process waits; it goes on when the first is stopped, and a third when it stands still itself."""
    tally = Tally()
    async with Town(folder, seed, private=12, rooms=6) as town:
        await open_town(town)
        people = asyncio.create_task(town.talk(0.1))
        first = town.process
        await town.start()
        second = town.process
        await town.logged("waiting to take over", 2)
        town.process = first
        tally.stops.append(await town.stop())
        town.process = second
        await town.news("telegram", town.sends("telegram") + 5)
        await town.news("discord", town.sends("discord") + 5)
        await town.start()
        await town.logged("waiting to take over", 4)
        people.cancel()
        await town.settled()
        assert second
        await stand_still(second, folder / "palaver.db")
        for place in town.places:
            town.say(place)
        await town.settled()
        second.send_signal(signal.SIGCONT)
        async with asyncio.timeout(30):
            assert await second.wait() == os.EX_TEMPFAIL, town.last_words()
        await close(town, tally)
    tally.broken = [line for line in tally.broken if "since this one stood still" not in line]
    return tally


async def stand_still(process: asyncio.subprocess.Process, journal: Path) -> None:
    """Not with the journal's lock in its hand: nobody could write until it goes on."""
    with contextlib.closing(sqlite3.connect(journal, timeout=PATIENCE, isolation_level=None)) as ours:
        ours.execute("BEGIN IMMEDIATE")
        process.send_signal(signal.SIGSTOP)
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] != "T":
            await asyncio.sleep(0.01)
        ours.execute("ROLLBACK")


async def open_town(town: Town) -> None:
    """Everyone has talked with the bot before; a Discord channel nobody was answered in is not looked through."""
    await town.start()
    await town.discord.until(connected=True, timeout=PATIENCE)
    for place in town.places:
        town.say(place)
    await town.settled()


async def close(town: Town, tally: Tally, echo: bool = True) -> None:
    await town.settled()
    tally.stops.append(await town.stop())
    tally.kills += len(town.killed)
    tally.asked += sum(map(len, town.asked.values()))
    tally.states += Ledger(town.folder / "palaver.db").states
    tally.doubled += doubled(town)
    tally.broken += judge(town, echo)
    tally.broken += [f"process {pid} is left" for pid in left_behind(town.folder)]


def left_behind(folder: Path) -> list[int]:
    """Processes that still work in the folder after a moment: an engine whose bots were killed must end too."""
    end = time.monotonic() + 0.5
    while (found := working_in(folder)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def working_in(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and (process / "cwd").resolve() == folder.resolve():
                found.append(int(process.name))
    return found
