"""The engine in another process, with real kills: nobody notices but the clock."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from core import metrics
from core.engine import http_engine
from core.engine.base import (
    BadCheckpoint,
    Cancelled,
    Completion,
    Engine,
    EngineClosed,
    Failed,
    OtherModel,
    PromptTooLong,
    QueueFull,
    SamplingParams,
)
from core.engine.echo_engine import EchoEngine
from core.engine.folder import PrivateFolder
from core.engine.http_engine import HttpEngine, connect_engine, spawn_engine
from core.engine.process import EngineProcess
from core.engine.server import Server, bound
from core.engine.torch_engine import TorchEngine
from core.settings import Settings
from core.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[3]
LONG = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, max_tokens=200)
Open = Callable[..., Coroutine[Any, Any, TorchEngine]]
Make = Callable[..., Path]


def settings(folder: Path) -> Settings:
    return Settings(model=str(folder), threads=1, dtype="float32")


def echo(folder: Path) -> dict[str, Any]:
    """What a child opens that needs no model, and so is there soon."""
    return {"kind": "echo", "model": str(folder), "revision": "", "device": "", "dtype": "", "threads": 1}


async def spawn_echo(folder: Path) -> HttpEngine:
    process = EngineProcess("echo", echo(folder))
    return await HttpEngine(f"unix:{process.path}", process).open()


@contextlib.asynccontextmanager
async def spawned(folder: Path, *, is_echo: bool = False) -> AsyncIterator[HttpEngine]:
    engine = await (spawn_echo(folder) if is_echo else spawn_engine(settings(folder)))
    try:
        yield engine
    finally:
        await engine.aclose()


@contextlib.asynccontextmanager
async def over_http(engine: Engine) -> AsyncIterator[HttpEngine]:
    """A client of `engine`, which is in this process, so that one can look inside."""
    folder = PrivateFolder()
    address = f"unix:{folder.path}/socket"
    with bound(address) as sock:
        async with Server().open(engine).listening(sock):
            client = await connect_engine(address)
            try:
                yield client
            finally:
                await client.aclose()
    folder.close()


def pid(engine: HttpEngine) -> int:
    assert engine.process
    return engine.process.pid


def proc(engine: HttpEngine, what: str) -> str:
    return Path(f"/proc/{pid(engine)}/{what}").read_text()


def gone(process: int) -> bool:
    try:
        return " Z " in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return True


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.02)


@pytest.fixture
def restarts() -> Callable[[], float]:
    """How many restarts were counted since the test began."""

    def counted() -> float:
        return sum(sample.value for metric in metrics.engine_restarts.collect() for sample in metric.samples[:1])

    before = counted()
    return lambda: counted() - before


# -- the same as in process ---------------------------------------------------------------------------------------


async def test_a_child_draws_what_the_engine_in_this_process_draws(engine: Open, checkpoint: Make) -> None:
    here = await engine("plain")
    asked = [
        ([7, 8, 9, 256], SamplingParams(temperature=0)),
        ([40, 41, 256, 3, 256], SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=20)),
        ([1] * 200, SamplingParams(temperature=0.7, seed=6, repetition_penalty=1.3, no_repeat_ngram=3)),
    ]
    async with spawned(checkpoint()) as there:
        assert there.info.vocab_size == here.info.vocab_size
        assert there.info.path == str(checkpoint())
        assert there.info.at_once == here.info.at_once == 32
        for prompt, params in asked:
            mine = await here.generate(prompt, params, session="s")
            theirs = await there.generate(prompt, params, session="s")
            assert [c.token_ids for c in theirs] == [c.token_ids for c in mine]
            assert [c.logprob for c in theirs] == pytest.approx([c.logprob for c in mine])
            assert [c.finish_reason for c in theirs] == [c.finish_reason for c in mine]


async def test_a_hint_arrives_and_saves_the_prefill(engine: Open) -> None:
    here = await engine("plain")
    async with over_http(here) as there:
        await there.generate([1, 2, 256], SamplingParams(temperature=0), session="s")
        there.prepare("s", [9] * 30)
        await until(lambda: any(slot.tokens == [9] * 30 for slot in here.core.scheduler.cache.idle))
        [completion] = await there.generate([*[9] * 30, 5, 256], SamplingParams(temperature=0), session="s")
        assert completion.cached_tokens == 30


async def test_a_hint_that_nobody_hears_is_no_mistake(engine: Open, checkpoint: Make) -> None:
    here = await engine("plain")
    async with over_http(here) as there:
        there.prepare("s", [9999])  # refused
        there.prepare("s", [])
        await there.forget("s")
    there.prepare("s", [1])  # closed
    async with spawned(checkpoint()) as there:
        there.prepare("s", [1, 2])
        assert there.process
        there.process.kill("by the test")
        there.prepare("s", [1, 2])
        assert await there.generate([1, 2, 256], SamplingParams(temperature=0))


async def test_a_hundred_requests_at_once(engine: Open) -> None:
    here = await engine("plain")
    async with over_http(here) as there:
        prompts = [[i, i + 1, 256] for i in range(100)]
        params = SamplingParams(temperature=0, max_tokens=6)
        theirs = await asyncio.gather(*(there.generate(p, params, deadline=120) for p in prompts))
        mine = [await here.generate(p, params) for p in prompts]
        assert [c.token_ids for (c,) in theirs] == [c.token_ids for (c,) in mine]


async def test_every_refusal_arrives_as_what_it_is(engine: Open) -> None:
    here = await engine("plain", max_running=1, max_waiting=1)
    async with over_http(here) as there:
        with pytest.raises(PromptTooLong) as caught:
            await there.generate([1] * 256, LONG)
        with pytest.raises(PromptTooLong) as same:
            await here.generate([1] * 256, LONG)
        assert str(caught.value) == str(same.value)
        for odd in ([], [384], [-1], [1.5], "hi"):
            there.prepare("s", cast("Any", odd))
            with pytest.raises(ValueError, match="a prompt is 1 or more ids from 0 below 384"):
                await there.generate(cast("Any", odd), LONG)
        ends = await asyncio.gather(*(there.generate([i, 256], LONG) for i in range(12)), return_exceptions=True)
        assert any(isinstance(end, QueueFull) for end in ends)
        assert all(isinstance(end, QueueFull | list) for end in ends)


async def test_a_deadline_is_a_cancellation(engine: Open) -> None:
    async with over_http(await engine("deep")) as there:
        with pytest.raises(Cancelled):
            await there.generate([1, 256], SamplingParams(temperature=0, max_tokens=1000), deadline=0.05)
        with pytest.raises(Cancelled):
            await there.generate([1, 256], LONG, deadline=-1)


async def test_who_hangs_up_frees_the_row(engine: Open) -> None:
    here = await engine("deep")
    async with over_http(here) as there:
        task = asyncio.create_task(there.generate([1, 256], SamplingParams(temperature=0, max_tokens=1000)))
        running = here.core.scheduler.running
        await until(lambda: bool(running))
        (row,) = running
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not running)
        assert row.finish_reason is None
        assert len(row.new_tokens) < 1000


async def test_forget_drops_what_was_cached(engine: Open) -> None:
    async with over_http(await engine("plain")) as there:
        prompt, params = [*range(100), 256], SamplingParams(temperature=0, max_tokens=2)
        cached = []
        for session in ("a", "a", "b", "a"):
            if session == "b":
                await there.forget("a")
            else:
                cached.append((await there.generate(prompt, params, session=session))[0].cached_tokens)
        assert cached[0] == 0
        assert cached[1] > 60
        assert cached[2] == 0


# -- a child that dies --------------------------------------------------------------------------------------------


async def test_killed_in_the_middle_of_ten_requests_it_answers_all_ten(
    checkpoint: Make, restarts: Callable[[], float]
) -> None:
    """And says what it would have said."""
    params = [SamplingParams(temperature=1.0, top_k=0, top_p=1.0, max_tokens=200, seed=seed) for seed in range(10)]
    async with spawned(checkpoint("deep")) as engine:
        want = await asyncio.gather(*(engine.generate([5, 256], p) for p in params))
        first = pid(engine)
        asked = [asyncio.create_task(engine.generate([5, 256], p, deadline=120)) for p in params]
        await asyncio.sleep(0.05)
        os.kill(first, signal.SIGKILL)
        answers = await asyncio.gather(*asked)
        assert [c.token_ids for (c,) in answers] == [c.token_ids for (c,) in want]
        assert pid(engine) != first
        assert restarts() == 1
        assert await engine.ready() == ""


async def test_the_seed_is_drawn_before_the_first_send(checkpoint: Make) -> None:
    seeds: list[int | None] = []

    class Noting(EchoEngine):
        async def generate(
            self, prompt: Sequence[int], params: SamplingParams, *, session: str = "", deadline: float | None = None
        ) -> list[Completion]:
            seeds.append(params.seed)
            if len(seeds) == 1:
                raise EngineClosed("restarting, ask again")
            return await super().generate(prompt, params)

    async with over_http(Noting(checkpoint())) as there:
        await there.generate([1, 256], SamplingParams())
        await there.generate([1, 256], SamplingParams())
        first, again, other = seeds
        assert first == again is not None
        assert other != first


async def test_what_was_forgotten_is_sent_again_as_nobodys(checkpoint: Make) -> None:
    sessions: list[str] = []
    asked, forgotten = asyncio.Event(), asyncio.Event()

    class Noting(EchoEngine):
        async def generate(
            self, prompt: Sequence[int], params: SamplingParams, *, session: str = "", deadline: float | None = None
        ) -> list[Completion]:
            sessions.append(session)
            if len(sessions) == 1:
                asked.set()
                await forgotten.wait()
                raise EngineClosed("restarting, ask again")
            return await super().generate(prompt, params)

    async with over_http(Noting(checkpoint())) as there:
        answer = asyncio.create_task(there.generate([1, 256], SamplingParams(), session="a"))
        await asked.wait()
        await there.forget("b")
        await there.forget("a")
        forgotten.set()
        assert await answer
    assert sessions == ["a", ""]


async def test_killed_again_and_again_it_comes_back(checkpoint: Make, restarts: Callable[[], float]) -> None:
    async with spawned(checkpoint(), is_echo=True) as engine:
        for kill in range(4):
            os.kill(pid(engine), signal.SIGKILL)
            answers = await asyncio.gather(*(engine.generate([i, 256], LONG, deadline=60) for i in range(5)))
            assert [c.token_ids for (c,) in answers] == [[i] for i in range(5)]
            assert restarts() == kill + 1


async def test_a_child_that_hangs_is_replaced(
    checkpoint: Make, restarts: Callable[[], float], caplog: pytest.LogCaptureFixture
) -> None:
    async with spawned(checkpoint(), is_echo=True) as engine:
        engine.probe_every, engine.probe_waits = 0.1, 1.0
        os.kill(pid(engine), signal.SIGSTOP)
        asked = [asyncio.create_task(engine.generate([i, 256], LONG, deadline=120)) for i in range(5)]
        assert [c.token_ids for (c,) in await asyncio.gather(*asked)] == [[i] for i in range(5)]
        assert restarts() == 1
        os.kill(pid(engine), signal.SIGKILL)
        await until(lambda: restarts() == 2)
    ends = [line for line in caplog.messages if line.endswith("starting it again")]
    assert "was killed here (silent for 2 s)" in ends[0] and "by SIGKILL, perhaps for want of memory" in ends[1]


async def test_a_child_is_not_killed_because_we_have_no_descriptor_to_ask_with(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(HttpEngine, "probe_every", 0.5)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with spawned(checkpoint(), is_echo=True) as engine:
        child = pid(engine)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))  # before the first probe, whose connection would be kept
        try:
            await asyncio.sleep(2)  # twice the probes that end a child
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await engine.generate([5, 256], LONG, deadline=60)
        assert pid(engine) == child and not caplog.messages


async def test_no_answer_at_twice_the_deadline_ends_the_child(checkpoint: Make, restarts: Callable[[], float]) -> None:
    async with spawned(checkpoint(), is_echo=True) as engine:
        engine.probe_every, engine.mercy = 600.0, 0.5
        os.kill(pid(engine), signal.SIGSTOP)
        with pytest.raises(Cancelled):
            await engine.generate([5, 256], LONG, deadline=0.5)
        assert restarts() == 0
        await until(lambda: restarts() == 1)
        assert await engine.generate([5, 256], LONG, deadline=60)


async def test_a_child_killed_by_a_signal_without_a_name_is_replaced(
    checkpoint: Make, restarts: Callable[[], float]
) -> None:
    async with spawned(checkpoint(), is_echo=True) as engine:
        os.kill(pid(engine), signal.SIGRTMIN + 1)
        await until(lambda: restarts() == 1)
        assert await engine.generate([5, 256], LONG, deadline=60)


DIES_INSIDE = """
import os, pathlib
from core.engine.base import EngineClosed
from core.engine.echo_engine import EchoEngine

