"""The journal's contract over plain lists, a delay before and after each commit: what was applied survives a crash.

Only what chat and courier call; the contract, of which it keeps that much, is in tests/core/journal.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from core.chat import NO_MARKS
from core.delivery import NotAccepted
from core.messages import Channel, Message, MessageState, Reply, Request, Turn


@dataclass
class Row:
    """One inbound message."""

    row: int
    message: Message
    state: MessageState
    deadline: datetime
    attempts: int = 0
    turn: int | None = None
    deleted: bool = False
    note: str = ""


@dataclass
class Sent:
    """One reply row."""

    reply: Reply
    spoken: str
    notice: bool
    note: str = ""


@dataclass
class Received:
    asked: tuple[Request, ...] = ()
    changed: tuple[Request, ...] = ()
    cancelled: tuple[int, ...] = ()


@dataclass
class Disk:
    """What survives a crash."""

    rows: list[Row] = field(default_factory=list)
    replies: list[Sent] = field(default_factory=list)
    turns: dict[Channel, int] = field(default_factory=dict)
    after: dict[Channel, int] = field(default_factory=dict)


class MemoryJournal:
    def __init__(
        self,
        disk: Disk,
        now: Callable[[], datetime],
        dice: random.Random,
        wait: Callable[[float], Awaitable[None]],
        refuse: float = 0.0,
    ) -> None:
        """`refuse`: the share of writes that fail and store nothing."""
        self._disk, self._now, self._dice, self._wait, self._refuse = disk, now, dice, wait, refuse

    async def _before(self) -> None:
        await self._wait(self._dice.uniform(0, 0.02))
        if self._dice.random() < self._refuse:
            raise NotAccepted("the disk is full")

    async def _after(self) -> None:
        await self._wait(self._dice.uniform(0, 0.005))

    def _find(self, row: int) -> Row:
        return self._disk.rows[row - 1]

    def _known(self, message: Message) -> Row | None:
        return next(
            (r for r in self._disk.rows if (r.message.channel, r.message.id) == (message.channel, message.id)), None
        )

    def _request(self, row: Row) -> Request:
        return Request(row.row, row.message, row.deadline, row.attempts)

    async def receive(self, *messages: Message, deadline: float, marks: Mapping[Channel, str] = NO_MARKS) -> Received:
        await self._before()
        asked: list[Request] = []
        changed: list[Request] = []
        cancelled: list[int] = []
        for message in messages:
            known = self._known(message)
            if message.kind in ("ask", "heard"):
                if known is None:
                    state: MessageState = "waiting" if message.kind == "ask" else "heard"
                    known = Row(len(self._disk.rows) + 1, message, state, self._now() + timedelta(seconds=deadline))
                    self._disk.rows.append(known)
                    if state == "waiting":
                        asked.append(self._request(known))
            elif known is not None and message.kind == "edit":
                another = message.text != known.message.text
                known.message = replace(known.message, text=message.text)
                if another and known.state == "waiting":
                    changed.append(self._request(known))
            elif known is not None:
                known.deleted = True
                for sent in self._disk.replies:
                    if sent.reply.message == known.row and sent.reply.state == "pending":
                        sent.reply, sent.note = replace(sent.reply, state="abandoned"), "taken back"
                if known.state == "waiting":
                    known.state = "cancelled"
                    cancelled.append(known.row)
        await self._after()
        return Received(tuple(asked), tuple(changed), tuple(cancelled))

    async def backlog(
        self, deadline: float, max_attempts: int = 3, platforms: Collection[str] | None = None
    ) -> list[Request]:
        await self._before()
        waiting = [
            row
            for row in self._disk.rows
            if row.state == "waiting" and (platforms is None or row.message.channel.platform in platforms)
        ]
        for row in waiting:
            if row.row <= self._disk.after.get(row.message.channel, 0):
                row.state = "cancelled"
        waiting = [row for row in waiting if row.state == "waiting"]
        newest = {row.message.channel: row.row for row in waiting if row.deadline <= self._now()}
        for row in waiting:
            if row.deadline > self._now():
                continue
            if newest[row.message.channel] != row.row:
                row.state = "expired"
            elif row.attempts < max_attempts:
                row.attempts += 1
                row.deadline = self._now() + timedelta(seconds=deadline)
        await self._after()
        return [self._request(row) for row in waiting if row.state == "waiting"]

    async def answer(
        self, request: Request, parts: Sequence[str], *, spoken: str, seed: int | None = None, logprob: float = 0.0
    ) -> list[Reply]:
        await self._before()
        row = self._find(request.row)
        if row.state != "waiting" or row.message.text != request.message.text:
            return []
        row.state = "answered"
        row.turn = self._disk.turns.get(row.message.channel, 0)
        self._disk.turns[row.message.channel] = row.turn + 1
        made = [self._reply(row, part, text) for part, text in enumerate(parts)]
        self._disk.replies += [Sent(reply, "" if reply.part else spoken, False) for reply in made]
        await self._after()
        return made

    async def close(
        self, request: Request, state: MessageState, note: str = "", notice: str = ""
    ) -> list[Reply] | None:
        await self._before()
        row = self._find(request.row)
        if row.state != "waiting":
            return None
        row.state, row.note = state, note
        made = [self._reply(row, 0, notice)] if notice else []
        self._disk.replies += [Sent(reply, "", True) for reply in made]
        await self._after()
        return made

    def _reply(self, row: Row, part: int, text: str) -> Reply:
        nonce = f"{self._dice.getrandbits(96):020x}"[-20:]
        id = len(self._disk.replies) + 1 + part
        return Reply(
            id, row.message.channel, row.message.id, text, nonce, part, message=row.row, created_at=self._now()
        )

    async def counts(self) -> dict[str, dict[str, int]]:
        rows, sent = self._disk.rows, self._disk.replies
        return {"messages": Counter(row.state for row in rows), "replies": Counter(one.reply.state for one in sent)}

    async def state(self, channel: Channel, id: str, account: str = "") -> MessageState | None:
        await self._wait(self._dice.uniform(0, 0.005))
        found = (row.state for row in self._disk.rows if (row.message.channel, row.message.id) == (channel, id))
        return next(found, None)

    async def question(self, row: int) -> Request | None:
        await self._wait(self._dice.uniform(0, 0.005))
        found = self._find(row)
        return self._request(found) if found.state == "waiting" else None

    async def attempt(self, request: Request) -> int:
        await self._before()
        row = self._find(request.row)
        row.attempts += 1
        await self._after()
        return row.attempts

    async def history(self, channel: Channel, *, before: int | None = None, limit: int = 64) -> list[Turn]:
        await self._wait(self._dice.uniform(0, 0.005))
        channel = self._find(before).message.channel if before else channel
        turns: list[Turn] = []
        for row in self._disk.rows:
            said = [sent for sent in self._disk.replies if sent.reply.message == row.row and not sent.notice]
            if row.message.channel != channel or row.turn is None or row.deleted or not said:
                continue
            if row.row <= self._disk.after.get(channel, 0) or (before is not None and row.row >= before):
                continue
            if any(sent.reply.state == "abandoned" and sent.reply.part == 0 for sent in said):
                continue
            turns += [
                Turn("user", row.message.author.name, row.message.text, 2 * row.turn, row.message.id),
                Turn("assistant", "", "".join(sent.spoken for sent in said), 2 * row.turn + 1, row.message.id),
            ]
        return sorted(turns, key=lambda turn: turn.index)[-limit:]

    async def reset(self, channel: Channel, asked: Message | None = None) -> bool:
        await self._before()
        if asked:
            if self._known(asked):
                return False
            self._disk.rows.append(Row(len(self._disk.rows) + 1, asked, "heard", self._now()))
        self._disk.after[channel] = len(self._disk.rows)
        return True

    async def rekey(self, old: Channel, new: Channel) -> None:
        """As far as replies and waiting questions go; the turns of `new` are not renumbered."""
        await self._before()
        self._disk.turns[new] = self._disk.turns.get(new, 0) + self._disk.turns.pop(old, 0)
        for row in self._disk.rows:
            if row.message.channel == old:
                row.message = replace(row.message, channel=new)
        for sent in self._disk.replies:
            if sent.reply.channel == old:
                sent.reply = replace(sent.reply, channel=new)
        await self._after()

    async def due(self, channel: Channel | None = None, limit: int | None = None) -> list[Reply]:
        due = [
            sent.reply
            for sent in self._disk.replies
            if sent.reply.state in ("pending", "sending") and channel in (None, sent.reply.channel)
        ]
        await self._wait(self._dice.uniform(0, 0.005))
        return due[:limit]

    async def begin_send(self, reply: Reply) -> Reply | None:
        await self._before()
        row = self._find(reply.message)
        if row.row <= self._disk.after.get(row.message.channel, 0):
            await self._set(replace(reply, state="abandoned"))
            return None
        begun = replace(reply, state="sending", tries=reply.tries + 1)
        return begun if await self._set(begun) else None

    async def sent(self, reply: Reply, id: str) -> None:
        await self._before()
        await self._set(replace(reply, state="sent"))

    async def pending(self, reply: Reply) -> None:
        await self._before()
        await self._set(replace(reply, state="pending"))

    async def abandon(self, reply: Reply, note: str, alone: bool = False) -> None:
        await self._before()
        for sent in self._disk.replies:
            one = sent.reply
            among = one.part == reply.part if alone else one.part >= reply.part
            if one.message == reply.message and among and one.state in ("pending", "sending"):
                sent.reply, sent.note = replace(one, state="abandoned"), note
        await self._after()

    async def _set(self, reply: Reply) -> bool:
        """False when it is settled already."""
        stored = next(sent for sent in self._disk.replies if sent.reply.id == reply.id)
        waits = stored.reply.state in ("pending", "sending")
        if waits:
            tries = max(reply.tries, stored.reply.tries)
            stored.reply = replace(stored.reply, state=reply.state, tries=tries)
        await self._after()
        return waits
