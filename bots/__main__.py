"""The command line: run, chat, engine, finetune, eval, bench, journal.

Exit codes: 0 fine, 1 it failed, 74 the journal's disk or file failed under it, 75 try again later (the journal, the
engine or the hub cannot be opened), 78 wrong settings.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import errno
import gc
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from core import settings as core_settings
from core.settings import Settings, WrongSettings

if TYPE_CHECKING:
    from bots.base import Bot
    from core.journal.journal import Journal

EX_TEMPFAIL, EX_CONFIG = 75, 78
ResultT = TypeVar("ResultT")

cli = typer.Typer(
    name="palaver",
    help="A chat bot for Discord, Telegram, the web and the terminal, out of a DialoGPT model that is yours.\n\n"
    "Settings come from the environment and from .env in this folder; .env.example lists them all. Without any, "
    "`palaver run` talks on a local web page with the embedded model.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
journal_cli = typer.Typer(help="The journal, where every message and reply stands: counts, exports, copies, checks.")
cli.add_typer(journal_cli, name="journal")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"palaver {version('palaver')}")
        raise typer.Exit


@cli.callback()
def options(
    _: Annotated[bool, typer.Option("--version", help="which Palaver this is", callback=_show_version)] = False,
) -> None: ...


@cli.command()
def run() -> None:
    """Start every bot whose settings are there, and the web page.

    DISCORD_TOKEN starts Discord, TELEGRAM_TOKEN starts Telegram; WEB_ENABLED=false keeps the page off. SIGTERM or
    Ctrl-C lets answers under way finish (GRACE seconds); a second one ends at once.
    """
    from bots.discord import DiscordSettings, open_discord
    from bots.telegram import TelegramSettings, open_telegram
    from bots.web import WebSettings, open_web

    settings, discord, telegram, web = _settings(Settings, DiscordSettings, TelegramSettings, WebSettings)
    bots: list[Bot] = []
    if discord.discord_token:
        bots.append(open_discord(discord))
    if telegram.telegram_token:
        bots.append(open_telegram(telegram))
    if not bots and not web.web_enabled:
        _stop(["WEB_ENABLED: no bot is left to run; set DISCORD_TOKEN or TELEGRAM_TOKEN, or WEB_ENABLED=true"])
    if web.web_enabled:
        bots.append(open_web(web))
    raise typer.Exit(_go(_serve(settings, bots, waits=True)))


@cli.command()
def chat() -> None:
    """Talk in the terminal. With piped input: one reply line per input line, then it ends.

    /reset starts anew, /quit ends. At the terminal, the conversation goes on where it ended last time; piped input is
    a conversation of its own each time, so that a script gives the same again (with SAMPLING__SEED set). A line with
    nothing to answer, blank or without a word, gets a blank line.
    """
    from bots.console import ConsoleBot

    (settings,) = _settings(Settings)
    bot = ConsoleBot(settings.queue.deadline + 15)
    if "log_level" not in settings.model_fields_set:
        logging.getLogger().setLevel(logging.WARNING)
        if bot.at_terminal and settings.engine in ("process", "inprocess"):
            print(f"loading {settings.model} …", file=sys.stderr, flush=True)
    raise typer.Exit(_go(_serve(settings, [bot])))


@cli.command()
def engine(
    address: Annotated[
        str, typer.Argument(help="where to listen: HOST:PORT, or unix:PATH for a socket that only you can open")
    ] = "127.0.0.1:8100",
) -> None:
    """Serve the model alone over HTTP, for bots elsewhere that set ENGINE=http://HOST:PORT.

    It needs MODEL, DEVICE and DTYPE and no token; whoever reaches the address may use it.
    """
    from core.engine.server import serve_engine

    found = re.fullmatch(r"unix:.+|.+:(\d{1,5})", address)
    if not found or int(found[1] or 0) > 65535:
        _stop([f"{address} is no address: name HOST:PORT, for example 127.0.0.1:8100, or unix:PATH"])
    (settings,) = _settings(Settings)
    raise typer.Exit(_go(serve_engine(settings, address)))


@cli.command()
def finetune(
    data: Annotated[Path, typer.Argument(help="dialogues: .jsonl, a list of turns on each line, or DialoGPT's .tsv")],
    out: Annotated[Path, typer.Argument(help="folder for the new model; MODEL=FOLDER talks with it")],
    valid: Annotated[Path | None, typer.Option(help="dialogues to measure on; else every 50th of DATA")] = None,
    epochs: Annotated[float, typer.Option(min=0.001, help="how often all dialogues are seen")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0, help="train that long instead; 0 goes by epochs")] = 0.0,
    learning_rate: Annotated[float, typer.Option(min=1e-7, max=1.0, help="at its peak")] = 5e-5,
    batch_tokens: Annotated[int, typer.Option(min=16, help="tokens in one step; fewer need less memory")] = 4096,
    max_length: Annotated[int, typer.Option(min=8, help="tokens; longer dialogues are split between turns")] = 128,
    reverse: Annotated[bool, typer.Option("--reverse", help="learn what was said from its answer instead")] = False,
) -> None:
    """Train MODEL further on dialogues of your own. It uses the GPU, or all cores (as DEVICE and THREADS say, where
    they are set).

    Stopped with Ctrl-C or SIGTERM? The same command goes on where it was; kill -9 costs the last 5 minutes. With more
    epochs it goes on after its end; with other dialogues or options, OUT must be another folder. In the end the folder
    holds the model, a plot of the losses and a card. NORMALISE=false takes the texts of a .jsonl as they are.
    """
    for name in ("torch", "transformers", "matplotlib"):
        if not find_spec(name):
            _stop(
                [f"palaver finetune needs {name}: in Palaver's folder, {sys.executable} -m pip install -e '.[train]'"]
            )
    from core.engine import hub
    from core.engine.base import BadCheckpoint, HubAway
    from core.engine.machine import cores
    from core.training.datasets import BadData, read_dialogues

    (settings,) = _settings(Settings)
    _stop_as_by_hand()
    try:
        base = _run(asyncio.to_thread(hub.resolve, settings.model, settings.model_revision or None))
        if not data.is_fifo():
            next(read_dialogues(data), None)  # a wrong file is told at once, not after the seconds that these take
        gc.disable()  # as in core.engine.server
        from core.training.finetune import Recipe, finetune
        from core.training.outcome import summary

        gc.enable()
        recipe = Recipe(
            learning_rate=learning_rate, epochs=epochs, minutes=minutes, batch_tokens=batch_tokens,
            max_length=max_length, reverse=reverse, normalise=settings.normalise, device=settings.device,
            threads=settings.threads or cores(),
        )  # fmt: skip
        progress = finetune(data, out, base, valid=valid, recipe=recipe)
    except BadCheckpoint as error:
        _stop([_of_setting(error)])
    except HubAway as error:
        print(error, file=sys.stderr)
        raise typer.Exit(EX_TEMPFAIL) from None
    except BadData as error:
        _stop([str(error)])
    except OSError as error:
        _stop([f"{error.filename}: {error.strerror}" if error.filename else str(error)])
    except KeyboardInterrupt as stopped:
        saved = (out / "checkpoint.pt").is_file()
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"stopped; the same command goes on where {out} stands" if saved else "stopped", file=sys.stderr)
        raise typer.Exit(128 + (stopped.args or [signal.SIGINT])[0]) from None
    print(f"{summary(progress)}\ntalk to it: MODEL={out} palaver chat")
    if not progress.valid[-1][1] < progress.valid[0][1]:
        print(
            "warning: that is no better than before: try more dialogues, fewer --epochs or a lower --learning-rate",
            file=sys.stderr,
        )


@cli.command("eval")
def evaluate(
    chats: Annotated[int, typer.Option(min=1, help="self-chats of 30 turns")] = 50,
    cases: Annotated[int, typer.Option(min=1, help="questions for each kind and distance of recall")] = 100,
) -> None:
    """Measure MODEL as it is set: does it remember names and likes, does it repeat itself, does it fall silent.

    A page of Markdown goes to standard output, row by row; Ctrl-C keeps what is through. Some 4,000 replies: minutes
    for the embedded model, hours for a large one on a CPU; the options make it shorter.
    """
    from rich.console import Console

    from core.app import open_voice
    from core.evaluation.report import evaluate

    (settings,) = _settings(Settings)
    logging.getLogger().setLevel(logging.WARNING)

    async def measure() -> int:
        with Console(stderr=True).status("loading") as status:
            async with open_voice(settings) as voice:
                async for line in evaluate(voice, chats=chats, cases=cases, tell=status.update):
                    status.stop()  # while it runs, standard output may not be what it was
                    print(line, flush=True)
                    status.start()
        return 0

    raise typer.Exit(_go(measure()))


@cli.command()
def bench(
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="how long to measure, loading not counted")] = 110,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """Measure what this machine serves with your settings: delays, replies a second, about how many active channels.

    It asks the same engine that the bots use, set up as theirs (ENGINE, MODEL, DTYPE, SAMPLING__*, HISTORY_TOKENS …),
    so stop palaver first: they would slow each other down. It needs no token and touches no journal.
    """
    (settings,) = _settings(Settings)
    logging.getLogger().setLevel(logging.WARNING)
    raise typer.Exit(_go(_bench(settings, seconds, as_json)))


async def _bench(settings: Settings, seconds: float, as_json: bool) -> int:
    from core.app import open_voice
    from core.evaluation import load

    began = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {what} ...", file=sys.stderr, flush=True)

    elsewhere = ":" in settings.engine  # what serves is not this machine
    tell(f"asking {settings.engine}" if elsewhere else f"loading {settings.model}")
    async with open_voice(settings) as voice:
        loading, info = time.monotonic() - began, voice.engine.info
        found = await load.measure(voice, seconds, settings.queue.running or voice.at_once, tell)
        memory = 0 if elsewhere else load.resident_bytes()
    how = f"{info.how}, at {settings.engine}" if elsewhere else info.how
    if as_json:
        print(json.dumps(load.as_dict(found, info.name, how, loading, memory), indent=2))
    else:
        print(load.as_text(found, info.name, how, loading, memory))
    return 0


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

    raise typer.Exit(_go(show()))


@journal_cli.command("export")
def journal_export(
    channel: Annotated[str, typer.Argument(help="platform:id, for example discord:123 or web:abc")],
    file: Annotated[Path | None, typer.Argument(help="where to write; standard output when left out")] = None,
) -> None:
    """One channel's conversation as JSON lines, oldest first.

    FILE is replaced when all of it is there. Exit code 1: the journal has nothing of that channel, or it failed.
    """
    from core.logs import ESCAPED
    from core.messages import Channel

    try:
        where = Channel.parse(channel)
    except ValueError as error:
        _stop([str(error)])
    whole = file.resolve() if file and (file.is_file() or not file.exists()) else None  # a device or pipe stays one
    part = whole.with_name(f"{whole.name}.part") if whole else file

    async def export() -> int:
        lines = 0
        async with _journal() as journal:
            if file and journal.holds(file):
                _stop([f"{file} belongs to the journal itself: name another file"])
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
        code = _go(export())
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
    code 1: the journal has nothing of that person, or it failed.
    """
    platform, _, author = person.partition(":")
    if not (platform and author):
        _stop([f"a person is written platform:id, for example discord:123, not {person!r}"])
    if not yes and not typer.confirm(f"Delete all that {person} said?", err=True):
        raise typer.Exit(1)

    async def forget() -> int:
        async with _journal() as journal:
            gone = await journal.forget(platform, author)
        print(f"{gone} messages deleted" if gone else f"the journal has nothing of {person}", file=sys.stderr)
        return 0 if gone else 1

    raise typer.Exit(_go(forget()))


