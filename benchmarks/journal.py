"""What the journal costs per message: receive, read the history, answer, two states of a delivery.

    python -m benchmarks.journal [DATABASE_URL]

Channels talk at once, each in turn; processor time is this process's, the latencies are those of a whole message.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from core.journal.journal import Journal, JournalError, open_journal
from core.messages import Author, Channel, Message

MESSAGES = 1000


async def talk(journal: Journal, channel: Channel, count: int, seconds: list[float]) -> None:
    for number in range(count):
        began = time.perf_counter()
        message = Message(channel, str(number), Author("u", "Ann"), f"hello {number}", datetime.now(UTC))
        (request,) = (await journal.receive(message, deadline=60)).asked
        await journal.history(channel, before=request.row)
        (reply,) = await journal.answer(request, ["Hello."], spoken="hello .")
        begun = await journal.begin_send(reply)
        assert begun
        await journal.sent(begun, "1")
        seconds.append(time.perf_counter() - began)


async def measure(url: str) -> None:
    journal = await open_journal(url)
    table = Table(title=f"journal, {MESSAGES} messages a row")
    for name in ("channels at once", "messages/s", "processor ms", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right")
    for channels in (1, 10, 100):
        seconds: list[float] = []
        wall, processor = time.perf_counter(), time.process_time()
        places = [Channel("bench", f"{time.time()} {number}") for number in range(channels)]
        await asyncio.gather(*(talk(journal, place, MESSAGES // channels, seconds) for place in places))
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        seconds.sort()
        row = (
            MESSAGES / wall,
            1e3 * processor / MESSAGES,
            1e3 * seconds[len(seconds) // 2],
            1e3 * seconds[-len(seconds) // 100],
        )
        table.add_row(str(channels), *(f"{value:.1f}" for value in row))
    await journal.aclose()
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.journal", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("url", nargs="?", metavar="DATABASE_URL", help="SQLite in a folder of its own when left out")
    url = parser.parse_args().url
    with tempfile.TemporaryDirectory() as folder:
        try:
            asyncio.run(measure(url or f"sqlite:///{folder}/palaver.db"))
        except JournalError as error:
            raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
