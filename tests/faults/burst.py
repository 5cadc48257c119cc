"""Far more than usual: a burst over many channels on a real journal, one loud channel beside calm ones."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import SecretStr

from core.app import open_app
from core.messages import Author, Channel, Message, MessageState, Reply
from core.settings import QueueLimits, Settings
from tests.simulation.house import House, play

PAGE = Path("/proc/self/statm")


class Board:
    """A platform that takes everything at once and keeps it."""

    name = "board"

    def __init__(self) -> None:
        self.seen: list[Reply] = []

    def split(self, text: str) -> list[str]:
        return [text]

    async def turn(self, channel: Channel) -> None: ...

    async def send(self, reply: Reply) -> str:
        await asyncio.sleep(0)
        self.seen.append(reply)
        return str(len(self.seen))

    async def find_sent(self, reply: Reply) -> str | None:
        return ""

    async def typing(self, channel: Channel, note: str = "", to: str = "") -> None: ...

    async def closed(self, channel: Channel, id: str, state: MessageState) -> None: ...


@dataclass
class Burst:
    asked: int
    states: Counter[str]
    seconds: float
    lag: float
    """The longest the event loop was not at hand, in seconds."""
    left: dict[str, tuple[int, int]]
    """Tasks, file descriptors, MiB: before and after."""
    broken: list[str]


async def burst(folder: Path, count: int, channels: int, seed: int) -> Burst:
    """`count` questions over `channels` channels, in batches as a poller brings them, as fast as they are taken."""
    dice, board = random.Random(seed), Board()
    limits = QueueLimits(total=count, deadline=3600)
    settings = Settings(database_url=SecretStr(f"sqlite:///{folder / 'palaver.db'}"), engine="echo", queue=limits)
    said: dict[tuple[str, str], str] = {}
    async with open_app(settings) as app:
        await app.courier.open([board])
        await app.chat.open([board.name])
        serving = asyncio.create_task(app.chat.serve())
        await asyncio.sleep(0.2)
        before, lag = _left(), asyncio.create_task(_lag())
        began, batch = time.monotonic(), []
        for number in range(count):
            channel = Channel(board.name, f"c{dice.randrange(channels)}")
            text = f"channel {channel.id} says number {number}"
            said[channel.id, str(number)] = text
            batch.append(Message(channel, str(number), Author(f"u{channel.id}", "Ann"), text, datetime.now(UTC)))
            if len(batch) == 100 or number == count - 1:
                await app.chat.receive(*batch)
                batch.clear()
        while (counts := await app.journal.counts())["messages"].get("waiting") or (
            counts["replies"].keys() & {"pending", "sending"}
        ):
            await asyncio.sleep(0.1)
        seconds = time.monotonic() - began
        lag.cancel()
        worst = (await asyncio.gather(lag, return_exceptions=True)) and WORST[0]
        await asyncio.sleep(1.2)  # a sweep
        after = _left()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    states = Counter(counts["messages"])
    return Burst(
        count,
        states,
        seconds,
        worst,
        {name: (before[name], after[name]) for name in before},
        _wrong(board, said, states),
    )


async def growth(folder: Path, waves: int, count: int, seed: int) -> list[tuple[int, float]]:
    """`waves` times `count` questions, each wave by other people in other channels: after each, when all is quiet, the
    live objects of the process and its size in MiB."""
    dice, board, sizes = random.Random(seed), Board(), list[tuple[int, float]]()
    limits = QueueLimits(total=10 * count, per_channel=count, deadline=3600)
    settings = Settings(database_url=SecretStr(f"sqlite:///{folder / 'palaver.db'}"), engine="echo", queue=limits)
    async with open_app(settings) as app:
        await app.courier.open([board])
        await app.chat.open([board.name])
        serving = asyncio.create_task(app.chat.serve())
        for wave in range(waves):
            for start in range(0, count, 100):
                batch = []
                for number in range(start, min(count, start + 100)):
                    channel = Channel(board.name, f"c{wave}-{dice.randrange(1 + count // 5)}")
                    author = Author(f"u{wave}-{dice.randrange(1 + count // 5)}", "Ann")
                    text = f"in wave {wave} number {number}"
                    batch.append(Message(channel, f"{wave}-{number}", author, text, datetime.now(UTC)))
                await app.chat.receive(*batch)
            while len(board.seen) < count:
                await asyncio.sleep(0.05)
            assert await app.courier.drain(60)
            board.seen.clear()
            await asyncio.sleep(1.2)  # a sweep
            gc.collect()
            sizes.append((len(gc.get_objects()), int(PAGE.read_text().split()[1]) * resource.getpagesize() / 2**20))
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    return sizes


def _wrong(board: Board, said: dict[tuple[str, str], str], states: Counter[str]) -> list[str]:
    broken = [] if states.total() == len(said) else [f"{len(said)} were asked and {states.total()} are stored"]
    broken += [f"left {state}" for state in states if state not in ("answered", "shed", "expired")]
    answers = [reply for reply in board.seen if "busy" not in reply.text and "answering many" not in reply.text]
    if len(answers) != states["answered"]:
        broken.append(f"{states['answered']} are answered and {len(answers)} answers are visible")
    if len({(reply.channel, reply.to) for reply in board.seen}) != len(board.seen):
        broken.append("a message has two replies")
    last: dict[Channel, int] = {}
    for reply in answers:
        if reply.text.lower().rstrip(".") != said[reply.channel.id, reply.to]:
            broken.append(f"{reply.text!r} is no answer to {said[reply.channel.id, reply.to]!r}")
        if int(reply.to) < last.get(reply.channel, -1):
            broken.append(f"out of order in {reply.channel}")
        last[reply.channel] = int(reply.to)
    return broken


WORST = [0.0]


async def _lag() -> None:
    WORST[0] = 0.0
    while True:
        began = time.monotonic()
        await asyncio.sleep(0.02)
        WORST[0] = max(WORST[0], time.monotonic() - began - 0.02)


def _left() -> dict[str, int]:
    pages = int(PAGE.read_text().split()[1])
    return {
        "tasks": len(asyncio.all_tasks()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "MiB": pages * resource.getpagesize() // 2**20,
    }


@dataclass
class Fairness:
    jain: float
    """(Σx)²/(n·Σx²) of each channel's share of what it could fairly have had: 1 is even-handed."""
    calm: float
    """The share of the calm channels' questions that were answered."""
    loud: float
    waited: float
    """Seconds a calm channel's answer took, on average."""


