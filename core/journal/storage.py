"""The file under the journal: migrated, checked, copied while in use, put back when it breaks.

An empty journal never takes the place of one that stood here: a file that is missing or corrupt is replaced by the
newest good copy beside it (`NAME.backups/`), or the start is refused with what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, inspect, text
from sqlalchemy.engine import URL

from core.journal.database import JournalBusy, JournalError, WrongAddress, away, busy, file_of, open_database

log = logging.getLogger(__name__)

KEEP = 5
LOG_EMPTY_WITHIN = 10.0
"""Seconds that who reads or writes may take."""
TABLES = {"alembic_version", "messages", "replies", "channels"}
"""What the journals of all versions have."""
MIGRATIONS = Path(__file__).parent / "migrations"
FOREIGN = (
    "DATABASE_URL: that database holds other tables and no journal; name an empty one, for example sqlite:///palaver.db"
)
HELD = {"": (0x40000002, 510), "-shm": (128, 1)}
"""What of a file SQLite locks for as long as it is open: sqlite.org/fileformat2, and os_unix.c for its index."""
WRITTEN = ("UTF8", "SQL_ASCII")  # the encodings of PostgreSQL in which every text can stand
BEHIND = """
SELECT setval(counter, newest)
FROM (SELECT pg_get_serial_sequence('{0}', 'id')::regclass AS counter, max(id) AS newest FROM {0}) AS copied
WHERE newest > coalesce(pg_sequence_last_value(counter), 0)
"""
"""Rows that were copied there, as from SQLite, have not counted up: what came next would be taken for known."""
MIGRATING = 0x70616C61766572  # PostgreSQL's advisory lock: two processes that start together migrate one by one


def prepare(file: Path) -> None:
    """Before opening: the folder exists, and the file is whole or was replaced by its newest good copy."""
    if not file.parent.is_dir():
        raise WrongAddress(f"DATABASE_URL: the folder {file.parent} does not exist; make it, or name another")
    if file.is_dir():
        raise WrongAddress(f"DATABASE_URL: {file} is a folder; name a file in it, for example {file / 'palaver.db'}")
    missing = not file.exists() or file.stat().st_size == 0
    if missing and _locked(file, "-shm"):
        raise JournalError(
            f"{file} was deleted under a process that has it open still; a palaver saves it and ends, so try again then"
        )
    problems = [] if missing else _problems(file)
    if not problems and not missing and (tables := _tables(file)):
        if not TABLES & tables:  # opening it as a journal would already change it
            raise WrongAddress(FOREIGN)
        if not (problems := _lacking(tables)):
            return
    copy = newest_good(file)
    if copy:
        restore(file, copy)
        log.warning("%s: %s; restored %s, made then", file, problems[0] if problems else "missing", copy.name)
    elif problems:
        raise JournalError(
            f"{file} is corrupt and has no good copy in {copies(file).name}/ ({problems[0]}); put a copy there and run "
            "palaver journal restore, or move the file away to begin an empty journal"
        )
    elif missing and (left := _left(file)):
        raise JournalError(
            f"{file} is missing, but {left.name} shows that a journal stood there; put both back or run "
            "palaver journal restore COPY, or move that file away to begin an empty journal"
        )
    elif missing:
        with contextlib.suppress(OSError):  # why it cannot be made is told when it is opened
            file.touch(0o600)  # what people say is for nobody else on this machine


def _left(file: Path) -> Path | None:
    """What a journal that is gone leaves beside it: its log, or the copy that was to take its place."""
    found = (file.with_name(file.name + suffix) for suffix in ("-wal", ".restoring"))
    return next((left for left in found if left.exists() and left.stat().st_size), None)


def _lacking(tables: set[str]) -> list[str]:
    """What a journal should have and this file has not."""
    return [f"table {name} is missing" for name in sorted(TABLES - tables)] if TABLES & tables else ["it is no journal"]


def _tables(file: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(file, timeout=30)) as connection:
        return {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


async def migrate(url: URL, progress: Callable[[str], None]) -> None:
    """Bring the tables to this version, all in one transaction. Raises JournalError; JournalBusy where PostgreSQL is
    away."""
    database = open_database(url, writes=True)
    try:
        await database.run(lambda connection: _upgrade(connection, progress))
    except JournalError:
        raise
    except CommandError as error:
        raise JournalError(
            f"the journal was written by a newer Palaver ({error}); start that version, or restore an older copy"
        ) from None
    except Exception as error:
        where = file_of(url) or url.host or url.query.get("host") or os.getenv("PGHOST", "localhost")
        if isinstance(where, tuple):
            where = ", ".join(where)
        line = f"the journal cannot be opened at {where}: {busy(error) or error}"
        if getattr(getattr(error, "orig", None), "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY:
            line = f"{where} cannot be written; give it to who runs palaver"
        if getattr(getattr(error, "orig", None), "sqlstate", "") == "42501":
            line += "; let the role own its database and all that is in it"
        raise (JournalError if file_of(url) or not away(error) else JournalBusy)(line) from error
    finally:
        await database.dispose()


def _upgrade(connection: Connection, progress: Callable[[str], None]) -> None:
    server = connection.dialect.name == "postgresql"
    if server:
        connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATING})"))
        if (encoding := connection.execute(text("SHOW server_encoding")).scalar_one()) not in WRITTEN:
            raise WrongAddress(
                f"DATABASE_URL: {encoding}, as that database has it, lacks most letters; make one in UTF8"
            )
    tables = set(inspect(connection).get_table_names())
    if tables and not TABLES & tables:
        raise WrongAddress(FOREIGN)
    if tables and (lacking := _lacking(tables)):
        raise JournalError(f"the journal is not whole, {lacking[0]}; restore all of it, or name an empty database")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    if tables:
        progress("the journal is checked for migrations")
    command.upgrade(config, "head")
    for table in ("messages", "replies") if server else ():
        connection.execute(text(BEHIND.format(table)))
    connection.execute(text("UPDATE alembic_version SET version_num = '' WHERE 1 = 0"))  # may we write?


def parts(file: Path) -> list[Path]:
    """What a journal in use consists of."""
    return [file.with_name(file.name + suffix).resolve() for suffix in ("", "-wal", "-shm")]


def copies(file: Path) -> Path:
    """The folder of the copies."""
    return file.with_name(file.name + ".backups")


def newest_good(file: Path) -> Path | None:
    """The newest copy without a problem."""
    return next((copy for copy in reversed(_kept(file)) if not _bad(copy)), None)


def _kept(file: Path) -> list[Path]:
    """The copies beside the file, oldest first, whatever people named theirs."""
    folder = copies(file)
    try:
        found = [folder / name for name in os.listdir(folder) if name.endswith(".db")]
        return sorted(found, key=lambda copy: copy.stat().st_mtime_ns)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise JournalError(f"{folder} cannot be read ({error.strerror}); give it to who runs palaver") from None


def _bad(copy: Path) -> str:
    """Why it cannot take a journal's place; "" when it can."""
    try:
        if problems := _problems(copy):
            return f"is corrupt itself: {problems[0]}"
        return "is no copy of a journal" if _lacking(_tables(copy)) else ""
    except JournalError as error:
        return f"is of no use: {error}"


