"""Connections: one writer whose transactions are shared by all who write at the same moment, and a few readers.

A group of writes costs one commit (one fsync); each caller goes on only after it. Whatever keeps a commit from
happening (locked, full, gone) is Busy: nothing of the group was stored, the next call connects anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, cast

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import create_async_engine

from core.delivery import NotAccepted

log = logging.getLogger(__name__)
T = TypeVar("T")
Rescue = Callable[[sqlite3.Connection], str]

EXAMPLES = "for example sqlite:///palaver.db or postgresql+asyncpg://palaver:PASSWORD@localhost/palaver"
SSL = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
FSYNC_FAILED = (sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC)
BAD_VALUE = (sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE)
BAD_VALUE_CLASS = ("21", "22", "23", "54")  # PostgreSQL's: cardinality, data, integrity, program limits
BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
MENDS = "the next start puts the newest good copy in its place"
GROUP = 256
RESCUE_EVERY = 10.0
"""Seconds after which saving a file that is gone from its place is tried again."""
READ_ONLY = "25006"
AWAY_CLASS = ("08", "25", "53", "57")
"""PostgreSQL's: no connection, read-only, no room, starting or stopping. The others are for a person to mend."""
NO_PRIMARY = "target attribute requirement"  # the driver says so, before the server could
BEGINS = 100  # tries, for 5 seconds together
ASK_FOR = 30.0
"""Seconds in which PostgreSQL may come back and say whether a commit that broke off took place."""


class JournalError(Exception):
    """The journal cannot be used; str() is one line that says what to do."""


class WrongAddress(JournalError):
    """DATABASE_URL must be mended first."""


class JournalBusy(JournalError, NotAccepted):
    """Not now; nothing was stored."""


def parse(url: str) -> URL:
    """An address in SQLAlchemy's form, with the drivers we speak. Raises WrongAddress."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise WrongAddress(f"DATABASE_URL: is no database address; {EXAMPLES}") from None
    drivers = {
        "sqlite": "sqlite",
        "sqlite+aiosqlite": "sqlite",
        "postgres": "postgresql+asyncpg",
        "postgresql": "postgresql+asyncpg",
        "postgresql+asyncpg": "postgresql+asyncpg",
    }
    if parsed.drivername not in drivers:
        raise WrongAddress(f"DATABASE_URL: only SQLite and PostgreSQL hold a journal; {EXAMPLES}")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise WrongAddress(f"DATABASE_URL: a journal in memory would lose everything; name a file, {EXAMPLES}")
    parsed = parsed.set(drivername=drivers[parsed.drivername])
    if parsed.get_backend_name() == "sqlite":
        if "?" in url:
            raise WrongAddress("DATABASE_URL: for SQLite it is the file's path alone, in which there can be no ?")
        return parsed
    given = {
        {"sslmode": "ssl"}.get(name, name): value for name, value in parsed.query.items()
    }  # libpq's name, asyncpg's
    if unknown := sorted(given.keys() - {"ssl", "host", "port"}):
        raise WrongAddress(f"DATABASE_URL: {', '.join(unknown)} cannot be given there; sslmode, host and port can")
    if given.get("ssl", "prefer") not in SSL:
        raise WrongAddress(f"DATABASE_URL: sslmode must be one of {', '.join(SSL)}")
    parsed = parsed.set(query=given)
    try:
        ports = parsed.get_dialect()().create_connect_args(parsed)[1].get("port", 1)
    except ArgumentError as error:
        raise WrongAddress(f"DATABASE_URL: {error}") from None
    if not all(0 < port < 65536 for port in ([ports] if isinstance(ports, int) else ports)):
        raise WrongAddress("DATABASE_URL: a port is a number up to 65535")
    return parsed


def file_of(url: URL) -> Path | None:
    """SQLite's file; None for PostgreSQL."""
    try:
        return Path(url.database).absolute() if url.get_backend_name() == "sqlite" and url.database else None
    except FileNotFoundError:
        raise JournalError("the working directory is gone; change into one that exists") from None


class Database(Protocol):
    """Where transactions run. `work` is plain and synchronous, the same for both kinds."""

    async def run(self, work: Callable[[Connection], T]) -> T:
        """`work` in one transaction, committed when this returns."""
        ...

    async def dispose(self) -> None: ...


def open_database(url: URL, *, writes: bool, rescue: Rescue | None = None) -> Database:
    """One connection that begins as a writer, or some that read. `rescue`: see SQLite."""
    return SQLite(url, writes, rescue) if file_of(url) else PostgreSQL(url, writes)


