"""Does the model remember? A name or a like is told, 0 to 3 other exchanges pass, then it is asked for."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from functools import cache

from core.evaluation.selfchat import Talker
from core.text import normalise, restore
from core.training.corpus import read_corpus
from core.training.expand import Expander, Kind


@dataclass(frozen=True, slots=True)
class Recall:
    asked: int
    right: int
    wrong: tuple[tuple[str, str], ...]
    """(what was to be recalled, what was said)"""

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else 0.0


async def recall(talker: Talker, kind: Kind, distance: int, count: int, *, held_out: bool, seed: int = 1) -> Recall:
    """`distance` 1 asks right after the bot took note. `held_out`: values and wordings that Palaver's
    corpus never trains."""
    expander, gate = _expander(held_out), asyncio.Semaphore(16)
    cases = [expander.recall(random.Random(f"recall-{seed}-{distance}-{i}"), kind, distance) for i in range(count)]

    async def one(number: int) -> str:
        async with gate:
            texts = cases[number][0]
            return await talker.reply(texts if talker.voice.spaced else [*map(restore, texts)], seed + number)

    replies = await asyncio.gather(*(one(number) for number in range(count)))
    wrong = tuple(
        (value, reply)
        for (_, value), reply in zip(cases, replies, strict=True)
        if f" {value.lower()} " not in f" {normalise(reply).lower()} "
    )
    return Recall(count, count - len(wrong), wrong)


@cache
def _expander(held_out: bool) -> Expander:
    """Made once: a model is asked about 24 times, and the corpus takes a fifth of a second to read."""
    return Expander(read_corpus(), held_out=held_out)
