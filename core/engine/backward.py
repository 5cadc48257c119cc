"""Does a reply answer what was said? A second model that was trained with the turns in reverse (`palaver finetune
--reverse`) says how likely the message is after it: maximum mutual information, DialoGPT's paper (arXiv 1911.00536,
section 3.2), after Li et al. 2016 (arXiv 1510.03055). What could be said to anything makes no message likely.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from core.engine.base import Completion
from core.engine.graphs import lost
from core.engine.kv_cache import ROUND, round_up
from core.engine.model import Batch, Model, Rows

log = logging.getLogger(__name__)

ROWS = 256
"""Of a step: other requests wait for each."""


class Backward:
    """A reverse model. It keeps nothing between requests."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def judge(self, message: Sequence[int], completions: list[Completion]) -> list[Completion]:
        """With `backward` in each, or as they are where the model has no number for one of them."""
        try:
            scores = self.scores(message, [completion.token_ids for completion in completions])
        except Exception as error:  # they can do without
            if lost(error):
                raise
            log.warning("the reverse model raised %r", error)
            return completions
        if not all(map(math.isfinite, scores)):
            return completions
        return [replace(c, backward=score) for c, score in zip(completions, scores, strict=True)]

    def scores(self, message: Sequence[int], replies: Sequence[Sequence[int]]) -> list[float]:
        """For each reply the mean log-probability, in nats, of the message's ids after it and its end, alike beside any
        others; of a long message the end counts for which the model's positions leave room."""
        room = max(0, self.model.config.n_positions - 1 - max(map(len, replies)))
        message = message[len(message) - min(room, len(message)) :]
        if not message:
            return [math.nan] * len(replies)
        eos = self.model.config.eos_id
        return [score for some in self._steps([[*reply, eos] for reply in replies], message) for score in some]

    def _steps(self, starts: list[list[int]], message: Sequence[int]) -> Iterator[list[float]]:
        """As many at a time as are in a step, and in the room for one window, which every model has."""
        while starts:
            rows = room = count = 0
            for start in starts:
                length = len(start) + len(message)
                rows, room = rows + length, room + round_up(length, ROUND)
                if count and (rows > ROWS or room > self.model.config.n_positions):
                    break
                count += 1
            yield self._step(starts[:count], message)
            starts = starts[count:]

    def _step(self, starts: list[list[int]], message: Sequence[int]) -> list[float]:
        ids, rows, wanted = list[int](), list[Rows](), list[int]()
        for start in starts:
            whole = [*start, *message[:-1]]  # nobody asks what follows
            rows.append(Rows(self.model.new_kv(len(whole)), 0, len(whole)))
            ids += whole
            wanted += range(len(ids) - len(message), len(ids))
        logits, summary = self.model.forward(Batch(ids, rows, wanted))
        expected = [*message] * len(starts)
        known = [
            float(logits[i, id]) - total for i, (id, total) in enumerate(zip(expected, summary.totals, strict=True))
        ]
        return [math.fsum(known[i : i + len(message)]) / len(message) for i in range(0, len(known), len(message))]
