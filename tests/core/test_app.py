"""The life of the house: what dies is named and started again, or ends the process; nothing dies in silence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from prometheus_client import REGISTRY
from pydantic import SecretStr

from bots.base import Bot, Line
from core import app as module
from core.app import App, open_app
from core.chat import Chat
from core.delivery import NotAccepted, RetryAfter, Unservable
from core.engine.base import Completion, EngineClosed, SamplingParams
from core.engine.torch_engine import TorchEngine
from core.messages import Author, Channel, Message, Reply
from core.settings import Settings
from tests.faults.burst import Board


class Player(Board):
    """A platform that lives as `lives` says, one exception for each, and then for ever."""

    alone = False

    def __init__(self, name: str, *lives: BaseException) -> None:
        super().__init__()
        self.name, self.lives, self.starts, self.line = name, list(lives), 0, Line()

    async def serve(self, chat: Chat) -> None:
        self.starts += 1
        if self.lives:
            raise self.lives.pop(0)
        await asyncio.Event().wait()


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.01)


def settings(folder: Path) -> Settings:
    return Settings(database_url=SecretStr(f"sqlite:///{folder / 'palaver.db'}"), engine="echo", grace=1.0)


def said(platform: str) -> Message:
    return Message(Channel(platform, "a"), "1", Author("u", "Ann"), "hello", datetime.now(UTC))


async def running(app: App, *bots: Bot) -> asyncio.Task[int]:
    task = asyncio.create_task(app.run(bots))
    await until(lambda: len(app.serving) == len(bots))
    return task


async def test_a_bot_that_dies_is_named_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying, well = Player("dying", KeyError("a bug")), Player("well")
    async with open_app(settings(tmp_path)) as app:
        task = await running(app, dying, well)
        await until(lambda: app.serving["dying"])
        assert await app.ready() == "dying: KeyError, starting again"
        await until(lambda: dying.starts == 2)
        assert await app.ready() == ""
        app.stop()
        assert await app.ready() == "stopping"
        assert await task == 0 and well.starts == 1


async def test_a_bot_that_is_cancelled_in_itself_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "backoff", lambda *_, **__: 0.0)
    bot = Player("one", asyncio.CancelledError())
    async with open_app(settings(tmp_path)) as app:
        task = await running(app, bot)
        await until(lambda: bot.starts == 2)
        assert await app.ready() == ""
        app.stop()
        assert await task == 0


async def test_a_bot_that_dies_while_it_is_stopped_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Clumsy(Player):
        async def serve(self, chat: Chat) -> None:
            try:
                await super().serve(chat)
            finally:
                raise ConnectionError("no goodbye")

    bot = Clumsy("one")
    async with open_app(settings(tmp_path)) as app:
        task = await running(app, bot)
        await until(lambda: bot.starts)
        app.stop()
        assert await asyncio.wait_for(task, 20) == 0 and bot.starts == 1
    assert "one died while it was stopped" in caplog.text


@pytest.mark.parametrize(("steady", "counted"), [(60.0, [1, 2, 3]), (0.0, [0, 0, 0])])
async def test_the_wait_before_a_start_grows_until_a_bot_served_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steady: float, counted: list[int]
) -> None:
    waits: list[int] = []

    def at_once(failures: int, longest: float, first: float) -> float:
        waits.append(failures)
        return 0.0

    monkeypatch.setattr(module, "STEADY", steady)
    monkeypatch.setattr(module, "backoff", at_once)
    dying = Player("dying", *[ConnectionError("no route")] * 3)
    async with open_app(settings(tmp_path)) as app:
        task = await running(app, dying)
        await until(lambda: dying.starts == 4)
        app.stop()
        assert await task == 0 and waits == counted


async def test_a_platform_that_is_not_heard_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def up() -> float | None:
        return REGISTRY.get_sample_value("palaver_bot_up", {"platform": "deaf"})

    bot = Player("deaf")
    async with open_app(settings(tmp_path)) as app:
        task = await running(app, bot)
        await until(lambda: bot.starts)
        bot.line.down("no answer")
        assert (await app.ready(), up()) == ("", 1.0), "a moment"
        monkeypatch.setattr(Line, "PATIENCE", 0.0)
        assert (await app.ready(), up()) == ("deaf: no answer", 0.0)
        bot.line.up()
        assert (await app.ready(), up()) == ("", 1.0)
        app.stop()
        assert await task == 0
    assert up() == 0.0


async def test_a_platform_that_says_how_long_is_left_alone_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "backoff", lambda failures, longest, first: 0.1)
    bot = Player("full", RetryAfter(1.2, "no calls"))
    async with open_app(settings(tmp_path)) as app:
        task = await running(app, bot)
        await until(lambda: bot.starts == 1)
        began = time.monotonic()
        await until(lambda: bot.starts == 2)
        assert time.monotonic() - began > 1.1 and "full: no calls; starting it again in 1.2 s" in caplog.text
        app.stop()
        assert await task == 0


async def test_what_waits_on_another_platform_is_left_to_who_serves_it(tmp_path: Path) -> None:
    bot = Player("here")
    async with open_app(settings(tmp_path)) as app:
        await app.journal.receive(said("elsewhere"), said("here"), deadline=60)
        task = await running(app, bot)
        await until(lambda: bot.seen)
        await asyncio.sleep(0.2)
        [owed] = await app.journal.backlog(60, platforms=["elsewhere"])
        assert owed.attempts == 0
        app.stop()
        assert await task == 0


@pytest.mark.parametrize("sent_id", [7, None])
async def test_what_was_sent_is_not_sent_again_for_an_id_that_is_no_text(tmp_path: Path, sent_id: Any) -> None:
    class Untyped(Player):
        async def send(self, reply: Reply) -> str:
            await super().send(reply)
            return cast(str, sent_id)

    bot = Untyped("here")
    async with open_app(settings(tmp_path)) as app:
        await app.journal.receive(said("here"), deadline=60)
        task = await running(app, bot)
        await until(lambda: bot.seen)
        app.stop()
        assert await task == 0
        assert len(bot.seen) == 1 and not await app.journal.due()


async def test_a_stop_lets_an_answer_under_way_end_and_another_process_serve_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot, begun = Player("here"), asyncio.Event()
    bot.alone = True
    async with open_app(settings(tmp_path)) as app:
        generate = app.chat.voice.engine.generate

        async def slowly(*prompt: Any, **more: Any) -> list[Completion]:
            begun.set()
            await asyncio.sleep(0.3)
            return await generate(*prompt, **more)

        monkeypatch.setattr(app.chat.voice.engine, "generate", slowly)
        await app.journal.receive(said("here"), deadline=60)
        task = await running(app, bot)
        await begun.wait()
        app.stop()
        assert await task == 0 and len(bot.seen) == 1
        assert await app.journal.lease("here", "another process", 10)


class Turns:
    """A journal whose leases are answered like this, and then with True."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers, self.steps = list(answers), list[object]()
        self.app = App(Settings(), cast(Any, self), cast(Any, None), cast(Any, None))

    async def lease(self, *_: object) -> bool:
        answer = self.answers.pop(0) if self.answers else True
        self.steps.append(answer)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def ping(self) -> None:
        self.steps.append("it is back")

    async def release(self, *_: object) -> None: ...

    async def sleep(self, seconds: float) -> None:
        self.steps.append(seconds)


