"""What the journal does beside a message's path: it keeps marks, leases and sessions for platforms, and it counts,
exports, forgets, checks and copies for people."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from sqlalchemy import Connection, Row, and_, delete, exists, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL

from core.journal import storage
from core.journal.database import Database, JournalError, Writer, busy, file_of
from core.journal.rows import exported, inside, kept_for, plain
from core.journal.schema import channels, leases, messages, replies, sessions, watermarks
from core.messages import Channel, MessageState, ReplyState
from core.owner import dead

DAY = 86_400.0
AT_ONCE = 500
"""So many messages are forgotten in one commit, or moved in one statement."""


class Upkeep:
    """The half of Journal that no message passes through, and its connections."""

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

    # -- what platforms need kept --------------------------------------------------------------------------------

    async def watermarks(self, platform: str) -> dict[str, str]:
        """Channel id -> the last message id received there."""
        query = select(watermarks.c.channel, watermarks.c.last_id).where(watermarks.c.platform == platform)
        return {row.channel: row.last_id for row in await self._read(query)}

    def _move_marks(self, connection: Connection, marks: Mapping[Channel, str]) -> None:
        """A mark of "" drops the channel's."""
        for channel in (channel for channel, id in marks.items() if not id):
            its = and_(watermarks.c.platform == channel.platform, watermarks.c.channel == channel.id)
            connection.execute(delete(watermarks).where(its))
        rows = [
            {"platform": c.platform, "channel": plain(c.id)[:128], "last_id": plain(id)[:128]}
            for c, id in marks.items()
            if id
        ]
        if not rows:
            return
        insert = self._insert(watermarks)
        moved = insert.on_conflict_do_update(
            index_elements=["platform", "channel"], set_={"last_id": insert.excluded.last_id}
        )
        connection.execute(moved, rows)

    async def adopt(self, platform: str, account: str) -> None:
        """Messages of `platform` that name no account, as in journals of old, are that one's from now on."""
        twin = messages.alias()
        same = and_(*(twin.c[name] == messages.c[name] for name in ("platform", "channel", "platform_id")))
        known = exists().where(same, twin.c.account == account)
        nameless = update(messages).where(messages.c.platform == platform, messages.c.account == "", ~known)
        await self._writer.do(lambda connection: connection.execute(nameless.values(account=account)))

    async def rekey(self, old: Channel, new: Channel) -> None:
        """The platform gave `old` another id: history, waiting questions and replies go with it."""

        def work(connection: Connection) -> None:
            known = select(messages.c.platform_id).where(inside(new))
            rows = connection.execute(select(channels).where(or_(kept_for(old), kept_for(new)))).all()
            before = max((row.next_turn for row in rows if row.channel == old.id), default=0)
            if before:  # what `new` said already comes after all that `old` said
                connection.execute(update(messages).where(inside(new)).values(turn=messages.c.turn + before))
            moving = select(messages.c.id).where(inside(old), messages.c.platform_id.not_in(known))
            ids = connection.execute(moving).scalars().all()
            for page in range(0, len(ids), AT_ONCE):  # in one statement PostgreSQL's time for one might not do
                some = messages.c.id.in_(ids[page : page + AT_ONCE])
                connection.execute(update(messages).where(some).values(channel=new.id))
            connection.execute(delete(channels).where(or_(kept_for(old), kept_for(new))))
            if rows:
                turns, hidden = sum(row.next_turn for row in rows), max(row.history_after for row in rows)
                merged = {"platform": new.platform, "channel": new.id, "next_turn": turns, "history_after": hidden}
                connection.execute(self._insert(channels).values(**merged))

        await self._writer.do(work)

    async def lease(self, name: str, owner: str, seconds: float) -> bool:
        """Take or renew `name` for so long; False while another owner holds it. The lease of an owner that is dead is
        void, and so is one that ends later than anyone could have asked for: its clock began anew since, or jumped."""

        def work(connection: Connection) -> bool:
            now = self._now(connection)
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

    def _now(self, connection: Connection) -> float:
        """By a clock that all processes on the journal share: this machine's since it started, which nobody sets, or
        the server's."""
        if self._file:
            return time.monotonic()
        return float(connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())

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
        for table, states in ((messages, get_args(MessageState)), (replies, get_args(ReplyState))):
            each = (func.count().filter(table.c.state == state).label(state) for state in sorted(states))
            (row,) = await self._read(select(*each))  # grouped, SQLite would sort all of them in memory
            counted[table.name] = {state: count for state, count in row._mapping.items() if count}
        return counted

    async def export(self, channel: Channel) -> AsyncIterator[dict[str, object]]:
        """Every message of a channel and what became of it, oldest first; resets do not hide anything here."""
        found = await self._read(select(messages.c.id).where(inside(channel)).order_by(messages.c.id))
        for page in range(0, len(found), 200):  # by id: to find the next page again would cost the whole channel
            ids = [row.id for row in found[page : page + 200]]
            rows = await self._read(select(messages).where(messages.c.id.in_(ids)).order_by(messages.c.id))
            answers: dict[int, list[Row[Any]]] = {}
            for reply in await self._read(select(replies).where(replies.c.message.in_(ids)).order_by(replies.c.id)):
                answers.setdefault(reply.message, []).append(reply)
            for row in rows:
                yield exported(row, answers.get(row.id, []))

    async def forget(self, platform: str, author: str) -> int:
        """Delete what a person said and the replies to it; how many messages that were. In many commits: whoever else
        writes comes in between, and the next call goes on with what one that was stopped has left."""
        theirs = and_(messages.c.platform == plain(platform), messages.c.author == plain(author))
        some = select(messages.c.id).where(theirs).limit(AT_ONCE)
        gone, count = delete(messages).where(messages.c.id.in_(some)), 0
        while deleted := await self._writer.do(lambda connection: connection.execute(gone).rowcount):
            count += deleted
        if self._file:
            await asyncio.to_thread(storage.empty_log, self._file)
        return count

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

    def holds(self, path: Path) -> bool:
        """Is it the journal's file, or one that SQLite has beside it?"""
        return self._file is not None and path.resolve() in storage.parts(self._file)

    @property
    def is_file(self) -> bool:
        """PostgreSQL has tools of its own for what we do to a file."""
        return self._file is not None

    async def backup(self, path: Path | None = None) -> Path:
        """A checked copy, made while everything runs; the newest few are kept. Raises JournalError."""
        if self._file is None:
            raise JournalError("PostgreSQL is backed up with its own tools: pg_dump")
        return await storage.backup(self._file, path)