alive = EchoEngine.generate

async def generate(self, prompt, params, **others):
    mark = pathlib.Path(os.environ["MARK"])
    if not mark.exists():
        mark.touch()
        raise EngineClosed("the device is lost")
    return await alive(self, prompt, params, **others)

EchoEngine.generate = generate
"""


async def test_an_engine_that_died_inside_its_process_is_a_dead_process(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, restarts: Callable[[], float]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(DIES_INSIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    async with spawned(checkpoint(), is_echo=True) as engine:
        assert await engine.generate([5, 256], LONG, deadline=60)
        assert restarts() == 1


async def test_while_it_is_down_a_request_waits_for_its_deadline_at_most(checkpoint: Make) -> None:
    """And ready() says in one line what is wrong."""
    async with spawned(checkpoint(), is_echo=True) as engine:
        config = checkpoint() / "config.json"
        text = config.read_text("utf-8")
        try:
            config.unlink()
            os.kill(pid(engine), signal.SIGKILL)
            with pytest.raises(EngineClosed, match=r"config\.json|starting again"):
                await engine.generate([5, 256], LONG, deadline=2)
            await engine.forget("somebody")  # the dead remember nothing
            assert await engine.ready()
            assert "\n" not in await engine.ready()
        finally:
            config.write_text(text, "utf-8")
        assert await engine.generate([5, 256], LONG, deadline=60)
        assert await engine.ready() == ""


POISON = """
import os, signal
from core.engine.echo_engine import EchoEngine

