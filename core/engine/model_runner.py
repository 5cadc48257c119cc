"""Runs one step: spans of sequences in, drawn tokens out. All tensors of a step live and die here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from core.engine.graphs import MOST_ROWS, shapes
from core.engine.kv_cache import Slot
from core.engine.model import Batch, Model, Rows
from core.engine.sampler import Draw, Summary, draw
from core.engine.sequence import Span

DEAR = 0.7
"""A price of a guess that pays only if so large a share of them is right."""


class ModelRunner:
    """A model and how to feed it. Not for two threads: one thread makes it and runs it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.draft: Model | None = None
        """The same in int8, where that pays (core.engine.draft)."""

    def run(self, spans: Sequence[Span]) -> list[list[tuple[int, float]] | None]:
        """For each span that is_last its next (token, log-probability), more than one where its guess was right; None
        where the model's numbers are not finite.

        Changes nothing but KV rows that count as unwritten until the scheduler books them: it may be run again.
        """
        for span in spans:
            self._furnish(span.sequence.slot)
        return self._draw([span for span in spans if span.is_last], *self.model.forward(self._batch(spans)))

    def _draw(self, spans: Sequence[Span], logits: Tensor, summary: Summary) -> list[list[tuple[int, float]] | None]:
        """One token from each row, up to the first that was not guessed: as if each had been a step of its own."""
        rows, totals, draws = logits.numpy(), summary.totals, list[Draw]()
        for span in spans:
            s = span.sequence
            for i in range(1 + len(span.guess)):
                tokens = [*s.tokens, *span.guess[:i]] if i else s.tokens
                is_first, row = len(tokens) == s.prompt_len, len(draws)
                draws.append(Draw(row, tokens, s.request.params, s.seed, is_first, summary.tops[row]))
        good = [d for d in draws if not math.isnan(totals[d.row])]
        drawn = dict(zip((d.row for d in good), draw(logits, good, self.model.config.eos_id), strict=True))
        results, row = list[list[tuple[int, float]] | None](), 0
        for span in spans:
            result = list[tuple[int, float]]()
            for i, guessed in enumerate((*span.guess, None), row):
                if i not in drawn:
                    break
                result.append((drawn[i], float(rows[i, drawn[i]]) - totals[i]))
                if drawn[i] != guessed:
                    break
            results.append(result or None)
            row += 1 + len(span.guess)
        return results

    def warm_up(self) -> None:
        """Run the shapes that come in life, so that nobody waits for them: on a GPU every one, on a CPU a single row
        and a few. (There long prompts gain nothing by it.)"""
        on_gpu = self.model.device.type == "cuda"
        some = min(self.model.config.n_positions, MOST_ROWS if on_gpu else 8)
        kv = self.model.new_kv(some)
        for count, wanted in shapes(some) if on_gpu else [(1, 1), (some, 1)]:
            count = min(count, some)
            self.model.forward(Batch([0] * count, [Rows(kv, 0, count)], list(range(count - min(wanted, count), count))))

    @torch.inference_mode()
    def price(self, guess: int) -> float:
        """How much longer each of `guess` guessed tokens makes a step of one, as a share of that one."""
        rows = min(1 + guess, self.model.config.n_positions)
        kv = self.model.new_kv(rows)

        def seconds(model: Model, count: int) -> float:
            begin = perf_counter()
            model.forward(Batch([0] * count, [Rows(kv, 0, count)], list(range(count))))
            return perf_counter() - begin  # the logits are there; work of torch on them would leave its threads awake

        draft = [(self.draft, 1)] if self.draft else []
        least = 0.15 if draft else 0.02  # seconds; what the machine does besides meets all alike, in turns

        def look() -> float:
            times = list[list[float]]()
            while len(times) < 3 or sum(map(sum, times)) < least:
                times.append([seconds(*way) for way in ((self.model, 1), (self.model, rows), *draft)])
            alone, together, *guessed = [float(min(of_way)) for of_way in zip(*times, strict=True)]
            return max(0.0, ((together - alone) / guess + sum(guessed)) / alone)

        found, looks = look(), 1
        while found > DEAR and looks < 3:  # something may have come between
            found, looks = min(found, look()), looks + 1
        return found

    @staticmethod
    def _batch(spans: Sequence[Span]) -> Batch:
        ids, rows, wanted = list[int](), list[Rows](), list[int]()
        for span in spans:
            assert span.sequence.slot
            ids += span.ids
            rows.append(Rows(span.sequence.slot.kv, span.start, span.count + len(span.guess)))
            if span.is_last:
                wanted += range(len(ids) - 1 - len(span.guess), len(ids))
        return Batch(ids, rows, wanted)

    def _furnish(self, slot: Slot | None) -> None:
        """Give a slot the room it is to have, with the prefix it was forked from."""
        assert slot
        if slot.kv is None:
            slot.kv = self.model.new_kv(slot.capacity)
        slot.kv = self.model.grow_kv(slot.kv, slot.capacity, len(slot.tokens))
        if slot.copy_from is not None:
            self.model.copy_kv(slot.copy_from.kv, slot.kv, len(slot.tokens))
            slot.copy_from = None
