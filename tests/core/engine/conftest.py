from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from core.engine.torch_engine import TorchEngine, open_torch_engine
from tests.checkpoints import make_checkpoint
from tests.core.engine.oracle import at_rest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("odd", ...)`: a folder, made once for each set of arguments."""

    @functools.cache
    def make(shape: str = "plain", **options: Any) -> Path:
        return make_checkpoint(tmp_path_factory.mktemp(shape), shape, **options)

    return make


@pytest.fixture(params=["cpu", "cuda"][: 1 + torch.cuda.is_available()])
def device(request: pytest.FixtureRequest) -> str:
    """Where `engine` computes: on all that this machine has, unless a test says where."""
    return str(request.param)


@pytest.fixture
async def engine(
    checkpoint: Callable[..., Path], device: str
) -> AsyncIterator[Callable[..., Coroutine[Any, Any, TorchEngine]]]:
    """`await engine("odd", max_running=2)`: open, one thread; in the end its books are checked and it is closed."""

    @asynccontextmanager
    async def opened(folder: Path, options: dict[str, Any]) -> AsyncIterator[TorchEngine]:
        usual: dict[str, Any] = {"device": device, "dtype": "float32", "threads": 1, "cache_bytes": 1 << 26, "seed": 0}
        engine = await open_torch_engine(folder, **(usual | options))
        try:
            yield engine
            if not await engine.ready():
                await at_rest(engine)
        finally:
            await engine.aclose()

    async with AsyncExitStack() as stack:

        async def open_one(folder: Path | str = "plain", **options: Any) -> TorchEngine:
            folder = checkpoint(folder) if isinstance(folder, str) else folder
            return await stack.enter_async_context(opened(folder, options))

        yield open_one


@pytest.fixture
def inference() -> Iterator[None]:
    """For tests that call a model themselves, as the engine's thread does: no gradients, one thread unless they ask."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)
