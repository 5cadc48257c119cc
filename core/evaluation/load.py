"""What this machine can serve: delays of real replies at growing load. `palaver bench` prints it.

People are played by the list of openers; everything else is as in a running bot: settings, window, engine, draws.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from core.engine.base import EngineClosed, EngineError
from core.engine.machine import cores
from core.evaluation.selfchat import read_openers
from core.messages import Turn
from core.voice import Voice

GOAL = 2.0
"""Seconds that 95 of 100 replies may take."""
PER_MINUTE = 2.0
"""Messages a minute that an active channel writes to the bot."""
FEWEST = 5
"""Messages from which on a level says anything."""
FLIGHTS = (1, 4, 16)
"""So many people write again as soon as they are answered; the last are the conversations that load begins with."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Delays:
    """Of the replies that came in `seconds`."""

    replies: int
    per_second: float
    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class Load:
    """All times in seconds."""

    first_reply: float
    """To an empty conversation, right after the start."""
    single: Delays
    words: float
    """Mean length of a reply."""
    in_flight: dict[int, Delays]
    levels: list[tuple[float, Delays]]
    """(messages per second that arrived by chance, how they fared)"""
    most_per_second: float
    """The highest such load at which 95 % of the replies took at most GOAL, but not more than was ever served in a
    second: what piles up is late only after a while. 0: not even the lowest tried."""

    @property
    def channels(self) -> int:
        return int(self.most_per_second * 60 / PER_MINUTE)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all are at or below (nearest rank). Of nothing: nan."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else float("nan")


@dataclass(slots=True)
class Talk:
    """One conversation, and the lengths of its replies."""

    voice: Voice
    number: int
    age: int = 0
    """Exchanges that lie behind it already."""
    turns: list[Turn] = field(default_factory=list)
    words: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = random.Random(self.number)
        for _ in range(2 * self.age):
            self._add(rng.choice(read_openers()))

    async def say(self, rng: random.Random) -> float:
        """Seconds until the reply was there. Raises an EngineError."""
        self._add(rng.choice(read_openers()))
        began = time.perf_counter()
        spoken = await self.voice.speak(self.turns, session=f"bench-{self.number}", seed=rng.getrandbits(60))
        seconds = time.perf_counter() - began
        text = spoken[0] if spoken else ""
        self._add(text)
        self.words.append(len(text.split()))
        return seconds

    def _add(self, text: str) -> None:
        index = self.turns[-1].index + 1 if self.turns else 0
        kept = self.turns[-self.voice.window.reach :]
        self.turns = [*kept, Turn("assistant" if index % 2 else "user", "", text, index)]


async def measure(voice: Voice, seconds: float, running: int, tell: Tell, seed: int = 1) -> Load:
    """Takes about `seconds`. `running`: requests under way at once, as in a running bot. `tell` hears of progress.

    Raises an EngineError when not one reply comes.
    """
    rng = random.Random(seed)
    tell("the first reply")
    first = await Talk(voice, 0).say(rng)
    talks = [Talk(voice, 1 + number, age=number % 10) for number in range(FLIGHTS[-1])]
    in_flight = {}
    for count in FLIGHTS:
        tell(f"{count} in flight")
        in_flight[count] = await closed_loop(talks[:count], seconds / 8, rng)
    rate, step, most, levels = 0.8 * in_flight[FLIGHTS[-1]].per_second, 1.3, 0.0, []
    for _ in range(5):
        tell(f"messages by chance, {_rate(rate)} a second")
        level = await open_loop(talks, rate, seconds / 8, running, rng)
        if level is None:
            break  # at a lower rate still fewer would come
        levels.append((rate, level))
        if level.p95 <= GOAL:
            most = max(most, rate)
            rate *= step
        else:
            rate, step = (rate / step, 1 + (step - 1) / 2) if most else (rate / 2, step)
    if why := await voice.engine.ready():
        raise EngineClosed(f"{why}: these figures would not be its own, measure again when it is there")
    words = [count for talk in talks for count in talk.words]
    most = min(most, max(delays.per_second for delays in (*in_flight.values(), *(level for _, level in levels))))
    return Load(first, in_flight[1], statistics.fmean(words), in_flight, levels, most)


async def closed_loop(talks: Sequence[Talk], seconds: float, rng: random.Random) -> Delays:
    """Each talk goes on as soon as it is answered; each is answered once at least."""
    delays: list[float] = []
    began = time.perf_counter()

    async def go_on(talk: Talk) -> None:
        while True:
            delays.append(await talk.say(rng))
            if time.perf_counter() >= began + seconds:
                return

    await asyncio.gather(*map(go_on, talks))
    return _delays(delays, time.perf_counter() - began)


async def open_loop(talks: list[Talk], rate: float, seconds: float, running: int, rng: random.Random) -> Delays | None:
    """`rate` messages a second arrive by chance, in any talk that waits for nothing, or in a new one when all wait,
    which is then one of `talks`; at most `running` are under way. None: fewer than FEWEST came in twice the time."""
    idle, gate = list(talks), asyncio.Semaphore(running)

    async def say() -> None:
        if not idle:
            talks.append(Talk(talks[0].voice, 1 + len(talks), age=len(talks) % 10))
            idle.append(talks[-1])
        talk = idle.pop(rng.randrange(len(idle)))
        try:
            async with gate:
                await talk.say(rng)
        finally:
            idle.append(talk)

    began = time.perf_counter()
    delays = await poisson(say, rate, seconds, rng, fewest=FEWEST)
    return _delays(delays, time.perf_counter() - began) if len(delays) >= FEWEST else None


