"""A process that writes a journal, on a disk that fails when told to, and that can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
WRITER = """
import asyncio, sys
from datetime import UTC, datetime
from core.journal import database
from core.journal.journal import JournalBusy, open_journal
from core.messages import Author, Channel, Message

database.RESCUE_EVERY = 1.0

async def main():
    journal = await open_journal(sys.argv[1])
    number, told = int(sys.argv[2]), ""
    print("open", flush=True)
    while True:
        batch = [str(number + place) for place in range(3)]
        messages = [Message(Channel("test", "a"), id, Author("u", "u"), "x" * 200, datetime.now(UTC)) for id in batch]
        try:
            for request in (await journal.receive(*messages, deadline=60)).asked:
                print(request.message.id, flush=True)
            number, told = number + 3, ""
        except JournalBusy as error:
            if told != str(error):
                told = str(error)
                print("busy:", error, flush=True)
            await asyncio.sleep(0.05)

asyncio.run(main())
"""


@contextlib.contextmanager
def writer(url: str, first: int = 0, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Prints "open", then the id of each message whose commit returned, "busy: …" when none does; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, url, str(first)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        line = process.stdout.readline()
        assert line == "open\n", process.communicate()
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def shim(folder: Path) -> Path:
    """The library to preload, compiled."""
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library
