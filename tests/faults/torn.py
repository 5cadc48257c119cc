"""Write-ahead logs as a dying machine leaves them: cut off, or with wrong bytes, anywhere."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
from pathlib import Path


class Torn:
    """`file` and its write-ahead log belong to a writer that was killed; copies of both are damaged and opened."""

    def __init__(self, file: Path, work: Path, seed: int) -> None:
        self._file, self._copy, self._dice = file, work / "torn.db", random.Random(seed)
        self.log = file.with_name(file.name + "-wal").read_bytes()
        self._sound: dict[int, int] = {}
        self.whole = self.read(self.log)
        """The ids in the order of their commits."""

    def damaged(self) -> tuple[str, bytes, int]:
        """(what was done, the log, up to which byte it is sound)."""
        at = self._dice.randrange(len(self.log))
        match self._dice.choice(("cut", "flip", "zero", "old")):
            case "cut":
                return f"cut at {at}", self.log[:at], at
            case "flip":
                bit = 1 << self._dice.randrange(8)
                return f"bit {bit} of {at}", self.log[:at] + bytes([self.log[at] ^ bit]) + self.log[at + 1 :], at
            case "zero":
                at = at // 512 * 512
                return f"sector {at} is zero", self.log[:at] + bytes(512) + self.log[at + 512 :], at
            case _:
                rest = self._dice.randbytes(min(4096, len(self.log) - at))
                return f"noise from {at}", self.log[:at] + rest + self.log[at + len(rest) :], at

    def read(self, log: bytes) -> list[str]:
        """The ids SQLite finds with this log. Raises AssertionError when the file is not whole."""
        for path in self._copy.parent.glob("torn.db*"):
            path.unlink()
        shutil.copyfile(self._file, self._copy)
        self._copy.with_name("torn.db-wal").write_bytes(log)
        with contextlib.closing(sqlite3.connect(self._copy)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            return [row[0] for row in database.execute("SELECT platform_id FROM messages ORDER BY id")]

    def _committed(self, sound: int) -> int:
        """How many messages the log holds up to this byte: sqlite.org/fileformat2, "The Write-Ahead Log"."""
        frame = 24 + int.from_bytes(self.log[8:12], "big")
        ends = [at + frame for at in range(32, len(self.log) - frame + 1, frame) if any(self.log[at + 4 : at + 8])]
        end = max((end for end in ends if end <= sound), default=0)
        if end not in self._sound:
            self._sound[end] = len(self.read(self.log[:end]))
        return self._sound[end]

    def check(self) -> None:
        """One state: what is there is what was committed first, and no less than the sound part of the log holds."""
        what, log, sound = self.damaged()
        try:
            found = self.read(log)
            assert found == self.whole[: len(found)], f"{found[:5]}… is no prefix"
            assert len(found) >= self._committed(sound), "commits before the damage are gone"
        except (AssertionError, sqlite3.Error) as error:
            raise AssertionError(f"{what}: {error}") from error
