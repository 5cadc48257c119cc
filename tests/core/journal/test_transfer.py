"""A journal moves from SQLite to PostgreSQL: with all that is in it, or not at all."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from core.journal.database import JournalError
from core.journal.journal import Journal, open_journal
from core.journal.transfer import transfer
from tests.bots.process import palaver
from tests.core.journal.test_journal import HERE, THERE, answered, ask, message, states


@pytest.fixture
async def file(tmp_path: Path) -> Path:
    """A journal with something of everything in it, of text also what PostgreSQL does not hold."""
    journal = await open_journal(f"sqlite:///{tmp_path}/old.db")
    for id in ("1", "2", "3"):
        for reply in await answered(journal, id):
            await journal.sent(reply, f"platform-{id}")
    await answered(journal, "4", THERE)  # not sent yet
    await journal.reset(THERE)
    await ask(journal, "5", text="what waits\0")
    await journal.receive(message("6", kind="heard"), deadline=9.0, marks={HERE: "6"})
    await journal.identified("discord")
    await journal.aclose()
    with contextlib.closing(sqlite3.connect(tmp_path / "old.db")) as opened, opened:
        opened.execute("UPDATE messages SET author_name = 'An' || char(0) || 'na' WHERE platform_id = '1'")
    return tmp_path / "old.db"


async def all_of(journal: Journal) -> list[object]:
    return [
        await states(journal),
        await journal.counts(),
        [line async for line in journal.export(HERE)],
        [await journal.history(where) for where in (HERE, THERE)],
        [(reply.id, reply.text, reply.nonce, reply.channel) for reply in await journal.due()],
        await journal.watermarks(HERE.platform),
        await journal.identified("discord", new=False),
    ]


async def contents(url: str) -> list[object]:
    journal = await open_journal(url)
    try:
        return await all_of(journal)
    finally:
        await journal.aclose()


async def test_all_of_it_moves_and_goes_on_there(tmp_path: Path, file: Path, postgres_url: str) -> None:
    before = file.read_bytes()
    code, output, errors = await palaver(tmp_path, "journal", "import", "old.db", DATABASE_URL=postgres_url)
    assert (code, output) == (0, "6 messages copied\n"), errors
    assert "copying" in errors and "100%" in errors
    assert file.read_bytes() == before
    with contextlib.closing(sqlite3.connect(file)) as opened, opened:
        opened.execute("UPDATE messages SET author_name = 'Anna' WHERE platform_id = '1'")
    assert await contents(postgres_url) == await contents(f"sqlite:///{file}")
    journal = await open_journal(postgres_url)
    assert [request.message.id for request in await journal.backlog(60.0)] == ["5"]
    assert await answered(journal, "7")
    await journal.aclose()


async def refused(file: Path, url: str) -> str:
    with pytest.raises(JournalError) as caught:
        await transfer(file, url)
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_what_breaks_off_leaves_nothing(file: Path, postgres_url: str) -> None:
    with contextlib.closing(sqlite3.connect(file)) as opened, opened:
        opened.execute("UPDATE watermarks SET last_id = ?", ("9" * 200,))  # when all else was copied
    assert "nothing was copied" in await refused(file, postgres_url)
    journal = await open_journal(postgres_url)
    assert await states(journal) == {}
    await journal.aclose()


async def test_what_cannot_be_moved_is_refused(tmp_path: Path, file: Path, postgres_url: str) -> None:
    assert "is no file" in await refused(tmp_path / "none.db", postgres_url)
    assert "set it to PostgreSQL" in await refused(file, f"sqlite:///{tmp_path}/new.db")
    (tmp_path / "noise.db").write_bytes(b"SQLite format 3\0" + bytes(5000))
    assert "is no whole journal" in await refused(tmp_path / "noise.db", postgres_url)
    await transfer(file, postgres_url)
    assert "not empty" in await refused(file, postgres_url)
