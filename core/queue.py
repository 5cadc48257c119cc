"""Who is answered next: first come first served in a channel, round-robin between channels, everything bounded.

A channel has at most one answer under way. It stands in `_turns` exactly while it has requests waiting and none under
way, so `take` is one pop from the left. Nothing here awaits between taking a request and giving it its place.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

from core.messages import Channel, Request
from core.settings import QueueLimits


class RequestQueue:
    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._lines: dict[Channel, list[Request]] = {}  # by row: the order of the journal
        self._under_way: dict[int, Channel] = {}  # by row: its channel may move meanwhile
        self._turns: deque[Channel] = deque()
        self._users: Counter[tuple[str, str]] = Counter()
        self._servers: Counter[tuple[str, str]] = Counter()
        self._waiting = 0
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        """Requests waiting, those under way not counted."""
        return self._waiting

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    def fullness(self) -> float:
        """0 to 1: how much of `total` waits."""
        return self._waiting / self._limits.total

    def full(self, request: Request, unsent: int = 0) -> str:
        """Why there is no room for `request`, or "": a bound's name. `unsent`: replies that wait in its chat."""
        message, limits = request.message, self._limits
        for name, count, bound in (
            ("total", self._waiting, limits.total),
            ("per_channel", len(self._lines.get(message.channel, ())) + unsent, limits.per_channel),
            ("per_user", self._users[_user(request)], limits.per_user),
            ("per_server", self._servers[_server(request)] if message.server else 0, limits.per_server),
        ):
            if count >= bound:
                return name
        return ""

    def put(self, request: Request) -> None:
        """Take a place in line. Whether there is room is the caller's question (`full`): what is owed from before a
        restart goes in whatever the bounds say."""
        channel = request.message.channel
        line = self._lines.setdefault(channel, [])
        insort(line, request, key=lambda waiting: waiting.row)
        self._count(request, +1)
        if len(line) == 1 and not self._rests(channel):
            self._turns.append(channel)
        self._arrived.set()

    async def take(self) -> Request:
        """The next request; its channel rests until `done`."""
        while not self._turns:
            self._arrived.clear()
            await self._arrived.wait()
        channel = self._turns.popleft()
        request = self._lines[channel].pop(0)
        self._under_way[request.row] = channel
        self._left(request)
        return request

    def done(self, request: Request) -> None:
        """The answer is given or given up: the channel goes to the end of the round."""
        channel = self._under_way.pop(request.row)
        if channel in self._lines and not self._rests(channel):
            self._turns.append(channel)
            self._arrived.set()

    def move(self, old: Channel, new: Channel) -> None:
        """What waits in `old` waits in `new`, behind the answer that is under way in `old`."""
        waiting = self.take_out(lambda request: request.message.channel == old)
        for row, channel in self._under_way.items():
            if channel == old:
                self._under_way[row] = new
                if new in self._turns:
                    self._turns.remove(new)
        for request in waiting:
            self.put(replace(request, message=replace(request.message, channel=new)))

    def replace(self, request: Request) -> bool:
        """An edit changed the question. False when it no longer waits here."""
        line = self._lines.get(request.message.channel, [])
        for place, waiting in enumerate(line):
            if waiting.row == request.row:
                line[place] = request
                return True
        return False

    def remove(self, row: int) -> bool:
        """A delete took the question back. False when it no longer waits here."""
        return bool(self.take_out(lambda request: request.row == row))

    def give_way(self, channel: Channel) -> Request | None:
        """Remove and return the oldest here that was missed while we were away: what is newer counts for more."""
        missed = (request for request in self._lines.get(channel, ()) if request.message.missed)
        if request := next(missed, None):
            self._drop(request)
        return request

    def next(self, most: int) -> list[Request]:
        """Who is taken next, in order, one of each channel that waits for its turn."""
        return [self._lines[channel][0] for channel in islice(self._turns, most)]

    def take_out(self, which: Callable[[Request], bool]) -> list[Request]:
        """Remove and return those that `which` is true of."""
        out = [request for request in self if which(request)]
        for request in out:
            self._drop(request)
        return out

    def clear(self) -> None:
        """Forget all that waits: it stands in the journal."""
        self.take_out(lambda _: True)

    def __iter__(self) -> Iterator[Request]:
        return (request for line in self._lines.values() for request in line)

    def check_integrity(self) -> None:
        """AssertionError when the books do not agree with each other."""
        ready = {channel for channel in self._lines if not self._rests(channel)}
        assert len(self._turns) == len(set(self._turns)) and set(self._turns) == ready
        assert all(line and line == sorted(line, key=lambda r: r.row) for line in self._lines.values())
        assert self._waiting == sum(map(len, self._lines.values())) == sum(self._users.values())

    def _drop(self, request: Request) -> None:
        channel = request.message.channel
        self._lines[channel].remove(request)
        self._left(request)
        if channel not in self._lines and not self._rests(channel):
            self._turns.remove(channel)

    def _rests(self, channel: Channel) -> bool:
        """An answer is under way there."""
        return channel in self._under_way.values()

    def _left(self, request: Request) -> None:
        self._count(request, -1)
        if not self._lines[request.message.channel]:
            del self._lines[request.message.channel]

    def _count(self, request: Request, by: int) -> None:
        self._waiting += by
        for counter, key in ((self._users, _user(request)), (self._servers, _server(request))):
            counter[key] += by
            if not counter[key]:
                del counter[key]


def _user(request: Request) -> tuple[str, str]:
    return request.message.channel.platform, request.message.author.id


def _server(request: Request) -> tuple[str, str]:
    return request.message.channel.platform, request.message.server