def restore(file: Path, copy: Path | None = None) -> Path:
    """Put `copy` (default: the newest good one) in place of `file`, which is moved aside; the process using it must
    have stopped. Returns the copy. Raises JournalError."""
    if copy is None:
        copy = newest_good(file)
    elif not copy.is_file():
        raise JournalError(f"{copy} is no file; name a copy, or leave it out for the newest in {copies(file)}")
    if copy is None:
        raise JournalError(f"there is no good copy in {copies(file)}")
    if why := _bad(copy):
        raise JournalError(f"{copy} {why}")
    if in_use(file):
        raise JournalError(f"{file} is in use; stop palaver, restore, and start it again")
    fresh = file.with_name(file.name + ".restoring")
    _drop(fresh)
    try:
        with _reading(copy) as reader:
            _copy(reader, fresh)
        _hand_over(fresh, file)
    except (OSError, sqlite3.Error) as error:
        _drop(fresh)
        raise JournalError(f"{copy} could not be copied to {file.parent}: {error}") from error
    _aside(file, "replaced", "", "-wal", "-shm")
    os.replace(fresh, file)
    _sync(file.parent)
    return copy


def _aside(file: Path, why: str, *suffixes: str) -> None:
    aside = f".{why}-{_stamp()}"
    for suffix in suffixes:
        old = file.with_name(file.name + suffix)
        if old.exists():
            old.rename(old.with_name(old.name + aside))


def rescue(file: Path, connection: sqlite3.Connection) -> str:
    """Save what is behind `connection`, whose file was deleted or replaced, where the next start finds it; what was
    done, one line. Raises JournalError."""
    replaced = _stands(file)
    target = file.with_name(f"{file.name}.replaced-{_stamp()}") if replaced else copies(file) / f"{_stamp()}.db"
    try:
        _save(connection, target)
        if not replaced:
            _settle(file, target)
        _aside(file, "replaced", "-wal", "-shm")  # the log is of the old file: played into another, it would spoil that
    except OSError as error:
        raise JournalError(f"{file.parent}: {error}") from error
    if replaced:
        return (
            f"{file} was replaced under this process, which ends here; what stood in it is {target}, and "
            f"palaver journal restore {target} takes it back"
        )
    return f"{file} was deleted under this process, which ends here; the next start takes up what stood in it, {target}"


def _stands(file: Path) -> bool:
    """Would a start take this file as it is? Its log is not looked at: that is another file's."""
    try:
        with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?immutable=1", uri=True)) as connection:
            rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            return bool(rows) and connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
    except sqlite3.Error:
        return False


def in_use(file: Path) -> bool:
    """Does another process have it open, even if it was deleted? Not to be asked where this one has: that would drop
    its locks."""
    return any(_locked(file, suffix) for suffix in HELD)


