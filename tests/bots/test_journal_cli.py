"""`palaver journal backup|restore|check` as processes."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from tests.bots.process import palaver, running


async def talked(folder: Path, *lines: str) -> Path:
    """A journal in which these were said; its file."""
    code, _, errors = await palaver(folder, "chat", said="\n".join(lines) + "\n")
    assert code == 0, errors
    return folder / "palaver.db"


def said(file: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(file)) as database:
        return [row[0] for row in database.execute("SELECT text FROM messages ORDER BY id")]


def spoil(file: Path) -> None:
    with file.open("rb+") as opened:
        opened.seek(4096)
        opened.write(b"\x55" * 8192)


async def test_a_copy_goes_and_comes_back(tmp_path: Path) -> None:
    file = await talked(tmp_path, "one")
    code, output, _ = await palaver(tmp_path, "journal", "backup")
    copy = Path(output.strip())
    assert code == 0 and copy.parent == tmp_path / "palaver.db.backups" and said(copy) == ["one"]
    await talked(tmp_path, "two")
    code, output, _ = await palaver(tmp_path, "journal", "backup", "elsewhere/mine.db")
    assert (code, output) == (0, "elsewhere/mine.db\n") and said(tmp_path / "elsewhere/mine.db") == ["one", "two"]
    assert await palaver(tmp_path, "journal", "restore") == (0, f"restored {copy}\n", "")
    assert said(file) == ["one"]
    assert await palaver(tmp_path, "journal", "restore", "elsewhere/mine.db") == (
        0,
        "restored elsewhere/mine.db\n",
        "",
    )
    assert said(file) == ["one", "two"]


async def test_a_check_says_what_is_wrong_and_changes_nothing(tmp_path: Path) -> None:
    file = await talked(tmp_path, "one")
    assert await palaver(tmp_path, "journal", "check") == (0, f"{file} is whole\n", "")
    await palaver(tmp_path, "journal", "backup")
    spoil(file)
    before = file.read_bytes()
    code, output, errors = await palaver(tmp_path, "journal", "check")
    assert code == 1 and output.strip() and errors == ""
    assert file.read_bytes() == before
    code, output, errors = await palaver(tmp_path, "journal")
    assert code == 0 and "restored" in errors and "answered" in output, "a start heals it"


async def test_a_running_palaver_may_be_copied_and_checked_but_not_replaced(tmp_path: Path) -> None:
    file = await talked(tmp_path, "one")
    async with running(tmp_path) as _:
        code, output, errors = await palaver(tmp_path, "journal", "backup")
        assert code == 0 and said(Path(output.strip())) == ["one"], errors
        assert (await palaver(tmp_path, "journal", "check"))[0] == 0
        code, output, errors = await palaver(tmp_path, "journal", "restore")
        assert (code, output) == (75, "")
        assert errors == f"{file} is in use; stop palaver, restore, and start it again\n"
    assert (await palaver(tmp_path, "journal", "restore"))[0] == 0


async def test_no_older_copy_takes_the_place_of_a_journal_that_is_gone_under_a_palaver(tmp_path: Path) -> None:
    file = await talked(tmp_path, "one")
    await palaver(tmp_path, "journal", "backup")
    await talked(tmp_path, "two")
    with contextlib.closing(sqlite3.connect(file)) as holder:
        holder.execute("SELECT * FROM messages").fetchall()
        file.unlink()
        for what, says in (
            (("journal",), "there is no journal at"),
            (("journal", "backup"), "there is no journal at"),
            (("journal", "restore"), "is in use; stop palaver"),
            (("run",), "was deleted under a process"),
        ):
            code, _, errors = await palaver(tmp_path, *what)
            assert code == 75 and says in errors and not file.exists()
    assert (await palaver(tmp_path, "journal", "restore"))[0] == 0 and said(file) == ["one"]


async def test_a_person_is_forgotten_when_that_is_meant(tmp_path: Path) -> None:
    file = await talked(tmp_path, "one")
    with contextlib.closing(sqlite3.connect(file)) as opened:
        [[author]] = opened.execute("SELECT DISTINCT author FROM messages").fetchall()
    who = f"console:{author}"
    assert (await palaver(tmp_path, "journal", "forget", who))[0] == 1, "nobody said yes"
    assert said(file) == ["one"]
    code, _, errors = await palaver(tmp_path, "journal", "forget", who, "--yes")
    assert (code, errors) == (0, "1 messages deleted\n") and said(file) == []
    code, _, errors = await palaver(tmp_path, "journal", "forget", who, "--yes")
    assert (code, errors) == (1, f"the journal has nothing of {who}\n")
    code, _, errors = await palaver(tmp_path, "journal", "forget", "somebody", "--yes")
    assert code == 78 and errors == "a person is written platform:id, for example discord:123, not 'somebody'\n"


@pytest.mark.parametrize(
    ("arguments", "url", "says"),
    [
        (("backup",), "", "there is no journal at"),
        (("check",), "", "there is no journal at"),
        (("restore",), "", "there is no good copy in"),
        (("restore", "nothing.db"), "", "nothing.db is no file"),
        (("backup",), "postgresql://u:hunter2@localhost/x", "its own tool for this: pg_dump"),
        (("restore",), "postgresql://u:hunter2@localhost/x", "its own tool for this: pg_restore"),
    ],
)
async def test_what_cannot_be_done_is_one_line(tmp_path: Path, arguments: tuple[str, ...], url: str, says: str) -> None:
    settings = {"DATABASE_URL": url} if url else {}
    code, output, errors = await palaver(tmp_path, "journal", *arguments, **settings)
    assert code == (78 if url else 75) and output == "" and errors.count("\n") == 1
    assert says in errors and "hunter2" not in errors
    assert list(tmp_path.iterdir()) == []


async def test_a_copy_does_not_take_the_journals_place(tmp_path: Path) -> None:
    before = (await talked(tmp_path, "hello")).read_bytes()
    code, _, errors = await palaver(tmp_path, "journal", "backup", "palaver.db")
    assert code and "is the journal itself: name another file" in errors
    assert (tmp_path / "palaver.db").read_bytes() == before
