"""A slice of the bench; as much of it as you like by hand: python -m tests.faults.bench --help."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from core import window
from tests.faults.burst import burst, fairness, growth
from tests.faults.descriptors import run_out
from tests.faults.hostile import storm
from tests.faults.judge import unhandled
from tests.faults.kills import POINTS, kill_at_points, kill_at_random, stop_when_full, two_on_one_journal
from tests.faults.soak import soak


@pytest.fixture
def silence() -> Iterator[None]:
    """The house tells of every fault, and the servers of clients that die."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


async def test_killed_at_random_nothing_is_lost_or_doubled(tmp_path: Path, silence: None) -> None:
    tally = await kill_at_random(tmp_path, seed=1, kills=4)
    assert tally.broken == [] and tally.kills == 4
    assert tally.states == {"answered": tally.asked}


async def test_killed_at_every_named_point_nothing_is_lost_or_doubled(tmp_path: Path, silence: None) -> None:
    tally = await kill_at_points(tmp_path, seed=1, times=1, telegram=POINTS[::2], discord=POINTS[1::2])
    assert tally.broken == [] and tally.kills == len(POINTS)
    assert tally.states == {"answered": tally.asked}


async def test_stopped_with_a_hundred_waiting_the_next_start_answers_them(tmp_path: Path, silence: None) -> None:
    tally = await stop_when_full(tmp_path, seed=1, waiting=100)
    assert tally.broken == [] and tally.states == {"answered": tally.asked}


async def test_of_two_on_one_journal_one_waits_and_takes_over(tmp_path: Path, silence: None) -> None:
    tally = await two_on_one_journal(tmp_path, seed=1)
    assert tally.broken == [] and tally.states == {"answered": tally.asked}
    assert tally.doubled["discord"] == 0


@pytest.mark.parametrize("webhook", [False, True])
async def test_out_of_file_descriptors_and_healed(tmp_path: Path, silence: None, webhook: bool) -> None:
    tally = await run_out(tmp_path, seed=1, seconds=1.0, webhook=webhook)
    assert tally.broken == [] and tally.states == {"answered": tally.asked}


async def test_hostile_inputs_over_three_wires(tmp_path: Path) -> None:
    given_, broken = await storm(tmp_path, seed=1, count=240)
    assert broken == [] and set(given_) == {"telegram", "discord", "web"}


async def test_a_burst_over_many_channels(tmp_path: Path) -> None:
    outcome = await burst(tmp_path, count=300, channels=60, seed=1)
    assert outcome.broken == [] and outcome.states == {"answered": 300}
    tasks, descriptors = outcome.left["tasks"], outcome.left["descriptors"]
    assert tasks[1] <= tasks[0] and descriptors[1] <= descriptors[0] + 8, "readers of the journal, opened when needed"


async def test_memory_does_not_grow_with_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "REMEMBERED", 100)  # full soon, as it is after a day
    gc.collect()
    gc.freeze()  # what other tests have left is not counted, nor looked through again and again
    sizes = [objects for objects, _ in await growth(tmp_path, waves=5, count=300, seed=1)]
    grown = min(sizes[3:]) - min(sizes[:2])  # what leaks stays, while timers and weak references come and go
    assert grown < 200, f"{sizes}: less than one object for three messages"


async def test_everything_at_once_for_a_while(tmp_path: Path, silence: None) -> None:
    outcome = await soak(tmp_path, seed=1, minutes=0.2, private=4, rooms=2)
    assert outcome.tally.broken == [] and outcome.tally.states == {"answered": outcome.tally.asked}
    assert outcome.troubles.total() > 1


def test_one_loud_channel_harms_no_calm_one(silence: None) -> None:
    outcome = fairness(seed=1, seconds=10)
    assert outcome.jain >= 0.9 and outcome.calm >= 0.9 and outcome.loud < 0.5


def test_the_judge_sees_a_traceback(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x WARNING discord.client: Attempting a reconnect in 1s: ConnectionClosed\nx INFO a: b\n")
    assert unhandled(log) == []
    log.write_text("x INFO a: b\n| Traceback (most recent call last):\nx ERROR   a: b\n")
    assert len(unhandled(log)) == 2


def test_every_test_that_the_page_names_is_there() -> None:
    root = Path(__file__).parents[2]
    lines = (root / "docs" / "reliability.md").read_text().splitlines()
    rows = [line.split("|")[2] for line in lines if line.startswith("|") and "tests/" in line.split("|")[2]]
    assert len(rows) > 40
    for row in rows:
        files = re.findall(r"test_\w+\.py", row)
        source = "".join(path.read_text() for file in files for path in (root / "tests").rglob(file))
        assert source, row
        for name in re.findall(r"`(\w+)`", row):
            assert re.search(rf"def test_\w*{name}", source) or "both bots" in row, f"{name} in {files}"
