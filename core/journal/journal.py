"""The journal: what was heard, what was answered, what was delivered. Every call that returns is on disk.

Calls raise JournalBusy when the database does not work now (nothing was stored; call again) and JournalError, one line
that says what to do, when it cannot be opened.
"""

from __future__ import annotations

import base64
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import Connection, and_, case, exists, func, select, update

from core import metrics
from core.journal import storage
from core.journal.database import JournalBusy, JournalError, file_of, open_database, parse
from core.journal.rows import KEY, few, inside, key, named, plain, request_of, row_of, same, storable, waits
from core.journal.schema import channels, messages, replies, unsettled, waiting
from core.journal.upkeep import Upkeep
from core.messages import Channel, Message, MessageState, Reply, Request, Turn

__all__ = ["Journal", "JournalBusy", "JournalError", "Received", "open_journal"]

log = logging.getLogger(__name__)
NO_MARKS: Mapping[Channel, str] = {}
TAKEN_BACK = exists().where(messages.c.id == replies.c.message, messages.c.deleted)
"""A reply's question was deleted."""
RESET = exists().where(
    messages.c.id == replies.c.message,
    channels.c.platform == messages.c.platform,
    channels.c.channel == messages.c.channel,
    messages.c.id <= channels.c.history_after,
)
"""Its conversation began anew since."""
KEPT = case((TAKEN_BACK, ""), else_=replies.c.text)
"""Of the text of a reply that is settled."""
RECENT = 128
"""Turns of a channel among which a deleted answer is looked for: as many as a prompt holds of short ones."""


@dataclass(frozen=True, slots=True)
class Received:
    """What a batch changed: new questions, waiting ones with a new text, rows of waiting ones taken back."""

    asked: tuple[Request, ...] = ()
    changed: tuple[Request, ...] = ()
    cancelled: tuple[int, ...] = ()


async def open_journal(url: str, *, progress: Callable[[str], None] = lambda line: None) -> Journal:
    """Check, migrate and open. `progress` hears one line per long step.

    Raises JournalBusy where PostgreSQL is away, else JournalError: a wrong address, a newer schema, a corrupt file
    without a good backup.
    """
    address = parse(url)
    file = file_of(address)
    if file:
        storage.prepare(file)
    await storage.migrate(address, progress)
    rescue = partial(storage.rescue, file) if file else None
    writer = open_database(address, writes=True, rescue=rescue)
    return Journal(address, writer, open_database(address, writes=False))


