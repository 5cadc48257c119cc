"""A house of real queue, chat and courier around in-memory ends, for tests that need one fault at one moment."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from core.chat import Chat
from core.courier import Courier
from core.delivery import SendError
from core.engine.base import Completion, EngineError, ModelInfo, SamplingParams
from core.messages import Author, Channel, Kind, Message, MessageState, Reply
from core.queue import RequestQueue
from core.settings import DeliveryRules, QueueLimits
from core.voice import Voice
from tests.simulation.memory_journal import Disk, MemoryJournal
from tests.simulation.virtual_time import VirtualLoop, run
from tests.simulation.world import Words


class ScriptedPlatform:
    """Sends fail as `script` says, one entry per attempt, then all goes well."""

    def __init__(self, name: str = "test") -> None:
        self.name = name
        self.script: dict[Channel, list[SendError | Exception]] = {}
        self.arrives_anyway = False
        self.found: str | None = None
        self.lookups: list[SendError] = []
        """How looking for what was sent fails, before it finds `found`."""
        self.visible: list[tuple[float, str]] = []
        self.typed: list[tuple[float, Channel]] = []
        self.told: list[str] = []
        self.limit = 1000
        self.wait, self.way = 0.0, 0.01
        """Seconds until a message may leave, and until it is there."""

    def split(self, text: str) -> list[str]:
        return [text[at : at + self.limit] for at in range(0, len(text), self.limit)]

    async def turn(self, channel: Channel) -> None:
        await asyncio.sleep(self.wait)

    async def send(self, reply: Reply) -> str:
        await asyncio.sleep(self.way)
        trouble = self.script.get(reply.channel)
        if trouble:
            if self.arrives_anyway:
                self.visible.append((asyncio.get_running_loop().time(), reply.text))
            raise trouble.pop(0)
        self.visible.append((asyncio.get_running_loop().time(), reply.text))
        return f"s{len(self.visible)}"

    async def find_sent(self, reply: Reply) -> str | None:
        if self.lookups:
            raise self.lookups.pop(0)
        return self.found

    async def typing(self, channel: Channel, note: str = "", to: str = "") -> None:
        self.typed.append((asyncio.get_running_loop().time(), channel))
        self.told += [note] if note else []

    async def closed(self, channel: Channel, id: str, state: MessageState) -> None: ...

    def texts(self) -> list[str]:
        return [text for _, text in self.visible]


class ScriptedEngine:
    """Says "re" and the question after `seconds`; raises what `script` holds first."""

    ended = ""

    def __init__(self, words: Words) -> None:
        self.info = ModelInfo("scripted", 1024, 50000, 0, "", "")
        self.words, self.seconds = words, 0.1
        self.script: list[EngineError] = []
        self.prompts: list[list[str]] = []
        self.seeds: list[int | None] = []
        self.forgotten: list[str] = []

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, session: str = "", deadline: float | None = None
    ) -> list[Completion]:
        turns = [" ".join(turn) for turn in self.words.turns(prompt)]
        self.prompts.append(turns)
        self.seeds.append(params.seed)
        await asyncio.sleep(self.seconds)
        if self.script:
            raise self.script.pop(0)
        return [Completion(self.words.encode(f"re {turns[-1]}"), -1.0, "stop", 0)]

    def prepare(self, session: str, ids: Sequence[int]) -> None: ...

    async def ready(self) -> str:
        return ""

    async def forget(self, session: str) -> None:
        self.forgotten.append(session)

    async def aclose(self) -> None: ...


def late(call: Callable[..., Awaitable[Any]], seconds: float) -> Callable[..., Awaitable[Any]]:
    """`call`, and its caller hears of it so much later."""

    async def called(*args: Any, **settings: Any) -> Any:
        result = await call(*args, **settings)
        await asyncio.sleep(seconds)
        return result

    return called


class House:
    """`await house.open()`, say things, sleep, look at platform and disk."""

    def __init__(
        self, loop: VirtualLoop, limits: QueueLimits | None = None, rules: DeliveryRules | None = None
    ) -> None:
        self.loop, self.disk, self.platform = loop, Disk(), ScriptedPlatform()
        self.limits, self.rules = limits or QueueLimits(), rules or DeliveryRules()
        self.words = Words()
        self.engine = ScriptedEngine(self.words)
        self.refusing = False
        self._said = 0
        self.build()

    def build(self) -> None:
        """A new process on the same disk."""
        journal: Any = MemoryJournal(self.disk, self.loop.wall, random.Random(1), self._wait)
        voice = Voice(self.engine, self.words, SamplingParams(max_tokens=8), 60, spaced=False)  # type: ignore[arg-type]
        self.journal = journal
        self.courier = Courier(journal, self.rules, self.loop.wall)
        self.queue = RequestQueue(self.limits)
        self.chat = Chat(journal, self.queue, self.courier, voice, self.limits, self.loop.time, self.loop.wall)

    async def _wait(self, seconds: float) -> None:
        from core.delivery import NotAccepted

        await asyncio.sleep(seconds)
        if self.refusing:
            raise NotAccepted("the disk is full")

    async def open(self) -> None:
        await self.courier.open([self.platform])
        await self.chat.open()
        self.serving = asyncio.create_task(self.chat.serve())

    async def kill(self) -> None:
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def message(self, text: str, channel: str = "a", id: str = "", kind: Kind = "ask") -> Message:
        self._said += 1
        id = id or str(self._said)
        return Message(Channel("test", channel), id, Author("u", "u"), text, self.loop.wall(), kind)

    async def say(self, *texts: str, channel: str = "a") -> None:
        await self.chat.receive(*(self.message(text, channel) for text in texts))

    def states(self) -> list[str]:
        return [row.state for row in self.disk.rows]


def play(scene: Callable[[House], Awaitable[None]], **settings: Any) -> None:
    """Run one scene on virtual time."""
    loop = VirtualLoop()

    async def whole() -> None:
        house = House(loop, **settings)
        await house.open()
        await scene(house)
        house.queue.check_integrity()

    run(loop, whole())
