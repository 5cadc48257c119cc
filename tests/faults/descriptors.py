"""No file descriptor left: what stands open stays open, nothing new can be opened, until there are some again."""

from __future__ import annotations

import asyncio
import resource
import socket
from pathlib import Path

from tests.faults.kills import Tally, close, open_town
from tests.faults.town import Town


async def run_out(folder: Path, seed: int, seconds: float, webhook: bool = False, engine: str = "echo") -> Tally:
    """Everyone asks while every connection is cut and none can be made, for so long; then they can again."""
    tally, settings = Tally(), {"ENGINE": engine}
    if webhook:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        settings |= {
            "TELEGRAM_WEBHOOK_URL": f"http://127.0.0.1:{port}/hook",
            "TELEGRAM_WEBHOOK_PORT": str(port),
        }
    async with Town(folder, seed, settings, private=6, rooms=3) as town:
        await open_town(town)
        limit(town, 1)
        await town.cut_all()
        calls = len(town.telegram.calls), len(town.discord.calls)
        for place in town.places:
            town.say(place)
        await asyncio.sleep(seconds)
        if (len(town.telegram.calls), len(town.discord.calls)) != calls:
            tally.broken.append("it called though it had no descriptor to call with")
        limit(town, 1024)
        await close(town, tally, engine == "echo")
    return tally


def limit(town: Town, count: int) -> None:
    """So many file descriptors the process may have from now on."""
    assert town.process is not None
    hard = resource.prlimit(town.process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(town.process.pid, resource.RLIMIT_NOFILE, (count, hard))
