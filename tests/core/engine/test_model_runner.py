"""What is chosen at start, and how it is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from core.engine import model_runner
from core.engine.model_runner import cores
from core.engine.torch_engine import TorchEngine


@pytest.mark.parametrize(("limit", "want"), [("150000 100000", 1), ("50000 100000", 1), ("250000 100000", 2)])
def test_a_containers_share_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, want: int) -> None:
    (tmp_path / "cpu.max").write_text(limit + "\n")
    monkeypatch.setattr(model_runner, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cores() == want


def test_without_a_limit_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(model_runner, "QUOTA", tmp_path / "cpu.max")
    assert cores() == 8
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores() == 8


@pytest.mark.parametrize(("dtype", "path"), [("float32", "torch"), ("bfloat16", "torch"), ("int8", "int8")])
async def test_the_line_at_start_says_device_precision_path_and_threads(
    engine: Callable[..., Coroutine[Any, Any, TorchEngine]], dtype: str, path: str
) -> None:
    said = (await engine(dtype=dtype, threads=1)).info.how.split(", ")
    assert said[0] == "cpu" and said[-1] == "1 thread"
    assert any(dtype in part for part in said) and any(path in part for part in said)
