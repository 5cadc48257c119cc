"""Builds the house from its settings and takes it down in reverse; the only file that knows everyone.

open_engine, open_voice and open_app are async context managers: what they opened is closed when the block ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, TypeVar

from core import metrics, systemd
from core.backoff import backoff
from core.chat import Chat
from core.courier import Courier, insist
from core.delivery import NotAccepted, RetryAfter, Unservable
from core.engine.base import Engine, HubAway
from core.logs import Complaints
from core.owner import OWNER
from core.queue import RequestQueue
from core.settings import Settings
from core.tokenizer import Tokenizer
from core.voice import Voice

if TYPE_CHECKING:
    from bots.base import Bot, Line
    from core.journal.journal import Journal

log = logging.getLogger(__name__)

OpenT = TypeVar("OpenT")
BACKUP_EVERY = 3600.0
LOOK_EVERY = 10.0
BEAT = 0.25
HELD = 10.0
"""Seconds until another process serves a platform whose own stands still; renewed three times as often."""
START = 600.0
"""Seconds that systemd gives a start that says it is still at it, as the unit does from the beginning."""
CLOSING = 20.0
"""Seconds that systemd gives a stop beyond GRACE, to close what is open."""
STEADY = 60.0
"""A bot that served this long was healthy: its next failure counts as the first."""


@contextlib.asynccontextmanager
async def open_engine(settings: Settings) -> AsyncIterator[Engine]:
    """The engine that `ENGINE` names. Raises BadCheckpoint, HubAway or EngineClosed, one clear line."""
    engine: Engine
    if settings.engine == "echo":
        from core.engine.echo_engine import EchoEngine

        engine = EchoEngine()
    elif settings.engine == "inprocess":
        from core.engine.process import local_options
        from core.engine.server import open_local

        engine = await open_local(**local_options(settings))
    elif settings.engine == "process":
        from core.engine.http_engine import spawn_engine

        engine = await spawn_engine(settings)
    else:
        from core.engine.http_engine import connect_engine

        engine = await connect_engine(settings.engine)
    try:
        yield engine
    finally:
        await engine.aclose()


@contextlib.asynccontextmanager
async def open_voice(settings: Settings | None = None) -> AsyncIterator[Voice]:
    """An engine that speaks: `await voice.ask("hi")`. Without settings, the environment's."""
    settings = settings or Settings()
    if settings.reverse_model and settings.sampling.n == 1:
        log.warning("REVERSE_MODEL has nothing to judge: SAMPLING__N=8 draws eight candidates")
    if settings.reverse_model and settings.engine not in ("process", "inprocess"):
        mend = "set it where that engine runs" if ":" in settings.engine else "there is no model to judge"
        log.warning("REVERSE_MODEL is of no use beside ENGINE=%s: %s", settings.engine, mend)
    async with open_engine(settings) as engine:
        yield Voice(
            engine,
            Tokenizer.load(engine.info.path, engine.info.vocab_size, engine.info.eos_id),
            settings.sampling,
            settings.history_tokens,
            settings.history_keep,
            settings.normalise,
        )