@journal_cli.command("backup")
def journal_backup(
    file: Annotated[
        Path | None, typer.Argument(help="where to; left out, NAME.backups/ beside the journal, where 5 are kept")
    ] = None,
) -> None:
    """Copy the journal while everything runs, check the copy, and print where it is.

    A running palaver does the same every hour.
    """
    from core.journal import storage

    async def copy() -> int:
        print(await storage.backup(_journal_file("pg_dump"), file))
        return 0

    raise typer.Exit(_go(copy()))


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

    raise typer.Exit(_go(restore()))


@journal_cli.command("check")
def journal_check() -> None:
    """Read all of the journal and print what is wrong with it, also while palaver runs. It changes nothing.

    Exit code 0: it is whole. 1: it is not; palaver journal restore puts the newest good copy in its place.
    """
    from core.journal import storage

    async def check() -> int:
        file = _journal_file("pg_amcheck")
        problems = await storage.check(file)
        print("\n".join(problems) or f"{file} is whole")
        return 1 if problems else 0

    raise typer.Exit(_go(check()))


def _journal_file(tool: str, must_exist: bool = True) -> Path:
    """SQLite's file; PostgreSQL has `tool` for the same. Raises JournalError."""
    _, file = _address(must_exist)
    if file is None:
        _stop([f"DATABASE_URL: that journal is in PostgreSQL, which has its own tool for this: {tool}"])
    return file


