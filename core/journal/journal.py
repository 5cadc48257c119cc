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
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, and_, delete, exists, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL

from core.journal import storage
from core.journal.database import Database, JournalBusy, JournalError, Writer, busy, file_of, open_database, parse
from core.journal.schema import channels, leases, messages, replies, sessions, watermarks
from core.messages import Author, Channel, Message, MessageState, Reply, Request, Turn
from core.owner import dead

__all__ = ["Journal", "JournalBusy", "JournalError", "Received", "open_journal"]

log = logging.getLogger(__name__)
T = TypeVar("T")
DAY = 86_400.0
NO_MARKS: Mapping[Channel, str] = {}


@dataclass(frozen=True, slots=True)
class Received:
    """What a batch changed: new questions, waiting ones with a new text, rows of waiting ones taken back."""

    asked: tuple[Request, ...] = ()
    changed: tuple[Request, ...] = ()
    cancelled: tuple[int, ...] = ()


async def open_journal(url: str, *, progress: Callable[[str], None] = lambda line: None) -> Journal:
    """Check, migrate and open. `progress` hears one line per long step.

    Raises JournalError: a wrong address, a database out of reach, a newer schema, a corrupt file without a good backup.
    """
    address = parse(url)
    file = file_of(address)
    if file:
        storage.prepare(file)
    await storage.migrate(address, progress)
    rescue = partial(storage.rescue, file) if file else None
    writer = open_database(address, writes=True, rescue=rescue)
    return Journal(address, writer, open_database(address, writes=False))


