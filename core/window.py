"""Turns to prompt ids: whole turns inside a token budget, with a start that stays put while the cache is good.

A prompt is `turn eos turn eos … turn eos` (DialoGPT, arXiv 1911.00536, section 2). GPT-2's positions are absolute, so a
start that moves voids everything cached: it stands at the first turn of all as long as everything fits. Then it moves
rarely, to a turn whose index is divisible by a power of two (or the next, where that one is missing): the largest of
which there always is one among the turns behind which the share `keep` of the budget is left. That depends on nothing
but the turns.

A turn stands in a prompt again and again, and to spell and encode it costs more than all the rest here: its ids are
remembered.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from operator import attrgetter

from core.messages import Turn

REMEMBERED = 16_384
"""Turns whose ids are kept, the last used: the windows of some 800 channels. 4 MB; at most 12 MB at a budget of 128."""


class Window:
    def __init__(
        self,
        encode: Callable[[str], list[int]],
        eos_id: int,
        budget: int,
        keep: float = 0.5,
        spelled: Callable[[Turn], str] = attrgetter("text"),
    ) -> None:
        """`encode` turns one turn's text, as `spelled`, into ids without eos; `budget` ids (at least 2) per prompt, of
        which the share `keep` (0 to 1) stays where the start moves on: with 1, it moves whenever a turn comes.

        `spelled` looks at a turn's role and text alone.
        """
        self._encode = encode
        self._eos_id = eos_id
        self.budget = budget
        self.reach = budget // 2 + 2
        """So many turns never fit, none having fewer than two tokens: of a longer talk the last of them are enough."""
        self.keep = keep
        self._spelled = spelled
        self._ids: OrderedDict[bytes, array[int]] = OrderedDict()
        """Last used last. By a digest: texts may be long."""

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """1 to `budget` ids, oldest turn first; `turns` ends with the one to be answered.

        Turns without a token are left out. A last turn longer than the budget loses its left.
        Empty when the last turn has no token: there is nothing to answer.
        """
        if not turns or not (asked := self.ids(turns[-1])):
            return []
        before = self._fitting(turns[:-1], self.budget - len(asked))
        whole = len(before) == len(turns) - 1
        return [*self._begin(before, whole, len(asked)), *asked][-self.budget :]

    def ahead(self, turns: Sequence[Turn]) -> list[int]:
        """What the next prompt will begin with if the question to come is as long as those before were on average.

        `turns` ends with an answer. Empty when nothing of them will be left.
        """
        recent = self._fitting(turns, self.budget)
        asked = [len(span) for turn, span in recent if turn.role == "user"]
        if not asked:
            return []
        next_asked = sum(asked) // len(asked)
        while sum(len(span) for _, span in recent) > self.budget - next_asked:
            recent.pop(0)
        return self._begin(recent, len(recent) == len(turns), next_asked)

    def ids(self, turn: Turn) -> Sequence[int]:
        """The turn's ids and eos, of one longer than the budget the last budget + 1; none when it has no token."""
        key = blake2b(f"{turn.role} {turn.text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in self._ids:
            self._ids.move_to_end(key)
        else:
            ids = self._encode(self._spelled(turn))
            self._ids[key] = array("i", [*ids, self._eos_id][-self.budget - 1 :] if ids else [])
            if len(self._ids) > REMEMBERED:
                self._ids.popitem(last=False)
        return self._ids[key]

    def forget(self) -> None:
        """Nothing of what was said stays. (Whose it was, nobody knows.)"""
        self._ids.clear()

    def _fitting(self, turns: Sequence[Turn], room: int) -> list[tuple[Turn, Sequence[int]]]:
        """The last turns that fit in `room` together, oldest first; older ones are not looked at."""
        found: list[tuple[Turn, Sequence[int]]] = []
        for turn in reversed(turns):
            span = self.ids(turn)
            room -= len(span)
            if room < 0:
                break
            found.append((turn, span))
        return found[::-1]

    def _begin(self, fitting: Sequence[tuple[Turn, Sequence[int]]], whole: bool, asked: int) -> list[int]:
        """The ids of those that fit before a question of `asked`, from the start on; of the `whole` talk, all."""
        starts, left = list[int](), asked + sum(len(span) for _, span in fitting)
        for i, (_, span) in enumerate(fitting):
            if left < self.keep * self.budget:
                break
            starts.append(i)
            left -= len(span)
        stride = 1 << max(0, len(starts).bit_length() - 1)
        places = [turn.index // stride for turn, _ in fitting]  # an exchange may be missing: what follows stands for it
        marks = (i for i in starts if (places[i] > places[i - 1] if i else fitting[0][0].index % stride == 0))
        start = 0 if whole else next(marks, 0)
        return [id for _, span in fitting[start:] for id in span]
