"""Who we are among the processes that share a journal, and whether another of them is certainly dead.

A lease runs out by itself after seconds; its owner was killed a moment ago on this machine more often than not, and
then its successor need not wait.
"""

from __future__ import annotations

import os
import platform
import random
from pathlib import Path


def _here() -> str:
    """This boot of this machine and this namespace of process ids; "" where nobody can tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + f"/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


HERE = _here()
OWNER = f"{platform.node().replace(' ', '-')[:64]} {HERE or '-'} {os.getpid()} {random.getrandbits(32):08x}"
"""This process."""


def dead(owner: str) -> bool:
    """True only when `owner` ran where we run and its process id is nobody's any more."""
    parts = owner.split(" ")
    if not HERE or len(parts) != 4 or parts[1] != HERE or not parts[2].isdigit():
        return False
    try:
        os.kill(int(parts[2]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # somebody else's process
    return False
