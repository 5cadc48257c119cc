"""Logits to tokens, one row at a time, in float32: what a row draws depends on its own numbers and generator alone.

Same rules as Transformers' processors: repetition penalty, no repeated n-gram, no eos as the first token; then top_k,
temperature, top_p. (Transformers divides by the temperature first, which leaves the k largest what they are.)

What is left is drawn as a race: id i runs for -log(u_i) / weight_i, where u_i in (0, 1) is a function of the seed, the
position and i alone, and the first there is drawn, with a probability of its share of the weights (Efraimidis and
Spirakis 2006, "Weighted random sampling with a reservoir"; over logits it is the Gumbel-max trick). So two models that
nearly agree nearly always draw the same.

The native library, where there is one, sums up rows and draws among the top_k; else torch and numpy do.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.engine.base import SamplingParams
from core.engine.native import library

Row = NDArray[np.float32]
Ids = NDArray[np.integer]

NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Summary:
    """Of rows of logits."""

    totals: list[float]
    """log(sum(e^x)) of each; NaN where a number is not finite."""
    tops: list[int]
    """For the native draw the address of each row's largest of each 32; 0 where there are none."""


def addresses(rows: Tensor) -> list[int]:
    """Of each row of 32-bit numbers."""
    return [rows.data_ptr() + 4 * rows.stride(0) * i for i in range(len(rows))]


def summarise(logits: Tensor) -> Summary:
    """(rows, vocab), where no step has done it. The same bits beside other rows."""
    native, none = library.open_library(), [0] * len(logits)
    if not native:  # each row for itself: torch cuts up the sum of a single one among threads
        return Summary([float(row.logsumexp(0)) if row.sum().isfinite() else math.nan for row in logits], none)
    assert logits.stride(1) == 1
    totals = torch.empty(len(logits), dtype=torch.float64)
    places = logits.data_ptr(), len(logits), logits.stride(0), logits.shape[1], totals.data_ptr()
    native.palaver_logsumexp(*places, torch.get_num_threads(), native.palaver_best_path())
    return Summary(totals.tolist(), none)


class Draw(NamedTuple):
    """A token to be drawn, the one after `tokens`: a function of what stands here and of the logits of its row."""

    row: int
    tokens: Sequence[int]
    params: SamplingParams
    seed: int
    is_first: bool
    tops: int = 0
    """As in Summary."""


def draw(logits: Tensor, draws: Sequence[Draw], eos_id: int) -> list[int]:
    """One token for each. `logits` (rows, vocab): those of the rows in `draws` are finite."""
    native, drawn, left, places = library.open_library(), [0] * len(draws), list[bytes](), list[int]()
    rows, vocab, kept = logits.numpy(), logits.shape[1], list[Row]()
    start, apart = logits.data_ptr(), logits.stride(0) * logits.itemsize
    for i, (row, tokens, params, seed, is_first, tops) in enumerate(draws):
        banned = eos_id if is_first else -1
        if native and params.temperature and 0 < params.top_k < vocab - 1:
            place = start + row * apart
            if params.repetition_penalty != 1 or params.no_repeat_ngram > 0:
                mine = rows[row]
                scores = process(mine, tokens, params, eos_id if is_first else None)
                if scores is not mine:
                    place, tops, banned = address(scores), 0, -1
                    kept.append(scores)
            knobs = params.temperature, params.top_p, vocab, params.top_k, banned
            places.append(i)
            left.append(library.DRAW.pack(place, tops, seed % 2**64, *knobs, len(tokens)))
        else:
            drawn[i] = choice(rows[row], draws[i], eos_id if is_first else None)
    if native and left:
        ids, threads = (ctypes.c_int32 * len(left))(), torch.get_num_threads()
        native.palaver_draw(b"".join(left), len(left), ids, threads, native.palaver_best_path())
        for i, id in zip(places, ids, strict=True):
            drawn[i] = id
    return drawn


