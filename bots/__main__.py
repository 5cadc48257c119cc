"""The command line: run, chat, engine, finetune, eval, bench, journal."""

from __future__ import annotations

import asyncio
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
from importlib.metadata import version
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from bots.commands import EX_TEMPFAIL, go, read, run_async, stop
from bots.journal_commands import journal_cli
from core.settings import SOCKET_PATH, Settings

if TYPE_CHECKING:
    from bots.base import Bot

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

    settings, discord, telegram, web = read(Settings, DiscordSettings, TelegramSettings, WebSettings)
    bots: list[Bot] = []
    if discord.discord_token:
        bots.append(open_discord(discord))
    if telegram.telegram_token:
        bots.append(open_telegram(telegram))
    if not bots and not web.web_enabled:
        stop(["WEB_ENABLED: no bot is left to run; set DISCORD_TOKEN or TELEGRAM_TOKEN, or WEB_ENABLED=true"])
    if web.web_enabled:
        bots.append(open_web(web))
    raise typer.Exit(go(_serve(settings, bots, waits=True)))


@cli.command()
def chat() -> None:
    """Talk in the terminal. With piped input: one reply line per input line, then it ends.

    /reset starts anew, /quit ends. At the terminal, the conversation goes on where it ended last time; piped input is
    a conversation of its own each time, so that a script gives the same again (with SAMPLING__SEED set). A line with
    nothing to answer, blank or without a word, gets a blank line.
    """
    from bots.console import ConsoleBot

    (settings,) = read(Settings)
    bot = ConsoleBot(settings.queue.deadline + 15)
    if "log_level" not in settings.model_fields_set:
        logging.getLogger().setLevel(logging.WARNING)
        if bot.at_terminal and settings.engine in ("process", "inprocess"):
            print(f"loading {settings.model} …", file=sys.stderr, flush=True)
    raise typer.Exit(go(_serve(settings, [bot])))


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
        stop([f"{address} is no address: name HOST:PORT, for example 127.0.0.1:8100, or unix:PATH"])
    if address.startswith("unix:") and len(os.fsencode(address[5:])) > SOCKET_PATH:
        stop([f"{address} is longer than the {SOCKET_PATH} bytes that a socket's path may have"])
    (settings,) = read(Settings)
    raise typer.Exit(go(serve_engine(settings, address)))


