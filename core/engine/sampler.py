"""Logits to tokens, one row at a time, in float32: what a row draws depends on its own numbers and generator alone.

Same rules in the same order as Transformers' processors: repetition penalty, no repeated n-gram, no eos as the first
token; then temperature, top_k, top_p.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from core.engine.base import SamplingParams

NEVER = float("-inf")


def draw(
    logits: Tensor, tokens: list[int], params: SamplingParams, rng: random.Random, *, eos_id: int, is_first: bool
) -> tuple[int, float]:
    """The next token after `tokens` and its log-probability under the unfiltered `logits` (vocab,), all finite."""
    scores = process(logits, tokens, params, banned=eos_id if is_first else None)
    if params.temperature == 0:
        token = int(scores.argmax())
    else:
        ids, weights = distribution(scores, params)
        reached = weights.cumsum(0, dtype=torch.float64)
        at = int(torch.searchsorted(reached, rng.random() * float(reached[-1]), right=True))
        token = int(ids[min(at, len(ids) - 1)])
    return token, float(logits.log_softmax(0)[token])


def process(logits: Tensor, tokens: list[int], params: SamplingParams, banned: int | None = None) -> Tensor:
    """(vocab,) -> (vocab,): penalised and forbidden tokens; the input itself when there is nothing to do."""
    grams = repeated(tokens, params.no_repeat_ngram)
    if params.repetition_penalty == 1 and not grams and banned is None:
        return logits
    scores = logits.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(tokens)))
        old = scores[seen]
        scores[seen] = torch.where(old < 0, old * params.repetition_penalty, old / params.repetition_penalty)
    if grams:
        scores[torch.tensor(sorted(grams))] = NEVER
    if banned is not None:
        scores[banned] = NEVER
    if grams and scores.max() == NEVER:  # a tiny vocabulary, all of it forbidden: then repeating is the lesser evil
        return process(logits, tokens, SamplingParams(), banned)
    return scores


def distribution(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The ids that may be drawn and how much each weighs."""
    ids, scores = None, scores / params.temperature
    if 0 < params.top_k < len(scores):
        ids = largest(scores, params.top_k)
        scores = scores[ids]
    weights = scores.softmax(0)
    if params.top_p < 1:
        inside = nucleus(weights, params.top_p)
        ids, weights = inside if ids is None else ids[inside], weights[inside]
    return torch.arange(len(weights)) if ids is None else ids, weights


def nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Where the likeliest stand that make up a share of `top_p` of `weights` (n,), likeliest first.

    Sorts only what can be among them: n weights below (1 - top_p) / n are together less than what is left out. Half
    of that is the limit, so that rounding decides nothing.
    """
    total = float(weights.sum(dtype=torch.float64))
    near = (weights >= (1 - top_p) * total / 2 / len(weights)).nonzero()[:, 0]
    falling, order = weights[near].sort(descending=True, stable=True)
    before = falling.cumsum(0, dtype=torch.float64) - falling
    return near[order[before < top_p * total]]


def largest(scores: Tensor, k: int) -> Tensor:
    """Ids of the k largest scores and of all that tie with the last of them, ascending.

    Looks into blocks of 64 only where the block's maximum says so: half the time of a plain top-k, same result.
    """
    blocks = F.pad(scores, (0, -len(scores) % 64), value=NEVER).view(-1, 64)
    best = blocks.amax(1)
    richest = best.topk(min(k, len(best)), sorted=False).indices  # the k largest stand in no more than k blocks
    least = blocks[richest].flatten().topk(k).values[-1]
    near = (best >= least).nonzero()[:, 0]
    hits = (blocks[near] >= least).nonzero()
    ids = near[hits[:, 0]] * 64 + hits[:, 1]
    return ids[ids < len(scores)]  # where forbidden ids are among the k, the padding ties with them


def repeated(tokens: list[int], n: int) -> set[int]:
    """Ids that would close an n-gram which stands in `tokens` already."""
    if n == 0 or len(tokens) < n:
        return set()
    tail = tokens[len(tokens) - n + 1 :]
    return {tokens[i + n - 1] for i in range(len(tokens) - n + 1) if tokens[i : i + n - 1] == tail}
