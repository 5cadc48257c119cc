"""What is chosen at start, and how it is told."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.engine import choice, model_runner
from core.engine.hub import EMBEDDED
from core.engine.torch_engine import TorchEngine


@pytest.mark.parametrize(("name", "number"), [("cuda", 0), ("cuda:1", 1)])
def test_kernels_are_launched_on_the_gpu_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Triton launches on the thread's own, whatever it is given."""
    asked: list[object] = []

    def choose(*_: object) -> None:
        asked.append("model")
        raise ZeroDivisionError

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(choice, "choose", choose)
    with pytest.raises(ZeroDivisionError):
        choice.open_runner(EMBEDDED, name, "auto", 1)
    assert asked == [number, "model"]


@pytest.mark.parametrize(("device", "shapes"), [("cpu", {(1, 1), (8, 1)}), ("cuda", None)])
def test_the_shapes_that_come_first_in_life_are_run_at_start(device: str, shapes: set[tuple[int, int]] | None) -> None:
    """On a GPU every graph that a step may take."""
    seen = set[tuple[int, int]]()
    model: Any = SimpleNamespace(
        config=SimpleNamespace(n_positions=1024), device=torch.device(device), new_kv=lambda _: None,
        forward=lambda batch: seen.add((len(batch.ids), len(batch.wanted))),
    )  # fmt: skip
    model_runner.ModelRunner(model).warm_up()
    assert seen == (shapes or {(2**i, min(wanted, 2**i)) for i in range(9) for wanted in (1, 16, 256)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("device", ["cpu"])
async def test_the_line_at_start_says_device_precision_path_and_threads(
    engine: Callable[..., Coroutine[Any, Any, TorchEngine]], dtype: str
) -> None:
    said = (await engine(dtype=dtype, threads=1)).info.how.split(", ")
    assert said[0] == "cpu" and said[-1] == "1 thread"
    assert any(dtype in part for part in said) and any("native" in part for part in said)
