"""What is asked of a peer, the same ids and the same window for all: talks of messages and replies of fixed lengths.

Everything goes through `Peer.reply`. A talk's ids depend on its number alone, so every peer gets the same questions.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.serve.peers import Peer
from core.engine.base import QueueFull
from core.engine.kv_cache import common_prefix
from core.evaluation.load import GOAL, family, percentile, poisson
from core.messages import Turn
from core.window import Window

LENGTHS = 12, 16
"""Ids of a message and of a reply, when nothing else is said."""
CYCLE = 12
"""Exchanges until a channel of B and E starts anew: so the mix of short and long histories stays the same."""
SILENCE, LEAVES = 12.0, 8
"""E: mean seconds until somebody in a talk writes again, and how many messages a talk has before they fall silent."""
LEVELS = 6
"""E: loads tried; twice as many while none is too high."""


@dataclass(frozen=True, slots=True)
class Script:
    """The ids people say, and how much of a talk is shown to the model."""

    vocab: int
    eos: int
    """Ends a reply early; nobody says it."""
    end: int
    """Stands after each turn."""
    window: int
    keep: float
    message: int = LENGTHS[0]
    reply: int = LENGTHS[1]
    """Ids of each."""
    pause: float = 0.0
    """Seconds a single user takes before each message."""
    text: Sequence[int] = ()
    """A long text's ids that people quote from; without it, ids are drawn from the vocabulary."""

    def say(self, rng: random.Random, count: int) -> list[int]:
        if self.text:
            start = rng.randrange(len(self.text) - count)
            return list(self.text[start : start + count])
        ids = [rng.randrange(self.vocab - 1) for _ in range(count)]
        return [id + (id >= self.eos) for id in ids]


@dataclass(slots=True)
class Said:
    """One reply. `new` ids of the prompt's `length` were not in the talk's last prompt and reply."""

    seconds: float
    length: int
    new: int
    moved: bool
    """The window's start is another than last time."""
    at: float
    """When it was there."""


@dataclass(slots=True)
class Talk:
    """One channel. `age` exchanges lie behind it already, never seen by the peer. After `cycle` it starts anew."""

    script: Script
    number: int
    age: int = 0
    cycle: int = 0
    session: str = ""
    before: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    rng: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.number)
        self.start_anew(self.age)

    def start_anew(self, age: int = 0) -> None:
        self.session, self.before, self.turns = f"{self.number}-{self.rng.random()}", [], []
        for _ in range(age):
            self._add("user", self.script.say(self.rng, self.script.message))
            self._add("assistant", self.script.say(self.rng, self.script.reply))

    async def say(self, peer: Peer, candidates: int = 1) -> Said:
        """The next message and its reply."""
        if self.cycle and len(self.turns) >= 2 * self.cycle:
            self.start_anew()
        self._add("user", self.script.say(self.rng, self.script.message))
        window = Window(_ids, self.script.end, self.script.window, self.script.keep)
        prompt = window.prompt(self.turns)
        known = common_prefix(self.before, prompt)
        began = time.perf_counter()
        replies = await peer.reply(prompt, self.session, candidates, self.script.reply)
        done = time.perf_counter()
        if len(replies) != candidates or any(len(ids) != self.script.reply for ids in replies):
            raise RuntimeError(
                f"asked for {candidates} of {self.script.reply} ids, got {[len(ids) for ids in replies]}"
            )
        self._add("assistant", replies[0])
        ahead = window.ahead(self.turns)
        if ahead and ahead[: len(prompt)] != prompt:  # as core.voice does
            peer.prepare(self.session, ahead)
        moved = bool(self.before) and known < len(self.before)
        self.before = [*prompt, *replies[0]]
        return Said(done - began, len(prompt), len(prompt) - known, moved, done)

    def _add(self, role: Literal["user", "assistant"], ids: Sequence[int]) -> None:
        self.turns.append(Turn(role, "", " ".join(map(str, ids)), len(self.turns)))