class App:
    """Everything open; `run` is its life."""

    def __init__(self, settings: Settings, journal: Journal, courier: Courier, chat: Chat) -> None:
        self.settings, self.journal, self.courier, self.chat = settings, journal, courier, chat
        self.serving: dict[str, str] = {}  # bot -> why it does not serve, "" when it does
        self._lines: dict[str, Line] = {}
        self.stopping = asyncio.Event()
        self._wrongly_set = 0  # bots that ended so
        self._code = 0

    async def run(self, bots: Sequence[Bot]) -> int:
        """Serve until a signal or until no bot is left; then drain. The process's exit code."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(Complaints(loop))
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self.stop)
        for bot in bots:
            if hasattr(bot, "readiness"):  # it serves /readyz
                bot.readiness = self.ready
        house = [asyncio.create_task(self.chat.serve()), asyncio.create_task(self._beat())]
        serving = [asyncio.create_task(self._serve(bot)) for bot in bots]
        systemd.notify("READY=1")
        ends = [asyncio.create_task(self.stopping.wait()), asyncio.create_task(_all(serving)), *house]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        asked = self.stopping.is_set()
        self.stopping.set()
        systemd.notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={(self.settings.grace + CLOSING) * 1e6:.0f}")
        await self.chat.drain(self.settings.grace)
        for task in (*serving, *ends):
            task.cancel()
        outcomes = await asyncio.gather(*serving, *house, return_exceptions=True)
        failures = [e for e in outcomes if isinstance(e, Exception)]
        for failure in failures:
            log.critical("the house fell down", exc_info=failure)
        left = asked or not bots or any(not self.serving.get(bot.name) for bot in bots)
        if failures:
            return 1
        if left:
            return self._code
        return os.EX_CONFIG if self._wrongly_set == len(bots) else 1

    def stop(self) -> None:
        """Drain and end; called a second time, the process ends at once."""
        if self.stopping.is_set():
            log.warning("stopped at once; what waits is answered after the next start")
            logging.shutdown()
            os._exit(1)
        log.info("stopping: answers under way have %g s", self.settings.grace)
        self.stopping.set()

    async def ready(self) -> str:
        """ "" when every message would be answered; else what is missing, one line."""
        if self.stopping.is_set():
            return "stopping"
        states = {name: why or self._lines[name].trouble for name, why in self.serving.items()}
        if silent := [f"{name}: {why}" for name, why in states.items() if why]:
            return "; ".join(silent)
        try:
            await self.journal.ping()
        except NotAccepted as error:
            return f"journal: {error}"
        return await self.chat.voice.engine.ready()

    async def _serve(self, bot: Bot) -> None:
        """When it is this process's turn, take up what the journal owes the bot, and run it."""
        self.serving[bot.name], self._lines[bot.name] = "", bot.line
        async with self._turn(bot.name) if bot.alone else contextlib.nullcontext():
            await self.courier.open([bot])
            await self.chat.open([bot.name])
            await self._supervise(bot)

    @contextlib.asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        """Entered when no other process on this journal serves the platform; none does as long as the block runs."""
        waiting = False
        while True:
            try:
                if await self.journal.lease(name, OWNER, HELD):
                    break
            except NotAccepted:
                await insist(self.journal.ping)
                await asyncio.sleep(HELD)  # who has it could not renew it either, and comes first
                continue
            if not waiting:
                log.warning("another process serves %s from this journal; waiting to take over", name)
            waiting = True
            await asyncio.sleep(HELD / 5)
        keeping = asyncio.create_task(self._keep(name))
        try:
            yield
        finally:
            keeping.cancel()
            with contextlib.suppress(NotAccepted):  # it ends by itself
                await self.journal.release(name, OWNER)

    async def _keep(self, name: str) -> None:
        """Hold the turn until cancelled. Who stood still until another took it ends here: all it had begun stands in
        the journal, and the other has taken it up."""
        while True:
            await asyncio.sleep(HELD / 3)
            try:
                if await self.journal.lease(name, OWNER, HELD):
                    continue
            except NotAccepted:
                continue  # while the journal is away nobody can take it
            except Exception:
                log.exception("%s: that this process serves it could not be noted; trying again", name)
                continue
            log.error("another process serves %s since this one stood still: this one ends", name)
            logging.shutdown()
            os._exit(os.EX_TEMPFAIL)

    async def _supervise(self, bot: Bot) -> None:
        """One bot, started again when it dies; the others never notice."""
        failures, serves = 0, False
        metrics.bot_up.labels(bot.name).set_function(lambda: serves and not bot.line.trouble)
        while True:
            self.serving[bot.name], serves = "", True
            began = time.monotonic()
            try:
                await bot.serve(self.chat)
                return
            except Unservable as error:
                log.error("%s cannot serve: %s", bot.name, error)
                self.serving[bot.name] = str(error)
                self._wrongly_set += not isinstance(error.__context__, OSError)  # a port may be free at the next start
                return
            except (Exception, asyncio.CancelledError) as error:
                task = asyncio.current_task()
                if task and task.cancelling():  # we stop it; else it was cancelled in itself
                    if isinstance(error, Exception):
                        log.exception("%s died while it was stopped", bot.name)
                    return
                failures = 0 if time.monotonic() - began > STEADY else failures + 1
                asked = error.seconds if isinstance(error, RetryAfter) else 0.0
                wait = max(asked, backoff(failures, 60.0, first=1.0))
                self.serving[bot.name] = f"{type(error).__name__}, starting again"
                if isinstance(error, ConnectionError | RetryAfter):
                    log.warning("%s: %s; starting it again in %.1f s", bot.name, error, wait)
                else:
                    log.exception("%s died; starting it again in %.1f s", bot.name, wait)
                metrics.bot_restarts.labels(bot.name).inc()
            finally:
                serves = False
            await asyncio.sleep(wait)

    async def _beat(self) -> None:
        """Until cancelled: measure how late the event loop wakes, feed the watchdog, see that the engine has not
        ended and the journal's file is in its place, back it up hourly."""
        backup_at, look_at = time.monotonic() + BACKUP_EVERY, 0.0
        backup: asyncio.Task[None] | None = None  # each may take minutes, and the watchdog does not wait
        look: asyncio.Task[None] | None = None
        while True:
            began = time.monotonic()
            await asyncio.sleep(BEAT)
            metrics.loop_lag_seconds.observe(max(0.0, time.monotonic() - began - BEAT))
            systemd.notify("WATCHDOG=1")
            if (why := self.chat.voice.engine.ended) and not self.stopping.is_set():
                log.critical("%s; only a new process helps, so this one ends", why)
                self._code = os.EX_TEMPFAIL
                self.stop()
            if look and look.done():
                look.result()  # a journal that has ended ends the house
            if time.monotonic() >= look_at and (look is None or look.done()):
                look_at = time.monotonic() + LOOK_EVERY
                look = asyncio.create_task(self._look())
            if self.journal.is_file and time.monotonic() >= backup_at and (backup is None or backup.done()):
                backup_at = time.monotonic() + BACKUP_EVERY
                backup = asyncio.create_task(self._backup())

    async def _look(self) -> None:
        with contextlib.suppress(NotAccepted):  # /readyz tells
            await self.journal.look()

    async def _backup(self) -> None:
        try:
            await self.journal.backup()
        except Exception as error:
            log.error("the hourly backup failed: %s", error)


