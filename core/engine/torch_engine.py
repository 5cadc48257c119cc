"""The engine in this process: one thread owns torch; the event loop hands it requests and never waits for it.

    generate ──submit──▶ inbox ──▶ worker thread: step(), step(), … ──deliver──▶ the awaiting task

`Core` is the synchronous half and can be used alone: `step()` is schedule -> run -> update.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from core.engine.base import (
    BadCheckpoint,
    Cancelled,
    Completion,
    EngineClosed,
    EngineError,
    Failed,
    ModelInfo,
    SamplingParams,
)
from core.engine.choice import cache_tokens, open_runner
from core.engine.config import read_config
from core.engine.draft import Draft
from core.engine.futures import settle
from core.engine.graphs import lost
from core.engine.guesses import Phrases
from core.engine.hub import named
from core.engine.judge import Case, Judge
from core.engine.kv_cache import ROUND, KVCache
from core.engine.model_runner import ModelRunner
from core.engine.scheduler import GUESS, Scheduler
from core.engine.sequence import Request, Span
from core.tokenizer import Tokenizer

log = logging.getLogger(__name__)

AT_ONCE = {"cpu": (32, 256), "cuda": (256, 1024)}
"""Sequences that run and rows of a step, where nobody says otherwise."""
LEAVE = 5.0
"""Seconds that the interpreter's end waits for a step, or for a model that is being loaded."""
WAY_BACK = 0.1
"""Share of a deadline at which candidates are good as they are, so that they reach who waits in another process."""
TOKENS_EACH = 3 * ROUND
"""Tokens that a sequence takes in the cache, usually: more of them than there is room for are not promised."""


class Core:
    """Scheduler and model, synchronous, and a judge of candidates. One thread makes it and calls it."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, judge: Judge) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.judge = judge

    def step(self) -> bool:
        """One pass of each model over whatever is to do. False: nothing was."""
        judged = self.judge.step()
        spans = self.scheduler.schedule()
        if spans:
            self._run_and_update(spans)
        elif not judged:
            self.scheduler.check_integrity()
        return judged or bool(spans)

    def _run_and_update(self, spans: list[Span]) -> None:
        """What raises is run again in halves, until the one at fault stands alone and fails alone."""
        try:
            drawn = self.runner.run(spans)
        except Exception as error:
            if lost(error):
                raise  # only a new process helps
            log.warning("a step of %d sequences raised %r", len(spans), error)
            reason = f"the model raised {type(error).__name__}"
        else:
            self.scheduler.update(spans, drawn)
            return
        # Out here nothing holds the failed step's tensors any more.
        spared = self.scheduler.cache.drop_idle()  # when it was memory, this much can be
        if len(spans) > 1:
            for half in (spans[: len(spans) // 2], spans[len(spans) // 2 :]):
                if alive := [span for span in half if span.sequence.slot]:
                    self._run_and_update(alive)
        elif spans[0].guess:
            self._run_and_update([replace(spans[0], guess=())])
        elif spared:
            self._run_and_update(spans)
        else:
            self.scheduler.give_up(spans[0].sequence.request, Failed(reason))


class TorchEngine:
    """Satisfies `core.engine.base.Engine`. Made by `open_torch_engine`."""

    def __init__(self, open_core: Callable[[], tuple[Core, ModelInfo]]) -> None:
        self.info: ModelInfo
        self.core: Core
        """The worker thread's; look only when nothing runs."""
        self._open_core = open_core
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._inbox: queue.SimpleQueue[Callable[[Scheduler], None] | None] = queue.SimpleQueue()
        self._end: EngineError | None = None
        self._under_way: set[asyncio.Future[list[Completion]]] = set()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def ended(self) -> str:
        """As core.engine.base says: who stands in its process goes with it."""
        return str(self._end) if self._end else ""

    async def start(self) -> None:
        """Load the model and warm it up. Raises BadCheckpoint."""
        self._thread.start()
        atexit.register(self._end_thread, LEAVE)  # for who closes nothing
        await self._opened

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        session: str = "",
        deadline: float | None = None,
    ) -> list[Completion]:
        """As core.engine.base says."""
        if self._end:
            raise EngineClosed(str(self._end))
        ids = self.info.prompt(prompt)
        if not isinstance(params, SamplingParams) or not isinstance(session, str):
            raise ValueError("params must be SamplingParams, and session text")
        future: asyncio.Future[list[Completion]] = self._loop.create_future()
        now = time.monotonic()
        until = None if deadline is None else now + deadline
        judged_by = None if deadline is None else now + deadline * (1 - WAY_BACK)

        def deliver(end: list[Completion] | EngineError) -> None:
            if isinstance(end, list) and len(end) > 1:
                case = Case(
                    self.info.last_turn(ids),
                    end,
                    lambda judged: settle(future, judged),
                    lambda: not future.done(),
                    judged_by,
                )
                self.core.judge.cases.append(case)
            else:
                settle(future, end)

        request = Request(ids, params, session, until, deliver)
        self._under_way.add(future)
        self._inbox.put(lambda scheduler: scheduler.add(request))
        try:
            return await future
        except asyncio.CancelledError:
            self._inbox.put(lambda scheduler: scheduler.give_up(request, Cancelled("nobody waits for it")))
            raise
        finally:
            self._under_way.discard(future)

    def prepare(self, session: str, ids: Sequence[int]) -> None:
        """As core.engine.base says."""
        with contextlib.suppress(ValueError):
            mine = list(self.info.prompt(ids))
            if session and not self._end:
                self._inbox.put(lambda scheduler: scheduler.prepare(session, mine))

    async def ready(self) -> str:
        return self.ended

    async def forget(self, session: str) -> None:
        done: asyncio.Future[None] = self._loop.create_future()

        def forget(scheduler: Scheduler) -> None:
            scheduler.forget(session)
            settle(done, None)

        if session and not self._end:
            self._inbox.put(forget)
            await asyncio.wait({done, self._closed}, return_when=asyncio.FIRST_COMPLETED)

    async def aclose(self) -> None:
        """Requests under way end with EngineClosed."""
        self._end = self._end or EngineClosed("the engine is closed")
        self._inbox.put(None)
        if self._thread.ident:
            await asyncio.shield(self._closed)
            self._end_thread()
            atexit.unregister(self._end_thread)

    def _end_thread(self, seconds: float | None = None) -> None:
        """At the interpreter's end it would be torn off, and where that meets the model in C++ the process aborts."""
        self._inbox.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        """The worker thread, from loading to the end."""
        try:
            self.core, self.info = self._open_core()
        except BaseException as error:
            settle(self._opened, error)
        else:
            settle(self._opened, None)
            try:
                self._serve(self.core)
            except Exception as error:
                log.exception("the engine died")
                self._end = EngineClosed(f"the engine died: {type(error).__name__}")
        with contextlib.suppress(RuntimeError):  # nobody is left to hear it when the loop is gone
            self._loop.call_soon_threadsafe(self._settle_all)

    def _serve(self, core: Core) -> None:
        """Step while there is something to do, sleep while there is not; until None comes."""
        busy = False
        with torch.inference_mode():
            while True:
                try:
                    command = self._inbox.get(block=not busy)
                except queue.Empty:
                    busy = core.step()
                    continue
                if command is None:
                    return
                command(core.scheduler)
                busy = True

    def _settle_all(self) -> None:
        """In the event loop, at the very end."""
        self._end = self._end or EngineClosed("the engine is closed")
        for future in self._under_way:
            settle(future, self._end)
        settle(self._closed, None)