class Journal:
    def __init__(self, url: URL, writer: Database, readers: Database) -> None:
        self._url = url
        self._file = file_of(url)
        self._writer = Writer(writer)
        self._readers = readers
        self._insert: Any = sqlite.insert if self._file else postgresql.insert

    async def aclose(self) -> None:
        await self._writer.aclose()
        await self._readers.dispose()

    async def _read(self, statement: Any) -> Sequence[Row[Any]]:
        try:
            return await self._readers.run(lambda connection: connection.execute(statement).all())
        except Exception as error:
            raise busy(error) or error from error

    # -- receiving -----------------------------------------------------------------------------------------------

    async def receive(self, *batch: Message, deadline: float, marks: Mapping[Channel, str] = NO_MARKS) -> Received:
        """T1, one commit: new messages are stored once however often they come, edits and deletes reach theirs, and
        the channels' watermarks move to `marks`.

        `deadline`: seconds from now for the questions among them. Edits and deletes of what we never saw are dropped.
        """
        if not batch and not marks:
            return Received()
        clean = [_storable(message) for message in batch]

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
        insert = self._insert(messages).on_conflict_do_nothing().returning(*_KEY, messages.c.id)
        stored = connection.execute(insert, [_row(message, now, now + deadline) for message in fresh]).all()
        ids = {tuple(row)[:4]: row.id for row in stored}
        due = datetime.fromtimestamp(now + deadline, UTC)
        asked = []
        for message in fresh:
            row = ids.pop(_key(message), None)
            if row is not None and message.kind == "ask":
                asked.append(Request(row, message, due))
        return asked

    def _edit(self, connection: Connection, message: Message) -> list[Request]:
        change = update(messages).where(_is(message), ~messages.c.deleted).values(text=message.text)
        rows = connection.execute(change.returning(messages)).all()
        return [_request(row) for row in rows if row.state == "waiting"]

    def _delete(self, connection: Connection, message: Message) -> list[int]:
        row = connection.execute(select(messages.c.id, messages.c.state).where(_is(message))).first()
        if row is None:
            return []
        state = "cancelled" if row.state == "waiting" else row.state
        gone = update(messages).where(messages.c.id == row.id)
        connection.execute(gone.values(deleted=True, text="", author_name="", state=state))
        connection.execute(update(replies).where(replies.c.message == row.id).values(spoken=""))
        return [row.id] if state != row.state else []

    async def refail(self, *batch: Message, note: str, state: MessageState = "failed") -> None:
        """Record what nobody could read, or will answer, in its final state, so that it does not come again."""

        def work(connection: Connection) -> None:
            now = time.time()
            rows = [{**_row(_storable(m), now, now), "state": state, "note": _text(note)[:500]} for m in batch]
            connection.execute(self._insert(messages).on_conflict_do_nothing(), rows)

        if batch:
            await self._writer.do(work)

    async def backlog(
        self, deadline: float, max_attempts: int = 3, platforms: Collection[str] | None = None
    ) -> list[Request]:
        """At start, in arrival order: what still waits on `platforms` (None: on all). Of what is past its deadline, the
        newest question of each channel gets a fresh one (`max_attempts` times, then it failed); the others expire."""
        owed, ended = await self._writer.do(
            lambda connection: self._backlog(connection, deadline, max_attempts, platforms)
        )
        if ended:
            log.warning("too old at the start: %d expired, %d failed", ended["expired"], ended["failed"])
        return owed

    def _backlog(
        self, connection: Connection, deadline: float, max_attempts: int, platforms: Collection[str] | None
    ) -> tuple[list[Request], Counter[str]]:
        """What is owed, and how many came to which end."""
        now = time.time()
        waiting = select(messages).where(messages.c.state == "waiting").order_by(messages.c.id)
        if platforms is not None:
            waiting = waiting.where(messages.c.platform.in_(platforms))
        rows = connection.execute(waiting).all()
        newest = {(row.platform, row.channel): row.id for row in rows}
        owed = []
        ended = Counter[str]()
        for row in rows:
            if row.deadline > now:
                owed.append(_request(row))
                continue
            last = newest[row.platform, row.channel] == row.id
            if last and row.attempts < max_attempts:
                values: dict[str, Any] = {"attempts": row.attempts + 1, "deadline": now + deadline}
                request = replace(_request(row), deadline=datetime.fromtimestamp(now + deadline, UTC))
                owed.append(replace(request, attempts=row.attempts + 1))
            else:
                values = {"state": "failed" if last else "expired", "note": "too old at start"}
                ended[values["state"]] += 1
            connection.execute(update(messages).where(messages.c.id == row.id).values(**values))
        return owed, ended

    # -- answering -----------------------------------------------------------------------------------------------

    async def answer(
        self, request: Request, parts: Sequence[str], *, spoken: str, seed: int | None = None, logprob: float = 0.0
    ) -> list[Reply]:
        """T2, one transaction: the message is answered, its replies (one per part) are pending.

        `spoken` is what the model said in its own spelling, for the history. [] when the message waits no more, or
        an edit changed its text meanwhile.
        """

        def work(connection: Connection) -> list[Reply]:
            channel = request.message.channel
            here = {"platform": channel.platform, "channel": channel.id}
            count = self._insert(channels).values(**here, next_turn=1, history_after=0)
            count = count.on_conflict_do_update(
                index_elements=list(here), set_={"next_turn": channels.c.next_turn + 1}
            ).returning(channels.c.next_turn)
            turn = connection.execute(count).scalar_one() - 1
            still = and_(_waits(request), messages.c.text == request.message.text)
            done = update(messages).where(still).values(state="answered", turn=turn)
            if not connection.execute(done.returning(messages.c.id)).first():
                return []
            said = [(part, "" if place else _text(spoken)) for place, part in enumerate(parts)]
            return self._reply(connection, request, said, notice=False, seed=seed, logprob=logprob)

        return await self._writer.do(work)

    async def close(self, request: Request, state: MessageState, note: str = "", notice: str = "") -> list[Reply]:
        """Another final state, and where `notice` is not "" one line to tell (never part of the history).

        [] when the message waits no more, or there is nothing to tell.
        """

        def work(connection: Connection) -> list[Reply]:
            done = update(messages).where(_waits(request)).values(state=state, note=_text(note)[:500])
            if not connection.execute(done.returning(messages.c.id)).first() or not notice:
                return []
            return self._reply(connection, request, [(notice, "")], notice=True)

        return await self._writer.do(work)

    def _reply(
        self, connection: Connection, request: Request, said: list[tuple[str, str]], **common: Any
    ) -> list[Reply]:
        now = time.time()
        made = []
        for part, (line, spoken) in enumerate(said):
            nonce = base64.urlsafe_b64encode(os.urandom(15)).decode()  # never from a row id: backups repeat those
            values = {"message": request.row, "part": part, "text": _text(line), "spoken": spoken, "nonce": nonce}
            values |= {"state": "pending", "tries": 0, "created_at": now, "platform_id": "", "note": ""}
            insert = self._insert(replies).values(**values, **common).returning(replies.c.id)
            id = connection.execute(insert).scalar_one()
            message = request.message
            made.append(
                Reply(
                    id,
                    message.channel,
                    message.id,
                    _text(line),
                    nonce,
                    part,
                    message=request.row,
                    created_at=datetime.fromtimestamp(now, UTC),
                )
            )
        return made

    async def question(self, row: int) -> Request | None:
        """As it stands now; None when it waits no more."""
        found = await self._read(select(messages).where(messages.c.id == row, messages.c.state == "waiting"))
        return _request(found[0]) if found else None

    async def attempt(self, request: Request) -> int:
        """Count a failed attempt; how many there were."""
        count = update(messages).where(messages.c.id == request.row).values(attempts=messages.c.attempts + 1)
        count = count.returning(messages.c.attempts)
        return await self._writer.do(lambda connection: connection.execute(count).scalar() or 0)

    async def history(self, channel: Channel, *, before: int | None = None, limit: int = 64) -> list[Turn]:
        """The last `limit` turns since the last reset, oldest first, in the order they were answered: each question
        and its answer. What was deleted, or never delivered, is not among them."""
        after = select(channels.c.history_after).where(
            channels.c.platform == channel.platform, channels.c.channel == channel.id
        )
        query = (
            select(messages.c.turn, messages.c.author_name, messages.c.text, messages.c.platform_id, replies.c.spoken)
            .join(replies, and_(replies.c.message == messages.c.id, replies.c.part == 0))
            .where(
                _in(channel),
                messages.c.turn.is_not(None),
                messages.c.id > func.coalesce(after.scalar_subquery(), 0),
                ~messages.c.deleted,
                ~replies.c.notice,
                replies.c.state != "abandoned",
            )
            .order_by(messages.c.turn.desc())
            .limit((limit + 1) // 2)
        )
        if before is not None:
            query = query.where(messages.c.id < before)
        turns: list[Turn] = []
        for row in reversed(await self._read(query)):
            turns.append(Turn("user", row.author_name, row.text, 2 * row.turn, row.platform_id))
            turns.append(Turn("assistant", "", row.spoken, 2 * row.turn + 1, row.platform_id))
        return turns[-limit:]

    async def reset(self, channel: Channel) -> None:
        """What was said before is in no later history, what still waits for its answer included."""
        here = {"platform": channel.platform, "channel": channel.id}
        newest = select(func.coalesce(func.max(messages.c.id), 0)).where(_in(channel)).scalar_subquery()
        insert = self._insert(channels).values(**here, next_turn=0, history_after=newest)
        forget = insert.on_conflict_do_update(
            index_elements=list(here), set_={"history_after": insert.excluded.history_after}
        )
        await self._writer.do(lambda connection: connection.execute(forget))

    # -- delivering ----------------------------------------------------------------------------------------------

    async def due(self, channel: Channel | None = None, limit: int | None = None) -> list[Reply]:
        """Replies not yet delivered or given up, oldest first: of one channel, or of all."""
        query = (
            select(replies, messages.c.platform, messages.c.channel, messages.c.platform_id.label("answers"))
            .join(messages, replies.c.message == messages.c.id)
            .where(replies.c.state.in_(("pending", "sending")))
            .order_by(replies.c.id)
            .limit(limit)
        )
        if channel is not None:
            query = query.where(_in(channel))
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
                None if row.first_try_at is None else datetime.fromtimestamp(row.first_try_at, UTC),
                row.message,
                datetime.fromtimestamp(row.created_at, UTC),
            )
            for row in await self._read(query)
        ]

    async def begin_send(self, reply: Reply) -> Reply:
        """T3: an attempt is about to leave."""
        first = reply.first_try_at or datetime.now(UTC)
        await self._set(reply, state="sending", tries=reply.tries + 1, first_try_at=first.timestamp())
        return replace(reply, state="sending", tries=reply.tries + 1, first_try_at=first)

    async def sent(self, reply: Reply, id: str) -> None:
        """T4: it arrived, as the platform's `id`."""
        await self._set(reply, state="sent", platform_id=_text(id)[:128])

    async def pending(self, reply: Reply) -> None:
        """It certainly did not arrive."""
        await self._set(reply, state="pending")

    async def abandon(self, reply: Reply, note: str) -> None:
        await self._set(reply, state="abandoned", note=_text(note)[:500])

    async def _set(self, reply: Reply, **values: Any) -> None:
        change = update(replies).where(replies.c.id == reply.id).values(**values)
        await self._writer.do(lambda connection: connection.execute(change))

    async def replied(self, channel: Channel, id: str) -> bool:
        """Is there a reply to this message that was not given up?"""
        query = select(exists().where(_in(channel), messages.c.platform_id == id, replies.c.message == messages.c.id))
        return bool((await self._read(query))[0][0])

    # -- what platforms need kept --------------------------------------------------------------------------------

    async def watermarks(self, platform: str) -> dict[str, str]:
        """Channel id -> the last message id received there."""
        query = select(watermarks.c.channel, watermarks.c.last_id).where(watermarks.c.platform == platform)
        return {row.channel: row.last_id for row in await self._read(query)}

    def _move_marks(self, connection: Connection, marks: Mapping[Channel, str]) -> None:
        if not marks:
            return
        rows = [
            {"platform": c.platform, "channel": _text(c.id)[:128], "last_id": _text(id)[:128]}
            for c, id in marks.items()
        ]
        insert = self._insert(watermarks)
        moved = insert.on_conflict_do_update(
            index_elements=["platform", "channel"], set_={"last_id": insert.excluded.last_id}
        )
        connection.execute(moved, rows)

    async def rekey(self, old: Channel, new: Channel) -> None:
        """The platform gave `old` another id: history, waiting questions and replies go with it."""

        def work(connection: Connection) -> None:
            known = select(messages.c.platform_id).where(_in(new))
            rows = connection.execute(select(channels).where(or_(_channel(old), _channel(new)))).all()
            before = max((row.next_turn for row in rows if row.channel == old.id), default=0)
            later = update(messages).where(_in(new)).values(turn=messages.c.turn + before)
            connection.execute(later)  # what `new` said already comes after all that `old` said
            connection.execute(
                update(messages).where(_in(old), messages.c.platform_id.not_in(known)).values(channel=new.id)
            )
            connection.execute(delete(channels).where(or_(_channel(old), _channel(new))))
            if rows:
                turns, hidden = sum(row.next_turn for row in rows), max(row.history_after for row in rows)
                merged = {"platform": new.platform, "channel": new.id, "next_turn": turns, "history_after": hidden}
                connection.execute(self._insert(channels).values(**merged))

        await self._writer.do(work)

    async def lease(self, name: str, owner: str, seconds: float) -> bool:
        """Take or renew `name` for so long; False while another owner holds it. The lease of an owner that is dead is
        void, and so is one that ends later than anyone could have asked for: a clock has jumped since."""

        def work(connection: Connection) -> bool:
            now = time.time()
            holder = connection.execute(select(leases.c.owner).where(leases.c.name == name)).scalar()
            insert = self._insert(leases).values(name=name, owner=owner, until=now + seconds)
            free = or_(leases.c.owner == owner, leases.c.until <= now, leases.c.until > now + 2 * seconds)
            if holder is not None and dead(holder):
                free = or_(free, leases.c.owner == holder)
            insert = insert.on_conflict_do_update(
                index_elements=["name"], set_={"owner": owner, "until": now + seconds}, where=free
            ).returning(leases.c.owner)
            return connection.execute(insert).first() is not None

        return await self._writer.do(work)

    async def release(self, name: str, owner: str) -> None:
        gone = delete(leases).where(leases.c.name == name, leases.c.owner == owner)
        await self._writer.do(lambda connection: connection.execute(gone))

    async def identified(self, platform: str, new: bool = True) -> int:
        """How many sessions began on `platform` in the last 24 hours, with a `new` one, which is counted."""

        def work(connection: Connection) -> int:
            if new:
                connection.execute(self._insert(sessions).values(platform=platform, at=time.time()))
            connection.execute(delete(sessions).where(sessions.c.at < time.time() - DAY))
            query = select(func.count()).select_from(sessions).where(sessions.c.platform == platform)
            return connection.execute(query).scalar_one()

        return await self._writer.do(work)

    # -- operating -----------------------------------------------------------------------------------------------

    async def counts(self) -> dict[str, dict[str, int]]:
        """{"messages": {state: rows}, "replies": {state: rows}}."""
        counted = {}
        for table in (messages, replies):
            rows = await self._read(select(table.c.state, func.count().label("n")).group_by(table.c.state))
            counted[table.name] = {row.state: row.n for row in sorted(rows)}
        return counted

    async def export(self, channel: Channel) -> AsyncIterator[dict[str, object]]:
        """Every message of a channel and what became of it, oldest first; resets do not hide anything here."""
        last = 0
        while rows := await self._read(
            select(messages).where(_in(channel), messages.c.id > last).order_by(messages.c.id).limit(200)
        ):
            last = rows[-1].id
            answers: dict[int, list[Row[Any]]] = {}
            ids = [row.id for row in rows]
            for reply in await self._read(select(replies).where(replies.c.message.in_(ids)).order_by(replies.c.id)):
                answers.setdefault(reply.message, []).append(reply)
            for row in rows:
                yield _exported(row, answers.get(row.id, []))

    async def forget(self, platform: str, author: str) -> int:
        """Delete what a person said and the replies to it; how many messages that were."""
        gone = delete(messages).where(messages.c.platform == platform, messages.c.author == author)
        return await self._writer.do(lambda connection: connection.execute(gone).rowcount)

    async def ping(self) -> None:
        """Raises JournalBusy when a write would not work now."""
        mark = self._insert(leases).values(name="ping", owner="", until=time.time())
        mark = mark.on_conflict_do_update(index_elements=["name"], set_={"until": mark.excluded.until})
        await self._writer.do(lambda connection: connection.execute(mark))

    async def look(self) -> None:
        """Nothing is written, but a file that was deleted or replaced meanwhile is noticed, as each write does."""
        if self._file:
            await self._writer.do(lambda connection: None)

    async def check(self) -> list[str]:
        """Problems found in the file, [] when it is whole."""
        if self._file is None:
            await self.ping()
            return []
        return await storage.check(self._file)

    async def backup(self, path: Path | None = None) -> Path:
        """A checked copy, made while everything runs; the newest few are kept. Raises JournalError."""
        if self._file is None:
            raise JournalError("PostgreSQL is backed up with its own tools: pg_dump")
        return await storage.backup(self._file, path)


