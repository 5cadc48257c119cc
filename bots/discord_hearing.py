"""Discord's events in their order: the gateway's raw JSON, behind it what was missed, into chat in batches.

A channel's watermark moves in the commit that stores its messages. A new session replays nothing, so every channel we
know is behind until its history was read; what is said there meanwhile waits behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import discord
from discord.http import Route

from bots import discord_events as events
from bots.discord_api import Client, call
from core.backoff import backoff
from core.delivery import MaybeSent, NotAccepted, NotSent, Refused, RetryAfter
from core.messages import Channel, Message

if TYPE_CHECKING:
    from core.chat import Chat

log = logging.getLogger(__name__)

READERS = 8
"""Channels whose history is read at once; one that must wait lets others go first."""
AGAIN = 1.0
"""Seconds until a page of history that did not come is asked for again, then twice as long."""
CATCH_UP_MESSAGES = 2000
CATCH_UP_PAGES = 500
"""Of 100 messages each: what is behind them in a channel is never read."""
CATCH_UP_DIRECT = 100
CATCH_UP_HOURS = 24
"""What was said so long before the newest message of its channel expires; our own clock has no say."""
EDITED_SECONDS = 300.0
"""A message that an edit makes one to us is heard when it was no older than that."""
EDITED_NOW = 3600.0
"""And now, by our own clock, is no older than that."""
GUILDS_SECONDS = 10.0
LATER = 60.0
"""Seconds until a history out of reach is tried again, at most."""
MARK_EVERY = 5.0
SESSIONS_A_DAY = 950
"""Discord resets a token that identifies a thousand times a day: beyond this, starts are spread over the day."""


@dataclass(frozen=True, slots=True)
class Mark:
    """All before it in the inbox is stored: the channel's watermark may move here. With no id it is dropped."""

    channel: str
    id: str


@dataclass(frozen=True, slots=True)
class Reset:
    """The channel starts anew when all before it is stored, and nothing behind it."""

    channel: Channel
    done: asyncio.Future[None]