async def _all(tasks: Collection[asyncio.Task[None]]) -> bool:
    """When every bot has ended; how is asked later."""
    return bool(await asyncio.wait(tasks))


async def _opened(attempt: Callable[[], Awaitable[OpenT]], waits: bool) -> OpenT:
    """What `attempt` opens; if it `waits`, tried again while PostgreSQL or the hub is away."""
    from core.journal.journal import JournalBusy

    tries = 0
    while True:
        try:
            return await attempt()
        except (JournalBusy, HubAway) as error:
            if not waits:
                raise
            log.warning("%s; waiting for it", error)
        systemd.notify(f"EXTEND_TIMEOUT_USEC={START * 1e6:.0f}")
        await asyncio.sleep(backoff(tries, 30.0, first=1.0))
        tries += 1


@contextlib.asynccontextmanager
async def open_app(settings: Settings, waits: bool = False) -> AsyncIterator[App]:
    """Journal, engine, courier, chat. Raises JournalError or EngineError, one clear line each; if it `waits`, not for a
    PostgreSQL or a hub that is away: they come back, as under a house that runs."""
    from core.journal.journal import open_journal

    url = settings.database_url.get_secret_value()
    async with contextlib.AsyncExitStack() as stack:
        journal = await _opened(lambda: open_journal(url, progress=log.info), waits)
        stack.push_async_callback(journal.aclose)
        voice = await _opened(lambda: stack.enter_async_context(open_voice(settings)), waits)
        courier = Courier(journal, settings.delivery)
        stack.push_async_callback(courier.aclose)
        chat = Chat(journal, RequestQueue(settings.queue), courier, voice, settings.queue)
        log.info("model %s: %s", voice.engine.info.name, voice.engine.info.how)
        yield App(settings, journal, courier, chat)