def _address(must_exist: bool = True) -> tuple[str, Path | None]:
    """Where the journal is, and SQLite's file: to look at a journal makes none, and puts no copy in the place of one
    that is gone. Raises JournalError."""
    from core.journal.database import JournalError, file_of, parse

    (settings,) = _settings(Settings)
    logging.getLogger().setLevel(logging.WARNING)
    url = settings.database_url.get_secret_value()
    file = file_of(parse(url))
    if must_exist and file and not file.exists():
        raise JournalError(f"DATABASE_URL: there is no journal at {file}")
    return url, file


def _stop_as_by_hand() -> None:
    """SIGTERM and SIGHUP raise KeyboardInterrupt with their number, unless they are ignored, as nohup does."""

    def stop(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


def _settings(*groups: type[Any]) -> list[Any]:
    """Read them all, or stop with one line per mistake."""
    from core import logs

    try:
        found = core_settings.read(*groups)
    except WrongSettings as error:
        _stop(error.lines)
    secrets = [
        value.get_secret_value()
        for group in found
        for value in (getattr(group, name) for name in type(group).model_fields)
        if hasattr(value, "get_secret_value")
    ]
    logs.set_up(next((group.log_level for group in found if isinstance(group, Settings)), "info"), secrets)
    return found


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


def _stop(lines: list[str]) -> NoReturn:
    for line in lines:
        print(line, file=sys.stderr)
    raise SystemExit(EX_CONFIG)


def _of_setting(error: Exception) -> str:
    """What is wrong with a checkpoint, by the setting that names it, where the error names no other."""
    return str(error) if re.match(r"[A-Z_]+=", str(error)) else f"MODEL: {error}"


async def _serve(settings: Settings, bots: list[Bot], waits: bool = False) -> int:
    """Loading may take minutes, and a container's first process hears no signal that it has not asked for. If it
    `waits`, a hub that is away comes back, as PostgreSQL does."""
    from core import systemd
    from core.app import START, open_app
    from core.backoff import backoff
    from core.engine.base import HubAway

    loop, opening = asyncio.get_running_loop(), asyncio.current_task()
    assert opening
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, opening.cancel)  # app.run hears them from then on
    try:
        tries = 0
        while True:
            try:
                async with open_app(settings, waits) as app:
                    return await app.run(bots)
            except HubAway as error:
                if not waits:
                    raise
                logging.getLogger("palaver").warning("%s; waiting for it", error)
            systemd.notify(f"EXTEND_TIMEOUT_USEC={START * 1e6:.0f}")
            await asyncio.sleep(backoff(tries, 30.0, first=1.0))
            tries += 1
    except asyncio.CancelledError:
        print("stopped before it served", file=sys.stderr)
        return 0  # as it was asked to, and as when it had served: systemd calls all else a failure