def _locked(file: Path, suffix: str) -> bool:
    held = file.with_name(file.name + suffix)
    start, length = HELD[suffix]
    try:
        with held.open("rb+") as opened:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise JournalError(f"{held} cannot be opened: {error}") from error
    return False


async def check(file: Path) -> list[str]:
    """Problems in a file in use, [] when it is whole; in a thread, since it reads all of it."""
    return await asyncio.to_thread(lambda: _problems(file, "integrity_check") or _lacking(_tables(file)))


async def backup(file: Path, path: Path | None = None) -> Path:
    """A copy of a file in use, kept only if it is whole; without a `path` the newest few stay beside the file."""
    return await asyncio.to_thread(_backup, file, path)


def _backup(file: Path, path: Path | None) -> Path:
    target = path or copies(file) / f"{_stamp()}.db"
    if target.exists() and not target.is_file():
        raise JournalError(f"{target} is no file that can be replaced; name one, for example palaver-copy.db")
    if target.resolve() in parts(file):
        raise JournalError(f"{target} is the journal itself: name another file for the copy")
    if target.exists() and target.stat().st_size and (why := _bad(target)):
        raise JournalError(f"{target} stands there already and {why}: name another file for the copy")
    try:
        if lacking := _lacking(_tables(file)):
            raise JournalError(f"{file} is not copied, the older copies stay: {lacking[0]}")
        if path is None and shutil.disk_usage(file.parent).free < 2 * file.stat().st_size:
            raise JournalError(f"{file} is not copied: it would nearly fill its disk, and then take nothing; make room")
        with _reading(file) as reader:
            _save(reader, target)
        if path is None:
            _settle(file, target)
    except (OSError, sqlite3.Error) as error:
        raise JournalError(f"no copy could be made at {target.parent}: {error}") from error
    return target


def _settle(file: Path, copy: Path) -> None:
    """It is the newest from now on, also where a clock that was wrong made one for a time to come; the oldest go that
    have no name of people's own."""
    for made in (copy.parent, copy):
        _hand_over(made, file)
    newest = max((other.stat().st_mtime_ns for other in _kept(file) if other != copy), default=0)
    if newest >= copy.stat().st_mtime_ns:
        os.utime(copy, ns=(newest + 1, newest + 1))
    for old in [kept for kept in _kept(file) if re.fullmatch(r"[\d-]+", kept.stem)][:-KEEP]:
        old.unlink(missing_ok=True)
    for half in copies(file).glob("*.part*"):  # of a process that ended in the middle of it
        with contextlib.suppress(FileNotFoundError):
            if half.stat().st_mtime < time.time() - 86_400:
                half.unlink()


def _hand_over(made: Path, file: Path) -> None:
    """What root makes beside a service's journal is the service's."""
    if os.geteuid() == 0:
        owner = (file if file.exists() else file.parent).stat()
        os.chown(made, owner.st_uid, owner.st_gid)


def _save(reader: sqlite3.Connection, target: Path) -> None:
    """A checked copy. Raises JournalError."""
    fresh = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _drop(fresh)
        _copy(reader, fresh)
        if problems := _problems(fresh, "integrity_check"):
            raise JournalError(f"the copy is not whole, the older ones stay: {problems[0]}")
        os.replace(fresh, target)
    except (OSError, sqlite3.Error) as error:
        raise JournalError(f"no copy could be made at {target.parent}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            _drop(fresh)
    _sync(target.parent)


def _drop(half: Path) -> None:
    """With what SQLite leaves beside it where the disk was full."""
    for left in (half, half.with_name(half.name + "-journal")):
        left.unlink(missing_ok=True)


def empty_log(file: Path) -> None:
    """What was deleted stands in the log, too, until others write over it: all goes into the file, and the log is cut.
    https://www.sqlite.org/pragma.html#pragma_wal_checkpoint"""
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=LOG_EMPTY_WITHIN)) as connection:
            ((refused, *_),) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        why = "it is in use" if refused else ""
    except sqlite3.Error as error:
        why = str(error)
    if why:
        log.warning("%s-wal cannot be emptied (%s): what was deleted stands there until it is written over", file, why)


def _reading(file: Path) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True))


def _copy(reader: sqlite3.Connection, target: Path) -> None:
    """SQLite's online copy, on disk when it returns."""
    with contextlib.closing(sqlite3.connect(target)) as writer:
        os.chmod(target, 0o600)
        reader.backup(writer)  # in one step: in several, each write of others makes it begin anew
        writer.execute("PRAGMA journal_mode=DELETE")
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def _problems(file: Path, pragma: str = "quick_check") -> list[str]:
    """What SQLite finds wrong."""
    try:
        # not read-only: a write-ahead log that a killed process left must be played first
        with contextlib.closing(sqlite3.connect(file, timeout=30)) as connection:
            rows = connection.execute(f"PRAGMA {pragma}(20)").fetchall()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
            hint = "is the disk full, or its folder not ours to write in?"
            raise JournalError(f"{file} cannot be read: {error}; {hint}") from error
        return [str(error)]
    return [row[0] for row in rows if row[0] != "ok"]


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")


def _sync(folder: Path) -> None:
    """A rename is on disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