class SQLite:
    """Threads of its own: through an async driver every statement crosses threads four times, here a transaction
    crosses once (a fifth of the processor's time per message)."""

    def __init__(self, url: URL, writes: bool, rescue: Rescue | None = None) -> None:
        """`rescue` saves everything from the open connection when its file is gone from its place, by a hand or a
        script: what is written from then on would be lost with this process. It says what it did, or raises
        JournalError."""
        self._file, self._rescue = url.database or "", rescue
        self._place: tuple[int, int] | None = None  # device and inode
        self._not_saved, self._again = "", 0.0
        size = 1 if writes else 2
        self._engine = create_engine(url, pool_size=size, max_overflow=0)
        event.listen(self._engine, "connect", _set_up_sqlite)
        begin = "BEGIN IMMEDIATE" if writes else "BEGIN"
        event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        self._threads = ThreadPoolExecutor(size, "journal")

    async def run(self, work: Callable[[Connection], T]) -> T:
        def transaction() -> T:
            if self._rescue and self._gone():
                self._end(self._rescue)
            try:
                with self._engine.begin() as connection:
                    return work(connection)
            except DBAPIError as error:
                if self._rescue and is_damaged(error.orig):
                    end(f"{self._file} is damaged, so this process ends here: {MENDS} ({error.orig})")
                raise

        return await asyncio.get_running_loop().run_in_executor(self._threads, transaction)

    def _gone(self) -> bool:
        """Is another file in its place, or none? A few microseconds."""
        if self._place is None:
            self._engine.connect().close()  # the pool keeps it open
        try:
            found = os.stat(self._file)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False  # who can tell?
        self._place = self._place or (found.st_dev, found.st_ino)
        return self._place != (found.st_dev, found.st_ino)

    def _end(self, rescue: Rescue) -> None:
        """This process, once all is saved; until then nothing is written any more."""
        if time.monotonic() >= self._again:
            open_ = self._engine.raw_connection()
            try:
                said = rescue(cast(sqlite3.Connection, open_.driver_connection))
            except JournalError as error:
                self._not_saved, self._again = str(error), time.monotonic() + RESCUE_EVERY
                log.error("%s is gone from its place, and cannot be saved yet: %s", self._file, error)
            else:
                end(said)
            finally:
                open_.close()
        raise JournalBusy(f"{self._file} is gone from its place, and cannot be saved yet: {self._not_saved}")

    async def dispose(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, self._engine.dispose)
        self._threads.shutdown(wait=False)


class PostgreSQL:
    def __init__(self, url: URL, writes: bool) -> None:
        self._writes = writes
        self._engine = create_async_engine(
            url,
            pool_size=1 if writes else 4,
            max_overflow=0,
            pool_timeout=30,
            pool_pre_ping=True,
            connect_args={
                "timeout": 5,
                "command_timeout": 20,
                "target_session_attrs": "read-write",  # of several hosts the primary, wherever it is now
                "server_settings": {
                    "application_name": "palaver",
                    "synchronous_commit": "on",
                    "statement_timeout": "15000",
                    "lock_timeout": "5000",
                    "idle_in_transaction_session_timeout": "30000",
                },
            },
        )

    async def run(self, work: Callable[[Connection], T]) -> T:
        if not self._writes:
            async with self._engine.begin() as connection:
                return await connection.run_sync(work)
        number = 0  # of the transaction, once all but its commit is done
        try:
            async with self._engine.begin() as connection:
                result = await connection.run_sync(work)
                number = (await connection.exec_driver_sql("SELECT txid_current()")).scalar_one()
        except Exception as error:
            if getattr(getattr(error, "orig", None), "sqlstate", "") == READ_ONLY:
                await self._engine.dispose()  # it says so for ever; a new connection may find who is the primary now
            if not (number and await self._committed(number)):
                raise
        return result

    async def _committed(self, number: int) -> bool:
        """The connection broke in the middle of a commit: the server knows how it ended, once it can be asked. Where it
        cannot, this process ends: what it knows no more stands in the journal, and the next start takes it up."""
        end = asyncio.get_running_loop().time() + ASK_FOR
        while True:
            try:
                async with self._engine.connect() as connection:
                    asked = await connection.exec_driver_sql(f"SELECT txid_status({number:d})")
                    if (status := asked.scalar_one()) != "in progress":
                        return bool(status == "committed")
            except Exception as error:
                log.warning("did a commit arrive? the database cannot be asked yet: %s", error)
            if asyncio.get_running_loop().time() > end:
                log.critical("whether a commit arrived is unknown, so this process ends here")
                logging.shutdown()
                os._exit(os.EX_TEMPFAIL)
            await asyncio.sleep(0.5)

    async def dispose(self) -> None:
        await self._engine.dispose()


