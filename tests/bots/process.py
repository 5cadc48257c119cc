"""The program as a person starts it: `python -m bots …` in an empty folder, with nothing set but what the test sets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0
"""Seconds; the machine may be busy."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bots", *arguments]


def environment(**settings: str) -> dict[str, str]:
    """What a shell has, and the echo engine."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ENGINE": "echo", **settings}


async def start(folder: Path, *arguments: str, **settings: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *command(*arguments), cwd=folder, env=environment(**settings), stdin=PIPE, stdout=PIPE, stderr=PIPE
    )


async def palaver(folder: Path, *arguments: str, said: str = "", **settings: str) -> tuple[int, str, str]:
    """Run to the end with `said` as its input: (exit code, output, errors)."""
    process = await start(folder, *arguments, **settings)
    async with asyncio.timeout(PATIENCE):
        output, errors = await process.communicate(said.encode())
    return process.returncode or 0, output.decode(), errors.decode()


@contextlib.asynccontextmanager
async def running(folder: Path, **settings: str) -> AsyncIterator[tuple[Process, str]]:
    """`palaver run`, and the address it printed. Killed when the block ends, if it is still there."""
    process = await start(folder, "run", **{"WEB_PORT": "0", **settings})
    errors = asyncio.create_task(_keep(process))
    try:
        async with asyncio.timeout(PATIENCE):
            assert process.stdout
            line = (await process.stdout.readline()).decode()
        found = re.fullmatch(r"Palaver talks at (http://\S+)\n", line)
        assert found, f"{line!r}\n{(await errors).decode()}"
        yield process, found.group(1)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        print((await errors).decode(), file=sys.stderr)


async def _keep(process: Process) -> bytes:
    assert process.stderr
    return await process.stderr.read()
