"""The engine on Ray Serve: a real cluster of one machine, from the file that operators start."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from core.engine import wire
from core.engine.base import Completion, SamplingParams
from core.engine.http_engine import HttpEngine, connect_engine
from core.engine.torch_engine import TorchEngine

ROOT = Path(__file__).resolve().parents[3]
START = 120.0
"""Seconds that a cluster may take to come up beside other tests."""
PROMPT = list(range(50, 90))
SHORT = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, max_tokens=12)
LONG = replace(SHORT, max_tokens=200, n=64, seed=1)
Open = Callable[..., Coroutine[Any, Any, TorchEngine]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator's, with the file and the cluster's log."""
    return tmp_path_factory.mktemp("ray")


def environment(home: Path) -> dict[str, str]:
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "NO_COLOR": "1"}
    return os.environ | quiet | {"HOME": str(home)}


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    """Where two replicas of the embedded model answer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = (ROOT / "deploy/ray/serve.yaml").read_text()
    text = text.replace("port: 8100", f"port: {port}").replace("MODEL: embedded", "DTYPE: float32")
    (home / "serve.yaml").write_text(text)
    serve = Path(sys.executable).with_name("serve")
    command: list[str | Path] = [serve, "run", "--app-dir", ROOT, home / "serve.yaml"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(home), stdout=log, stderr=log, start_new_session=True)
    late = time.monotonic() + START
    while "2 replicas," not in (home / "log").read_text() and process.poll() is None and time.monotonic() < late:
        time.sleep(0.05)  # until both stand on the ring
    yield f"http://127.0.0.1:{port}"
    print((home / "log").read_text())
    process.send_signal(signal.SIGINT)
    process.wait(START)


@pytest.fixture
async def there(address: str) -> AsyncIterator[HttpEngine]:
    engine = await connect_engine(address, START)
    yield engine
    await engine.aclose()


async def ask(engine: HttpEngine | TorchEngine, number: int, session: str = "") -> Completion:
    params = replace(SHORT, seed=number)
    (completion,) = await engine.generate([*PROMPT, number], params, session=session or f"session {number}")
    return completion


async def count(address: str, session: str, name: str) -> int:
    """Of the replica that has the session."""
    async with aiohttp.ClientSession(address, headers={wire.SESSION: wire.affinity(session)}) as http:
        async with http.get("/metrics") as answer:
            found = re.search(rf"^palaver_engine_{name} (\d+)$", await answer.text(), re.MULTILINE)
    assert found
    return int(found[1])


async def until_running(address: str, session: str, busy: bool = True) -> None:
    async with asyncio.timeout(START):
        while bool(await count(address, session, "requests_running")) != busy:
            await asyncio.sleep(0.01)


def kill_one() -> None:
    """A replica, by the name that Ray gives its process."""
    pids = subprocess.check_output(["pgrep", "-f", "^ray::ServeReplica:palaver:engine"], text=True)
    os.kill(int(pids.split()[0]), signal.SIGKILL)


async def test_it_says_what_an_engine_in_this_process_says(there: HttpEngine, engine: Open) -> None:
    assert there.info.at_once == 2 * 32  # so many a bot keeps under way, and both have work
    here = await engine(ROOT / "core/models/tiny")
    replies = [(await ask(here, number)).token_ids for number in range(8)]
    assert [said.token_ids for said in await asyncio.gather(*(ask(there, number) for number in range(8)))] == replies


async def test_a_session_stays_where_its_keys_and_values_are(there: HttpEngine) -> None:
    for number in range(20, 32):
        assert (await ask(there, number)).cached_tokens < len(PROMPT)
        assert (await ask(there, number)).cached_tokens == len(PROMPT)


async def test_every_replica_forgets(there: HttpEngine, address: str) -> None:
    async with aiohttp.ClientSession(address) as http:

        async def cached() -> list[int]:
            """Of one session, asked by 16 ways: some lead to each replica."""
            found = []
            for way in range(16):
                body = {"prompt": PROMPT[::-1], "params": asdict(SHORT), "session": "anna"}
                async with http.post("/generate", json=body, headers={wire.SESSION: str(way)}) as answer:
                    found += [c.cached_tokens for c in wire.load_completions(await answer.json())]
            return found

        assert (await cached()).count(0) == 2
        assert (await cached()).count(0) == 0
        await there.forget("anna")
        assert (await cached()).count(0) == 2


async def test_who_goes_away_is_given_up(there: HttpEngine, address: str) -> None:
    before = await count(address, "gone", "requests_total")
    asking = asyncio.create_task(there.generate(PROMPT, LONG, session="gone"))
    await until_running(address, "gone")
    asking.cancel()
    await until_running(address, "gone", busy=False)
    assert await count(address, "gone", "requests_total") == before


async def test_a_replica_dies_and_nobody_notices(there: HttpEngine, address: str) -> None:
    expected = [(await ask(there, number)).token_ids for number in range(40, 44)]
    sessions = [f"long {k}" for k in range(6)]
    asking = [asyncio.create_task(there.generate(PROMPT, LONG, session=session)) for session in sessions]
    for session in sessions:
        await until_running(address, session)
    asking_too = [asyncio.create_task(ask(there, number)) for number in range(40, 44)]
    kill_one()
    assert [said.token_ids for said in await asyncio.gather(*asking_too)] == expected
    answers = await asyncio.gather(*asking)
    assert all([c.token_ids for c in answer] == [c.token_ids for c in answers[0]] for answer in answers)


async def test_after_a_change_of_their_number_a_bot_keeps_as_many_under_way_as_they_run(
    there: HttpEngine, address: str, home: Path
) -> None:
    text = (home / "serve.yaml").read_text()
    (home / "serve.yaml").write_text(text.replace("num_replicas: 2", "num_replicas: 1"))
    dashboard = re.findall(r"http://\S+?:\d+", (home / "log").read_text())[0]
    serve = Path(sys.executable).with_name("serve")
    command: list[str | Path] = [serve, "deploy", "--address", dashboard, home / "serve.yaml"]
    await asyncio.to_thread(
        subprocess.run, command, env=environment(home) | {"RAY_AUTH_MODE": "token"}, check=True, capture_output=True
    )
    async with asyncio.timeout(60), aiohttp.ClientSession(address) as http:
        at_once = 0
        while at_once != 32:
            await asyncio.sleep(0.05)
            async with http.get("/info") as answer:
                at_once = (await answer.json())["at_once"]