class Journal(Upkeep):
    """A message's path, from receive to sent; the rest is core.journal.upkeep's."""

    # -- receiving -----------------------------------------------------------------------------------------------

    async def receive(self, *batch: Message, deadline: float, marks: Mapping[Channel, str] = NO_MARKS) -> Received:
        """T1, one commit: new messages are stored once however often they come, edits and deletes reach theirs, and
        the channels' watermarks move to `marks`.

        `deadline`: seconds from now for the questions among them. Edits and deletes of what we never saw are dropped.
        """
        if not batch and not marks:
            return Received()
        clean = [storable(message) for message in batch]

        def work(connection: Connection) -> Received:
            self._move_marks(connection, marks)
            return self._receive(connection, clean, deadline)

        return await self._writer.do(work)

    def _receive(self, connection: Connection, batch: list[Message], deadline: float) -> Received:
        asked: list[Request] = []
        changed: list[Request] = []
        cancelled: list[int] = []
        fresh: list[Message] = []
        for message in batch:
            if message.kind in ("ask", "heard"):
                fresh.append(message)
                continue
            asked += self._store(connection, fresh, deadline)
            fresh = []
            if message.kind == "edit":
                changed += self._edit(connection, message)
            else:
                cancelled += self._delete(connection, message)
        asked += self._store(connection, fresh, deadline)
        return Received(tuple(asked), tuple(changed), tuple(cancelled))

    def _store(self, connection: Connection, fresh: list[Message], deadline: float) -> list[Request]:
        """Insert or ignore; the questions that are new, in the batch's order."""
        if not fresh:
            return []
        now = time.time()
        insert = self._insert(messages).on_conflict_do_nothing().returning(*KEY, messages.c.id)
        stored = connection.execute(insert, [row_of(message, now, now + deadline) for message in fresh]).all()
        ids = {tuple(row)[:4]: row.id for row in stored}
        due = datetime.fromtimestamp(now + deadline, UTC)
        asked = []
        for message in fresh:
            row = ids.pop(key(message), None)
            if row is not None and message.kind == "ask":
                asked.append(Request(row, message, due))
        return asked

    def _edit(self, connection: Connection, message: Message) -> list[Request]:
        another = and_(same(message), ~messages.c.deleted, messages.c.text != message.text)  # a preview is an edit, too
        change = update(messages).where(another).values(text=message.text)
        rows = connection.execute(change.returning(messages)).all()
        return [request_of(row) for row in rows if row.state == "waiting"]

    def _delete(self, connection: Connection, message: Message) -> list[int]:
        row = connection.execute(select(messages.c.id, messages.c.state).where(same(message))).first()
        if row is None:
            self._delete_answer(connection, message)
            return []
        state = "cancelled" if row.state == "waiting" else row.state
        gone = update(messages).where(messages.c.id == row.id)
        connection.execute(gone.values(deleted=True, text="", author_name="", state=state))
        self._unsay(connection, row.id)
        return [row.id] if state != row.state else []

    def _delete_answer(self, connection: Connection, message: Message) -> None:
        """If it is one of ours, its turn is in no later history."""
        here = and_(inside(message.channel), messages.c.account == message.account)
        turns = select(messages.c.id).where(here, messages.c.turn.is_not(None))
        recent = turns.order_by(messages.c.turn.desc()).limit(RECENT)
        ours = select(replies.c.message).where(replies.c.message.in_(recent), replies.c.platform_id == message.id)
        if (row := connection.execute(ours).scalar()) is not None:
            connection.execute(update(messages).where(messages.c.id == row).values(deleted=True))
            self._unsay(connection, row)

    def _unsay(self, connection: Connection, row: int) -> None:
        """Of the answer to this message nothing more is sent, and no text is kept but what is looked for by it."""
        its = update(replies).where(replies.c.message == row)
        connection.execute(its.where(replies.c.state == "pending").values(state="abandoned", note="taken back"))
        connection.execute(its.values(spoken=""))
        connection.execute(its.where(~unsettled).values(text=""))

    async def refail(self, *batch: Message, note: str, state: MessageState = "failed") -> None:
        """Record what nobody could read, or will answer, in its final state, so that it does not come again."""

        def work(connection: Connection) -> None:
            now = time.time()
            rows = [{**row_of(storable(m), now, now), "state": state, "note": plain(note)[:500]} for m in batch]
            connection.execute(self._insert(messages).on_conflict_do_nothing(), rows)

        if batch:
            await self._writer.do(work)

    async def backlog(
        self, deadline: float, max_attempts: int = 3, platforms: Collection[str] | None = None
    ) -> list[Request]:
        """At start, in arrival order: what still waits on `platforms` (None: on all). Of what is past its deadline, the
        newest question of each channel gets a fresh one (`max_attempts` times, then it comes with the old one, to be
        closed); the others expire."""
        owed, expired = await self._writer.do(
            lambda connection: self._backlog(connection, deadline, max_attempts, platforms)
        )
        for platform, count in expired.items():
            metrics.finished.labels(platform, "expired").inc(count)
        if expired:
            log.warning("too old at the start: %d expired", expired.total())
        return owed

    def _backlog(
        self, connection: Connection, deadline: float, max_attempts: int, platforms: Collection[str] | None
    ) -> tuple[list[Request], Counter[str]]:
        """What is owed, and how many expired on each platform."""
        now = time.time()
        ours = waiting
        if platforms is not None:
            ours = and_(ours, few(messages.c.platform).in_(platforms))
        here = and_(messages.c.platform == channels.c.platform, messages.c.channel == channels.c.channel)
        before_a_reset = exists().where(here, messages.c.id <= channels.c.history_after)
        forgotten = update(messages).where(ours, before_a_reset)
        connection.execute(forgotten.values(state="cancelled", note="forgotten"))  # a stop came between
        rows = connection.execute(select(messages).where(ours).order_by(messages.c.id)).all()
        newest = {(row.platform, row.channel): row.id for row in rows}
        owed, expired = [], Counter[str]()
        for row in rows:
            this = update(messages).where(messages.c.id == row.id)
            request = request_of(row)
            if row.deadline <= now and newest[row.platform, row.channel] != row.id:
                connection.execute(this.values(state="expired", note="too old at start"))
                expired[row.platform] += 1
                continue
            if row.deadline <= now and row.attempts < max_attempts:
                connection.execute(this.values(attempts=row.attempts + 1, deadline=now + deadline))
                fresh = datetime.fromtimestamp(now + deadline, UTC)
                request = replace(request, deadline=fresh, attempts=row.attempts + 1)
            owed.append(request)
        return owed, expired

    # -- answering -----------------------------------------------------------------------------------------------

    async def answer(
        self, request: Request, parts: Sequence[str], *, spoken: str, seed: int | None = None, logprob: float = 0.0
    ) -> list[Reply]:
        """T2, one transaction: the message is answered, its replies (one per part) are pending.

        `spoken` is what the model said in its own spelling, for the history. [] when the message waits no more, or
        an edit changed its text meanwhile.
        """

        def work(connection: Connection) -> list[Reply]:
            place = select(messages.c.platform, messages.c.channel).where(messages.c.id == request.row)
            if (row := connection.execute(place).first()) is None:
                return []
            here = dict(row._mapping)  # it may have moved since it was asked
            count = self._insert(channels).values(**here, next_turn=1, history_after=0)
            count = count.on_conflict_do_update(
                index_elements=list(here), set_={"next_turn": channels.c.next_turn + 1}
            ).returning(channels.c.next_turn)
            turn = connection.execute(count).scalar_one() - 1
            still = and_(waits(request), messages.c.text == request.message.text)
            done = update(messages).where(still).values(state="answered", turn=turn)
            if not connection.execute(done.returning(messages.c.id)).first():
                return []
            said = [(part, "" if number else plain(spoken)) for number, part in enumerate(parts)]
            moved = replace(request.message, channel=Channel(row.platform, row.channel))
            asked = replace(request, message=moved)
            return self._reply(connection, asked, said, notice=False, seed=seed, logprob=logprob)

        return await self._writer.do(work)

    async def close(
        self, request: Request, state: MessageState, note: str = "", notice: str = ""
    ) -> list[Reply] | None:
        """Another final state, and where `notice` is not "" one line to tell (never part of the history).

        None when nothing was stored: the message waits no more.
        """

        def work(connection: Connection) -> list[Reply] | None:
            done = update(messages).where(waits(request)).values(state=state, note=plain(note)[:500])
            if not connection.execute(done.returning(messages.c.id)).first():
                return None
            return self._reply(connection, request, [(notice, "")] if notice else [], notice=True)

        return await self._writer.do(work)

    def _reply(
        self, connection: Connection, request: Request, said: list[tuple[str, str]], **common: Any
    ) -> list[Reply]:
        now = time.time()
        made = []
        for part, (line, spoken) in enumerate(said):
            nonce = base64.urlsafe_b64encode(os.urandom(15)).decode()  # never from a row id: backups repeat those
            values = {"message": request.row, "part": part, "text": plain(line), "spoken": spoken, "nonce": nonce}
            values |= {"state": "pending", "tries": 0, "created_at": now, "platform_id": "", "note": ""}
            insert = self._insert(replies).values(**values, **common).returning(replies.c.id)
            id = connection.execute(insert).scalar_one()
            message = request.message
            made.append(
                Reply(
                    id,
                    message.channel,
                    message.id,
                    plain(line),
                    nonce,
                    part,
                    message=request.row,
                    created_at=datetime.fromtimestamp(now, UTC),
                )
            )
        return made

    async def question(self, row: int) -> Request | None:
        """As it stands now; None when it waits no more."""
        found = await self._read(select(messages).where(messages.c.id == row, waiting))
        return request_of(found[0]) if found else None

    async def attempt(self, request: Request) -> int:
        """Count a failed attempt; how many there were."""
        count = update(messages).where(messages.c.id == request.row).values(attempts=messages.c.attempts + 1)
        count = count.returning(messages.c.attempts)
        return await self._writer.do(lambda connection: connection.execute(count).scalar() or 0)

    async def history(self, channel: Channel, *, before: int | None = None, limit: int = 64) -> list[Turn]:
        """The last `limit` turns since the last reset, oldest first, in the order they were answered: each question
        and its answer. What was deleted, or never delivered, is not among them. `before` the row of a message, they are
        of its channel, which may have another id by now."""
        where: Any = inside(channel)
        if before is not None:
            its = messages.alias()
            of = [select(its.c[name]).where(its.c.id == before).scalar_subquery() for name in ("platform", "channel")]
            where = and_(messages.c.platform == of[0], messages.c.channel == of[1], messages.c.id < before)
        after = select(channels.c.history_after).where(
            channels.c.platform == messages.c.platform, channels.c.channel == messages.c.channel
        )
        said = (messages.c.turn, messages.c.author_name, messages.c.text, messages.c.platform_id, replies.c.spoken)
        hidden = messages.c.id <= func.coalesce(after.scalar_subquery(), 0)
        query = (
            select(*said, hidden.label("hidden"))
            .join(replies, and_(replies.c.message == messages.c.id, replies.c.part == 0))
            .where(
                where,
                messages.c.turn.is_not(None),
                ~messages.c.deleted,
                ~replies.c.notice,
                replies.c.state != "abandoned",
            )
            .order_by(messages.c.turn.desc())
            .limit((limit + 1) // 2)
        )
        turns: list[Turn] = []
        for row in reversed(await self._read(query)):
            if row.hidden:
                continue  # as a condition it would have all that was before the reset read, in search of `limit` turns
            turns.append(Turn("user", row.author_name, row.text, 2 * row.turn, row.platform_id))
            turns.append(Turn("assistant", "", row.spoken, 2 * row.turn + 1, row.platform_id))
        return turns[-limit:]

    async def reset(self, channel: Channel, asked: Message | None = None) -> bool:
        """What was said before is in no later history, what still waits for its answer included. With the message that
        `asked` for it, only when that is not stored yet: False when it is."""
        here = {"platform": channel.platform, "channel": channel.id}
        newest = select(func.coalesce(func.max(messages.c.id), 0)).scalar_subquery()  # of all channels: found at once
        insert = self._insert(channels).values(**here, next_turn=0, history_after=newest)
        forget = insert.on_conflict_do_update(
            index_elements=list(here), set_={"history_after": insert.excluded.history_after}
        )

        def work(connection: Connection) -> bool:
            if asked:
                now = time.time()
                store = self._insert(messages).values(row_of(storable(asked), now, now)).on_conflict_do_nothing()
                if connection.execute(store.returning(messages.c.id)).first() is None:
                    return False
            connection.execute(forget)
            return True

        return await self._writer.do(work)

    # -- delivering ----------------------------------------------------------------------------------------------

    async def due(self, channel: Channel | None = None, limit: int | None = None) -> list[Reply]:
        """Replies not yet delivered or given up, oldest first: of one channel, or of all."""
        query = (
            select(replies, messages.c.platform, messages.c.channel, messages.c.platform_id.label("answers"))
            .join(messages, replies.c.message == messages.c.id)
            .where(unsettled)
            .order_by(replies.c.id)
            .limit(limit)
        )
        if channel is not None:
            query = query.where(few(messages.c.platform) == channel.platform, few(messages.c.channel) == channel.id)
        return [
            Reply(
                row.id,
                Channel(row.platform, row.channel),
                row.answers,
                row.text,
                row.nonce,
                row.part,
                row.state,
                row.tries,
                row.message,
                datetime.fromtimestamp(row.created_at, UTC),
            )
            for row in await self._read(query)
        ]

    async def begin_send(self, reply: Reply) -> Reply | None:
        """T3: an attempt is about to leave. None: another process has settled the reply, or its question is deleted,
        or forgotten."""
        first = func.coalesce(replies.c.first_try_at, time.time())
        begin = (
            update(replies)
            .where(replies.c.id == reply.id, unsettled)
            .values(
                state=case((TAKEN_BACK | RESET, "abandoned"), else_="sending"),
                note=case((TAKEN_BACK, "taken back"), (RESET, "forgotten"), else_=replies.c.note),
                text=KEPT,
                tries=reply.tries + 1,
                first_try_at=first,
            )
        )
        begun = begin.returning(replies.c.state)
        state = await self._writer.do(lambda connection: connection.execute(begun).scalar())
        return replace(reply, state="sending", tries=reply.tries + 1) if state == "sending" else None

    async def sent(self, reply: Reply, id: str) -> None:
        """T4: it arrived, as the platform's `id`."""
        await self._set(reply, state="sent", platform_id=plain(id)[:128], text=KEPT)

    async def pending(self, reply: Reply) -> None:
        """It certainly did not arrive."""
        await self._set(reply, state="pending")

    async def abandon(self, reply: Reply, note: str, alone: bool = False) -> None:
        """It is given up, and in the same commit the later parts of its message: no start sends a tail. `alone`: they
        follow, since it may have arrived."""
        parts = replies.c.part == reply.part if alone else replies.c.part >= reply.part
        gone = update(replies).where(replies.c.message == reply.message, parts, unsettled)
        gone = gone.values(state="abandoned", note=plain(note)[:500], text=KEPT)
        await self._writer.do(lambda connection: connection.execute(gone))

    async def _set(self, reply: Reply, **values: Any) -> bool:
        """False when it is settled already."""
        change = update(replies).where(replies.c.id == reply.id, unsettled).values(**values)
        return await self._writer.do(lambda connection: connection.execute(change).rowcount > 0)

    async def state(self, channel: Channel, id: str, account: str = "") -> MessageState | None:
        """What became of this message; None: it is not known."""
        found = await self._read(select(messages.c.state).where(named(channel, id, account)))
        return found[0].state if found else None