_KEY = (messages.c.platform, messages.c.account, messages.c.channel, messages.c.platform_id)


def _key(message: Message) -> tuple[str, str, str, str]:
    return message.channel.platform, message.account, message.channel.id, message.id


def _is(message: Message) -> Any:
    return and_(*(column == value for column, value in zip(_KEY, _key(message), strict=True)))


def _in(channel: Channel) -> Any:
    return and_(messages.c.platform == channel.platform, messages.c.channel == channel.id)


def _channel(channel: Channel) -> Any:
    return and_(channels.c.platform == channel.platform, channels.c.channel == channel.id)


def _waits(request: Request) -> Any:
    return and_(messages.c.id == request.row, messages.c.state == "waiting")


def _text(text: str) -> str:
    """What both databases can hold: no lone surrogate, no NUL (illegal in PostgreSQL)."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "")


def _storable(message: Message) -> Message:
    """As both databases hold it; of ids, too, since an event nobody can read may have anything for one."""
    channel, author = message.channel, message.author
    return replace(
        message,
        channel=Channel(channel.platform, _text(channel.id)[:128]),
        id=_text(message.id)[:128],
        author=replace(author, id=_text(author.id)[:64], name=_text(author.name)[:200]),
        text=_text(message.text),
        server=_text(message.server)[:64],
        account=_text(message.account)[:64],
    )


def _row(message: Message, received_at: float, deadline: float) -> dict[str, Any]:
    platform, account, channel, id = _key(message)
    return {
        "platform": platform,
        "account": account,
        "channel": channel,
        "platform_id": id,
        "server": message.server,
        "author": message.author.id,
        "author_name": message.author.name,
        "author_is_bot": message.author.is_bot,
        "text": message.text,
        "sent_at": message.sent_at.timestamp(),
        "received_at": received_at,
        "deadline": deadline,
        "state": "waiting" if message.kind == "ask" else "heard",
        "attempts": 0,
        "deleted": False,
        "note": "",
    }


def _request(row: Row[Any]) -> Request:
    message = Message(
        Channel(row.platform, row.channel),
        row.platform_id,
        Author(row.author, row.author_name, row.author_is_bot),
        row.text,
        datetime.fromtimestamp(row.sent_at, UTC),
        server=row.server,
        account=row.account,
    )
    return Request(row.id, message, datetime.fromtimestamp(row.deadline, UTC), row.attempts)


def _exported(row: Row[Any], answers: list[Row[Any]]) -> dict[str, object]:
    return {
        "id": row.platform_id,
        "at": datetime.fromtimestamp(row.sent_at, UTC).isoformat(),
        "author": row.author_name,
        "text": row.text,
        "state": row.state,
        "replies": [
            {"text": reply.text, "state": reply.state, "id": reply.platform_id, "seed": reply.seed} for reply in answers
        ],
    }
