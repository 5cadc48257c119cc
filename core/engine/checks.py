"""Does a model compute here what it must? Tried at start, on what takes a moment."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from core.engine.graphs import GraphedGPT2
from core.engine.model import GPT2, TILE, Batch, Model, Rows

NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far logits may be from those of the same weights in torch's operations, relative to their spread."""


def first_layer(model: GPT2) -> GPT2:
    """Has every shape: a machine whose rows agree there agrees in all layers."""
    model = copy.copy(model)
    model.h = model.h[:1]
    return model


def rows_agree(model: Model) -> bool:
    """Is a row's result, at a few positions, the same bits alone, in other batches, and with its prompt cut up? And
    where all rows are wanted, which may be a product of another shape?"""
    length = min(model.config.n_positions, TILE + 6)
    ids = [7 * i % model.config.vocab_size for i in range(length)]
    looked_at = [p for p in sorted({0, 1, 4, 35, length - 4, length - 1}) if 0 <= p < length]

    def logits_of(counts: Sequence[int], looked_at: Sequence[int] = looked_at) -> Tensor:
        """With the logarithm of their sum; computed in steps of so many rows, every second one beside a stranger."""
        kv, other, results, start = model.new_kv(length), model.new_kv(length), [], 0
        for i, count in enumerate(counts):
            strangers = ids[: 5 * i % length] if i % 2 else []
            rows = [Rows(other, 0, len(strangers))] if strangers else []
            wanted = [len(strangers) + p - start for p in range(start, start + count) if p in looked_at]
            batch = Batch(strangers + ids[start : start + count], [*rows, Rows(kv, start, count)], wanted)
            logits, found = model.forward(batch)
            totals = torch.tensor(found.totals, dtype=torch.float64)
            results.append(torch.cat([logits, totals[:, None]], 1))
            start += count
        return torch.cat(results)

    whole = logits_of([length], range(length))[looked_at]
    ways = [1] * min(length, 6), [2, 3, 35], [length - 4, 1, 1, 1, 1]
    return all(
        torch.equal(logits, whole[: len(logits)])
        for logits in (logits_of(way) for way in ways if min(way) > 0 and sum(way) <= length)
    )


def check_graphs(model: GraphedGPT2, eager: GPT2) -> None:
    """Raises ValueError where a few steps of several batches are not those of `eager`, its logits not rounded: what all
    of a real model's have in common is so large that a step of bfloat16 is as wide as what tells them apart."""
    c, eager = model.config, eager.with_float32_logits()
    more = min(16, c.n_positions - 1)
    lengths = [n for n in (1, 20, TILE - 1, TILE, 250, 500) if n + more <= c.n_positions]
    ids = [[(7 * i + 11 * k) % c.vocab_size for i in range(c.n_positions)] for k in range(len(lengths))]
    sides = [(m, [m.new_kv(n + 17) for n in lengths]) for m in (model, eager)]

    def step(side: int, which: Sequence[int], begin: Sequence[int], count: int) -> Tensor:
        m, kv = sides[side]
        rows = [Rows(kv[k], begin[k], count) for k in which]
        flat = [i for k in which for i in ids[k][begin[k] : begin[k] + count]]
        return m.forward(Batch(flat, rows, list(range(len(flat)))))[0]

    everyone = range(len(lengths))
    for k in everyone:
        for side in range(2):
            step(side, [k], [0] * len(lengths), lengths[k])
    for count in (1, more):
        got, want = (step(side, everyone, lengths, count) for side in range(2))
        spread, far = want.std(1), NEAR[model.dtype]
        if not got.isfinite().all():
            raise ValueError("numbers are not finite")
        if not bool(((got - want).std(1) <= far * spread).all()):
            raise ValueError("logits are not those of the same weights without graphs")
