"""How a thread that owns a library answers the event loop. Torch-free."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any


def settle(future: asyncio.Future[Any], end: object) -> None:
    """From any thread: `end` becomes the future's result, or its exception; what is settled or given up stays so.

    Nobody is left to hear it when the loop is gone.
    """
    with contextlib.suppress(RuntimeError):
        future.get_loop().call_soon_threadsafe(_settle, future, end)


def _settle(future: asyncio.Future[Any], end: object) -> None:
    if future.done():
        return
    if isinstance(end, BaseException):
        future.set_exception(end)
    else:
        future.set_result(end)
