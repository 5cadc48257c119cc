"""Who is dead and who only looks like it."""

from __future__ import annotations

import os
import subprocess
import sys

from core.owner import HERE, OWNER, dead


def test_a_process_that_ended_is_dead_and_nobody_else_is() -> None:
    said = [sys.executable, "-c", "from core.owner import OWNER; print(OWNER)"]
    gone = subprocess.run(said, capture_output=True, text=True, check=True).stdout.strip()
    node, here, pid, random = gone.split(" ")
    assert dead(gone)
    assert not dead(OWNER) and not dead(f"{node} {HERE} {os.getppid()} {random}")
    assert not dead(f"{node} another-boot/{here.split('/')[1]} {pid} {random}"), "another machine's processes"
    assert not dead("me") and not dead("") and not dead(f"{node} {HERE} x {random}")
    assert len(OWNER) <= 256


def test_a_process_of_another_user_lives() -> None:
    assert not dead(f"node {HERE} 1 00000000")
