"""The command line as a process: `palaver run`, what stops it, and what it says about wrong settings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path

import aiohttp
import pytest
from typer.testing import CliRunner

from bots.__main__ import cli
from core.engine.hub import EMBEDDED
from tests.bots.process import PATIENCE, ROOT, palaver, running, start
from tests.fakes.hub import Hub, hub

SECRET = "hunter2-and-more"


async def say(address: str, id: str, text: str, session: aiohttp.ClientSession) -> str:
    """The reply to `text` on the page at `address`."""
    async with session.ws_connect(address + "/ws") as page, asyncio.timeout(PATIENCE):
        await page.send_json({"id": id, "text": text})
        while True:
            frame = await page.receive_json()
            if frame.get("reply", {}).get("to") == id:
                return str(frame["reply"]["text"])


@pytest.fixture
async def browser() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        yield session


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
async def test_run_serves_the_page_until_a_signal(
    tmp_path: Path, browser: aiohttp.ClientSession, name: signal.Signals
) -> None:
    async with running(tmp_path) as (process, address):
        assert await say(address, "question-1", "hello there", browser) == "Hello there"
        async with browser.get(address + "/readyz") as response:
            assert (response.status, await response.text()) == (200, "ready\n")
        async with browser.get(address + "/metrics") as response:
            assert 'palaver_messages_finished_total{platform="web",state="answered"} 1.0' in await response.text()
        process.send_signal(name)
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 0


async def test_a_conversation_outlives_the_process(tmp_path: Path, browser: aiohttp.ClientSession) -> None:
    for number in (1, 2):
        async with running(tmp_path) as (process, address):
            await say(address, f"question-{number}", f"say {number}", browser)
            process.kill()
    async with running(tmp_path) as (_, address), browser.ws_connect(address + "/ws") as page:
        await page.send_json({"hello": True})
        history = (await page.receive_json())["history"]
    assert [turn["text"] for turn in history] == ["say 1", "Say 1", "say 2", "Say 2"]


async def test_two_processes_share_a_journal(tmp_path: Path, browser: aiohttp.ClientSession) -> None:
    """The page runs on while somebody talks in the terminal of the same folder."""
    async with running(tmp_path) as (_, address):
        code, output, errors = await palaver(tmp_path, "chat", said="hello from the terminal\n")
        assert (code, output) == (0, "Hello from the terminal\n"), errors
        assert await say(address, "question-1", "hello from the page", browser) == "Hello from the page"


async def test_wrong_settings_are_a_line_each_and_no_value(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WEB_HSOT=127.0.0.1\n")
    began = time.monotonic()
    code, output, errors = await palaver(
        tmp_path,
        "run",
        WEB_PORT=SECRET,
        SAMPLING__TEMPERATURE=SECRET,
        DTYPE=SECRET,
        ENGINE=SECRET,
        QUEUE__DEADLINE="-1",
        WEB_ORIGIN=SECRET,
        GRACE=SECRET,
    )
    assert code == 78 and output == ""
    lines = errors.splitlines()
    names = [
        "DTYPE",
        "ENGINE",
        "GRACE",
        "QUEUE__DEADLINE",
        "SAMPLING__TEMPERATURE",
        "WEB_HSOT",
        "WEB_ORIGIN",
        "WEB_PORT",
    ]
    assert [line.split(":")[0] for line in lines] == names
    assert all("for example" in line or "did you mean" in line for line in lines), errors
    assert SECRET not in errors
    assert time.monotonic() - began < 30  # two seconds on a machine that has nothing else to do


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://u:hunter2@127.0.0.1/x?pool=3", "pool cannot be given there"),
        ("postgresql://u:hunter2@127.0.0.1/x?sslmode=maybe", "sslmode must be one of"),
        ("sqlite:////nowhere/at/all/palaver.db", "/nowhere/at/all does not exist; make it"),
        ("sqlite:////tmp", "/tmp is a folder"),
    ],
)
async def test_a_journals_address_that_is_wrong_is_a_wrong_setting(tmp_path: Path, url: str, says: str) -> None:
    code, _, errors = await palaver(tmp_path, "run", DATABASE_URL=url)
    assert code == 78 and errors.startswith("DATABASE_URL: ") and says in errors and errors.count("\n") == 1


async def test_nothing_to_run_is_a_wrong_setting(tmp_path: Path) -> None:
    code, _, errors = await palaver(tmp_path, "run", WEB_ENABLED="false")
    assert code == 78 and errors.startswith("WEB_ENABLED: ") and len(errors.splitlines()) == 1


async def test_a_taken_port_ends_with_the_mend(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, output, errors = await palaver(tmp_path, "run", WEB_PORT=str(port))
    assert code == 1 and output == ""
    assert f"WEB_PORT: port {port} is taken" in errors and "Traceback" not in errors


async def test_a_platform_out_of_reach_is_a_line_and_no_failure_when_stopped(tmp_path: Path) -> None:
    nowhere = {"DISCORD_TOKEN": "MTAwMDAw.a-token.of-nobody", "DISCORD_API_BASE": "http://127.0.0.1:9/api/v10"}
    process = await start(tmp_path, "run", WEB_ENABLED="false", **nowhere)
    assert process.stderr
    async with asyncio.timeout(PATIENCE):
        while b"starting it again" not in (line := await process.stderr.readline()):
            assert line and b"Traceback" not in line
        process.terminate()
        assert b"Traceback" not in await process.stderr.read() and await process.wait() == 0
    assert b"Discord is out of reach: Cannot connect to host 127.0.0.1:9" in line


async def test_the_file_speaks_to_the_hub_too(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("HF_HUB_OFFLINE=1\nHF_HOME=hf\n")
    code, _, errors = await palaver(tmp_path, "chat", ENGINE="inprocess", MODEL="some/model", HF_HOME="other")
    assert code == 78 and "HF_HUB_OFFLINE is set" in errors and not (tmp_path / "hf").exists()


async def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    code, _, errors = await palaver(tmp_path, "run", ENGINE="inprocess", MODEL=str(tmp_path / "nothing"))
    assert code == 78 and errors.splitlines()[-1].startswith("MODEL: ") and "Traceback" not in errors


async def test_without_torch_a_model_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow/torch.py").write_text("raise ModuleNotFoundError('no', name='torch')")
    where = f"{tmp_path / 'shadow'}{os.pathsep}{ROOT}"
    for engine in ("inprocess", "process"):
        code, _, errors = await palaver(tmp_path, "chat", ENGINE=engine, PYTHONPATH=where)
        assert (code, errors) == (78, "ENGINE: torch is not installed: pip install 'palaver[engine]'\n")


async def test_an_engine_at_too_long_a_path_is_one_line(tmp_path: Path) -> None:
    code, _, errors = await palaver(tmp_path, "engine", f"unix:/{'x' * 107}")
    assert code == 78 and "longer than the 107 bytes" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("run",), ("chat",), ("engine",), ("journal",), ("journal", "export")])
def test_help_says_something(arguments: tuple[str, ...]) -> None:
    said = CliRunner().invoke(cli, [*arguments, "--help"], prog_name="palaver", env={"TERM": "dumb"})
    assert said.exit_code == 0 and "Usage: palaver" in said.stdout and said.stderr == ""
    assert len(said.stdout.splitlines()) > 8


def test_short_questions() -> None:
    runner = CliRunner()
    assert runner.invoke(cli, ["chat", "-h"]).stdout == runner.invoke(cli, ["chat", "--help"]).stdout != ""
    assert runner.invoke(cli, ["--version"]).stdout == f"palaver {version('palaver')}\n"


async def test_the_journal_counts_and_exports(tmp_path: Path) -> None:
    code, output, errors = await palaver(tmp_path, "journal")
    assert (code, output) == (75, "") and "there is no journal at" in errors and not list(tmp_path.iterdir())
    await palaver(tmp_path, "chat", said="hello\n🦄\n")
    code, output, errors = await palaver(tmp_path, "journal")
    assert code == 0 and "answered" in output and "heard" in output and errors == ""
    code, _, errors = await palaver(tmp_path, "journal", "export", "nowhere")
    assert code == 78 and "platform:id" in errors


async def test_an_export_takes_nothings_place_before_it_is_whole(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, address), aiohttp.ClientSession() as session:
        await say(address, "question-1", "héllo", session)
        journal, text = sqlite3.connect(tmp_path / "palaver.db"), "héllo\t\x9b2J\u202eyou\u2028"  # as Telegram may say
        [(channel,)] = journal.execute("UPDATE messages SET text = ? RETURNING channel", [text]).fetchall()
        journal.commit()
        journal.close()
        for name in ("palaver.db", "palaver.db-wal"):
            code, _, errors = await palaver(tmp_path, "journal", "export", f"web:{channel}", name)
            assert code == 78 and "belongs to the journal itself" in errors
        code, _, errors = await palaver(tmp_path, "journal", "export", f"web:{channel}", "talk.jsonl")
        assert code == 0 and errors == ""
        written = (tmp_path / "talk.jsonl").read_text("utf-8")
        assert json.loads(written)["text"] == text and '"héllo\\t\\u009b2J\\u202eyou\\u2028"' in written
        code, _, errors = await palaver(tmp_path, "journal", "export", "web:another", "talk.jsonl")
        assert (code, errors) == (1, "the journal has nothing of web:another\n")
        assert (tmp_path / "talk.jsonl").stat().st_size and not list(tmp_path.glob("*.part"))
        code, output, _ = await palaver(tmp_path, "journal", "export", f"web:{channel}", PYTHONIOENCODING="ascii")
        assert code == 0 and output.isascii() and json.loads(output)["text"] == text
        os.mkfifo(tmp_path / "pipe")
        read = asyncio.create_task(asyncio.to_thread((tmp_path / "pipe").read_text, "utf-8"))
        code, _, errors = await palaver(tmp_path, "journal", "export", f"web:{channel}", "pipe")
        assert code == 0 and json.loads(await read)["text"] == text and (tmp_path / "pipe").is_fifo(), errors
        code, _, errors = await palaver(tmp_path, "journal", "export", f"web:{channel}", "nowhere/talk.jsonl")
        assert (code, errors) == (1, "nowhere/talk.jsonl cannot be written: No such file or directory\n")


async def test_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    await palaver(tmp_path, "chat", said="hello\n")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2]), "ENGINE": "echo"}
    for command in ("journal", "journal check", "chat"):
        process = await asyncio.create_subprocess_shell(
            f"{sys.executable} -m bots {command} > /dev/full",
            cwd=tmp_path,
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(PATIENCE):
            _, errors = await process.communicate(b"hello\n")
        last = errors.decode().splitlines()[-1]
        assert process.returncode == 1 and "standard output cannot be written: No space left on device" in last
        assert b"Traceback" not in errors


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_while_the_model_loads_ends_it(tmp_path: Path, name: signal.Signals) -> None:
    """Also where it is the first process of a container, which hears only signals that it asked for."""
    first = ["unshare", "--pid", "--fork", "--kill-child"] if os.geteuid() == 0 else []
    process = await asyncio.create_subprocess_exec(
        *(*first, sys.executable, "-m", "bots", "run"),
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2]), "WEB_PORT": "0"},
        stderr=asyncio.subprocess.PIPE,
    )
    child = process.pid
    async with asyncio.timeout(PATIENCE):
        while not (engines := await asyncio.to_thread(engine_of, tmp_path)):
            await asyncio.sleep(0.05)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            child = int(pid) if first else child
        os.kill(child, name)
        _, errors = await process.communicate()
    assert errors.decode().splitlines()[-1] == "stopped before it served" and b"Traceback" not in errors
    assert process.returncode == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in engines)


async def test_ctrl_c_while_it_is_imported_ends_it() -> None:
    code = """