class Hearing:
    """One client's ears: gateway events in their order, behind them what was missed, into chat in batches."""

    def __init__(self, client: Client, chat: Chat) -> None:
        self._client, self._chat = client, chat
        self._inbox: asyncio.Queue[Message | Mark | Reset] = asyncio.Queue()
        self._marks: dict[str, str] = {}
        self._dirty: set[str] = set()
        self._last_seen: int | None = None  # the newest message of all channels, when the session began
        self._stored: set[str] = set()  # channels with a mark on disk
        self._first_mark = asyncio.Event()
        # Channels to be caught up, and what comes there meanwhile.
        self._behind: dict[str, list[Message | Reset]] = {}
        self._claimed: set[str] = set()  # those of them that came with their server
        self._roles: set[str] = set()  # ours alone, one in each server
        self._guilds: set[str] = set()
        self._guilds_came = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reading: set[asyncio.Task[Any]] = set()  # those of them that read what was missed
        self._turn = asyncio.Semaphore(READERS)
        client.on_session = self._count_session
        parsers = client._connection.parsers
        for name, parse in list(parsers.items()):
            parsers[name] = self._guarded(name, parse)

    async def open(self) -> None:
        """Read the watermarks; before the client connects, or a channel we know would look new."""
        await self._insist(self._load_marks)

    async def run(self) -> None:
        """Until cancelled."""
        writing = asyncio.create_task(self._write_marks())
        try:
            while True:
                batch = [await self._inbox.get()]
                while not (isinstance(batch[-1], Reset) or self._inbox.empty()) and len(batch) < 200:
                    batch.append(self._inbox.get_nowait())
                messages = [item for item in batch if isinstance(item, Message)]
                marks = {item.channel: item.id for item in batch if isinstance(item, Mark)}
                if messages:
                    await self._insist(self._store, messages, marks)
                for channel, id in marks.items():
                    self._mark(channel, id)
                if isinstance(batch[-1], Reset):
                    await self._start_anew(batch[-1])
        finally:
            writing.cancel()
            for task in self._tasks:
                task.cancel()

    async def reset(self, channel: Channel) -> None:
        """Start the channel's conversation anew, after what was said there until now. Raises NotAccepted."""
        reset = Reset(channel, asyncio.get_running_loop().create_future())
        self._take(reset)
        await reset.done

    async def _start_anew(self, reset: Reset) -> None:
        if reset.done.done():
            return  # nobody waits for it any more, and was told so
        try:
            await self._chat.reset(reset.channel)
        except NotAccepted as error:
            if not reset.done.done():
                reset.done.set_exception(error)
        else:
            if not reset.done.done():
                reset.done.set_result(None)

    async def _load_marks(self) -> None:
        self._marks = await self._chat.watermarks(events.PLATFORM)
        self._stored = set(self._marks)

    async def _store(self, messages: list[Message], marks: dict[str, str]) -> None:
        """Messages and how far their channels are read, in one commit."""
        read = {m.channel: marks[m.channel.id] for m in messages if marks.get(m.channel.id)}
        await self._chat.receive(*messages, marks=read)
        self._stored |= {channel.id for channel in read}

    async def _insist(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Nothing was stored: Discord does not send it again, so we keep it and come again."""
        wait = 0.2
        while True:
            try:
                await work(*arguments)
                return
            except NotAccepted as error:
                log.warning("the journal does not take Discord's events now: %s", error)
                await asyncio.sleep(wait)
                wait = min(5.0, 2 * wait)

    # -- gateway events, each within the turn of the event loop that read it --------------------------------------

    def _guarded(self, name: str, parse: Callable[[Any], None]) -> Callable[[Any], None]:
        """discord.py ends the client when an event cannot be parsed; ours is read first, and neither ends anything."""
        hear = {
            "READY": self._on_ready,
            "GUILD_CREATE": self._on_guild,
            "GUILD_DELETE": self._on_guild_gone,
            "CHANNEL_CREATE": self._first,
            "THREAD_CREATE": self._first,
            "THREAD_UPDATE": self._on_thread,
            "THREAD_DELETE": self._on_gone,
            "CHANNEL_DELETE": self._on_gone,
            "MESSAGE_CREATE": self._on_message,
            "MESSAGE_UPDATE": self._on_edit,
            "MESSAGE_DELETE": self._on_delete,
            "MESSAGE_DELETE_BULK": self._on_deletes,
        }.get(name)

        def guarded(event: Any) -> None:
            for read in (hear, parse):
                try:
                    if read is not None:
                        read(event)
                except Exception as error:
                    log.warning("an event %s of Discord's could not be read: %s", name, type(error).__name__)
                    if read is hear and name == "MESSAGE_CREATE":
                        self._spawn(self._insist(self._unread, event, type(error).__name__))

        return guarded

    async def _unread(self, event: Any, why: str) -> None:
        await self._chat.refail(events.unread(event, why), note=f"unreadable: {why}")

    def _on_ready(self, event: Mapping[str, Any]) -> None:
        """A new session: nothing is replayed, so every channel we know is behind until its history was read."""
        self._me = str(event["user"]["id"])
        self._guilds = {str(guild["id"]) for guild in event.get("guilds") or ()}
        self._last_seen = max(map(int, self._marks.values()), default=None)
        log.info("Discord: connected as %s, in %d servers", event["user"]["username"], len(self._guilds))
        self._guilds_came.clear()
        self._claimed.clear()
        for task in self._reading:  # it may have read a channel before the gap that this session begins with
            task.cancel()
        self._behind = {channel: [] for channel in self._marks} | self._behind
        self._read(self._catch_up_rest(set(self._behind)))

    def _on_guild(self, event: Mapping[str, Any]) -> None:
        """The newest message of each channel comes with its server: what is behind is read, what is new is marked."""
        behind, since, joined = dict[str, str](), self._last_seen, 0
        self._roles |= {str(role["id"]) for role in event.get("roles") or () if events.own_role(role, self._me)}
        if at := event.get("joined_at"):
            joined = discord.utils.time_snowflake(datetime.fromisoformat(at))
        if since is not None:
            since = max(since, joined)
        for channel in [*(event.get("channels") or ()), *(event.get("threads") or ())]:
            id, newest = str(channel["id"]), channel.get("last_message_id")
            if id in self._marks:
                self._mark(id, str(joined))  # later, if we were thrown out and invited again
            elif since is not None and max(int(id), int(newest or 0)) > since:
                self._mark(id, str(max(since, int(id) - 1)))  # new to us since; a thread may be as old as its post
            if id not in self._marks:
                self._first(channel)
            elif "last_message_id" not in channel or int(newest or 0) > int(self._marks[id]):
                behind[id] = str(newest or 0)
                self._behind[id] = [*self._behind.get(id, ())]  # a new gap, which who reads an older one does not close
            else:
                self._release(id)
        self._guilds.discard(str(event["id"]))
        if not self._guilds:
            self._guilds_came.set()
        self._claimed |= set(behind)
        self._read(self._catch_up(behind, str(event["id"])))

    def _first(self, channel: Mapping[str, Any]) -> None:
        """A channel new to us: what was said there before is not ours, what is said from now on is."""
        id = str(channel["id"])
        if id in self._marks or "last_message_id" not in channel:
            return
        newly = channel.get("newly_created")  # then it names the first post, which is yet to come
        self._mark(id, str(int(id) - 1 if newly else channel["last_message_id"] or 0))

    def _on_thread(self, event: Mapping[str, Any]) -> None:
        """Nothing is said in an archived thread; one that is opened again is new to us since."""
        if (event.get("thread_metadata") or {}).get("archived"):
            self._on_gone(event)

    def _on_gone(self, event: Mapping[str, Any]) -> None:
        """A thread, or a channel and the threads in it."""
        guild = self._client.get_guild(int(event.get("guild_id") or 0))
        inside = [thread for thread in guild.threads if thread.parent_id == int(event["id"])] if guild else []
        for id in (event["id"], *(thread.id for thread in inside)):
            self._inbox.put_nowait(Mark(str(id), ""))

    def _on_guild_gone(self, event: Mapping[str, Any]) -> None:
        """Thrown out, where it is no outage: its channels would be looked for at the next start, before people's."""
        guild = self._client.get_guild(int(event["id"]))
        if guild is None or event.get("unavailable"):
            return
        self._roles -= {str(role.id) for role in guild.roles}
        for place in (*guild.channels, *guild.threads):
            self._inbox.put_nowait(Mark(str(place.id), ""))

    def _on_message(self, event: Mapping[str, Any]) -> None:
        channel, id = str(int(event["channel_id"])), str(int(event["id"]))
        message = events.read(event, self._me, roles=self._roles)
        if channel not in self._marks and not event.get("guild_id") and self._last_seen is not None:
            self._mark(channel, str(self._last_seen))  # a stranger, who may have written while we were away
            self._behind[channel] = []
            self._read(self._catch_up({channel: ""}))
        if message is not None:
            self._take(message)
        if channel not in self._behind:
            self._inbox.put_nowait(Mark(channel, id))

    def _on_edit(self, event: Mapping[str, Any]) -> None:
        edited = event.get("edited_timestamp", "")
        if "content" in event and edited is not None:  # else its embeds changed
            message = events.read({"author": {"id": 0}, **event}, self._me, "edit", self._roles)
            if message is None:
                return
            soon = edited and (datetime.fromisoformat(edited) - message.sent_at).total_seconds() < EDITED_SECONDS
            soon = soon and (datetime.now(UTC) - message.sent_at).total_seconds() < EDITED_NOW  # a pin is told so, too
            if soon and "author" in event and (asked := events.read(event, self._me, roles=self._roles)):
                self._take(asked)  # it may name us only now; what is stored already is not stored again
            self._take(message)

    def _on_delete(self, event: Mapping[str, Any]) -> None:
        self._take(events.gone(event["channel_id"], event["id"]))

    def _on_deletes(self, event: Mapping[str, Any]) -> None:
        for id in event["ids"]:
            self._take(events.gone(event["channel_id"], id))

    def _take(self, item: Message | Reset) -> None:
        """Its place in line; in a channel that is behind, after what was missed."""
        held = self._behind.get(item.channel.id)
        if held is None:
            self._inbox.put_nowait(item)
        else:
            held.append(item)

    def _release(self, channel: str) -> None:
        for item in self._behind.pop(channel, ()):
            self._inbox.put_nowait(item)

    def _read(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._spawn(work)
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    # -- what was said while we were away --------------------------------------------------------------------------

    async def _catch_up_rest(self, channels: set[str]) -> None:
        """Channels that come with no server: direct messages, threads left, servers that are late."""
        if self._guilds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._guilds_came.wait(), GUILDS_SECONDS)
        rest = channels & set(self._behind) - self._claimed
        if len(rest) > CATCH_UP_DIRECT and self._guilds:
            late = await asyncio.gather(*map(self._comes_later, rest))
            later = {channel for channel, comes in zip(rest, late, strict=True) if comes}
            rest = channels & set(self._behind) - self._claimed - later  # some came meanwhile
        newest = sorted(rest, key=lambda id: int(self._marks[id]), reverse=True)
        if left := newest[CATCH_UP_DIRECT:]:
            log.warning("what was missed is not read in %d channels that were quiet longest", len(left))
        for channel in left:
            self._release(channel)
        await self._catch_up(dict.fromkeys(newest[:CATCH_UP_DIRECT], ""))

    async def _comes_later(self, channel: str) -> bool:
        """With a server that is still away: it is read then, and takes no place from people's."""
        async with self._turn:
            try:
                place = await self._fetch(channel) or {}
            except ConnectionError:
                return False
        return str(place.get("guild_id")) in self._guilds

    async def _catch_up(self, channels: Mapping[str, str], guild: str = "") -> None:
        """Channels, each with its newest message where that is known."""
        async with asyncio.TaskGroup() as group:
            for channel, newest in channels.items():
                group.create_task(self._catch_up_in(channel, guild, newest))

    async def _catch_up_in(self, channel: str, guild: str, newest: str) -> None:
        """A channel that cannot be read now is read later: its mark must not move past what was missed."""
        failures = 0
        async with self._turn:
            while True:
                held = self._behind.get(channel)
                try:
                    await self._read_missed(channel, guild, newest)
                    break
                except (ConnectionError, NotAccepted) as error:
                    if not failures:
                        log.warning("what was missed in channel %s is read later: %s", channel, error)
                    await self._wait(backoff(failures, LATER, first=1.0))
                    failures += 1
                except Exception as error:
                    log.warning("what was missed in channel %s could not be read: %s", channel, error)
                    break
        if self._behind.get(channel) is held:
            self._release(channel)

    async def _wait(self, seconds: float) -> None:
        """It is others' turn meanwhile."""
        self._turn.release()
        try:
            await asyncio.sleep(seconds)
        finally:
            await self._turn.acquire()

    async def _read_missed(self, channel: str, guild: str, newest_id: str) -> None:
        """Messages behind the watermark, oldest first; what already carries our reply is stored, not answered. Of very
        many, or when it is long ago, all but the newest expire."""
        mark, found, expired = self._marks[channel], dict[int, dict[str, Any]](), 0
        place = {} if guild else await self._fetch(channel) or {}  # no message says whether it was direct
        guild = guild or str(place.get("guild_id") or "")
        archived = (place.get("thread_metadata") or {}).get("archived")  # and no server tells of it any more
        for _ in range(CATCH_UP_PAGES):
            page = await self._fetch(channel, "/messages", {"after": mark, "limit": 100})
            if page is None:  # what was said there is not ours, and no start asks for it again
                self._inbox.put_nowait(Mark(channel, newest_id))
                return
            fresh = {int(event["id"]): event for event in page if int(event["id"]) > int(mark)}
            found |= dict(sorted(fresh.items()))
            expired += await self._expire([found.pop(id) for id in list(found)[:-CATCH_UP_MESSAGES]], guild)
            if len(page) < 100 or not fresh:
                break
            mark = str(max(fresh))
        else:
            log.warning("too much was missed in channel %s; the rest is not read", channel)
        if not found:
            if archived:
                self._inbox.put_nowait(Mark(channel, ""))
            return
        newest = events.sent_at(max(found))
        old = [id for id in found if (newest - events.sent_at(id)).total_seconds() > 3600 * CATCH_UP_HOURS]
        expired += await self._expire([found.pop(id) for id in old], guild)
        if expired:
            log.warning("missed in channel %s and too old to be answered now: %d messages to us", channel, expired)
        answered = {events.answers(event, self._me) for event in found.values()}
        for event in found.values():
            message = await self._missed(event, guild)
            if message and message.id in answered:
                message = replace(message, kind="heard")
            if message:
                self._inbox.put_nowait(message)
        self._inbox.put_nowait(Mark(channel, "" if archived else str(max(found))))

    async def _missed(self, event: dict[str, Any], guild: str) -> Message | None:
        """An event from the history, if it is said to us."""
        try:
            message = events.read({**event, **({"guild_id": guild} if guild else {})}, self._me, roles=self._roles)
            return replace(message, missed=True) if message else None
        except Exception as error:
            await self._insist(self._unread, event, type(error).__name__)
            return None

    async def _expire(self, missed: list[dict[str, Any]], guild: str) -> int:
        """How many of them were said to us."""
        late = [message for event in missed if (message := await self._missed(event, guild))]
        if late:
            await self._insist(self._store_expired, late)
        return len(late)

    async def _store_expired(self, late: list[Message]) -> None:
        await self._chat.refail(*late, note="missed, and too old by now", state="expired")

    async def _fetch(self, channel: str, path: str = "", params: dict[str, Any] | None = None) -> Any:
        """None where we may not read any more."""
        route = Route("GET", "/channels/{channel_id}" + path, channel_id=int(channel))
        tries = 0
        while tries < 5:
            await self._client.turn()
            try:
                return await call(self._client, route, params=params or {})
            except Refused:
                return None
            except RetryAfter as error:
                await self._wait(error.seconds)
            except (NotSent, MaybeSent):
                await self._wait(backoff(tries, LATER, first=AGAIN))
                tries += 1
        raise ConnectionError("the history is out of reach")

    # -- watermarks and sessions ------------------------------------------------------------------------------------

    def _mark(self, channel: str, id: str) -> None:
        if not id and channel not in self._behind:
            self._marks.pop(channel, None)
            self._stored.discard(channel)
            self._dirty.add(channel)
        elif id and int(id) > int(self._marks.get(channel, "-1")):
            self._marks[channel] = id
            self._dirty.add(channel)
            if channel not in self._stored:
                self._first_mark.set()

    async def _write_marks(self) -> None:
        """Now and then: a mark that is too old costs a look, never a message. A channel's first is written at once:
        without one, what is said while we are away is not looked for."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._first_mark.wait(), MARK_EVERY)
            self._first_mark.clear()
            dirty, self._dirty = self._dirty, set()
            if not dirty:
                continue
            try:
                marks = {Channel(events.PLATFORM, channel): self._marks.get(channel, "") for channel in dirty}
                await self._chat.receive(marks=marks)
                self._stored |= {channel.id for channel, id in marks.items() if id}
            except NotAccepted:
                self._dirty |= dirty
                await asyncio.sleep(MARK_EVERY)

    async def sessions(self, new: bool = False) -> int:
        """How many there were in 24 hours, with a `new` one."""
        try:
            count = await self._chat.identified(events.PLATFORM, new)
        except NotAccepted:
            return 0
        if count >= SESSIONS_A_DAY and not new:  # a new one beyond it ends in a start, which asks here
            log.error("%d sessions on Discord in 24 hours; at 1,000 the token is reset: look why", count)
        return count

    async def _count_session(self, first: bool) -> None:
        """A client's first session has waited already where there were too many."""
        if await self.sessions(new=True) > SESSIONS_A_DAY and not first:
            self._spawn(self._end())

    async def _end(self) -> None:
        """A start waits before it opens a session; the client's own next attempt would not."""
        await asyncio.sleep(1.0)  # until this one is open and can be closed
        await self._client.close()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
