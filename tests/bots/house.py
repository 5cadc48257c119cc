"""A whole house for one bot, in memory: real chat and courier, a journal of lists, an engine that the test holds."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from bots.base import Bot
from core.chat import Chat
from core.courier import Courier
from core.engine.base import Completion, ModelInfo, SamplingParams
from core.queue import RequestQueue
from core.settings import DeliveryRules, QueueLimits
from core.tokenizer import Tokenizer
from core.voice import Voice
from tests.simulation.memory_journal import Disk, MemoryJournal
from tests.simulation.world import Words

if TYPE_CHECKING:
    from core.journal.journal import Journal


async def until(what: Callable[[], object], seconds: float = 20.0) -> None:
    """Returns when `what()` is true; TimeoutError when it never is."""
    async with asyncio.timeout(seconds):
        while True:
            if what():
                return
            await asyncio.sleep(0.01)


class Says:
    """Answers "you said" and the question, as long as `gate` is open; `prompts` are the turns it was given."""

    ended = ""

    def __init__(self) -> None:
        self.words = Words()
        self.gate = asyncio.Event()
        self.gate.set()
        self.prompts: list[list[str]] = []
        self.info = ModelInfo("says", 1024, 50_000, 0, "", "")

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, session: str = "", deadline: float | None = None
    ) -> list[Completion]:
        turns = [" ".join(turn) for turn in self.words.turns(prompt)]
        self.prompts.append(turns)
        await self.gate.wait()
        return [Completion(self.words.encode(f"you said {turns[-1]}"), -1.0, "stop", 0)]

    def prepare(self, session: str, ids: Sequence[int]) -> None: ...

    async def ready(self) -> str:
        return ""

    async def forget(self, session: str) -> None: ...

    async def aclose(self) -> None: ...


class House:
    """`disk` outlives a run; `journal.refuse` is the share of writes that are not accepted."""

    def __init__(self, limits: QueueLimits | None = None) -> None:
        self.disk = Disk()
        self.limits = limits or QueueLimits()
        self.engine = Says()

    @contextlib.asynccontextmanager
    async def serve(self, bot: Bot) -> AsyncIterator[Chat]:
        """Until the block ends, as a process would end: cancelled, with answers under way lost."""
        self.journal = MemoryJournal(self.disk, lambda: datetime.now(UTC), random.Random(7), asyncio.sleep)
        journal = cast("Journal", self.journal)
        courier = Courier(journal, DeliveryRules())
        voice = Voice(self.engine, cast(Tokenizer, self.engine.words), SamplingParams(), 128)
        chat = Chat(journal, RequestQueue(self.limits), courier, voice, self.limits)
        await courier.open([bot])
        await chat.open()
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(chat.serve()), asyncio.create_task(bot.serve(chat))]
        try:
            yield chat
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            await courier.aclose()
        for error in ended:
            if isinstance(error, Exception):
                raise error
