"""`palaver journal`: counts, exports, copies, checks, and who is to be forgotten."""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bots.commands import go, read, stop
from core.settings import Settings

if TYPE_CHECKING:
    from core.journal.journal import Journal

journal_cli = typer.Typer(help="The journal, where every message and reply stands: counts, exports, copies, checks.")


@journal_cli.callback(invoke_without_command=True)
def journal_counts(context: typer.Context) -> None:
    """The journal, where every message and reply stands. Alone: how many are in which state."""
    if context.invoked_subcommand:
        return

    async def show() -> int:
        from rich.console import Console
        from rich.table import Table

        async with _journal() as journal:
            for what, states in (await journal.counts()).items():
                table = Table(title=what, title_justify="left")
                table.add_column("state")
                table.add_column("rows", justify="right")
                for state, count in states.items():
                    table.add_row(state, str(count))
                Console().print(table)
        return 0

    raise typer.Exit(go(show()))


@journal_cli.command("export")
def journal_export(
    channel: Annotated[str, typer.Argument(help="platform:id, for example discord:123 or web:abc")],
    file: Annotated[Path | None, typer.Argument(help="where to write; standard output when left out")] = None,
) -> None:
    """One channel's conversation as JSON lines, oldest first.

    FILE is replaced when all of it is there. Exit code 1: the journal has nothing of that channel, or FILE cannot be
    written. 75: it cannot be opened.
    """
    from core.logs import ESCAPED
    from core.messages import Channel

    try:
        where = Channel.parse(channel)
    except ValueError as error:
        stop([str(error)])
    whole = file.resolve() if file and (file.is_file() or not file.exists()) else None  # a device or pipe stays one
    part = whole.with_name(f"{whole.name}.part") if whole else file

    async def export() -> int:
        lines = 0
        async with _journal() as journal:
            if file and journal.holds(file):
                stop([f"{file} belongs to the journal itself: name another file"])
            try:
                with part.open("w", encoding="utf-8") if part else contextlib.nullcontext(sys.stdout) as out:
                    some = codecs.lookup(getattr(out, "encoding", "utf-8")).name != "utf-8"  # letters only
                    async for line in journal.export(where):
                        print(json.dumps(line, ensure_ascii=some).translate(ESCAPED), file=out)
                        lines += 1
                if whole and part and lines:
                    part.replace(whole)
            finally:
                if whole and part:
                    part.unlink(missing_ok=True)
        if not lines:
            print(f"the journal has nothing of {where}", file=sys.stderr)
        return 0 if lines else 1

    try:
        code = go(export())
    except OSError as error:
        print(f"{file or 'standard output'} cannot be written: {error.strerror or error}", file=sys.stderr)
        code = 1
    raise typer.Exit(code)


@journal_cli.command("forget")
def journal_forget(
    person: Annotated[str, typer.Argument(help="platform:id of who is to be forgotten, for example discord:123")],
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Delete what a person said, in every channel, and the replies to it, also while palaver runs.

    Copies made before still have it; while palaver runs, those beside the journal are replaced within 5 hours. Exit
    code 1: the journal has nothing of that person, or you said no. 75: it cannot be opened.
    """
    platform, _, author = person.partition(":")
    if not (platform and author):
        stop([f"a person is written platform:id, for example discord:123, not {person!r}"])
    if not yes and not typer.confirm(f"Delete all that {person} said?", err=True):
        raise typer.Exit(1)

    async def forget() -> int:
        async with _journal() as journal:
            gone = await journal.forget(platform, author)
        print(f"{gone} messages deleted" if gone else f"the journal has nothing of {person}", file=sys.stderr)
        return 0 if gone else 1

    raise typer.Exit(go(forget()))


@journal_cli.command("backup")
def journal_backup(
    file: Annotated[
        Path | None, typer.Argument(help="where to; left out, NAME.backups/ beside the journal, where 5 are kept")
    ] = None,
) -> None:
    """Copy the journal while everything runs, check the copy, and print where it is.

    A running palaver does the same every hour. Without FILE none is made where it would leave the disk less room than
    the journal takes.
    """
    from core.journal import storage

    async def copy() -> int:
        print(await storage.backup(_journal_file("pg_dump"), file))
        return 0

    raise typer.Exit(go(copy()))


@journal_cli.command("restore")
def journal_restore(
    copy: Annotated[Path | None, typer.Argument(help="which copy; left out, the newest that is whole")] = None,
) -> None:
    """Put a copy in the journal's place; stop palaver first. What stood there is moved aside, nothing is deleted.

    Messages since the copy are lost to this journal. A corrupt journal is restored like this by itself at a start.
    """
    from core.journal import storage

    async def restore() -> int:
        used = storage.restore(_journal_file("pg_restore", must_exist=False), copy)
        print(f"restored {used}")
        return 0

    raise typer.Exit(go(restore()))


@journal_cli.command("import")
def journal_import(
    file: Annotated[Path, typer.Argument(help="SQLite's journal, for example palaver.db; it stays as it is")],
) -> None:
    """Copy an SQLite journal into PostgreSQL: set DATABASE_URL to an empty database, and stop palaver first.

    All of it is there in the end, or nothing. History, what waits for an answer and what waits to be sent go on there.
    """
    from rich.console import Console
    from rich.progress import Progress

    from core.journal.transfer import transfer

    async def copy() -> int:
        url, _ = _address(must_exist=False)
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("copying", total=None)
            count = await transfer(file, url, lambda done, of: bar.update(task, completed=done, total=of))
        print(f"{count} messages copied")
        return 0

    raise typer.Exit(go(copy()))


@journal_cli.command("check")
def journal_check() -> None:
    """Read all of the journal and print what is wrong with it, also while palaver runs. It changes nothing.

    Exit code 0: it is whole. 1: it is not; palaver journal restore puts the newest good copy in its place. 75: it
    cannot be opened.
    """
    from core.journal import storage

    async def check() -> int:
        file = _journal_file("pg_amcheck")
        problems = await storage.check(file)
        print("\n".join(problems) or f"{file} is whole")
        return 1 if problems else 0

    raise typer.Exit(go(check()))


def _journal_file(tool: str, must_exist: bool = True) -> Path:
    """SQLite's file; PostgreSQL has `tool` for the same. Raises JournalError."""
    _, file = _address(must_exist)
    if file is None:
        stop([f"DATABASE_URL: that journal is in PostgreSQL, which has its own tool for this: {tool}"])
    return file


def _address(must_exist: bool = True) -> tuple[str, Path | None]:
    """Where the journal is, and SQLite's file: to look at a journal makes none, and puts no copy in the place of one
    that is gone. Raises JournalError."""
    from core.journal.database import JournalError, file_of, parse

    (settings,) = read(Settings)
    logging.getLogger().setLevel(logging.WARNING)
    url = settings.database_url.get_secret_value()
    file = file_of(parse(url))
    if must_exist and file and not file.exists():
        raise JournalError(f"DATABASE_URL: there is no journal at {file}")
    return url, file


@contextlib.asynccontextmanager
async def _journal() -> AsyncIterator[Journal]:
    """One that stands there."""
    from core.journal.journal import open_journal

    url, _ = _address()
    journal = await open_journal(url)
    try:
        yield journal
    finally:
        await journal.aclose()