harmless = EchoEngine.generate

async def generate(self, prompt, params, **others):
    if 13 in prompt:
        os.kill(os.getpid(), signal.SIGKILL)
    return await harmless(self, prompt, params, **others)

EchoEngine.generate = generate
"""


async def test_a_request_that_kills_is_given_up_and_the_others_live(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, restarts: Callable[[], float]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(POISON)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with spawned(checkpoint(), is_echo=True) as engine:
        asked = [engine.generate([i, 256], LONG, deadline=120) for i in range(20)]
        *ends, last = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(ends[13], Failed)
        assert f"died {http_engine.MOST_DEATHS} times" in str(ends[13])
        for i, end in enumerate([*ends, last]):
            assert i == 13 or (isinstance(end, list) and end[0].token_ids == [i])
        assert restarts() == http_engine.MOST_DEATHS


async def test_a_suspects_turn_is_waited_for_until_its_deadline_or_the_end(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, restarts: Callable[[], float]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(POISON)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with asyncio.timeout(60), spawned(checkpoint(), is_echo=True) as engine:
        await engine._suspects.acquire()  # another suspect is at work
        with pytest.raises(Cancelled, match="within the deadline"):
            await engine.generate([13, 256], LONG, deadline=8)
        assert restarts() == 2
        asked = asyncio.create_task(engine.generate([13, 256], LONG))
        await until(lambda: restarts() == 4)
        await engine.aclose()
        engine._suspects.release()
        with pytest.raises(EngineClosed, match="the engine is closed"):
            await asked


async def test_what_failed_and_what_answered_in_the_same_moment_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_engine, "SILENCE", 0.01)
    engine = http_engine.HttpEngine("http://127.0.0.1:1")
    sent: list[asyncio.Event] = []

    async def exchange(method: str, path: str, body: object, number: str) -> dict[str, Any]:
        sent.append(asyncio.Event())
        if len(sent) % 2:
            await sent[-1].wait()
            raise http_engine.Unreachable("the wire broke")
        sent[-2].set()
        return {}

    monkeypatch.setattr(engine, "_exchange", exchange)
    for _ in range(20):
        assert await engine._once("POST", "/generate", dict, time.monotonic() + 60) == {}
    assert len(sent) == 40
    await engine.aclose()


async def test_a_child_that_finds_another_model_in_its_folder_is_not_asked(checkpoint: Make, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    async with spawned(folder, is_echo=True) as engine:
        assert await engine.generate([5, 256], LONG, deadline=60)
        os.kill(pid(engine), signal.SIGKILL)
        assert await engine.generate([5, 256], LONG, deadline=60) and engine.ended == ""
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
        os.kill(pid(engine), signal.SIGKILL)
        with pytest.raises(OtherModel, match="the engine has another model now"):
            await engine.generate([5, 256], LONG, deadline=60)
        assert "another model" in engine.ended and "another model" in await engine.ready()


# -- its start and its end ----------------------------------------------------------------------------------------


async def test_a_bad_checkpoint_surfaces_with_its_line(tmp_path: Path, checkpoint: Make) -> None:
    with pytest.raises(BadCheckpoint, match=r"no config\.json"):
        await spawn_engine(settings(tmp_path))
    (tmp_path / "config.json").write_text((checkpoint() / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(BadCheckpoint) as caught:
        await spawn_engine(settings(tmp_path))
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_child_that_dies_at_its_start_says_its_last_words(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "aiohttp").mkdir()
    (tmp_path / "aiohttp" / "__init__.py").write_text("raise RuntimeError('no such day')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineClosed, match=r"ended with exit code 1 while it started: .*no such day") as caught:
        await spawn_echo(checkpoint())
    assert "\n" not in str(caught.value)


async def test_the_working_directory_cannot_replace_modules(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "aiohttp.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    async with spawned(checkpoint(), is_echo=True) as engine:
        assert await engine.ready() == ""


async def test_it_has_no_secrets(checkpoint: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = "canary-8c1f"
    (tmp_path / secret).write_text("postgresql+asyncpg://localhost/x")
    for name in ("DISCORD_TOKEN", "TELEGRAM_TOKEN", "DATABASE_URL", "CREDENTIALS_DIRECTORY"):
        monkeypatch.setenv(name, secret)
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / secret))
    for name in ("HF_TOKEN", "TELEGRAM_WEBHOOK_SECRET", "PGPASSWORD", "OPENAI_API_KEY", "discord_token"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HISTORY_TOKENS", "64")
    async with spawned(checkpoint(), is_echo=True) as engine:
        environment, arguments = proc(engine, "environ"), proc(engine, "cmdline")
    assert secret not in environment + arguments
    assert "HISTORY_TOKENS=64" in environment


async def test_its_log_lines_are_ours(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    says = "'ERROR core.engine.odd one\\ntwo ' + 'x' * 200_000 + '\\rthree'"
    (tmp_path / "sitecustomize.py").write_text(f"import sys; print({says}, file=sys.stderr); print('four')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with spawned(checkpoint(), is_echo=True):
        pass
    assert ("core.engine.odd", logging.ERROR, "one") in caplog.record_tuples
    for stray in ("three", "four"):
        assert ("engine", logging.WARNING, stray) in caplog.record_tuples
    assert max(len(record.message) for record in caplog.records) <= 2000


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_what_is_sent_to_all_of_a_service_does_not_end_it(checkpoint: Make, how: signal.Signals) -> None:
    async with spawned(checkpoint(), is_echo=True) as engine:
        before = pid(engine)
        os.kill(before, how)
        assert await engine.generate([1, 256], LONG, deadline=60)
        assert pid(engine) == before


async def test_closing_ends_even_a_child_that_hangs_and_what_waits(checkpoint: Make) -> None:
    engine = await spawn_echo(checkpoint())
    os.kill(pid(engine), signal.SIGSTOP)
    asked = asyncio.create_task(engine.generate([1, 256], LONG))
    await asyncio.sleep(0.05)
    assert engine.process
    folder = engine.process.path.parent
    await engine.aclose()
    with pytest.raises(EngineClosed):
        await asked
    with pytest.raises(EngineClosed):
        await engine.generate([1, 256], LONG)
    assert await engine.ready()
    assert gone(pid(engine))
    assert not folder.exists()
    await engine.aclose()


PARENT = """
import asyncio, sys
from core.engine.http_engine import spawn_engine
from core.engine.base import SamplingParams
from core.settings import Settings