async def poisson(
    say: Callable[[], Awaitable[object]],
    rate: float,
    seconds: float,
    rng: random.Random,
    patience: float = 5 * GOAL,
    fewest: int = 0,
) -> list[float]:
    """Seconds each took when `rate` a second arrive by chance for `seconds`, or for twice as long until `fewest` have
    come; nobody waits for who came before.

    One that raises an EngineError counts as infinitely late, and so does what is not there `patience` seconds after the
    last arrival.
    """
    delays: list[float] = []

    async def one() -> None:
        began = time.perf_counter()
        try:
            await say()
        except EngineError:
            delays.append(float("inf"))
        else:
            delays.append(time.perf_counter() - began)

    tasks: list[asyncio.Task[None]] = []
    now = began = time.perf_counter()
    while (now := now + rng.expovariate(rate)) < began + (seconds if len(tasks) >= fewest else 2 * seconds):
        await asyncio.sleep(max(0.0, now - time.perf_counter()))
        tasks.append(asyncio.create_task(one()))
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=patience)
        for task in late:
            task.cancel()
            delays.append(float("inf"))
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and (mistake := task.exception()):
            raise mistake
    return delays


def _delays(seconds: Sequence[float], wall: float) -> Delays:
    there = sum(s < float("inf") for s in seconds)
    return Delays(there, there / wall, percentile(seconds, 0.5), percentile(seconds, 0.95))


def as_dict(load: Load, name: str, how: str, loading: float, memory: int) -> dict[str, object]:
    """For programs, as JSON has it; seconds, bytes. None: a delay without end, or of nothing."""
    measured = {**asdict(load), "active_channels": load.channels}
    ours = cores() if memory else None
    terms = {"p95_goal": GOAL, "messages_per_minute_and_channel": PER_MINUTE}
    found = {"model": name, "how": how, "cores": ours, "load": loading, "memory": memory, **terms, **measured}
    plain: dict[str, object] = json.loads(json.dumps(found), parse_constant=lambda _: None)
    return plain


def as_text(load: Load, name: str, how: str, loading: float, memory: int) -> str:
    """For people."""
    rows = [(f"{count} in flight", delays) for count, delays in load.in_flight.items()]
    rows += [(f"{_rate(rate)} arriving a second", delays) for rate, delays in load.levels]
    lines = [
        f"{name}: {how}; {cores()} cores" if memory else f"{name}: {how}",
        f"loaded in {loading:.1f} s, first reply {load.first_reply:.2f} s later, "
        + (f"{memory / 1e9:.2f} GB of memory at most" if memory else "memory not seen from here"),
        f"a reply to a single user: {load.single.p50:.2f} s (95 % within {load.single.p95:.2f} s), "
        f"{load.words:.1f} words on average",
        "",
        f"{'':26}{'replies':>9}{'replies/s':>11}{'p50 s':>9}{'p95 s':>9}",
        *(f"{what:26}{d.replies:9}{d.per_second:11.2f}{_time(d.p50):>9}{_time(d.p95):>9}" for what, d in rows),
        "",
    ]
    each = f"each writes {PER_MINUTE:g} messages a minute to the bot, 95 % are answered within {GOAL:g} s"
    if load.channels:
        lines.append(f"So set up, it serves about {load.channels} active channels ({each}).")
        lines.append("That is its limit: plan for half.")
    elif not load.levels:
        lines.append(
            f"How many channels it serves cannot be told: fewer than {FEWEST} messages came. Measure for longer."
        )
    else:
        lines.append(f"So set up, it is too slow for this model: no load tried was served in time ({each}).")
    return "\n".join(lines)


def _rate(per_second: float) -> str:
    return f"{per_second:.2g}" if per_second < 10 else f"{per_second:.0f}"


def _time(seconds: float) -> str:
    """Of what never came: late; of nothing: a dash."""
    return "-" if math.isnan(seconds) else "late" if math.isinf(seconds) else f"{seconds:.2f}"


def resident_bytes(kind: str = "VmHWM") -> int:
    """Memory of this process and its children, their peaks added up ("VmRSS": now); 0 where there is no /proc."""
    return sum(int(status.get(kind, "0 kB").split()[0]) << 10 for status in family())


def family() -> Iterator[dict[str, str]]:
    """/proc/PID/status of this process, its children and theirs."""
    pids = {os.getpid()}
    for status in sorted(_statuses(), key=lambda s: int(s["Pid"])):
        if int(status["Pid"]) in pids or int(status["PPid"]) in pids:
            pids.add(int(status["Pid"]))
            yield status


def _statuses() -> Iterable[dict[str, str]]:
    for file in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = file.read_text("utf-8", "replace").splitlines()
        except OSError:  # it has just ended
            continue
        yield {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
