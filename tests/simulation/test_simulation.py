"""A slice of the schedules; any number by hand: python -m tests.simulation.test_simulation FIRST COUNT."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.simulation.world import World, quiet


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    quiet()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("block", range(6))
def test_every_schedule_keeps_the_promises(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        World(seed).run()


@pytest.mark.parametrize("seed", [400947, 408390])
def test_schedules_that_once_were_broken(seed: int) -> None:
    World(seed).run()


def test_a_schedule_replays_by_its_seed() -> None:
    first, second = World(7), World(7)
    assert first.run() == second.run()
    assert [str(reply) for _, reply in first.servers[0].ledger] == [str(reply) for _, reply in second.servers[0].ledger]


def main(first: int, count: int) -> None:
    quiet()
    states, began, said = Counter[str](), time.monotonic(), 0.0
    for seed in range(first, first + count):
        states += World(seed).run()
        if time.monotonic() - said > 5:
            said = time.monotonic()
            print(f"{seed - first + 1:,}/{count:,} schedules, {dict(states)}", flush=True)
    print(f"{count:,} schedules from seed {first} in {time.monotonic() - began:.0f} s, none broken; {dict(states)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