async def main():
    engine = await spawn_engine(Settings(model=sys.argv[1], threads=1))
    (completion,) = await engine.generate([1, 256], SamplingParams(max_tokens=2, temperature=0))
    assert completion.token_ids
    print(engine.process.pid, *sorted({"torch", "transformers", "numpy"} & set(sys.modules)), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_the_child_dies_with_its_parent_which_never_imports_torch(checkpoint: Make) -> None:
    """The child is stopped first: only the kernel can end it then."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(checkpoint())], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    child, *imported = parent.stdout.readline().split()
    assert imported == []
    os.kill(int(child), signal.SIGSTOP)
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 60
    while not gone(int(child)) and time.monotonic() < end:
        time.sleep(0.02)
    assert gone(int(child))


def test_the_child_ends_with_its_standard_input(checkpoint: Make) -> None:
    """The way that works where no kernel helps."""
    folder = PrivateFolder()
    address = f"unix:{folder.path}/socket"
    options = {"parent": os.getpid(), "address": address, "log_level": "INFO", "engine": echo(checkpoint())}
    child = subprocess.Popen(
        [sys.executable, "-m", "core.engine.child", json.dumps(options)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout and child.stdin
    assert b"info" in child.stdout.readline()
    child.stdin.close()
    assert child.wait(60) == 1
    child.stdout.close()
    folder.close()


# -- an engine elsewhere ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def elsewhere(address: str, model: Path, kind: str = "process") -> AsyncIterator[str]:
    """`palaver engine` at `address`; yields the address to connect to."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bots", "engine", address),
        env=os.environ | {"MODEL": str(model), "THREADS": "1", "DTYPE": "float32", "ENGINE": kind},
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    try:
        line = (await process.stdout.readline()).decode()
        yield line.split(" at ")[1].split(": model ")[0]
    finally:
        process.kill()
        await process.communicate()


