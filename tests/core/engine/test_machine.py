"""How many cores there are for us."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core.engine import machine
from core.engine.machine import cores


@pytest.mark.parametrize(("limit", "want"), [("150000 100000", 1), ("50000 100000", 1), ("250000 100000", 2)])
def test_a_containers_share_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, want: int) -> None:
    (tmp_path / "cpu.max").write_text(limit + "\n")
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cores() == want


def test_without_a_limit_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    assert cores() == 8
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores() == 8
