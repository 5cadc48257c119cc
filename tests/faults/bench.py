"""The bench by hand, as long as you like; it ends with exit code 1 when a promise was broken.

python -m tests.faults.bench --kills 1000 --seed 1          # random SIGKILLs under load, faults on both wires
python -m tests.faults.bench --kills 50 --engine process    # the same with the embedded model
python -m tests.faults.bench --points 5 --seed 1            # every named crash point, for both platforms
python -m tests.faults.bench --soak 60 --seed 1             # an hour of everything, and the memory of a long life
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.core.journal.disk import writer
from tests.faults.burst import burst, fairness, growth
from tests.faults.hostile import storm
from tests.faults.kills import POINTS, Tally, kill_at_points, kill_at_random, stop_when_full
from tests.faults.soak import soak
from tests.faults.torn import Torn

ROUND = 20
"""Kills in one town; then its ledgers are counted and the next one opens with the next seed."""


def kills(count: int, seed: int, engine: str) -> Tally:
    total, done, round_ = Tally(), 0, 0
    while done < count:
        now = min(ROUND, count - done)
        with Folder() as folder:
            tally = asyncio.run(kill_at_random(folder.path, seed + round_, now, engine))
            folder.keep = bool(tally.broken)
        for line in tally.broken:
            print(line, flush=True)
        total += tally
        done, round_ = done + now, round_ + 1
        _progress(f"{done:,}/{count:,} kills, seed {seed + round_ - 1}", total)
    return total


def points(times: int, seed: int) -> Tally:
    with Folder() as folder:
        tally = asyncio.run(kill_at_points(folder.path, seed, times, POINTS, POINTS))
        folder.keep = bool(tally.broken)
    for line in tally.broken:
        print(line, flush=True)
    return tally


def torn(count: int, seed: int) -> list[str]:
    with Folder() as folder:
        work = folder.path / "torn"
        work.mkdir()
        file, said = folder.path / "palaver.db", time.monotonic()
        with writer(f"sqlite:///{file}") as process:
            assert process.stdout
            for line in process.stdout:
                if line == "600\n":
                    break
        state, broken = Torn(file, work, seed), []
        for number in range(1, count + 1):
            try:
                state.check()
            except AssertionError as error:
                broken.append(str(error))
            if time.monotonic() - said > 5:
                said = time.monotonic()
                print(f"{number:,}/{count:,} torn logs, {len(broken)} broken", flush=True)
        print(f"{count:,} states of a log of {len(state.log):,} bytes and {len(state.whole):,} messages")
        folder.keep = bool(broken)
    return broken


def hostile(count: int, seed: int) -> list[str]:
    with Folder() as folder:
        given, broken = asyncio.run(storm(folder.path, seed, count, progress=True))
        print(f"{given.total():,} hostile inputs: {dict(given)}")
        folder.keep = bool(broken)
    return broken


def crowd(count: int, seed: int) -> list[str]:
    with Folder() as folder:
        outcome = asyncio.run(burst(folder.path, count, max(1, count // 10), seed))
        folder.keep = bool(outcome.broken)
    print(f"{outcome.asked:,} messages over {max(1, count // 10):,} channels in {outcome.seconds:.0f} s:")
    print(f"  {dict(outcome.states)}, the event loop away for {outcome.lag:.2f} s at most, before and after")
    print(f"  {outcome.left}")
    fair = fairness(seed)
    print(f"one channel at 100 times the rate: Jain {fair.jain:.3f}, calm channels answered {fair.calm:.1%}")
    print(f"  after {fair.waited:.1f} s on average, the loud one {fair.loud:.1%}")
    return outcome.broken


def stops(waiting: int, seed: int) -> Tally:
    with Folder() as folder:
        tally = asyncio.run(stop_when_full(folder.path, seed, waiting))
        folder.keep = bool(tally.broken)
    for line in tally.broken:
        print(line, flush=True)
    return tally


def soaked(minutes: float, seed: int, engine: str) -> Tally:
    said = 0.0

    def tell(line: str) -> None:
        nonlocal said
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(line, flush=True)

    with Folder() as folder:
        outcome = asyncio.run(soak(folder.path, seed, minutes, engine, tell))
        folder.keep = bool(outcome.tally.broken)
    for line in outcome.tally.broken[:20]:
        print(line, flush=True)
    print(f"troubles: {dict(outcome.troubles)}")
    if outcome.memory:
        shown = outcome.memory[:: max(1, len(outcome.memory) // 10)]
        print("MiB in the last life: " + ", ".join(f"{size:.1f} at {at:.0f} s" for at, size, _ in shown))
        print(
            f"  {outcome.growth():+.1f} MiB an hour after the first third; descriptors {shown[1][2]} to {shown[-1][2]}"
        )
    return outcome.tally


def grown(count: int, seed: int) -> list[str]:
    with Folder() as folder:
        waves = asyncio.run(growth(folder.path, 10, max(1, count // 10), seed))
    for number, (objects, size) in enumerate(waves, 1):
        print(f"after {number * max(1, count // 10):,} messages: {objects:,} objects, {size:.1f} MiB")
    more = waves[-1][0] - waves[1][0]
    return [f"{more:,} objects more than after the second wave"] if more > count // 20 else []


class Folder:
    """A folder of its own for a run, kept when something was wrong."""

    def __enter__(self) -> Folder:
        self.path, self.keep = Path(tempfile.mkdtemp(prefix="palaver-bench-")), True
        return self

    def __exit__(self, *_: object) -> None:
        if self.keep:
            print(f"kept for a look: {self.path}", flush=True)
        else:
            shutil.rmtree(self.path)


def _progress(done: str, tally: Tally) -> None:
    print(f"{done}: {tally.asked:,} asked, {dict(tally.states)}, {len(tally.broken)} broken", flush=True)


def table(tally: Tally, seconds: float) -> str:
    rows = [
        ("kills", f"{tally.kills:,}"),
        ("messages", f"{tally.asked:,}"),
        *((f"  {state}", f"{count:,}") for state, count in sorted(tally.states.items())),
        ("doubled on Discord", str(tally.doubled["discord"])),
        ("doubled on Telegram, all in doubt", str(tally.doubled["telegram"])),
        ("slowest stop", f"{max(tally.stops):.1f} s"),
    ]
    if tally.recoveries:
        late = sorted(tally.recoveries)
        p95 = late[int(0.95 * (len(late) - 1))]
        rows.append(("start to first reply, median / p95", f"{statistics.median(late):.1f} / {p95:.1f} s"))
    rows += [("broken", str(len(tally.broken))), ("took", f"{seconds:.0f} s")]
    return "\n".join(f"{name:<36}{value:>12}" for name, value in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="The bench of proof.")
    parser.add_argument("--kills", type=int, default=0, help="random SIGKILLs under load")
    parser.add_argument("--points", type=int, default=0, help="so many deaths at every named point")
    parser.add_argument("--stops", type=int, default=0, help="one SIGTERM with so many questions open")
    parser.add_argument("--torn", type=int, default=0, help="torn write-ahead logs")
    parser.add_argument("--hostile", type=int, default=0, help="hostile inputs")
    parser.add_argument("--burst", type=int, default=0, help="messages at once, and one loud channel")
    parser.add_argument("--growth", type=int, default=0, help="messages through one process, its objects counted")
    parser.add_argument("--soak", type=float, default=0.0, help="minutes of load with every kind of trouble")
    parser.add_argument("--engine", default="echo", help="echo, process (the embedded model) or inprocess")
    parser.add_argument("--seed", type=int, default=1)
    asked, began = parser.parse_args(), time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no palaver is left running
    logging.basicConfig(level=logging.WARNING, handlers=[logging.NullHandler()])  # counted, not told
    total = Tally()
    if asked.kills:
        total += kills(asked.kills, asked.seed, asked.engine)
    if asked.stops:
        total += stops(asked.stops, asked.seed)
    if asked.points:
        total += points(asked.points, asked.seed)
    if asked.soak:
        total += soaked(asked.soak, asked.seed, asked.engine)
    broken = list(total.broken)
    if total.asked:
        print(table(total, time.monotonic() - began))
    for count, run in ((asked.torn, torn), (asked.hostile, hostile), (asked.burst, crowd), (asked.growth, grown)):
        if count:
            began = time.monotonic()
            found = run(count, asked.seed)
            for line in found[:20]:
                print(line)
            print(f"{len(found)} broken, {time.monotonic() - began:.0f} s")
            broken += found
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
