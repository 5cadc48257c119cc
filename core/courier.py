"""Delivers replies: in order within a channel, one attempt at a time, each step in the journal before and after it.

pending → sending (committed before a byte leaves) → sent | abandoned. An attempt in doubt is looked up on the platform
before anything is sent again; where nobody can tell, a setting decides. One chat's trouble never delays another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from core import metrics
from core.backoff import backoff
from core.crash import crash_point
from core.delivery import MaybeSent, NotAccepted, NotSent, Platform, Refused, RetryAfter
from core.messages import Channel, Message, MessageState, Reply
from core.settings import DeliveryRules

if TYPE_CHECKING:
    from core.journal.journal import Journal

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

TYPING_EVERY = 4.0
"""Telegram shows typing for 5 s, Discord for 10."""
LAST = 5.0
"""Seconds that a stop waits for what is on its way, so that nobody has to guess whether it arrived."""


def wall() -> datetime:
    return datetime.now(UTC)


async def insist(write: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """A write to the journal that must come before anything else happens here: it heals, we wait."""
    tries = 0
    while True:
        try:
            return await write(*args, **kwargs)
        except NotAccepted as error:
            log.warning("the journal does not take a state yet: %s", error)
            await asyncio.sleep(backoff(tries, 5.0))
            tries += 1


class Courier:
    in_memory = 20
    """Replies of one channel; what waits behind them is read from the journal when its turn comes."""

    def __init__(self, journal: Journal, rules: DeliveryRules, now: Callable[[], datetime] = wall) -> None:
        self._journal = journal
        self._rules = rules
        self._now = now
        self._platforms: dict[str, Platform] = {}
        self._lines: dict[Channel, deque[Reply]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._attempts: set[asyncio.Task[bool]] = set()
        self._circuits: dict[str, Circuit] = defaultdict(Circuit)
        self._moved: dict[Channel, Channel] = {}
        # Channels with more replies in the journal than in their line, and about how many: read on, it is known anew.
        self._behind: defaultdict[Channel, int] = defaultdict(int)
        # When those in a line expire, by the clock nobody sets: the wall's is read once per reply.
        self._ends: dict[int, float] = {}

    async def open(self, platforms: Iterable[Platform]) -> None:
        """Take up these platforms and what the journal still owes them."""
        opened = {platform.name: platform for platform in platforms}
        self._platforms |= opened
        self.deliver(reply for reply in await insist(self._journal.due) if reply.channel.platform in opened)

    def check(self, channels: Iterable[Channel]) -> None:
        """ValueError, one line, where one is of a platform that no bot here has."""
        for channel in channels:
            if channel.platform not in self._platforms:
                there = ", ".join(sorted(self._platforms)) or "none"
                raise ValueError(f"{channel}: no bot is called {channel.platform} (there is {there}); name it so")

    def deliver(self, replies: Iterable[Reply]) -> None:
        """Take places in the channels' lines; returns at once."""
        for reply in replies:
            metrics.undelivered.inc()
            if reply.channel in self._moved:
                reply = replace(reply, channel=self._moved[reply.channel])
            self._open_line(reply.channel)
            if len(self._lines[reply.channel]) >= self.in_memory or reply.channel in self._behind:
                self._behind[reply.channel] += 1
            elif reply.id not in self._ends:  # else the journal gave it
                self._hold(reply)

    def unsent(self, channel: Channel) -> int:
        """Replies that wait behind the answer whose turn it is, of all topics in its chat: they share its limits."""
        chat, line = channel.chat, self._lines.get(channel)
        first = line[0].message if line else 0
        return sum(
            sum(reply.message != first for reply in waiting) + self._behind.get(other, 0)
            for other, waiting in self._lines.items()
            if other.id.startswith(chat.id) and other.chat == chat  # to make a Channel of each takes longer
        )

    def moved(self, old: Channel, new: Channel) -> None:
        """What the journal held for `old` it holds for `new` from now on."""
        self._moved[old] = new
        self._behind[new] += self._behind.pop(old, 0)
        self._open_line(new)

    def _open_line(self, channel: Channel) -> None:
        if channel not in self._lines:
            self._lines[channel] = deque()
            self._start(self._work(channel))

    def _hold(self, reply: Reply) -> None:
        age = max(0.0, (self._now() - reply.created_at).total_seconds())
        self._ends[reply.id] = asyncio.get_running_loop().time() + self._rules.patience - age
        self._lines[reply.channel].append(reply)

    async def _read_on(self, channel: Channel) -> None:
        """The line is empty: on with what waits in the journal, and with what is delivered here meanwhile."""
        behind = self._behind.pop(channel)
        rows = await insist(self._journal.due, channel, self.in_memory)
        if len(rows) == self.in_memory:
            self._behind[channel] += max(0, behind - len(rows))
        line = self._lines[channel]
        found = {reply.id: reply for reply in (rows if channel in self._behind else (*rows, *line))}
        while line:
            del self._ends[line.pop().id]
        for id in sorted(found):
            if id in self._ends:  # it stands in the line of a chat that moved here, which goes first
                self._behind[channel] += 1
                break
            self._hold(found[id])
        if not line and channel in self._behind:
            await asyncio.sleep(1.0)

    def split(self, channel: Channel, text: str) -> list[str]:
        """`text` in pieces as the channel's platform takes them."""
        return self._platforms[channel.platform].split(text)

    @contextlib.asynccontextmanager
    async def typing(self, message: Message) -> AsyncIterator[None]:
        """Show typing, to answer this, as long as the block runs."""
        task = asyncio.create_task(self._type(message))
        try:
            yield
        finally:
            task.cancel()

    def tell(self, message: Message, note: str) -> None:
        """Show typing once with a note to who said this; returns at once."""
        self._start(self._show(message.channel, message.id, note))

    def closed(self, message: Message, state: MessageState) -> None:
        """Show that this ended without a reply, or with one from another process; returns at once."""
        self._start(self._show(message.channel, message.id, state=state))

    async def drain(self, timeout: float) -> bool:
        """Wait until everything is delivered; False when something was left for the next start: then nothing more is
        begun, and what is on its way may arrive."""
        waiting = {task for task in self._tasks if not task.done()}
        if waiting:
            await asyncio.wait(waiting, timeout=timeout)
        left = bool(self._lines)
        await self._stop()
        if self._attempts:
            await asyncio.wait(self._attempts, timeout=LAST)
        return not left

    async def aclose(self) -> None:
        """Stop at once; what is not sent stands in the journal."""
        await self._stop()
        for attempt in self._attempts:
            attempt.cancel()
        await asyncio.gather(*self._attempts, return_exceptions=True)

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _type(self, message: Message) -> None:
        while True:
            await self._show(message.channel, message.id)
            await asyncio.sleep(TYPING_EVERY)

    async def _show(self, channel: Channel, id: str, note: str = "", state: MessageState = "waiting") -> None:
        platform = self._platforms.get(channel.platform)
        try:
            if platform is not None and state == "waiting":
                await platform.typing(channel, note, id)
            elif platform is not None:
                await platform.closed(channel, id, state)
        except Exception as error:
            log.debug("%s of a message in %s is not shown: %s", state, channel, error)

    async def _work(self, channel: Channel) -> None:
        """One channel's line, front to back; the task ends with the line."""
        line = self._lines[channel]
        refused = 0  # the message whose earlier part was given up, and the later ones with it
        try:
            while line or channel in self._behind:
                if not line:
                    await self._read_on(channel)
                    continue
                reply = line[0]
                if reply.message != refused and not await self._deliver_surely(reply):
                    refused = reply.message
                line.popleft()
                del self._ends[reply.id]
                metrics.undelivered.dec()
        finally:
            metrics.undelivered.dec(len(line))
            del self._lines[channel]

    async def _deliver_surely(self, reply: Reply) -> bool:
        """A bug in a bot must not silence its channels: what it raised counts as an attempt in doubt."""
        tries = 0
        while True:
            try:
                return await self._deliver(reply)
            except (Exception, asyncio.CancelledError):
                if (task := asyncio.current_task()) and task.cancelling():
                    raise  # we are; else something in the bot was
                log.exception("%s: reply %d could not be delivered, trying again", reply.channel, reply.id)
                self._count(reply, "raised")
                await asyncio.sleep(backoff(tries))
                reply, tries = replace(reply, state="sending"), tries + 1

    async def _deliver(self, reply: Reply) -> bool:
        """Until the reply is sent (True) or given up (False)."""
        platform = self._platforms[reply.channel.platform]
        circuit = self._circuits[platform.name]
        if reply.state == "sending" and await self._arrived(platform, reply):
            return True
        while not self._too_late(reply):
            await circuit.closed(reply.channel, reply.tries)
            if self._too_late(reply):
                break  # of many it waited long for leave
            try:
                await platform.turn(reply.channel)
                arrived = await self._surely(self._attempt(platform, reply))
            except RetryAfter as error:
                self._count(reply, "retry_after")
                await asyncio.sleep(error.seconds)
            except NotSent as error:
                self._count(reply, "not_sent")
                log.warning("%s: not sent, trying again: %s", reply.channel, error)
                await circuit.failed(reply.channel, reply.tries + 1)
            except MaybeSent as error:
                self._count(reply, "in_doubt")
                log.warning("%s: perhaps sent, looking: %s", reply.channel, error)
                await circuit.failed(reply.channel, reply.tries + 1)
                if await self._arrived(platform, reply):
                    return True
            else:
                circuit.worked()
                return arrived
            reply = replace(reply, tries=reply.tries + 1)
        return await self._give_up(reply, "too late")

    async def _attempt(self, platform: Platform, reply: Reply) -> bool:
        """From T3 to T4, or to what else came of it: True when it arrived, False when it was refused."""
        if await insist(self._journal.begin_send, reply) is None:
            if state := await insist(self._journal.state, reply.channel, reply.to):
                self._start(self._show(reply.channel, reply.to, state=state))  # who waits here has not seen it
            return True
        crash_point("after T3")
        try:
            sent_id = await platform.send(reply)
        except Refused as error:
            return await self._give_up(reply, str(error))
        except (RetryAfter, NotSent):
            await insist(self._journal.pending, reply)
            raise
        crash_point("before T4")
        return await self._sent(reply, sent_id)

    async def _surely(self, attempt: Coroutine[None, None, bool]) -> bool:
        """Not cancelled with who waits for it: it may have arrived, and should be on record then."""
        task = asyncio.create_task(attempt)
        self._attempts.add(task)
        task.add_done_callback(self._attempted)
        await asyncio.wait({task})
        return task.result()

    def _attempted(self, task: asyncio.Task[bool]) -> None:
        self._attempts.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may be left to hear it

    async def _arrived(self, platform: Platform, reply: Reply) -> bool:
        """Settle an attempt in doubt; True when nothing is left to do: it arrived."""
        circuit, tries = self._circuits[platform.name], reply.tries
        while not self._too_late(reply):
            await circuit.closed(reply.channel, tries)
            try:
                found = await platform.find_sent(reply)
            except RetryAfter as error:
                await asyncio.sleep(error.seconds)
                continue
            except (NotSent, MaybeSent):
                tries += 1
                await circuit.failed(reply.channel, tries)
                continue
            except Refused as error:
                found = None
                log.warning("%s: cannot look for what was sent: %s", reply.channel, error)
            if found:
                circuit.worked()
                return await self._sent(reply, found)
            break
        else:
            return False
        if found is None and self._rules.in_doubt == "abandon":
            await self._give_up(reply, "in doubt", alone=True)
            return True
        return False

    async def _sent(self, reply: Reply, sent_id: str) -> bool:
        # It has arrived, also where a bot returns a number, or forgets to return.
        await insist(self._journal.sent, reply, str(sent_id or ""))
        self._count(reply, "sent")
        return True

    async def _give_up(self, reply: Reply, why: str, alone: bool = False) -> bool:
        log.warning("%s: reply %d is given up: %s", reply.channel, reply.id, why)
        await insist(self._journal.abandon, reply, why, alone)
        self._count(reply, "abandoned")
        return False

    def _too_late(self, reply: Reply) -> bool:
        return asyncio.get_running_loop().time() > self._ends[reply.id]

    def _count(self, reply: Reply, outcome: str) -> None:
        metrics.sends.labels(reply.channel.platform, outcome).inc()


class Circuit:
    """A platform on which chat after chat fails is asked by one of them at a time until it answers. A chat that has not
    failed goes at once: none suffers from what is wrong with others, and it is the best to try with."""

    OPENS_AT = 5

    def __init__(self) -> None:
        self._failing: set[Channel] = set()
        self._probe = asyncio.Lock()

    async def closed(self, channel: Channel, tries: int) -> None:
        """Wait for leave to send, or to look."""
        if self._is_open(channel):
            async with self._probe:
                if self._is_open(channel):
                    await asyncio.sleep(backoff(tries, 5.0))

    def _is_open(self, channel: Channel) -> bool:
        return channel in self._failing and len(self._failing) >= self.OPENS_AT

    async def failed(self, channel: Channel, tries: int) -> None:
        self._failing.add(channel)
        await asyncio.sleep(backoff(tries))

    def worked(self) -> None:
        self._failing.clear()
