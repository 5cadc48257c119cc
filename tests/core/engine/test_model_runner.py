"""What is chosen at start, and how it is told."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from core.engine.torch_engine import TorchEngine


@pytest.mark.parametrize(
    ("dtype", "path"), [("float32", "native"), ("bfloat16", "native"), ("float16", "torch"), ("int8", "native")]
)
@pytest.mark.parametrize("device", ["cpu"])
async def test_the_line_at_start_says_device_precision_path_and_threads(
    engine: Callable[..., Coroutine[Any, Any, TorchEngine]], dtype: str, path: str
) -> None:
    said = (await engine(dtype=dtype, threads=1)).info.how.split(", ")
    assert said[0] == "cpu" and said[-1] == "1 thread"
    assert any(dtype in part for part in said) and any(path in part for part in said)
