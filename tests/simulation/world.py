"""People, two platforms, an engine and a house that dies now and then; afterwards the ledgers are read.

`World(seed).run()` plays one schedule and returns what happened; it raises AssertionError, with the seed, when a
promise is broken. Telegram's platform confirms by offset and cannot tell what it was sent; Discord's takes one nonce
twice within two minutes for one message, and finds our message again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from core.chat import Chat
from core.courier import Courier
from core.delivery import MaybeSent, NotAccepted, NotSent, Refused, RetryAfter
from core.engine.base import Cancelled, Completion, EngineClosed, Failed, ModelInfo, QueueFull, SamplingParams
from core.messages import Author, Channel, Message, MessageState, Reply
from core.queue import RequestQueue
from core.settings import DeliveryRules, QueueLimits
from core.voice import Voice
from tests.simulation.memory_journal import Disk, MemoryJournal
from tests.simulation.virtual_time import VirtualLoop, run

SECONDS = 40.0
PATIENCE = 900.0
NONCE_LASTS = 120.0


@dataclass(frozen=True)
class Faults:
    """Shares of calls that go wrong; `kills` lives end early."""

    kills: int
    not_sent: float
    maybe_before: float
    maybe_after: float
    retry_after: float
    refused: float
    journal: float
    engine: float
    duplicates: float

    @classmethod
    def draw(cls, dice: random.Random) -> Faults:
        rates = [dice.choice((0.0, 0.0, 0.02, 0.15)) for _ in range(8)]
        return cls(dice.choice((0, 1, 3, 6)), *rates)


@dataclass
class Life:
    """One run of the process. Dead, nothing it still does has any effect."""

    tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    dead: bool = False

    async def wait(self, seconds: float) -> None:
        if self.dead:
            raise asyncio.CancelledError
        await asyncio.sleep(seconds)
        if self.dead:
            raise asyncio.CancelledError


class Words:
    """A tokenizer whose tokens are words."""

    eos_id = 0

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._words: list[str] = [""]

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self._ids:
                self._ids[word] = len(self._words)
                self._words.append(word)
        return [self._ids[word] for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self._words[id] for id in ids)

    def turns(self, ids: Sequence[int]) -> list[list[str]]:
        """The words of each turn of a prompt."""
        turns: list[list[str]] = [[]]
        for id in ids:
            if id == self.eos_id:
                turns.append([])
            else:
                turns[-1].append(self._words[id])
        return [turn for turn in turns if turn]


class Answers:
    """An engine that says "re" and the question, now and then late or not at all; it reads every prompt critically."""

    def __init__(self, world: World, life: Life) -> None:
        self._world, self._life = world, life
        self.info = ModelInfo("answers", 1024, 50000, 0, "", "")

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, session: str = "", deadline: float | None = None
    ) -> list[Completion]:
        world = self._world
        await self._life.wait(world.dice.expovariate(1 / world.pace))
        if world.dice.random() < world.faults.engine:
            raise world.dice.choice([EngineClosed("gone"), QueueFull("full"), Failed("raised"), Cancelled("late")])
        spoken = world.words.turns(prompt)
        questions = [turn for turn in spoken if turn[0] != "re"]
        assert all(f"@{session}" in turn for turn in spoken), f"a foreign text in the prompt of {session}: {spoken}"
        numbers = [int(turn[1]) for turn in questions]
        assert numbers == sorted(set(numbers)), f"history out of order in {session}: {numbers}"
        ids = world.words.encode(" ".join(["re", *spoken[-1]]))
        return [Completion(ids, -1.0, "stop", 0)]

    def prepare(self, session: str, ids: Sequence[int]) -> None: ...

    async def ready(self) -> str:
        return ""

    async def forget(self, session: str) -> None: ...

    async def aclose(self) -> None: ...


class Server:
    """A platform as its people see it: what was said, what became visible, how far it is confirmed."""

    def __init__(self, name: str, remembers: bool) -> None:
        self.name, self.remembers = name, remembers
        self.events: list[Message] = []
        self.news = asyncio.Event()
        self.confirmed = 0
        self.ledger: list[tuple[float, Reply]] = []
        self.doubtful: set[int] = set()
        self.closed: set[Channel] = set()


class Client:
    """Our side of a platform in one life: the poller and the four calls of the courier."""

    def __init__(self, world: World, server: Server, life: Life) -> None:
        self.name = server.name
        self._world, self._server, self._life = world, server, life

    def split(self, text: str) -> list[str]:
        words = text.split()
        return [" ".join(words[:3]), " ".join(words[3:])] if len(words) > 5 else [text]

    async def typing(self, channel: Channel, note: str = "", to: str = "") -> None: ...

    async def closed(self, channel: Channel, id: str, state: MessageState) -> None: ...

    async def serve(self, chat: Chat) -> None:
        server, dice = self._server, self._world.dice
        while True:
            await chat.paused()
            if server.confirmed >= len(server.events):
                server.news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(server.news.wait(), 20.0)
            start = server.confirmed
            if dice.random() < self._world.faults.duplicates:
                start = max(0, start - dice.randint(1, 3))
            batch = server.events[start : start + dice.randint(1, 5)]
            try:
                await chat.receive(*batch)
            except NotAccepted:
                batch = []
            await self._life.wait(dice.uniform(0, 0.3))
            if batch:
                server.confirmed = max(server.confirmed, start + len(batch))

    async def turn(self, channel: Channel) -> None: ...

    async def send(self, reply: Reply) -> str:
        world, server, faults, dice = self._world, self._server, self._world.faults, self._world.dice
        server.doubtful.add(reply.id)  # until something certain is known
        await self._life.wait(dice.uniform(0.01, 0.2))
        if reply.channel in server.closed:
            raise Refused("blocked")
        if dice.random() < faults.not_sent:
            raise NotSent("no route")
        if dice.random() < faults.retry_after:
            raise RetryAfter(dice.choice((0.5, 3.0, 35.0)))
        if dice.random() < faults.maybe_before:
            raise MaybeSent("reset")
        known = self._visible(reply) if server.remembers else None
        if known is None or world.loop.time() - known > NONCE_LASTS:
            server.ledger.append((world.loop.time(), reply))
        await self._life.wait(dice.uniform(0.01, 0.2))
        if dice.random() < faults.maybe_after:
            raise MaybeSent("reset")
        world.clean.add(reply.id)
        return str(reply.id)

    def _visible(self, reply: Reply) -> float | None:
        """When it arrived first."""
        return next((at for at, seen in self._server.ledger if seen.nonce == reply.nonce), None)

    async def find_sent(self, reply: Reply) -> str | None:
        await self._life.wait(0.05)
        if not self._server.remembers:
            return None
        return "" if self._visible(reply) is None else str(reply.id)


class World:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.faults = Faults.draw(self.dice)
        self.pace = self.dice.choice((0.02, 0.3, 2.0))
        self.limits = QueueLimits(
            per_channel=self.dice.choice((3, 20)), running=self.dice.choice((1, 4, 32)), deadline=60
        )
        self.in_memory = self.dice.choice((1, 2, 20))
        self.words = Words()
        self.disk = Disk()
        self.clean: set[int] = set()
        self.servers = [Server("telegram", False), Server("discord", True)]
        self.loop = VirtualLoop()

    def run(self) -> Counter[str]:
        """What became of the messages, by state."""
        random.seed(self.seed)
        try:
            run(self.loop, self._play())
            return self._judge()
        except BaseException as error:
            error.add_note(f"replay with World({self.seed}).run()")
            raise

    async def _play(self) -> None:
        people = asyncio.create_task(self._people())
        ends = sorted(self.dice.uniform(0, SECONDS) for _ in range(self.faults.kills))
        for end in ends:
            life = await self._live()
            await asyncio.sleep(max(0.0, end - self.loop.time()))
            await self._kill(life)
            await asyncio.sleep(self.dice.choice((0.0, 0.5, 20.0, 300.0)))
        life = await self._live()
        await people
        while not self._settled():
            self._healthy(life)
            assert self.loop.time() < 4 * PATIENCE, f"not settled: {self._open()}"
            await asyncio.sleep(1.0)
        self._healthy(life)
        await self._kill(life)

    async def _live(self) -> Life:
        life = Life()
        journal: Any = MemoryJournal(self.disk, self.loop.wall, self.dice, life.wait, self.faults.journal)
        voice = Voice(Answers(self, life), self.words, SamplingParams(max_tokens=8), 60, spaced=False)  # type: ignore[arg-type]
        courier = Courier(journal, DeliveryRules(patience=PATIENCE), self.loop.wall)
        courier.in_memory = self.in_memory
        queue = RequestQueue(self.limits)
        chat = Chat(journal, queue, courier, voice, self.limits, self.loop.time, self.loop.wall)
        clients = [Client(self, server, life) for server in self.servers]

        async def house() -> None:
            await courier.open(clients)
            await chat.open()
            async with asyncio.TaskGroup() as group:
                group.create_task(chat.serve())
                for client in clients:
                    group.create_task(client.serve(chat))

        life.tasks = [asyncio.create_task(house()), asyncio.create_task(self._audit(queue))]
        self._queue = queue
        return life

    async def _audit(self, queue: RequestQueue) -> None:
        while True:
            await asyncio.sleep(1.0)
            queue.check_integrity()

    async def _kill(self, life: Life) -> None:
        """kill -9: from here on nothing of this life touches disk or wire."""
        life.dead = True
        keep = {asyncio.current_task(), self._people_task}
        rest = [task for task in asyncio.all_tasks() if task not in keep]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def _healthy(self, life: Life) -> None:
        for task in life.tasks:
            if task.done() and task.exception():
                raise task.exception() or AssertionError("ended")

    async def _people(self) -> None:
        """Say things, change some, take some back, block the bot now and then."""
        self._people_task = asyncio.current_task()
        dice, said = self.dice, []
        channels = [
            (server, Channel(server.name, str(i))) for server in self.servers for i in range(dice.randint(1, 3))
        ]
        numbers = Counter[Channel]()
        for _ in range(dice.randint(2, 24)):
            await asyncio.sleep(dice.choice((0.0, 0.1, 1.0, 5.0)))
            server, channel = dice.choice(channels)
            numbers[channel] += 1
            long = "and more" if dice.random() < 0.2 else ""
            text = f"say {numbers[channel]} @{channel} {long}".strip()
            message = Message(channel, f"m{numbers[channel]}", Author("u", "u"), text, self.loop.wall())
            server.events.append(message)
            said.append((server, message))
            if dice.random() < 0.1:
                server, message = dice.choice(said)
                if dice.random() < 0.5:
                    server.events.append(replace(message, kind="edit", text=message.text + " again"))
                else:
                    server.events.append(replace(message, kind="delete", text=""))
            for one in self.servers:
                one.news.set()
            if dice.random() < self.faults.refused:
                server.closed.add(channel)

    def _settled(self) -> bool:
        return all(server.confirmed >= len(server.events) for server in self.servers) and not self._open()

    def _open(self) -> list[object]:
        rows = [row for row in self.disk.rows if row.state == "waiting"]
        return rows + [sent for sent in self.disk.replies if sent.reply.state in ("pending", "sending")]

    def _judge(self) -> Counter[str]:
        """The promises, from the ledgers."""
        rows = {(row.message.channel, row.message.id): row for row in self.disk.rows}
        assert len(rows) == len(self.disk.rows), "a message is stored twice"
        by_id = {sent.reply.id: sent for sent in self.disk.replies}
        for server in self.servers:
            for message in server.events:
                assert (message.channel, message.id) in rows, f"lost: {message}"
            copies = Counter(reply.id for _, reply in server.ledger)
            for sent in by_id.values():
                reply = sent.reply
                if reply.channel.platform != server.name:
                    continue
                if reply.state == "sent":
                    assert copies[reply.id] >= 1, f"never arrived: {reply}"
                if server.remembers:
                    assert copies[reply.id] <= 1, f"doubled: {reply}"
            self._ordered(server, by_id)
        for row in self.disk.rows:
            replies = [sent for sent in by_id.values() if sent.reply.message == row.row]
            assert bool([sent for sent in replies if not sent.notice]) == (row.state == "answered"), row
            if row.state == "answered":
                text = " ".join(sent.reply.text for sent in replies)
                assert text.startswith(f"re say {row.message.id[1:]} @{row.message.channel}"), (text, row)
        return Counter(row.state for row in self.disk.rows)

    def _ordered(self, server: Server, by_id: dict[int, Any]) -> None:
        """Replies become visible in the order in which the questions were asked, parts in theirs."""
        seen: dict[Channel, list[tuple[int, int]]] = {}
        for _, reply in server.ledger:
            place = (int(reply.to[1:]), reply.part)
            if not by_id[reply.id].notice and place not in seen.setdefault(reply.channel, []):
                seen[reply.channel].append(place)
        for channel, places in seen.items():
            assert places == sorted(places), f"out of order in {channel}: {places}"


def quiet() -> None:
    """The house logs every fault; a million of them would hide the one that matters."""
    logging.disable(logging.CRITICAL)