def _go(work: Coroutine[None, None, int]) -> int:
    """Run to the end; what cannot be opened is one line."""
    from core.delivery import NotAccepted
    from core.engine.base import BadCheckpoint, EngineError
    from core.journal.database import JournalError, WrongAddress

    try:
        return _run(work)
    except WrongAddress as error:
        print(error, file=sys.stderr)
        return EX_CONFIG
    except BadCheckpoint as error:
        print(_of_setting(error), file=sys.stderr)
        return EX_CONFIG
    except (EngineError, JournalError, NotAccepted) as error:
        print(error, file=sys.stderr)
        return EX_TEMPFAIL
    except KeyboardInterrupt:
        return 130


class _Left(ThreadPoolExecutor):
    """Threads that nobody waits for at the end: a download, or a copy of the journal, may take hours more."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


def _run(work: Coroutine[None, None, ResultT]) -> ResultT:
    async def beside_threads_that_are_left() -> ResultT:
        asyncio.get_running_loop().set_default_executor(_Left())
        return await work

    return asyncio.run(beside_threads_that_are_left())


def main() -> None:
    """Ends without waiting for threads that are still at work, as Python would."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # people's names, on a terminal that knows fewer letters
    try:
        try:
            cli(prog_name="palaver")
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        print(f"standard output cannot be written: {error.strerror}", file=sys.stderr)
        code = 1
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
