"""The one path of a message: receive (commit, then return), answer, hand the reply to the courier; reset and drain.

Chat is all a bot sees of the house. Whatever happens to an answer, its message reaches exactly one final state.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from core import metrics
from core.backoff import backoff
from core.courier import TYPING_EVERY, Courier, insist, wall
from core.crash import crash_point
from core.delivery import NotAccepted
from core.engine.base import Cancelled, Completion, EngineError, Failed, PromptTooLong
from core.messages import Channel, Message, MessageState, Request, Turn
from core.queue import RequestQueue
from core.settings import QueueLimits
from core.text import MAX_CHARS
from core.voice import Voice

if TYPE_CHECKING:
    from core.journal.journal import Journal

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ATTEMPTS = 3
FULL, RELIEVED = 0.8, 0.5
BUSY = "I am answering many people right now, please try again in a minute."
SORRY = "Sorry, I could not find an answer to that. Could you say it in other words?"
BUSY_EVERY = 60.0
LONGEST = 4 * MAX_CHARS
"""Characters kept of a message, its end: twice what Discord and Telegram take. The model sees fewer."""
FORGET = 5.0
"""Seconds for the engine to forget; it may be away, and a stop does not wait for that."""
TELL_AFTER = 2.0
EXPIRED_EVERY = 10.0
"""Seconds that expired messages are counted for, before one line in the log tells of them."""
TOLD = 20
"""So many who wait are shown their place at a time: platforms count these calls too."""
AT_ONCE = 256
"""So many of those that expire together are closed in one commit of the journal's; others write in between."""
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
NO_MARKS: Mapping[Channel, str] = {}