async def open_torch_engine(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 0,
    cache_bytes: int = 0,
    max_running: int = 0,
    token_budget: int = 0,
    max_waiting: int = 256,
    seed: int | None = None,
    guess: int = GUESS,
    price: float | None = None,
    reverse: Path | None = None,
) -> TorchEngine:
    """Load the checkpoint in `folder` and start the engine.

    `threads`, `cache_bytes`, `max_running` and `token_budget` 0 choose. At most `max_running` sequences run,
    `token_budget` rows (a token of a prompt or of a reply each) are in a step, and `max_waiting` requests wait.
    `seed` makes the seeds that requests without one are given repeatable; `guess` 0 leaves speculative decoding out,
    `price` is what it costs here, measured when None. `reverse` is the checkpoint that tells a message from its reply,
    to judge candidates in place of the model itself. Raises BadCheckpoint.
    """

    def open_core() -> tuple[Core, ModelInfo]:
        if read_config(folder / "config.json").reverse:
            raise BadCheckpoint(f"{folder} was trained with --reverse: it judges, as REVERSE_MODEL, and does not talk")
        second = open_judge(reverse, folder, device, dtype, threads) if reverse else None
        runner = open_runner(folder, device, dtype, threads, cache_bytes, with_draft=guess > 0)
        config, (running, budget) = runner.model.config, AT_ONCE[runner.model.device.type]
        cost = runner.price(guess) if guess and price is None else price or 0.0
        guesses = Draft(runner.draft, cost) if runner.draft else Phrases(cost)
        seeds = random.Random(seed) if seed is not None else random.SystemRandom()
        scheduler = Scheduler(
            KVCache(cache_tokens(runner.model, cache_bytes)),
            max_positions=config.n_positions,
            eos_id=config.eos_id,
            max_running=max_running or running,
            token_budget=token_budget or budget,
            max_waiting=max_waiting,
            draw_seed=lambda: seeds.getrandbits(62),
            guess=guess,
            guesses=guesses,
        )
        info = ModelInfo(
            name=folder.name,
            max_positions=config.n_positions,
            vocab_size=config.vocab_size,
            eos_id=config.eos_id,
            path=str(folder),
            how=runner.model.how + (", REVERSE_MODEL judges candidates" if second else ""),
            at_once=max(1, min(max_running or running, scheduler.cache.total // TOKENS_EACH)),
        )
        return Core(runner, scheduler, second or Judge(runner.model)), info

    engine = TorchEngine(open_core)
    try:
        await engine.start()
    except BaseException:
        await engine.aclose()
        raise
    return engine


def open_judge(reverse: Path, folder: Path, device: str, dtype: str, threads: int) -> Judge:
    """Raises BadCheckpoint, also where its ids are not those of the model in `folder`."""
    mine = read_config(folder / "config.json")
    vocabulary = Tokenizer.load(folder, mine.vocab_size, mine.eos_id).vocabulary
    with named("REVERSE_MODEL"):
        config = read_config(reverse / "config.json")
        if reverse.samefile(folder) or config.reverse is False:
            which = "is MODEL itself" if reverse.samefile(folder) else f"{reverse} was trained to talk"
            raise BadCheckpoint(f"{which}; train one that tells a message from its reply: palaver finetune --reverse")
        tokenizer = Tokenizer.load(reverse, config.vocab_size, config.eos_id)
        if tokenizer.vocabulary != vocabulary or config.vocab_size < mine.vocab_size:
            raise BadCheckpoint(f"{reverse} has another vocabulary than MODEL: train it from that, or from its like")
        # The least room: a judge keeps nothing, and a step of it fits in one window's.
        return Judge(open_runner(reverse, device, dtype, threads, cache_bytes=1).model, reverse=True)