async def test_palaver_engine_on_tcp_serves_another_machine(engine: Open, checkpoint: Make) -> None:
    here = await engine("plain")
    async with elsewhere("127.0.0.1:0", checkpoint()) as address:
        there = await connect_engine(address)
        try:
            params = SamplingParams(temperature=0, max_tokens=10)
            assert await there.ready() == ""
            assert there.info.path != here.info.path  # nothing of that machine's disk is needed
            assert Tokenizer.load(there.info.path).encode("hi") == Tokenizer.load(here.info.path).encode("hi")
            assert [c.token_ids for c in await there.generate([1, 256], params)] == [
                c.token_ids for c in await here.generate([1, 256], params)
            ]
        finally:
            await there.aclose()
        with pytest.raises(BadCheckpoint):
            Tokenizer.load(there.info.path)


async def test_an_engine_elsewhere_may_go_and_come_back(checkpoint: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, http_engine.__name__)
    folder = PrivateFolder()
    address = f"unix:{folder.path}/socket"
    async with elsewhere(address, checkpoint(), "echo"):
        there = await connect_engine(address)
    try:
        assert "does not answer" in await there.ready()
        with pytest.raises(EngineClosed, match="does not answer"):
            await there.generate([1, 256], LONG, deadline=0.3)
        asked = [asyncio.create_task(there.generate([1, 256], LONG, deadline=120)) for _ in range(5)]
        await asyncio.sleep(0.1)
        async with elsewhere(address, checkpoint(), "echo"):
            assert all(await asyncio.gather(*asked))
            assert await there.ready() == ""
        said = [record.getMessage() for record in caplog.records if record.name == http_engine.__name__]
        assert len(said) == 2 and "whoever asks waits" in said[0] and "answers again" in said[1], "not one for each"
    finally:
        await there.aclose()
        folder.close()


