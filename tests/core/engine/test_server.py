"""The engine's HTTP surface, over real sockets; and `palaver engine` as a process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from core.engine import server as module
from core.engine import wire
from core.engine.base import Completion, EngineClosed, EngineError, ModelInfo, OtherModel, SamplingParams
from core.engine.echo_engine import EchoEngine
from core.engine.folder import PrivateFolder
from core.engine.http_engine import connect_engine
from core.engine.server import BODY_LIMIT, Server, bound

ROOT = Path(__file__).resolve().parents[3]
GOOD: dict[str, Any] = {"prompt": [1, 2, 256], "params": {"seed": 1}}


class Odd(EchoEngine):
    """Raises what it is told to."""

    error: Exception = EngineError("told to")

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, session: str = "", deadline: float | None = None
    ) -> list[Completion]:
        raise self.error


@pytest.fixture
def folder() -> Iterator[Path]:
    private = PrivateFolder()
    yield private.path
    private.close()


@contextlib.asynccontextmanager
async def listening(server: Server, folder: Path) -> AsyncIterator[aiohttp.ClientSession]:
    path = folder / "socket"
    with bound(f"unix:{path}") as sock:
        async with (
            server.listening(sock),
            aiohttp.ClientSession("http://engine", connector=aiohttp.UnixConnector(str(path))) as session,
        ):
            yield session


async def test_generate_and_what_it_counts(checkpoint: Callable[..., Path], folder: Path) -> None:
    async with listening(Server().open(EchoEngine(checkpoint())), folder) as http:
        async with http.post("/generate", json=GOOD) as answer:
            assert answer.status == 200
            (completion,) = wire.load_completions(await answer.json())
            assert completion.token_ids == [1, 2]
        async with http.post("/prepare", json={"prompt": [1, 2], "session": "s"}) as answer:
            assert (answer.status, await answer.json()) == (200, {})
        async with http.post("/forget", json={"session": "s"}) as answer:
            assert (answer.status, await answer.json()) == (200, {})
        async with http.get("/metrics") as answer:
            text = await answer.text()
        assert re.findall(r"^palaver_engine_(\w+) (\d+)$", text, re.MULTILINE) == [
            ("requests_running", "0"),
            ("prompt_tokens_total", "3"),
            ("reply_tokens_total", "2"),
            ("requests_total", "1"),
        ]


async def test_whoever_asks_learns_the_model(checkpoint: Callable[..., Path], folder: Path) -> None:
    async with listening(Server().open(EchoEngine(checkpoint())), folder) as http:
        async with http.get("/info") as answer:
            said = await answer.json()
            assert len(said.pop("fingerprint")) == 64
            assert wire.load_info(said) == ModelInfo("echo", 256, 384, 256, str(checkpoint()), "says it back, no model")
        async with http.get("/tokenizer") as answer:
            files = await answer.json()
    assert files == {name: (checkpoint() / name).read_text("utf-8") for name in ("config.json", "tokenizer.json")}


async def test_a_folder_that_changes_under_an_engine_changes_nothing(
    checkpoint: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    """Whoever comes later, also from this machine, speaks the ids that it began with."""
    shutil.copytree(checkpoint(), tmp_path / "model")
    async with listening(Server().open(EchoEngine(tmp_path / "model")), folder) as http:
        early = await connect_engine(f"unix:{folder / 'socket'}")
        shutil.copytree(checkpoint("odd"), tmp_path / "model", dirs_exist_ok=True)
        late = await connect_engine(f"unix:{folder / 'socket'}")
        async with http.get("/tokenizer") as answer:
            files = await answer.json()
        for name in ("config.json", "tokenizer.json"):
            kept = (checkpoint() / name).read_text("utf-8")
            assert files[name] == (Path(late.info.path) / name).read_text("utf-8") == kept
        assert early.info.path == str(tmp_path / "model")
        assert await late.generate([1, 2, 256], SamplingParams()) == await early.generate([1, 2, 256], SamplingParams())
        await asyncio.gather(early.aclose(), late.aclose())


async def test_who_asks_with_another_models_ids_is_refused(checkpoint: Callable[..., Path], folder: Path) -> None:
    async with listening(Server().open(EchoEngine(checkpoint())), folder) as http:
        async with http.get("/info") as answer:
            mine = (await answer.json())["fingerprint"]
        for model, statuses in ((mine, [200, 200, 200]), ("another", [409, 409, 503])):
            headers = {wire.MODEL: model}
            async with (
                http.post("/generate", json=GOOD, headers=headers) as generated,
                http.post("/prepare", json={"prompt": [1], "session": "s"}, headers=headers) as prepared,
                http.get("/readyz", headers=headers) as ready,
            ):
                assert [generated.status, prepared.status, ready.status] == statuses
                if model != mine:
                    assert type(wire.load_error(await generated.json())) is OtherModel


async def test_a_body_that_is_not_packed_as_it_says_is_one_line(checkpoint: Callable[..., Path], folder: Path) -> None:
    async with listening(Server().open(EchoEngine(checkpoint())), folder) as http:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        async with http.post("/generate", data=json.dumps(GOOD), headers=headers) as answer:
            said = await answer.json()
            assert (answer.status, said["error"]) == (400, wire.BAD_REQUEST)
            assert said["message"].endswith("Can not decode content-encoding: gzip")


async def test_while_the_model_loads_it_lives_but_is_not_ready(folder: Path) -> None:
    async with listening(Server(), folder) as http:
        async with http.get("/livez") as answer:
            assert answer.status == 200
        async with http.get("/readyz") as answer:
            assert (answer.status, await answer.text()) == (503, "the model is loading\n")
        async with http.post("/generate", json=GOOD) as answer:
            assert answer.status == 503
            error = wire.load_error(await answer.json())
            assert (type(error), str(error)) == (EngineClosed, "the model is loading")


@pytest.mark.parametrize(
    ("body", "status", "names"),
    [
        (b"{", 400, "JSON"),
        (b"[" * 200_000, 400, "JSON"),
        (json.dumps(GOOD | {"prompt": [384]}).encode(), 400, "prompt"),
        (json.dumps(GOOD | {"params": {"top_p": 0}}).encode(), 400, "top_p"),
        (b" " * (BODY_LIMIT + 1), 413, ""),
    ],
)
async def test_bad_input_is_one_clear_line(
    checkpoint: Callable[..., Path], folder: Path, body: bytes, status: int, names: str
) -> None:
    async with listening(Server().open(EchoEngine(checkpoint())), folder) as http:
        async with http.post(
            "/generate", data=io.BytesIO(body), headers={"Content-Type": "application/json"}
        ) as answer:
            said = await answer.json()
            assert answer.status == status
    assert said["error"] == "BadRequest"
    assert names in said["message"]
    assert "\n" not in said["message"]


async def test_pages_in_a_browser_cannot_post(checkpoint: Callable[..., Path], folder: Path) -> None:
    async with listening(Server().open(EchoEngine(checkpoint())), folder) as http:
        for path in ("/generate", "/forget"):
            async with http.post(path, data=json.dumps(GOOD), headers={"Content-Type": "text/plain"}) as answer:
                assert answer.status == 415
            # DNS rebinding: to the browser it is the page's own server, whom it asks no leave
            rebound = {"Host": "evil.example", "Origin": "http://evil.example"}
            async with http.post(path, json=GOOD, headers=rebound) as answer:
                assert answer.status == 403
        async with http.get("/nowhere") as answer:
            assert (answer.status, (await answer.json())["error"]) == (404, "BadRequest")


@pytest.mark.parametrize("kind", list(wire.STATUS))
async def test_every_refusal_has_its_status_and_name(
    checkpoint: Callable[..., Path], folder: Path, kind: type[EngineError]
) -> None:
    engine = Odd(checkpoint())
    engine.error = kind("because")
    async with listening(Server().open(engine), folder) as http:
        async with http.post("/generate", json=GOOD) as answer:
            assert answer.status == wire.STATUS[kind]
            assert await answer.json() == {"error": kind.__name__, "message": "because"}
        async with http.get("/metrics") as answer:
            assert f"palaver_engine_refused_{kind.__name__.lower()}_total 1" in await answer.text()


async def test_a_surprise_is_a_failed_request_and_no_traceback(checkpoint: Callable[..., Path], folder: Path) -> None:
    engine = Odd(checkpoint())
    engine.error = KeyError("two\nlines")
    async with listening(Server().open(engine), folder) as http:
        async with http.post("/generate", json=GOOD) as answer:
            said = await answer.json()
    assert said["error"] == "Failed"
    assert said["message"].startswith("KeyError")
    assert "\n" not in said["message"]


def test_a_socket_is_its_owners_and_goes(folder: Path) -> None:
    path = folder / "deep" / "er" / "socket"
    with bound(f"unix:{path}"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


def test_a_socket_of_the_dead_is_taken_over_and_one_of_the_living_is_not(folder: Path) -> None:
    path = folder / "socket"
    with bound(f"unix:{path}") as sock:
        sock.listen()
        with contextlib.ExitStack() as stack:
            for _ in range(2):  # the second time so many ask already that it has no room for more
                with pytest.raises(EngineClosed, match="another process"), bound(f"unix:{path}"):
                    pass
                sock.listen(0)
                for _ in range(3):
                    client = stack.enter_context(socket.socket(socket.AF_UNIX))
                    client.setblocking(False)
                    client.connect_ex(str(path))
        os.link(path, folder / "left")
    os.link(folder / "left", path)
    with bound(f"unix:{path}"):
        pass


@pytest.mark.parametrize("address", ["", "8100", "localhost", "localhost:", ":80", "127.0.0.1:99999", "127.0.0.1:http"])
def test_what_is_no_address_is_one_line(address: str) -> None:
    with pytest.raises(EngineClosed, match=r"name HOST:PORT"), bound(address):
        pass


def test_a_port_in_use_is_one_line() -> None:
    with bound("127.0.0.1:0") as sock:
        port = sock.getsockname()[1]
        with pytest.raises(EngineClosed, match=f"127.0.0.1:{port}: .*in use"), bound(f"127.0.0.1:{port}"):
            pass


@contextlib.asynccontextmanager
async def palaver_engine(
    address: str, cwd: Path, **settings: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """(the process, its last line until it is ready or ends)."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bots", "engine", address),
        env=os.environ | {"PYTHONPATH": str(ROOT), "THREADS": "1"} | settings,
        cwd=cwd,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    try:
        line = (await process.stdout.readline()).decode().strip()
        yield process, line or (await process.stderr.read()).decode().strip().splitlines()[-1]
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_palaver_engine_says_where_it_is_and_ends_when_asked(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = str(checkpoint())
    async with palaver_engine("127.0.0.1:0", tmp_path, MODEL=folder, DTYPE="float32") as (process, line):
        found = re.fullmatch(r"engine ready at (http://127\.0\.0\.1:\d+): model \S+, (.*float32.*)", line)
        assert found, line
        async with aiohttp.ClientSession(found[1]) as http:
            prompt = {"prompt": [5, 6, 256], "params": {"max_tokens": 180, "temperature": 0}}
            under_way = asyncio.create_task(http.post("/generate", json=prompt))
            while True:
                async with http.get("/metrics") as answer:
                    if "requests_running 1" in await answer.text():
                        break
                if under_way.done():
                    break
            process.send_signal(signal.SIGTERM)
            async with await under_way as answer:
                assert answer.status == 200
        assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_a_connection_without_a_whole_request_is_closed(
    checkpoint: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE", 0.2)
    async with listening(Server().open(EchoEngine(checkpoint())), folder) as http:
        reader, writer = await asyncio.open_unix_connection(folder / "socket")
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        reader, writer = await asyncio.open_unix_connection(folder / "socket")
        writer.write(
            b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        with contextlib.suppress(ConnectionResetError):  # half a request ends like none
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        async with http.post("/generate", json=GOOD) as answer:
            assert answer.status == 200


async def test_what_strangers_do_at_the_port_is_few_lines(tmp_path: Path) -> None:
    async with palaver_engine("127.0.0.1:0", tmp_path, ENGINE="echo") as (process, line):
        there = ("127.0.0.1", int(line.split(":")[2]))
        for odd in (b"GET / HTTP/1.1\r\nHost: a\r\n\x1b[31m: b\r\n\r\n", b"\x1b[2J / HTTP/1.1\r\n\r\n"):
            with socket.create_connection(there) as scan:
                scan.sendall(odd)
                assert b" 400 " in await asyncio.to_thread(scan.recv, 100)
        hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (40, hard))
        idle = [socket.create_connection(there) for _ in range(60)]
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 0
        for each in idle:
            each.close()
        assert process.stderr
        said = (await process.stderr.read()).decode()
    assert "no connection can be accepted now" in said and "Traceback" not in said and len(said) < 2000


LOST = """
import torch
from core.engine.model_runner import ModelRunner

alive = ModelRunner.run

def run(self, spans):
    if 66 in spans[0].sequence.request.prompt:
        raise torch.AcceleratorError("lost", 1)
    return alive(self, spans)

ModelRunner.run = run
"""


async def test_palaver_engine_ends_when_its_device_is_lost(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LOST)
    settings = {"MODEL": str(checkpoint()), "DTYPE": "float32", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    async with palaver_engine("127.0.0.1:0", tmp_path, **settings) as (process, line):
        assert line.startswith("engine ready at http"), line
        async with aiohttp.ClientSession(line.split()[3].rstrip(":")) as http:
            for prompt, status in (([5, 256], 200), ([66, 256], 503)):
                async with http.post("/generate", json={"prompt": prompt, "params": {"max_tokens": 3}}) as answer:
                    assert answer.status == status
        assert await asyncio.wait_for(process.wait(), 60) == 75
        assert process.stderr
        assert (await process.stderr.read()).decode().splitlines()[-1].endswith("the engine died: AcceleratorError")


async def test_palaver_engine_stops_with_one_line_when_it_cannot_serve(tmp_path: Path, folder: Path) -> None:
    async with palaver_engine(f"unix:{folder}/socket", tmp_path, MODEL=str(tmp_path)) as (process, line):
        assert line == f"MODEL: {tmp_path} has no config.json: it is not a model's folder"
        assert await process.wait() == 78
    for nowhere in ("nowhere", "127.0.0.1:80000"):
        async with palaver_engine(nowhere, tmp_path, ENGINE="echo") as (process, line):
            assert line.startswith(f"{nowhere} is no address")
            assert await process.wait() == 78