class Chat:
    def __init__(
        self,
        journal: Journal,
        queue: RequestQueue,
        courier: Courier,
        voice: Voice,
        limits: QueueLimits,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = wall,
    ) -> None:
        self.journal = journal
        self._queue = queue
        self._courier = courier
        self.voice = voice
        self._limits = limits
        self._running = limits.running or voice.at_once
        self._clock = clock
        self._now = now
        self._answering: dict[int, asyncio.Task[None]] = {}
        self._edited: dict[int, Request] = {}
        self._busy_said: dict[Channel, float] = {}
        self._told: dict[int, float] = {}
        self._expired: Counter[Channel] = Counter()  # since the log told of any
        self._trouble = ""  # why the engine gives no answers, while it does not
        self._pace = 1.0  # seconds an answer takes, lately
        self._tasks: set[asyncio.Task[Any]] = set()
        self._taking = True
        self._relieved = asyncio.Event()
        self._relieved.set()

    # -- what bots call ------------------------------------------------------------------------------------------

    async def receive(self, *messages: Message, marks: Mapping[Channel, str] = NO_MARKS) -> bool:
        """On disk when it returns: only then acknowledge to the platform. Messages of one channel in their order.
        True: there is a question among them that had not come before.

        `marks`: how far these channels are read with it, where a platform is read and does not acknowledge.
        Raises NotAccepted when nothing could be stored: do not acknowledge. ValueError where no bot could reply.
        """
        began = self._clock()
        self._courier.check(message.channel for message in messages)
        cut = [replace(m, text=m.text[-LONGEST:]) if len(m.text) > LONGEST else m for m in messages]
        heard = [m if m.kind != "ask" or self.voice.hears(m.text) else replace(m, kind="heard") for m in cut]
        # Whoever is cancelled here may have stored it: then it is answered, too.
        return await asyncio.shield(self._spawn(self._receive(heard, marks, began)))

    async def _receive(self, messages: list[Message], marks: Mapping[Channel, str], began: float) -> bool:
        """T1, and what follows from it."""
        crash_point("before T1")
        try:
            received = await self.journal.receive(*messages, deadline=self._limits.deadline, marks=marks)
        except NotAccepted:
            metrics.refused.inc()
            raise
        crash_point("after T1")
        metrics.commit_seconds.observe(self._clock() - began)
        for request in received.asked:
            metrics.received.labels(request.message.channel.platform).inc()
        for request in received.asked if self._taking else ():  # nothing is awaited: arrival order is answer order
            unsent = self._courier.unsent(request.message.channel)
            bound = self._queue.full(request, unsent)
            gives = bound == "per_channel" and not self._queue.full(request, unsent - 1)  # one place less is enough
            if gives and (missed := self._queue.give_way(request.message.channel)):
                self._spawn(self._shed(missed, bound))
                bound = ""
            if bound:
                self._spawn(self._shed(request, bound))
            else:
                self._queue.put(self._timed(request))
        for request in map(self._timed, received.changed):
            if request.row in self._answering:
                self._edited[request.row] = request
                self._answering[request.row].cancel("edited")
            else:
                self._queue.replace(request)  # if it has ended meanwhile, its T2 has met the new text (_answer)
        for row in received.cancelled:
            if not self._queue.remove(row) and row in self._answering:
                self._answering[row].cancel("deleted")
            metrics.finished.labels(messages[0].channel.platform, "cancelled").inc()
        self._measure()
        return bool(received.asked)

    async def reset(self, channel: Channel, asked: Message | None = None) -> bool:
        """The conversation starts anew: what was said before is not in any later prompt, what waits for its answer gets
        none, and no answer to it is sent any more. False: `asked`, a platform's message that may come again, has been
        obeyed already."""
        if not await self.journal.reset(channel, asked):
            return False
        for request in self._queue.take_out(lambda waiting: waiting.message.channel == channel):
            self._spawn(self._close(request, "cancelled", "forgotten"))
        self._spawn(self._forget(channel))  # nobody waits for an engine that is away: it may only cost, never tell
        return True

    async def _forget(self, channel: Channel) -> None:
        try:
            async with asyncio.timeout(FORGET):
                await self.voice.forget(str(channel))
        except (EngineError, TimeoutError) as error:
            log.warning("%s: the engine may still hold what it computed: %s", channel, error or "no answer")

    async def paused(self) -> None:
        """Returns when there is room for more; pollers await it before they fetch."""
        await self._relieved.wait()

    async def history(self, channel: Channel, limit: int = 64) -> list[Turn]:
        """The last turns, oldest first, with the bot's lines in people's spelling."""
        turns = await self.journal.history(channel, limit=limit)
        return [
            replace(turn, text=self.voice.restore(turn.text)) if turn.role == "assistant" else turn for turn in turns
        ]

    # -- what the journal keeps for bots --------------------------------------------------------------------------

    async def watermarks(self, platform: str) -> dict[str, str]:
        """Channel id -> the last message id seen there."""
        return await self.journal.watermarks(platform)

    async def state(self, channel: Channel, id: str) -> MessageState | None:
        """What became of this message; None: it is not known."""
        return await self.journal.state(channel, id)

    async def refail(self, *messages: Message, note: str, state: MessageState = "failed") -> None:
        """Record what nobody could read, or will answer, in its final state, so that it does not come again."""
        await self.journal.refail(*messages, note=note, state=state)

    async def adopt(self, platform: str, account: str) -> None:
        """What stands in the journal without an account is that one's."""
        await insist(self.journal.adopt, platform, account)

    async def rekey(self, old: Channel, new: Channel) -> None:
        """The platform gave the conversation another id."""
        await self.journal.rekey(old, new)
        self._queue.move(old, new)
        self._courier.moved(old, new)

    async def identified(self, platform: str, new: bool = True) -> int:
        """How many sessions began on the platform in the last 24 hours, with a `new` one, which is counted."""
        return await self.journal.identified(platform, new)

    # -- the life of the house -----------------------------------------------------------------------------------

    async def open(self, platforms: Collection[str] | None = None) -> None:
        """Take up what the journal still owes `platforms` (None: all); before any bot serves, or a message could stand
        here twice. What waits on other platforms is the business of the process that runs them."""
        for request in await insist(self.journal.backlog, self._limits.deadline, MAX_ATTEMPTS, platforms):
            if request.deadline > self._now():
                self._queue.put(self._timed(request))
            else:
                await self._close(request, "failed", "no answer in so many starts", SORRY)

    async def serve(self) -> None:
        """Answer until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep())
            for _ in range(self._running):
                group.create_task(self._work())

    async def drain(self, timeout: float) -> None:
        """Answers under way finish within `timeout` seconds, sends included; what waits stays in the journal."""
        end = self._clock() + timeout
        self._taking = False
        self._queue.clear()
        running = self._tasks.union(self._answering.values())
        if running:
            await asyncio.wait(running, timeout=timeout)
        for task in running:
            task.cancel()
        if self._expired:
            self._tell_expired()
        await self._courier.drain(max(0.0, end - self._clock()))

    # -- answering -----------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            request = await self._queue.take()
            if not self._taking:
                continue  # it stands in the journal
            task = asyncio.create_task(self._answer_fully(request))
            self._answering[request.row] = task
            self._measure()
            began = self._clock()
            try:
                await asyncio.wait({task})
            finally:
                self._pace += 0.1 * (self._clock() - began - self._pace)
                task.cancel()
                del self._answering[request.row]
                edited = self._edited.pop(request.row, None)
                self._queue.done(request)
                if edited and self._taking:  # it reached an answer that was counting its failure
                    self._queue.put(edited)
                self._measure()

    async def _answer_fully(self, request: Request) -> None:
        """Until the message has a final state, whatever raises on the way."""
        tries = 0
        while True:
            try:
                if tries:  # what stands in the journal counts
                    again = await insist(self.journal.question, request.row)
                    if again is None:
                        await self._settled(request.message)
                        return
                    request = replace(again, ends=request.ends)
                if await self._answer(request, tries):
                    return
            except asyncio.CancelledError:
                if request.row not in self._edited:
                    raise
                del self._edited[request.row]
                if (task := asyncio.current_task()) is not None:
                    task.uncancel()
            except Exception:
                log.exception("%s: message %s could not be answered", request.message.channel, request.message.id)
                if await asyncio.shield(self._spawn(self._failed(request))):  # its apology must go out, too
                    return
            tries += 1

    async def _settled(self, message: Message) -> None:
        """Who asked is told how it ended without a reply from here: another process may have answered it."""
        if state := await insist(self.journal.state, message.channel, message.id, message.account):
            self._courier.closed(message, state)

    async def _answer(self, request: Request, tries: int) -> bool:
        """False when nothing was stored: an edit was before the answer, or the message waits no more."""
        channel, message = request.message.channel, request.message
        limit = self.voice.window.reach
        history = await insist(self.journal.history, channel, before=request.row, limit=limit)
        question = Turn("user", message.author.name, message.text, history[-1].index + 1 if history else 0)
        given = self.voice.params.seed
        seed = ((random.getrandbits(62) if given is None else given) + tries) % 2**63
        async with self._courier.typing(message):
            spoken, completion = await self._speak(request, [*history, question], seed)
            if completion is None:
                return True
            parts = self._courier.split(channel, self.voice.restore(spoken)) if spoken else []
            if not parts:
                raise Failed("the reply has no text")
            crash_point("before T2")
            # shielded: a commit that is cancelled may have happened, and then its replies must go out
            return await asyncio.shield(self._spawn(self._hand_over(request, parts, spoken, seed, completion)))

    async def _hand_over(
        self, request: Request, parts: list[str], spoken: str, seed: int, completion: Completion
    ) -> bool:
        """T2, and the replies on their way; False when nothing was stored."""
        logprob = completion.logprob
        replies = await insist(self.journal.answer, request, parts, spoken=spoken, seed=seed, logprob=logprob)
        crash_point("after T2")
        self._courier.deliver(replies)
        if replies:
            metrics.finished.labels(request.message.channel.platform, "answered").inc()
            metrics.answer_seconds.observe(max(0.0, self._limits.deadline - self._left(request)))
            metrics.tokens.labels("reply").inc(len(completion.token_ids))
            metrics.tokens.labels("cached").inc(completion.cached_tokens)
        return bool(replies)

    async def _speak(self, request: Request, turns: list[Turn], seed: int) -> tuple[str, Completion | None]:
        """What the model says; no completion when the message was closed instead."""
        session, tries = str(request.message.channel), 0
        while (left := self._left(request)) > 0:
            began = self._clock()
            try:
                heard = self.voice.hears(turns[-1].text)  # an edit may have left nothing
                reply = await self.voice.speak(turns, seed=seed, session=session, deadline=left) if heard else None
                metrics.generate_seconds.observe(self._clock() - began)
                self._trouble = ""
                if reply is None:
                    await self._close(request, "cancelled", "nothing to answer")
                return reply or ("", None)
            except (Failed, PromptTooLong):
                raise
            except EngineError as error:  # full, restarting or out of reach: it heals, or the deadline comes
                metrics.engine_failures.labels(type(error).__name__).inc()
                if not isinstance(error, Cancelled):  # who runs the engine has said so once
                    self._trouble = str(error)
                    log.debug("%s: the engine: %s", session, error)
                await asyncio.sleep(min(backoff(tries, 2.0), max(0.0, self._left(request))))
                tries += 1
        await self._close(request, "expired", "no answer in time")
        return "", None

    async def _failed(self, request: Request) -> bool:
        """Count a failed attempt; True when it was the last and the person got an apology."""
        if await insist(self.journal.attempt, request) < MAX_ATTEMPTS:
            return False
        await self._close(request, "failed", "every attempt failed", SORRY)
        return True

    async def _shed(self, request: Request, bound: str) -> None:
        """No room: a recorded state, and one polite line per chat and minute, where somebody waits."""
        chat, now = request.message.channel.chat, self._clock()
        silent = request.message.missed or now - self._busy_said.get(chat, -BUSY_EVERY) < BUSY_EVERY
        if not silent:
            self._busy_said[chat] = now
        await self._close(request, "shed", bound, "" if silent else BUSY)

    async def _close(self, request: Request, state: MessageState, note: str = "", notice: str = "") -> None:
        told = await insist(self.journal.close, request, state, note, notice)
        if told is None:
            await self._settled(request.message)
            return
        self._courier.deliver(told)
        if not told:
            self._courier.closed(request.message, state)
        metrics.finished.labels(request.message.channel.platform, state).inc()
        if state == "expired":
            self._expired[request.message.channel] += 1

    async def _sweep(self) -> None:
        """Once a second: requests past their deadline end, notes of who was told "busy" are dropped."""
        quiet_until = 0.0
        while True:
            await asyncio.sleep(1.0)
            late = self._queue.take_out(lambda waiting: self._left(waiting) <= 0)
            for first in range(0, len(late), AT_ONCE):
                together = late[first : first + AT_ONCE]
                await asyncio.gather(*(self._close(request, "expired", "waited too long") for request in together))
            if self._expired and self._clock() >= quiet_until:
                quiet_until = self._clock() + EXPIRED_EVERY
                self._tell_expired()
            old = self._clock() - BUSY_EVERY
            self._busy_said = {chat: at for chat, at in self._busy_said.items() if at > old}
            self._tell()
            self._measure()

    def _tell_expired(self) -> None:
        """Nobody else is told of them: one line, the channels with the most in front."""
        most = ", ".join(f"{channel} {count}" for channel, count in self._expired.most_common(5))
        rest = f" and {len(self._expired) - 5} channels more" if len(self._expired) > 5 else ""
        why = f" (the engine: {self._trouble})" if self._trouble else ""
        count, seconds = self._expired.total(), self._limits.deadline
        log.warning("expired without an answer in %g s: %d, of %s%s%s", seconds, count, most, rest, why)
        self._expired.clear()

    def _tell(self) -> None:
        """Who has waited for seconds, or will, sees typing and the place in line."""
        now = self._clock()
        self._told = {row: at for row, at in self._told.items() if now - at < TYPING_EVERY}
        for ahead, request in enumerate(self._queue.next(TOLD)):
            waited = self._limits.deadline - self._left(request)
            if waited >= TELL_AFTER and request.row not in self._told:
                self._told[request.row] = now
                seconds = max(1, round((ahead + 1) * self._pace / self._running))
                place = ORDINALS[ahead] if ahead < len(ORDINALS) else f"number {ahead + 1}"
                self._courier.tell(request.message, f"You are {place} in line, about {seconds} s.")

    def _timed(self, request: Request) -> Request:
        """With its deadline by a clock that nobody sets; the wall's is read when it comes, and when it is edited."""
        left = min(self._limits.deadline, (request.deadline - self._now()).total_seconds())  # it may have been set back
        return replace(request, ends=self._clock() + left)

    def _left(self, request: Request) -> float:
        """Seconds to the deadline."""
        return request.ends - self._clock()

    def _measure(self) -> None:
        metrics.waiting.set(len(self._queue))
        metrics.under_way.set(len(self._answering))
        if self._queue.fullness() >= FULL:
            self._relieved.clear()
        elif self._queue.fullness() <= RELIEVED:
            self._relieved.set()

    def _spawn(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