def _ids(text: str) -> list[int]:
    """A turn's text is its ids here: no tokenizer is measured."""
    return [int(word) for word in text.split()]


async def single(peer: Peer, script: Script, *, turns: int, age: int = 0, candidates: int = 1) -> dict[str, Any]:
    """One user. With `age`, a turn that is not counted brings the history in."""
    talk = Talk(script, 1 + age, age)
    if age:
        await talk.say(peer, candidates)
    said, before = [], processor_seconds()
    for _ in range(turns):
        await asyncio.sleep(script.pause)
        said.append(await talk.say(peer, candidates))
    spent = processor_seconds() - before
    return {
        "mean_ms": 1e3 * statistics.fmean(s.seconds for s in said),
        "processor_ms": 1e3 * spent / turns,
        "growing_ms": _p50(s.seconds for s in said if not s.moved),
        "sliding_ms": _p50(s.seconds for s in said if s.moved),
        "asked": [(s.length, s.new) for s in said],
    }


def _p50(seconds: Any) -> float | None:
    values = list(seconds)
    return 1e3 * statistics.median(values) if values else None


def processor_seconds() -> float:
    """What this process and its children have computed so far; 0 where there is no /proc.

    On a machine with other work it says more than the clock, as long as each peer has one thread: a second thread
    that waits for its share spins.
    """
    total = 0.0
    for status in family():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{status['Pid']}/stat").read_text("utf-8").rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


async def a_user(peer: Peer, script: Script, seconds: float) -> dict[str, Any]:
    """A: one user, 12 turns from an empty history."""
    return await single(peer, script, turns=12)


