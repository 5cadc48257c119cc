"""What every test and every process that it starts begins with."""

from __future__ import annotations

import ctypes
import gc
import os
import signal

import pytest

from core.engine.machine import spin_briefly

# One thread for torch, unless a test asks for more: with tensors as small as these, threads wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
spin_briefly()  # as every engine does: those of a worker beside other workers would take the time of whom they wait for

# Without CUDA's driver Triton interprets the GPU's kernels. It asks when it is imported, and torch may import it.
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    os.environ["TRITON_INTERPRET"] = "1"

# A script that runs the tests in the background has SIGINT ignored, nohup has SIGHUP, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# What is imported before the first test stays to the end: it is neither looked through while it comes nor ever after.
gc.disable()

LONGEST = (
    "tests/faults/test_faults.py", "tests/core/engine/test_graphs.py", "tests/core/engine/test_native.py",
    "tests/core/engine/test_ray_serve.py", "tests/bots/test_main.py", "tests/bots/test_model_cli.py", "tests/e2e/",
)  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that nobody waits for it alone; pytest drops an order given by arguments."""
    items.sort(key=lambda item: [not item.nodeid.startswith(place) for place in LONGEST])


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