@cli.command()
def finetune(
    data: Annotated[
        Path,
        typer.Argument(help="dialogues: .jsonl, a list of turns a line; DialoGPT's .tsv; a chat exported to .json"),
    ],
    out: Annotated[Path, typer.Argument(help="folder for the new model; MODEL=FOLDER talks with it")],
    valid: Annotated[
        Path | None, typer.Option(help="dialogues to measure on; else every 50th of DATA, 500 or so at most")
    ] = None,
    epochs: Annotated[float, typer.Option(min=0.001, max=1e6, help="how often all dialogues are seen")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0, help="train that long instead; 0 goes by epochs")] = 0.0,
    learning_rate: Annotated[float, typer.Option(min=1e-7, max=1.0, help="at its peak")] = 5e-5,
    batch_tokens: Annotated[int, typer.Option(min=16, help="tokens in one step; fewer need less memory")] = 4096,
    max_length: Annotated[int, typer.Option(min=8, help="tokens; longer dialogues are split between turns")] = 128,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="learn what was said from its answer, for REVERSE_MODEL")
    ] = False,
) -> None:
    """Train MODEL further on dialogues of your own. It uses the GPU, or all cores (as DEVICE and THREADS say, where
    they are set).

    Stopped with Ctrl-C or SIGTERM? The same command goes on where it was; kill -9 costs the last 5 minutes. With more
    epochs it goes on after its end; with other dialogues or options, OUT must be another folder. In the end the folder
    holds the model, a plot of the losses and a card. NORMALISE=false takes all texts as they are, not a .tsv's alone.
    """
    for name in ("torch", "transformers", "matplotlib"):
        if not find_spec(name):
            stop([f"palaver finetune needs {name}: in Palaver's folder, {sys.executable} -m pip install -e '.[train]'"])
    from core.engine import hub
    from core.engine.base import BadCheckpoint, HubAway
    from core.engine.machine import cores
    from core.training.datasets import BadData, read_dialogues

    (settings,) = read(Settings)
    _stop_as_by_hand()
    try:
        base = run_async(asyncio.to_thread(hub.resolve, settings.model, settings.model_revision or None))
        if not data.is_fifo():
            next(read_dialogues(data), None)  # a wrong file is told at once, not after the seconds that these take
        gc.disable()  # as in core.engine.server
        from core.training.finetune import Recipe, finetune
        from core.training.outcome import doubt, summary

        gc.enable()
        recipe = Recipe(
            learning_rate=learning_rate, epochs=epochs, minutes=minutes, batch_tokens=batch_tokens,
            max_length=max_length, reverse=reverse, normalise=settings.normalise, device=settings.device,
            threads=settings.threads or cores(),
        )  # fmt: skip
        progress = finetune(data, out, base, valid=valid, recipe=recipe)
    except BadCheckpoint as error:
        stop([hub.of_setting(error)])
    except HubAway as error:
        print(error, file=sys.stderr)
        raise typer.Exit(EX_TEMPFAIL) from None
    except BadData as error:
        stop([str(error)])
    except OSError as error:
        stop([f"{error.filename}: {error.strerror}" if error.filename else str(error)])
    except KeyboardInterrupt as stopped:
        saved = (out / "checkpoint.pt").is_file()
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"stopped; the same command goes on where {out} stands" if saved else "stopped", file=sys.stderr)
        raise typer.Exit(128 + (stopped.args or [signal.SIGINT])[0]) from None
    use = f"let it judge: REVERSE_MODEL={out} SAMPLING__N=8" if reverse else f"talk to it: MODEL={out}"
    print(f"{summary(progress)}\n{use} palaver chat")
    if why := doubt(progress, recipe):
        print(f"warning: {why}", file=sys.stderr)


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

    (settings,) = read(Settings)
    logging.getLogger().setLevel(logging.WARNING)

    async def measure() -> int:
        with Console(stderr=True).status("loading") as status:
            async with open_voice(settings) as voice:
                async for line in evaluate(voice, chats=chats, cases=cases, tell=status.update):
                    status.stop()  # while it runs, standard output may not be what it was
                    print(line, flush=True)
                    status.start()
        return 0

    raise typer.Exit(go(measure()))


@cli.command()
def bench(
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="how long to measure, loading not counted")] = 110,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """Measure what this machine serves with your settings: delays, replies a second, about how many active channels.

    It asks the same engine that the bots use, set up as theirs (ENGINE, MODEL, DTYPE, SAMPLING__*, HISTORY_TOKENS …),
    so stop palaver first: they would slow each other down. It needs no token and touches no journal.
    """
    (settings,) = read(Settings)
    logging.getLogger().setLevel(logging.WARNING)
    raise typer.Exit(go(_bench(settings, seconds, as_json)))


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


def _stop_as_by_hand() -> None:
    """SIGTERM and SIGHUP raise KeyboardInterrupt with their number, unless they are ignored, as nohup does."""

    def stop(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


async def _serve(settings: Settings, bots: list[Bot], waits: bool = False) -> int:
    """Loading may take minutes, and a container's first process hears no signal that it has not asked for."""
    from core.app import open_app

    loop, opening = asyncio.get_running_loop(), asyncio.current_task()
    assert opening
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, opening.cancel)  # app.run hears them from then on
    try:
        async with open_app(settings, waits) as app:
            return await app.run(bots)
    except asyncio.CancelledError:
        print("stopped before it served", file=sys.stderr)
        return 0  # as it was asked to, and as when it had served: systemd calls all else a failure


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