async def long_window(peer: Peer, script: Script, seconds: float) -> dict[str, Any]:
    """C: one user whose long window is full; as many turns as its start takes to move on twice."""
    return await single(peer, script, turns=16, age=1 + script.window // (script.message + script.reply + 2))


async def candidates(peer: Peer, script: Script, seconds: float) -> dict[str, Any]:
    """D: one user, 8 candidates for every reply; then as B, with 4 such requests in flight."""
    alone = await single(peer, script, turns=6, candidates=8)
    return alone | {"busy": await crowd(peer, script, seconds, in_flight=4, candidates=8)}


async def crowd(
    peer: Peer, script: Script, seconds: float, *, channels: int = 32, in_flight: int = 16, candidates: int = 1
) -> dict[str, Any]:
    """B: 32 channels, 16 requests in flight, for `seconds`; replies per second and their delay.

    Channels take turns. A peer that keeps a cache hears one message of each first, uncounted: it has served for long.
    """
    talks = [Talk(script, 100 + i, age=i % CYCLE, cycle=CYCLE) for i in range(channels)]
    queue: asyncio.Queue[Talk] = asyncio.Queue()
    said: list[Said] = []
    warm = channels if peer.caches else 0  # replies that come first
    for talk in talks:
        queue.put_nowait(talk)
    began = end = before = after = 0.0

    async def worker() -> None:
        nonlocal began, end, before, after
        while not end or time.perf_counter() < end:
            talk = await queue.get()
            if not end and len(said) >= warm:
                began, before = time.perf_counter(), processor_seconds()
                end = began + seconds
            said.append(await talk.say(peer, candidates))
            if end and not after and said[-1].at >= end:
                after = processor_seconds()
            queue.put_nowait(talk)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    # What was under way at the start counts, what is at the end does not: each is half in, half out. Where not even the
    # first was there by then, what came late.
    counted = [s for s in said if began < s.at <= end] or [s for s in said if s.at > end]
    delays = [s.seconds for s in counted]
    return {
        "replies_per_s": len(counted) / (max(s.at for s in counted) - began),
        "processor_ms": 1e3 * (after - before) / len(counted),
        "p50_ms": 1e3 * percentile(delays, 0.5),
        "p95_ms": 1e3 * percentile(delays, 0.95),
        "replies": len(counted),
        "asked": [(s.length, s.new) for s in counted],
    }


async def hundreds(peer: Peer, script: Script, seconds: float) -> dict[str, Any]:
    """F: 256 channels, a request of each in flight: what a GPU is for."""
    return await crowd(peer, script, seconds, channels=256, in_flight=256)


async def thousand(peer: Peer, script: Script, seconds: float) -> dict[str, Any]:
    """E: 1,000 channels, Poisson arrivals; the highest load at which 95 % of the replies take at most 2 s.

    Those in a talk write again after 12 s on average; after 8 messages on average they fall silent and another of the
    1,000 wakes up. Loads go up until one is too high, then up and down in steps that get smaller. Each level starts
    when the one before is through. What piles up is late only after a while, so the load counts as no more than was
    ever served in a second; `at_least`: no level was too high.
    """
    talks = [Talk(script, 10_000 + i, age=i % CYCLE, cycle=CYCLE) for i in range(1000)]
    rng, levels = random.Random(7), list[dict[str, float]]()
    awake, asleep = talks[:64], talks[64:]
    start = (await _closed(peer, awake, seconds))["replies_per_s"]
    rate, best, step, served, failed = 0.7 * start, 0.0, 1.25, start, False
    while len(levels) < (LEVELS if failed else 2 * LEVELS):
        while len(awake) < max(8, rate * SILENCE) and asleep:
            awake.append(asleep.pop(rng.randrange(len(asleep))))
        began = time.perf_counter()
        delays = await poisson(lambda: _one(peer, awake, asleep, rng), rate, seconds, rng)
        served = max(served, sum(delay < math.inf for delay in delays) / (time.perf_counter() - began))
        p95 = percentile(delays, 0.95)
        levels.append({"rate": rate, "p50_s": percentile(delays, 0.5), "p95_s": p95, "replies": len(delays)})
        best, failed = (max(best, rate), failed) if p95 <= GOAL else (best, True)
        rate, step = (rate * step, step) if p95 <= GOAL else (rate / step, 1 + (step - 1) / 2)
    return {
        "replies_per_s": min(best, served),
        "at_least": not failed,
        "closed_loop": start,
        "awake": len(awake),
        "levels": levels,
    }


async def _closed(peer: Peer, talks: Sequence[Talk], seconds: float) -> dict[str, float]:
    """16 in flight over `talks` until each was heard once and `seconds` are over."""
    queue = list(talks)
    began = time.perf_counter()
    count = 0

    async def worker() -> None:
        nonlocal count
        while time.perf_counter() < began + seconds or count < len(talks):
            talk = queue.pop(0)
            await talk.say(peer)
            queue.append(talk)
            count += 1

    await asyncio.gather(*(worker() for _ in range(16)))
    return {"replies_per_s": count / (time.perf_counter() - began)}


async def _one(peer: Peer, awake: list[Talk], asleep: list[Talk], rng: random.Random) -> None:
    """Whoever is awake and not waiting for a reply says something, or a sleeper when all wait."""
    if not awake and not asleep:
        raise QueueFull("everybody waits for a reply")
    talk = (awake or asleep).pop(rng.randrange(len(awake or asleep)))
    try:
        await talk.say(peer)
    except BaseException:
        talk.start_anew()  # its last message has no reply
        raise
    finally:
        awake.append(talk)
    if rng.random() < 1 / LEAVES and asleep:
        asleep.append(awake.pop())
        awake.append(asleep.pop(rng.randrange(len(asleep) - 1)))


CHANNELS = {"A": 1, "B": 32, "C": 1, "D": 32, "E": 128, "F": 256}
"""Whose cache is to be kept at the same time."""
WINDOWS = {"A": 256, "B": 256, "C": 900, "D": 256, "E": 256, "F": 256}
"""Ids of history a prompt may have; less where the model has fewer positions."""
WORKLOADS = {"A": a_user, "B": crowd, "C": long_window, "D": candidates, "E": thousand, "F": hundreds}