def _begin_wal(cursor: Any) -> None:
    """While another process does it, SQLite says at once that the file is locked, whatever the timeout."""
    for attempt in range(BEGINS):
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or attempt == BEGINS - 1:
                raise
        time.sleep(0.05)


def _set_up_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver must not begin behind our back: the "begin" event does
    cursor = connection.cursor()
    _begin_wal(cursor)
    for pragma in (
        "synchronous=FULL",
        "busy_timeout=5000",
        "foreign_keys=ON",
        "secure_delete=ON",
        "temp_store=MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def busy(error: BaseException) -> JournalBusy | None:
    """What kept the database from working, as one line; None when the fault is in what was to be written.

    In doubt it is the database: a message that is not acknowledged comes again, one given up does not.
    """
    original = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(original, "sqlite_errorcode", None)
    if code in FSYNC_FAILED:
        end(f"fsync failed: what the disk holds is unknown, so this process ends here ({original})")
    if isinstance(error, DBAPIError) and not error.connection_invalidated:
        state = getattr(original, "sqlstate", None)
        if (code is not None and code & 0xFF in BAD_VALUE) or (state is not None and state[:2] in BAD_VALUE_CLASS):
            return None
        if code is None and state is None:  # the driver itself said no, before the database heard of it
            return None if "argument" in str(original) or "parameter" in str(original) else _not_now(original)
        return _not_now(original)
    if isinstance(error, DBAPIError | OSError | PoolTimeout | asyncio.TimeoutError | sqlite3.Error):
        return _not_now(original)
    return None


def away(error: BaseException) -> bool:
    """Could PostgreSQL not be reached, or not work yet?"""
    original = getattr(error, "orig", None) or error
    if state := getattr(original, "sqlstate", None):
        return state[:2] in AWAY_CLASS
    return isinstance(error, OSError | asyncio.TimeoutError) or NO_PRIMARY in str(original)


def is_damaged(error: BaseException | None) -> bool:
    """Is it SQLite's file that is? No try again mends that."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in BROKEN


def end(why: str) -> NoReturn:
    """This process, for the sake of the journal's file."""
    log.critical("%s", why)
    logging.shutdown()
    os._exit(74)


def _not_now(error: BaseException | None) -> JournalBusy:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if is_damaged(error):
        text += f"; {MENDS}"
    return JournalBusy(f"the database does not work now: {text}")


@dataclass
class _Write:
    work: Callable[[Connection], Any]
    done: asyncio.Future[Any]


class Writer:
    """`await writer.do(work)`: `work(connection)` ran, and its commit is on disk."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._writes: asyncio.Queue[_Write | None] = asyncio.Queue()  # None: close
        self._task = asyncio.create_task(self._run())

    async def do(self, work: Callable[[Connection], T]) -> T:
        """Raises JournalBusy when nothing was stored, or what `work` raised. Cancelled: the outcome is unknown."""
        if self._task.done():
            raise JournalError("the journal is closed")
        write = _Write(work, asyncio.get_running_loop().create_future())
        self._writes.put_nowait(write)
        result: T = await write.done
        return result

    async def aclose(self) -> None:
        """What was asked for is finished first."""
        self._writes.put_nowait(None)
        await asyncio.gather(self._task, return_exceptions=True)
        await self._database.dispose()

    async def _run(self) -> None:
        group: list[_Write | None] = []
        try:
            while None not in group:
                group = [await self._writes.get()]
                while len(group) < GROUP and not self._writes.empty():
                    group.append(self._writes.get_nowait())
                if writes := [write for write in group if write]:
                    await self._commit(writes)
        finally:
            while not self._writes.empty():
                group.append(self._writes.get_nowait())
            for write in group:
                if write and not write.done.done():
                    write.done.set_exception(JournalBusy("the journal closed"))

    async def _commit(self, group: list[_Write]) -> None:
        """All in one transaction; when one of several raises, each in its own, so that it harms nobody else."""
        try:
            results = await self._database.run(lambda connection: [write.work(connection) for write in group])
        except Exception as error:
            failure = busy(error)
            if failure is None and len(group) > 1:
                for write in group:
                    await self._commit([write])
                return
            for write in group:
                if not write.done.done():
                    write.done.set_exception(failure or error)
        else:
            for write, result in zip(group, results, strict=True):
                if not write.done.done():  # a caller that was cancelled waits no more
                    write.done.set_result(result)
