"""Turns to prompt ids: whole turns inside a token budget, with a start that stays put while the cache is good.

A prompt is `turn eos turn eos … turn eos` (DialoGPT, arXiv 1911.00536, section 2). GPT-2's positions are absolute, so a
start that moves voids everything cached: it only ever stands at turn indices divisible by `stride`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

from core.messages import Turn


class Window:
    def __init__(
        self,
        encode: Callable[[str], list[int]],
        eos_id: int,
        budget: int,
        stride: int = 4,
        spelled: Callable[[Turn], str] = attrgetter("text"),
    ) -> None:
        """`encode` turns one turn's text, as `spelled`, into ids without eos; `budget` ids (at least 2) per prompt."""
        self._encode = encode
        self._eos_id = eos_id
        self.budget = budget
        self.stride = stride
        self._spelled = spelled

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """1 to `budget` ids, oldest turn first; `turns` ends with the one to be answered.

        Turns without a token are left out. A last turn longer than the budget loses its left.
        Empty when the last turn has no token: there is nothing to answer.
        """
        asked = self._span(turns[-1]) if turns else []
        if not asked:
            return []
        before = self._fitting(turns[:-1], self.budget - len(asked))
        return [*self._from_mark(before, turns[-1].index), *asked][-self.budget :]

    def ahead(self, turns: Sequence[Turn]) -> list[int]:
        """What the next prompt will begin with if the question to come is as long as those before were on average.

        `turns` ends with an answer. Empty when nothing of them will be left.
        """
        recent = self._fitting(turns, self.budget)
        asked = [len(span) for turn, span in recent if turn.role == "user"]
        if not asked:
            return []
        while sum(len(span) for _, span in recent) > self.budget - sum(asked) // len(asked):
            recent.pop(0)
        return self._from_mark(recent, turns[-1].index + 1)

    def _span(self, turn: Turn) -> list[int]:
        ids = self._encode(self._spelled(turn))
        return [*ids, self._eos_id] if ids else []

    def _fitting(self, turns: Sequence[Turn], room: int) -> list[tuple[Turn, list[int]]]:
        """The last turns that fit in `room` together, oldest first; older ones are not looked at."""
        found: list[tuple[Turn, list[int]]] = []
        for turn in reversed(turns):
            span = self._span(turn)
            room -= len(span)
            if room < 0:
                break
            found.append((turn, span))
        return found[::-1]

    def _from_mark(self, fitting: Sequence[tuple[Turn, list[int]]], index: int) -> list[int]:
        """Their ids from the first stride mark on; all when neither they nor the turn at `index` after them is one."""
        marks = (i for i, (turn, _) in enumerate(fitting) if turn.index % self.stride == 0)
        start = next(marks, len(fitting) if index % self.stride == 0 else 0)
        return [id for _, span in fitting[start:] for id in span]
