"""What this machine gives us. Torch-free: who only measures or plans uses it too."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")
"""A container's own control group, version 2: what it may have of the machine.
https://docs.kernel.org/admin-guide/cgroup-v2.html
"""
MEMORY = Path("/proc/meminfo")
UNKNOWN = 8 << 30
"""Bytes that are taken to be free where no Linux says."""


def cores() -> int:
    """How many this process may use; a container's share of the machine counts, rounded down to whole ones."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no control groups, or no limit: then it says "max"
        quota, period = map(int, (GROUP / "cpu.max").read_text("ascii").split())  # more threads would stop in turns
        return max(1, min(seen, quota // period))
    return seen


def free_memory() -> int:
    """Bytes that this process may still take, those counted in that hold files' pages; a container's limit counts."""
    free = UNKNOWN
    with contextlib.suppress(OSError, ValueError):
        [kibibytes] = re.findall(r"^MemAvailable: +(\d+) kB$", MEMORY.read_text("ascii"), re.MULTILINE)
        free = 1024 * int(kibibytes)
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((GROUP / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        [files] = re.findall(r"^inactive_file (\d+)$", (GROUP / "memory.stat").read_text("ascii"), re.MULTILINE)
        free = min(free, limit - used + int(files))
    return max(0, free)


def spin_briefly() -> None:
    """To be called before torch is imported: threads that share torch's steps wait awake some 0.07 ms, then asleep.

    libgomp's default is milliseconds. Where something else has one of the cores, a thread that waits awake takes the
    time of the very one it waits for. Whoever set GOMP_SPINCOUNT or OMP_WAIT_POLICY keeps it.
    https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "7000")