import sys
import bots

class CtrlC:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, CtrlC())
bots.main()
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
    _, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert (process.returncode, errors) == (130, b"")


def engine_of(folder: Path) -> list[int]:
    """Processes that serve an engine for bots in the folder."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            here = process.name.isdigit() and (process / "cwd").resolve() == folder.resolve()
            if here and b"core.engine.child" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


async def test_a_journal_deleted_while_nobody_talks_is_noticed_and_there_after_the_next_start(tmp_path: Path) -> None:
    await palaver(tmp_path, "chat", said="hello\n")
    _, before, _ = await palaver(tmp_path, "journal")
    async with running(tmp_path) as (process, _):
        (tmp_path / "palaver.db").unlink()
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 74
    async with running(tmp_path):
        pass
    assert (await palaver(tmp_path, "journal"))[1] == before


@pytest.mark.parametrize(
    ("arguments", "name", "code"),
    [
        (("run",), signal.SIGTERM, 0),
        (("engine", "127.0.0.1:0"), signal.SIGTERM, 0),
        (("bench",), signal.SIGINT, 130),
        (("finetune", "talks.jsonl", "mine"), signal.SIGTERM, 143),
    ],
)
async def test_a_signal_while_the_model_is_fetched_ends_it(
    tmp_path: Path, arguments: tuple[str, ...], name: signal.Signals, code: int
) -> None:
    """The hub sends 1 KB a second of a file of minutes."""
    files = {file: (EMBEDDED / file).read_bytes() for file in ("config.json", "tokenizer.json", "model.safetensors")}
    (tmp_path / "talks.jsonl").write_text('["hi", "hello"]\n')
    with hub(files, drip=1.0) as address:
        settings = {"MODEL": "some/model", "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "WEB_PORT": "0"}
        process = await start(tmp_path, *arguments, **settings, ENGINE="process", HF_HUB_DISABLE_XET="1")
        try:
            async with asyncio.timeout(PATIENCE):
                while "model.safetensors" not in Hub.fetched:
                    assert process.returncode is None
                    await asyncio.sleep(0.05)
            process.send_signal(name)
            _, errors = await asyncio.wait_for(process.communicate(), 20)
        finally:
            if process.returncode is None:
                process.kill()
    assert process.returncode == code and b"Traceback" not in errors and b"http:" not in errors, errors.decode()
    assert b"loading some/model" in errors or arguments[0] == "finetune"


async def test_a_hub_that_is_away_is_waited_for_by_run_and_said_by_others(tmp_path: Path) -> None:
    files = {file: (EMBEDDED / file).read_bytes() for file in ("config.json", "tokenizer.json", "model.safetensors")}
    (tmp_path / "talks.jsonl").write_text('["hi", "hello"]\n')
    with hub(files) as address:
        Hub.trouble = "503"
        settings = {"MODEL": "some/model", "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "WEB_PORT": "0"}
        settings |= {"ENGINE": "inprocess", "HF_HUB_DISABLE_XET": "1"}
        for command in (("chat",), ("finetune", "talks.jsonl", "mine")):
            code, output, errors = await palaver(tmp_path, *command, **settings)
            assert code == 75 and output == "" and errors.splitlines()[-1].endswith("overloaded (HTTP 503): try later")
        process = await start(tmp_path, "run", **settings)
        assert process.stdout and process.stderr
        async with asyncio.timeout(PATIENCE):
            while b"HTTP 503): try later; waiting for it" not in (line := await process.stderr.readline()):
                assert line
            Hub.trouble = ""
            assert b"Palaver talks at" in await process.stdout.readline()
            process.terminate()
            await process.communicate()
    assert process.returncode == 0


async def test_an_engine_that_comes_back_with_another_model_ends_it_and_the_next_start_answers(
    tmp_path: Path, browser: aiohttp.ClientSession
) -> None:
    for model in ("one", "other"):
        (tmp_path / model).mkdir()
        for file in ("config.json", "tokenizer.json"):
            (tmp_path / model / file).write_bytes((EMBEDDED / file).read_bytes() + b" " * (model == "other"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = "{}:{}".format(*free.getsockname())

    @contextlib.asynccontextmanager
    async def serving(model: str) -> AsyncIterator[None]:
        engine = await start(tmp_path, "engine", place, MODEL=model)
        try:
            assert engine.stdout and b"ready" in await engine.stdout.readline()
            yield
        finally:
            engine.kill()
            await engine.communicate()

    async with contextlib.AsyncExitStack() as stack:
        async with serving("one"):
            process, address = await stack.enter_async_context(running(tmp_path, ENGINE=f"http://{place}", GRACE="1"))
            assert await say(address, "question-1", "hello there", browser) == "Hello there"
        async with serving("other"):
            async with browser.get(address + "/readyz") as response:
                assert (response.status, await response.text()) == (503, "the engine has another model now: echo\n")
            with pytest.raises(TypeError, match="8:1001"):  # the page goes before there is a reply
                await say(address, "question-2", "are you there", browser)
            assert await asyncio.wait_for(process.wait(), PATIENCE) == 75
            _, address = await stack.enter_async_context(running(tmp_path, ENGINE=f"http://{place}"))
            assert await say(address, "question-2", "are you there", browser) == "Are you there"


SLOWLY = """
import time
from core import app
from core.journal import storage

def save(reader, target):
    target.parent.mkdir()
    time.sleep(600)

app.BACKUP_EVERY = 0.1
storage._save = save
"""


async def test_a_long_copy_of_the_journal_holds_up_no_stop(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOWLY)
    async with running(tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}") as (process, _):
        async with asyncio.timeout(PATIENCE):
            while not (tmp_path / "palaver.db.backups").is_dir():
                await asyncio.sleep(0.05)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 20) == 0