@pytest.mark.parametrize("lost", ["request", "answer", "refusal"])
async def test_a_wire_that_dies_in_silence_costs_no_answer(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Something between takes the bytes of the first question, or of its answer, and passes nothing on any more."""
    monkeypatch.setattr(http_engine, "SILENCE", 0.3)
    cut: list[asyncio.StreamWriter] = []

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_connection(*place.getsockname())

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter, mark: bytes) -> None:
            while data := await source.read(1 << 16):
                if not cut and mark in data:
                    cut.append(writer)
                if writer not in cut:
                    sink.write(data)
            sink.close()

        request, answer = (b"\0", b"completions") if lost == "answer" else (b"POST /generate", b"\0")
        await asyncio.gather(pass_on(reader, their_writer, request), pass_on(their_reader, writer, answer))

    with bound("127.0.0.1:0") as place:
        async with (
            Server().open(EchoEngine(checkpoint())).listening(place),
            await asyncio.start_server(between, "127.0.0.1") as server,
        ):
            there = await connect_engine("http://{}:{}".format(*server.sockets[0].getsockname()))
            try:
                began = time.monotonic()
                if lost == "refusal":
                    with pytest.raises(PromptTooLong):
                        await there.generate([1] * 256, SamplingParams(), deadline=60)
                else:
                    [completion] = await there.generate([1, 256], SamplingParams(), deadline=60)
                    assert completion.token_ids == [1]
                assert cut and time.monotonic() - began < 30
            finally:
                await there.aclose()


async def test_a_long_answer_is_waited_for_and_computed_once(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_engine, "SILENCE", 0.1)
    ends: list[str] = []

    class Slow(EchoEngine):
        async def generate(
            self, prompt: Sequence[int], params: SamplingParams, *, session: str = "", deadline: float | None = None
        ) -> list[Completion]:
            try:
                await asyncio.sleep(prompt[0] / 10)
            except asyncio.CancelledError:
                ends.append("given up")
                raise
            ends.append("answered")
            return await super().generate(prompt, params)

    async with over_http(Slow(checkpoint())) as there:
        assert await there.generate([10, 256], SamplingParams(), deadline=60)
        assert ends == ["answered"]
        with pytest.raises(Cancelled):
            await there.generate([300, 256], SamplingParams(), deadline=0.5)
        await until(lambda: ends == ["answered", "given up"])


async def test_what_was_under_way_to_the_engine_when_it_was_forgotten_does_not_stay(
    engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two go over different wires, and the later one may come first."""
    here = await engine("plain")
    begins = asyncio.Event()
    ask = here.generate

    async def later(prompt: Sequence[int], *args: Any, **kinds: Any) -> list[Completion]:
        await begins.wait()
        return await ask(prompt, *args, **kinds)

    monkeypatch.setattr(here, "generate", later)
    async with over_http(here) as there:
        asked = asyncio.create_task(there.generate([1, 256], SamplingParams(max_tokens=3), session="a"))
        await asyncio.sleep(0.2)
        await there.forget("a")
        begins.set()
        assert await asked
        await until(lambda: not here.core.scheduler.cache.kept)


async def test_a_path_longer_than_a_sockets_is_one_line() -> None:
    with pytest.raises(EngineClosed, match="longer than the 107 bytes"):
        await connect_engine(f"unix:/tmp/{'x' * 110}")


@pytest.mark.parametrize("address", ["http://", "unix:", "ftp://", "somewhere", "http://[x"])
async def test_what_is_no_address_is_one_line(address: str) -> None:
    with pytest.raises(EngineClosed, match="is no address"):
        await connect_engine(address)


async def test_nobody_there_is_one_line_after_a_while() -> None:
    with bound("127.0.0.1:0") as sock:
        free = sock.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(EngineClosed, match=f"http://127.0.0.1:{free} does not answer"):
        await connect_engine(f"http://127.0.0.1:{free}", patience=0.3)
    assert time.monotonic() - began >= 0.3


async def test_who_takes_the_call_and_says_nothing_is_one_line_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_engine, "SILENCE", 0.2)
    with bound("127.0.0.1:0") as hole:
        hole.listen()
        address = "http://{}:{}".format(*hole.getsockname())
        async with asyncio.timeout(30):
            with pytest.raises(EngineClosed, match=f"{address} does not answer"):
                await connect_engine(address, patience=0.5)


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (404, "<html>", "answers 404 and not like an engine"),
        (200, "hello", "answers 200 and not like an engine"),
        (502, '{"error": {"code": 502, "message": "no upstream"}}', "answers 502 and not like an engine"),
        (504, '{"status": 504, "error": "Timeout", "message": "", "path": "/"}', "answers 504 and not like an engine"),
        (502, '{"error": "Bad Gateway", "message": "no upstream"}', "answers 502 and not like an engine"),
        (200, "{}", "no engine of this version"),
        (404, '{"error": "BadRequest", "message": "Not Found"}', "no engine of this version"),
    ],
)
async def test_what_is_no_engine_is_one_line(status: int, body: str, says: str) -> None:
    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} Odd\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        writer.close()

    server = await asyncio.start_server(page, "127.0.0.1")
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(EngineClosed, match=says) as caught:
            await connect_engine(f"http://127.0.0.1:{port}", patience=0.2)
        assert "\n" not in str(caught.value)
