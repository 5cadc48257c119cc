"""A private folder in the system's temporary one, gone when it is closed, or swept up after its owner was killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from core.engine.base import EngineClosed

_PREFIX, _UNFINISHED, _LOCK = "palaver-engine-", ".palaver-engine-", "lock"
_LONGEST = 60
"""Bytes of the folder above; a Unix socket's path has about 100 at most."""


class PrivateFolder:
    """`path`, which nobody else may open (0700). Its owner holds a lock on it that ends with the process."""

    def __init__(self) -> None:
        """Raises EngineClosed, one line."""
        self._lock = -1
        made: Path | None = None
        try:
            above = Path(tempfile.gettempdir())
            above = above if len(os.fsencode(above)) <= _LONGEST else Path("/tmp")
            _sweep(above)
            made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=above))
            self._lock = os.open(made / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            # locked before another's sweep sees it
            self.path = made.rename(made.with_name(made.name.removeprefix(".")))
        except OSError as error:
            if made:  # no sweep looks for it
                shutil.rmtree(made, ignore_errors=True)
            if self._lock >= 0:
                os.close(self._lock)
            reason = error.strerror or error
            raise EngineClosed(f"no temporary folder can be made ({reason}): set TMPDIR to one with room") from error

    def close(self) -> None:
        """Remove it with all that is in it. Harmless the second time."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _sweep(above: Path) -> None:
    """Remove what a killed process left; what cannot be locked is in use."""
    for folder in above.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
