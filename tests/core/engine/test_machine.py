"""How much of this machine is for us."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.engine import machine
from core.engine.machine import cores, free_memory


@pytest.mark.parametrize(("limit", "want"), [("150000 100000", 1), ("50000 100000", 1), ("250000 100000", 2)])
def test_a_containers_share_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, want: int) -> None:
    (tmp_path / "cpu.max").write_text(limit + "\n")
    monkeypatch.setattr(machine, "GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cores() == want


def test_without_a_limit_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "GROUP", tmp_path)
    assert cores() == 8
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores() == 8


def test_memory_that_holds_files_is_free_and_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "GROUP", tmp_path)
    assert free_memory() == machine.UNKNOWN
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree:         10 kB\n")  # of another system
    assert free_memory() == machine.UNKNOWN
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree:         10 kB\nMemAvailable:    5000 kB\n")
    assert free_memory() == 5000 * 1024
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 9\ninactive_file 1000000\nactive_file 7\n")
    for limit, want in (("max", 5000 * 1024), ("4000000", 2_000_000), ("1", 0), ("9000000000", 5000 * 1024)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert free_memory() == want


def test_this_machines_memory_is_found() -> None:
    """To a tenth or so: it changes as we look."""
    [line] = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    assert 0 < free_memory() < 1.2 * 1024 * int(line.split()[1])


@pytest.mark.parametrize(
    ("given", "want"), [({}, "7000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_threads_that_wait_leave_the_core_to_others(given: dict[str, str], want: str) -> None:
    """Every OpenMP library in the process says at its start how long it will wait awake."""
    opening = (
        "import asyncio; from core.engine.server import open_local as o; asyncio.run(o('torch', *4 * ('none',), 0))"
    )
    without = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    said = subprocess.run(
        [sys.executable, "-c", opening],
        env=without | given | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    ).stderr
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said)) == {want}
