"""The model's own copy in int8 guesses for a model whose weights are two or four times as much to read.

It has no cache: it reads the keys and values that the model left and writes its own behind them, where the model writes
over them when it checks the guess. It draws with the same seed at the same positions, so where the two nearly agree it
nearly always draws the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence as Ids

from core.engine.guesses import Guesses
from core.engine.model import Batch, Model, Rows
from core.engine.sampler import Draw, draw
from core.engine.sequence import Sequence

log = logging.getLogger(__name__)


class Draft(Guesses):
    """Its model's `forward` takes the other's KV."""

    def __init__(self, model: Model, price: float) -> None:
        super().__init__(price)
        self.model = model

    def after(self, sequence: Sequence, most: int) -> list[int]:
        if not most or not self.pays():
            return []
        try:
            return self._guess(sequence, most)
        except Exception as error:  # a guess may be missed
            log.warning("guessing raised %r", error)
            self.right = 0.0
            return []

    def _guess(self, sequence: Sequence, most: int) -> list[int]:
        tokens, start, eos_id = list(sequence.tokens), len(sequence.tokens), self.model.config.eos_id
        assert sequence.slot
        while len(tokens) < start + most:
            rows = Rows(sequence.slot.kv, len(tokens) - 1, 1)
            logits, summary = self.model.forward(Batch(tokens[-1:], [rows], [0]))
            if math.isnan(summary.totals[0]):
                break
            params, is_first = sequence.request.params, len(tokens) == sequence.prompt_len
            [token] = draw(logits, [Draw(0, tokens, params, sequence.seed, is_first, summary.tops[0])], eos_id)
            if token == eos_id:
                break
            tokens.append(token)
        return tokens[start:]

    def learn(self, ids: Ids[int]) -> None: ...

    def clear(self) -> None: ...
