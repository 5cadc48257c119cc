"""Private folders are private, and none is left for long."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from core.engine.base import EngineClosed
from core.engine.folder import PrivateFolder

ROOT = Path(__file__).parents[3]


def test_only_its_owner_may_open_it_and_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    folder = PrivateFolder()
    assert folder.path.stat().st_mode & 0o777 == 0o700
    (folder.path / "something").write_text("x")
    folder.close()
    folder.close()
    assert not folder.path.exists()


def test_a_long_place_for_temporary_files_leaves_room_for_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    folder = PrivateFolder()
    assert len(bytes(folder.path / "socket")) < 100
    folder.close()


def test_nowhere_to_be_is_one_line(tmp_path: Path) -> None:
    """A process that may write no file, as where all disks are full."""
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "sys.argv[1:] = ['bench']; runpy.run_module('bots', run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ENGINE": "process", "MODEL": "embedded"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 75 and "Traceback" not in done.stderr
    assert "no temporary folder can be made (No usable temporary directory found" in done.stderr.splitlines()[-1]
    assert "set TMPDIR" in done.stderr


def test_what_cannot_be_locked_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def refuse(lock: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(EngineClosed, match="No locks available"):
        PrivateFolder()
    assert not list(tmp_path.iterdir()) and len(os.listdir("/proc/self/fd")) == before


def test_what_a_killed_process_left_is_swept_and_what_lives_is_not() -> None:
    code = "from core.engine.folder import PrivateFolder as F; f = F(); print(f.path, flush=True); input()"
    dead, living = (
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    assert dead.stdout and living.stdout and living.stdin and dead.stdin
    left, used = Path(dead.stdout.readline().strip()), Path(living.stdout.readline().strip())
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert left.is_dir()
    PrivateFolder().close()
    assert not left.exists()
    assert used.is_dir()
    living.communicate("\n")
    dead.communicate()
    PrivateFolder().close()
    assert not used.exists()


def test_a_folder_that_is_being_made_is_not_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process sweeps between all that is done to make it."""
    lock = fcntl.flock

    def sweep() -> None:
        code = "from core.engine.folder import PrivateFolder as F; F().close()"
        subprocess.run([sys.executable, "-c", code], check=True)

    def slowly(fd: int, how: int) -> None:
        sweep()
        lock(fd, how)
        sweep()

    monkeypatch.setattr(fcntl, "flock", slowly)
    folder = PrivateFolder()
    assert folder.path.is_dir() and folder.path.name.startswith("palaver-engine-")
    assert sorted(file.name for file in folder.path.iterdir()) == ["lock"]
    folder.close()
    assert not folder.path.exists()
