"""Who owns which KV, in tokens and bytes. Pure Python: the tensors hang on the slots and are never looked at here.

A slot belongs to one running sequence, or is idle and kept for its session's next turn, or is gone. When room is
wanted, idle slots leave in order of their last use, those that are not their session's only one first. A slot is never
shared: a fork copies the prefix into a slot of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

ROUND = 128
"""Capacities are multiples of this, so that a channel's slot has to grow only every few turns."""
PageT = TypeVar("PageT")


class Pages(Generic[PageT]):
    """What a sequence's KV stands in, where that can grow in its place; given back when nobody holds this any more."""

    def __init__(self, free: list[PageT], another: Callable[[], PageT]) -> None:
        """They come from `free` and go back there; `another` makes one where there is none."""
        self.pages: list[PageT] = []
        self._free, self._another = free, another
        weakref.finalize(self, free.extend, self.pages)

    def grow(self, count: int) -> None:
        """To so many. Raises what `another` does."""
        if count > len(self.pages):
            while len(self.pages) < count:
                self.pages.append(self._free.pop() if self._free else self._another())
            self.grown()

    def grown(self) -> None:
        """There are more of them now."""


class Slot:
    """Room for `capacity` tokens' KV; `tokens` are those written. `kv` is the model's, made when first used."""

    __slots__ = ("capacity", "copy_from", "kv", "session", "tokens")

    def __init__(self, session: str, capacity: int) -> None:
        self.session = session
        self.capacity = capacity
        self.tokens: list[int] = []
        self.kv: Any = None
        self.copy_from: Slot | None = None
        """Where the first len(tokens) KV rows have to be copied from before the slot is used."""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids are the same."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


class KVCache:
    """At most `total` tokens in all slots together."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        """Tokens of room taken."""
        self.busy = 0
        """Of them by running ones."""
        self.running: set[Slot] = set()
        self.idle: dict[Slot, None] = {}
        """Least recently used first; a dict, so that one may leave from anywhere at no cost."""
        self.kept: dict[str, list[Slot]] = {}
        """The idle ones of each session that has any, in the same order."""

    def acquire(self, session: str, prompt: Sequence[int], need: int, sibling: Slot | None = None) -> Slot | None:
        """A slot for `need` tokens that holds the longest prefix of `prompt` at hand, never all of it.

        Looks at what the session left behind, of which nothing stays beside it, and at `sibling`, a running slot of the
        same request. None: no room now.
        """
        left = list(self.kept.get(session, []))
        best = max(left, key=lambda s: common_prefix(s.tokens, prompt), default=None)
        slot = best if best and not sibling else Slot(session, 0)
        capacity = max(slot.capacity, round_up(need, ROUND))
        if self.busy + capacity > self.total:
            return None
        for idle in left:
            self._drop(idle)
        slot.capacity = capacity
        while self.used + capacity > self.total:
            self._drop(self._victim())
        prefix = min(common_prefix((sibling or slot).tokens, prompt), len(prompt) - 1)
        slot.copy_from = sibling if prefix else None
        slot.tokens = list(prompt[:prefix])
        self._run(slot)
        return slot

    def prepare(self, session: str, ids: Sequence[int]) -> Slot | None:
        """A slot to write `ids` in ahead of their prompt: one of the session's that begins with them, or a new one.

        Takes nothing from anybody, the session's other slots stay. None: all of it is there, or there is no free room,
        or nothing is kept of the session, so that one that was forgotten stays forgotten.
        """
        kept = self.kept.get(session)
        if not kept or any(common_prefix(s.tokens, ids) == len(ids) for s in kept):
            return None
        slot = next((s for s in kept if len(ids) <= s.capacity and s.tokens == ids[: len(s.tokens)]), None)
        if slot:
            self._drop(slot)
        else:
            slot = Slot(session, round_up(len(ids), ROUND) + ROUND)  # with room for the turn to come and its reply
            if self.used + slot.capacity > self.total:
                return None
        self._run(slot)
        return slot

    def release(self, slot: Slot, *, keep: bool) -> None:
        """The sequence is done with it. Kept for the session's next turn, or gone."""
        self.running.remove(slot)
        self.used -= slot.capacity
        self.busy -= slot.capacity
        if keep and slot.session and slot.copy_from is None:
            self.idle[slot] = None
            self.kept.setdefault(slot.session, []).append(slot)
            self.used += slot.capacity

    def forget(self, session: str) -> None:
        """Nothing of the session stays: idle slots go now, running ones when they are released."""
        for slot in list(self.kept.get(session, [])):
            self._drop(slot)
        for slot in self.running:
            if slot.session == session:
                slot.session = ""

    def drop_idle(self) -> bool:
        """Was there any?"""
        idle = list(self.idle)
        for slot in idle:
            self._drop(slot)
        return bool(idle)

    def check_integrity(self) -> None:
        """Raises AssertionError when the books are wrong."""
        assert self.used == sum(s.capacity for s in (*self.running, *self.idle)), "room is miscounted"
        assert self.busy == sum(s.capacity for s in self.running), "running room is miscounted"
        assert self.used <= self.total, f"{self.used} tokens of room taken, {self.total} there"
        assert not self.running & self.idle.keys(), "a slot is idle and running"
        for slot in (*self.running, *self.idle):
            assert len(slot.tokens) <= slot.capacity, "more tokens than room"
            assert slot.capacity % ROUND == 0
        for slot in self.idle:
            assert slot.session and slot.copy_from is None, "an idle slot is nobody's or half made"
            assert slot in self.kept[slot.session], "an idle slot is not with its session"
        assert sum(map(len, self.kept.values())) == len(self.idle), "a slot is kept twice, or is not idle"
        assert all(self.kept.values()), "a session is kept that has no slot"

    def _run(self, slot: Slot) -> None:
        self.running.add(slot)
        self.used += slot.capacity
        self.busy += slot.capacity

    def _drop(self, slot: Slot) -> None:
        """It is no longer idle."""
        del self.idle[slot]
        self.kept[slot.session].remove(slot)
        if not self.kept[slot.session]:
            del self.kept[slot.session]
        self.used -= slot.capacity

    def _victim(self) -> Slot:
        """The oldest idle slot whose session has another (of n candidates one is said), else the oldest."""
        alone = len(self.idle) == len(self.kept)  # each of them
        return next(s for s in self.idle if alone or len(self.kept[s.session]) > 1)
