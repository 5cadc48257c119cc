"""SQLite's journal into PostgreSQL: all of it in one transaction, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, exists, func, insert, select
from sqlalchemy.engine import URL

from core.journal import storage
from core.journal.database import JournalError, WrongAddress, busy, file_of, open_database, parse
from core.journal.rows import plain
from core.journal.schema import channels, messages, replies, sessions, watermarks

TABLES = (messages, replies, channels, watermarks, sessions)
"""Leases are not taken along: nobody who serves this journal serves that one."""
AT_ONCE = 1000
"""Rows in one statement."""


async def transfer(file: Path, url: str, progress: Callable[[int, int], None] = lambda done, of: None) -> int:
    """Copy the journal in `file`, which nobody may have open, into PostgreSQL's empty one at `url`; how many messages.
    `progress` hears how many rows were copied, of how many. The file stays, and ids go on from the highest at the next
    start (storage.BEHIND). Raises JournalError."""
    address = parse(url)
    if file_of(address):
        raise WrongAddress("DATABASE_URL: set it to PostgreSQL's address; one file takes another's place by restore")
    _look(file)
    if problems := await storage.check(file):
        raise JournalError(f"{file} is no whole journal: {problems[0]}")
    source = URL.create("sqlite", database=str(file))
    for place in (source, address):
        await storage.migrate(place, lambda line: None)
    reader, writer = create_engine(source), open_database(address, writes=True)
    try:
        with reader.connect() as old:
            count = await writer.run(lambda new: _copy(old, new, progress))
    except JournalError:
        raise
    except Exception as error:
        why = str(busy(error) or getattr(error, "orig", None) or error)
        raise JournalError(f"nothing was copied: {' '.join(why.split())[:300]}") from error
    finally:
        await writer.dispose()
        reader.dispose()
    return count


def _look(file: Path) -> None:
    if not file.is_file():
        raise JournalError(f"{file} is no file; name SQLite's journal, for example palaver.db")
    if storage.in_use(file):
        raise JournalError(f"{file} is in use; stop palaver first")


def _copy(old: Connection, new: Connection, progress: Callable[[int, int], None]) -> int:
    counts = {table.name: old.execute(select(func.count()).select_from(table)).scalar_one() for table in TABLES}
    done = 0
    for table in TABLES:
        if new.execute(select(exists(select(table)))).scalar_one():
            raise WrongAddress("DATABASE_URL: that journal is not empty; name an empty database")
        rows = old.execution_options(yield_per=AT_ONCE).execute(select(table)).mappings()
        for page in rows.partitions():
            new.execute(insert(table), [{name: _held(value) for name, value in row.items()} for row in page])
            progress(done := done + len(page), sum(counts.values()))
    return counts[messages.name]


def _held(value: Any) -> Any:
    """SQLite holds text that PostgreSQL does not."""
    return plain(value) if isinstance(value, str) else value