async def test_after_an_outage_of_the_journal_who_had_the_turn_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(NotAccepted("away"), False)
    monkeypatch.setattr(asyncio, "sleep", turns.sleep)
    async with turns.app._turn("one"):
        assert turns.steps[1:] == ["it is back", module.HELD, False, module.HELD / 5, True]


async def test_a_turn_is_kept_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(True, NotAccepted("away"), KeyError("a bug"))
    monkeypatch.setattr(module, "HELD", 0.03)
    async with turns.app._turn("one"):
        await until(lambda: turns.steps.count(True) > 2)


async def test_every_bot_that_cannot_serve_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    bots = [Player("one", Unservable("a bad token")), Player("two", Unservable("no intent")), Player("three")]
    async with open_app(settings(tmp_path)) as app:
        task = await running(app, *bots)
        await until(lambda: app.serving["one"] and app.serving["two"] and bots[2].starts)
        assert await app.ready() == "one: a bad token; two: no intent"
        assert not task.done()
        app.stop()
        assert await task == 0 and [bot.starts for bot in bots] == [1, 1, 1]


@pytest.mark.parametrize(("why", "code"), [(None, 78), (OSError("a taken port"), 1)])
async def test_with_no_bot_left_the_process_ends_as_wrongly_set_where_a_restart_mends_nothing(
    tmp_path: Path, why: Exception | None, code: int
) -> None:
    bots = [Player("one", Unservable("a bad token")), Player("two", Unservable("it cannot"))]
    bots[1].lives[0].__context__ = why
    async with open_app(settings(tmp_path)) as app:
        assert await asyncio.wait_for(app.run(bots), 30) == code


async def test_an_engine_in_this_process_that_died_ends_the_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """For another to start: no request would be answered here any more."""
    here = settings(tmp_path).model_copy(update={"engine": "inprocess", "threads": 1})
    async with open_app(here) as app:
        engine = cast("TorchEngine", app.chat.voice.engine)
        task = await running(app, Player("one"))
        engine.core.runner.run = lost  # type: ignore[method-assign]
        await app.journal.receive(said("one"), deadline=60)
        with pytest.raises(EngineClosed, match="the engine died: AcceleratorError"):
            await engine.generate([5], SamplingParams())
        assert await asyncio.wait_for(task, 30) == 75
    assert "the engine died: AcceleratorError; only a new process helps" in caplog.text


def lost(spans: object) -> Any:
    raise torch.AcceleratorError("lost", 1)


async def test_systemd_gives_a_stop_more_than_its_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("core.systemd.notify", told.append)
    async with open_app(settings(tmp_path)) as app:
        task = await running(app, Player("one"))
        app.stop()
        assert await task == 0
    assert "STOPPING=1\nEXTEND_TIMEOUT_USEC=21000000" in told


async def test_the_watchdog_is_fed_while_a_journal_that_is_gone_from_its_place_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    saving = asyncio.Event()
    monkeypatch.setattr("core.systemd.notify", told.append)
    async with open_app(settings(tmp_path)) as app:

        async def look() -> None:
            told.clear()
            saving.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(app.journal, "look", look)
        task = await running(app, Player("one"))
        await saving.wait()
        await until(lambda: told.count("WATCHDOG=1") > 1)
        app.stop()
        assert await task == 0


@pytest.mark.parametrize("part", ["chat", "beat"])
async def test_a_part_of_the_house_that_dies_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    async with open_app(settings(tmp_path)) as app:

        async def dies() -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(app.chat, "serve", dies) if part == "chat" else monkeypatch.setattr(app, "_beat", dies)
        assert await asyncio.wait_for(app.run([Player("one")]), 30) == 1
    assert "the house fell down" in caplog.text