def choice(logits: Row, d: Draw, banned: int | None) -> int:
    scores = process(logits, d.tokens, d.params, banned)
    if d.params.temperature == 0:
        return int(scores.argmax())
    ids, weights = distribution(scores, d.params)
    return int(ids[(weights / exponential(d.seed, len(d.tokens), ids)).argmax()])


def exponential(seed: int, position: int, ids: Ids) -> NDArray[np.floating]:
    """-log(u) of each id, above 0."""
    [mixed] = noise(np.uint64(seed % 2**64), np.zeros(1, np.uint64))
    [key] = noise(mixed, np.array([position], np.uint64))
    u = ((noise(key, ids.astype(np.uint64)) >> np.uint64(12)) + 0.5) * 2.0**-52
    times: NDArray[np.floating] = -np.log(u)
    return times


def noise(key: np.uint64, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Of the stream `key` the numbers that `numbers` counts, 64 bits each (splitmix64: Steele, Lea and Flood 2014,
    "Fast splittable pseudorandom number generators")."""
    x = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def process(logits: Row, tokens: Sequence[int], params: SamplingParams, banned: int | None = None) -> Row:
    """(vocab,) -> (vocab,): penalised and forbidden tokens; the input itself when there is nothing to do."""
    grams = repeated(tokens, params.no_repeat_ngram)
    if params.repetition_penalty == 1 and not grams and banned is None:
        return logits
    scores = logits.copy()
    if params.repetition_penalty != 1:
        seen = np.array(list(set(tokens)))
        old = scores[seen]
        scores[seen] = np.where(old < 0, old * params.repetition_penalty, old / params.repetition_penalty)
    if grams:
        scores[list(grams)] = NEVER
    if banned is not None:
        scores[banned] = NEVER
    if grams and scores.max() == NEVER:  # a tiny vocabulary, all of it forbidden: then repeating is the lesser evil
        return process(logits, tokens, replace(params, no_repeat_ngram=0), banned)
    return scores


def distribution(scores: Row, params: SamplingParams) -> tuple[Ids, Row]:
    """The ids that may be drawn and how much each weighs; the likeliest weighs 1."""
    ids = largest(scores, params.top_k) if 0 < params.top_k < len(scores) else None
    if ids is not None:
        scores = scores[ids]
    weights = np.exp((scores - np.float64(scores.max())) / params.temperature)
    if params.top_p < 1:
        inside = nucleus(weights, params.top_p)
        ids, weights = inside if ids is None else ids[inside], weights[inside]
    return np.arange(len(weights)) if ids is None else ids, weights


def nucleus(weights: Row, top_p: float) -> Ids:
    """Where the likeliest stand that make up a share of `top_p` of `weights` (n,), likeliest first.

    Sorts only what can be among them: n weights below (1 - top_p) / n are together less than what is left out. Half
    of that is the limit, so that rounding decides nothing.
    """
    total = float(weights.sum(dtype=np.float64))
    [near] = (weights >= (1 - top_p) * total / 2 / len(weights)).nonzero()
    order = near[(-weights[near]).argsort(kind="stable")]
    reached = weights[order].cumsum(dtype=np.float64)
    return order[: reached.searchsorted(top_p * total) + 1]


def largest(scores: Row, k: int) -> Ids:
    """Ids of the k largest scores and of all that tie with the last of them, ascending."""
    return np.flatnonzero(scores >= np.partition(scores, -k)[-k])


def address(array: Row) -> int:
    """Of its first number, for C."""
    assert array.flags.c_contiguous
    start: int = array.__array_interface__["data"][0]
    return start


def repeated(tokens: Sequence[int], n: int) -> set[int]:
    """Ids that would close an n-gram which stands in `tokens` already."""
    if n == 0 or len(tokens) < n:
        return set()
    tail = tuple(tokens[len(tokens) - n + 1 :])
    grams = zip(*(tokens[i:] for i in range(n)), strict=False)
    return {gram[-1] for gram in grams if gram[:-1] == tail}