def fairness(seed: int, calm: int = 20, seconds: float = 40.0) -> Fairness:
    """On virtual time: an engine that gives 10 answers a second, `calm` channels that ask 0.4 times a second each,
    and one that asks a hundred times as often."""
    dice = random.Random(seed)
    asked, answered, took = Counter[str](), Counter[str](), list[float]()
    limits = QueueLimits(running=1, deadline=60)

    async def scene(house: House) -> None:
        house.engine.seconds = 0.1
        asked_at: dict[str, float] = {}

        async def talk(channel: str, rate: float) -> None:
            end = house.loop.time() + seconds
            while house.loop.time() < end:
                await asyncio.sleep(dice.expovariate(rate))
                asked[channel] += 1
                text = f"{channel} {asked[channel]}"
                asked_at[f"re {text}"] = house.loop.time()
                await house.say(text, channel=channel)

        await asyncio.gather(talk("loud", 40.0), *(talk(f"calm{number}", 0.4) for number in range(calm)))
        await asyncio.sleep(120)
        for at, text in house.platform.visible:
            if text in asked_at:
                channel = text.split()[1]
                answered[channel] += 1
                if channel != "loud":
                    took.append(at - asked_at[text])

    play(scene, limits=limits)
    capacity = 10.0 * seconds
    fair = {f"calm{number}": float(asked[f"calm{number}"]) for number in range(calm)}
    fair["loud"] = max(1.0, capacity - sum(fair.values()))
    shares = [min(1.0, answered[channel] / fair[channel]) for channel in fair]
    calm_asked = sum(asked[channel] for channel in fair if channel != "loud")
    return Fairness(
        sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares)),
        sum(answered[channel] for channel in fair if channel != "loud") / calm_asked,
        answered["loud"] / asked["loud"],
        sum(took) / len(took),
    )
