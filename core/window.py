"""Turns to prompt ids: whole turns inside a token budget, with a start that stays put while the cache is good.

A prompt is `turn eos turn eos … turn eos` (DialoGPT, arXiv 1911.00536, section 2). GPT-2's positions are absolute, so a
start that moves voids everything cached: it only ever stands at turn indices divisible by `stride`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.messages import Turn


class Window:
    def __init__(self, encode: Callable[[str], list[int]], eos_id: int, budget: int, stride: int = 4) -> None:
        """`encode` turns one turn's text into ids without eos; `budget` ids (at least 2) per prompt."""
        self._encode = encode
        self._eos_id = eos_id
        self.budget = budget
        self.stride = stride

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """1 to `budget` ids, oldest turn first; `turns` ends with the one to be answered.

        Turns without a token are left out. A last turn longer than the budget loses its left.
        Empty when the last turn has no token: there is nothing to answer.
        """
        spans = [[*ids, self._eos_id] if (ids := self._encode(turn.text)) else [] for turn in turns]
        if not spans or not spans[-1]:
            return []
        start = self._start([turn.index for turn in turns], [len(span) for span in spans])
        return [id for span in spans[start:] for id in span][-self.budget :]

    def _start(self, indices: Sequence[int], lengths: Sequence[int]) -> int:
        """Where it begins: the earliest stride mark from which all fits, else the earliest turn, else the last."""
        room, first = self.budget, len(lengths)
        while first > 0 and lengths[first - 1] <= room:
            first -= 1
            room -= lengths[first]
        marks = (i for i in range(first, len(lengths)) if indices[i] % self.stride == 0)
        return min(next(marks, first), len(lengths) - 1)
