"""Sampling, rule by rule against Transformers' processors, and in distribution; natively and without the library."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.engine.base import SamplingParams
from core.engine.native import library
from core.engine.sampler import Draw, Row, distribution, draw, largest, nucleus, process, repeated, summarise

EOS = 11
VOCAB = 50_257


def alone(logits: Row, tokens: list[int], params: SamplingParams, seed: int, *, eos_id: int, is_first: bool) -> int:
    [token] = draw(torch.from_numpy(logits)[None], [Draw(0, tokens, params, seed, is_first)], eos_id)
    return token


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def processors(params: SamplingParams, prompt_len: int) -> Any:
    """What `generate` would use, in its order; but top_k before the temperature, which may make neighbours a tie."""
    chain: list[Any] = []
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.no_repeat_ngram:
        chain.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram))
    chain.append(MinNewTokensLengthLogitsProcessor(prompt_len, 1, EOS))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    return LogitsProcessorList(chain)


def dense(scores: Row, params: SamplingParams) -> Tensor:
    ids, weights = distribution(scores, params)
    out = np.zeros(len(scores))
    out[ids] = weights / weights.sum(dtype=np.float64)
    return torch.from_numpy(out)


@given(
    seed=st.integers(0, 2**32),
    vocab=st.integers(20, 400),
    length=st.integers(1, 40),
    prompt_len=st.integers(1, 40),
    temperature=st.floats(0.1, 3),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    top_p=st.floats(0.05, 1),
    penalty=st.sampled_from([1.0, 1.3, 0.8, 5.0]),
    ngram=st.sampled_from([0, 1, 2, 3]),
    coarse=st.booleans(),
)
@settings(max_examples=300, deadline=None)
@example(0, 41, 1, 1, 1.0, 40, 1.0, 1.0, 1, False)  # forbidden ids among the k largest
def test_the_same_distribution_as_transformers(
    seed: int,
    vocab: int,
    length: int,
    prompt_len: int,
    temperature: float,
    top_k: int,
    top_p: float,
    penalty: float,
    ngram: int,
    coarse: bool,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, generator=rng) * 4
    if coarse:  # ties, as bfloat16 makes them
        logits, top_p = logits.round(), 1.0
    length = max(length, prompt_len)
    tokens = torch.randint(min(vocab, 12), (length,), generator=rng).tolist()
    params = SamplingParams(temperature, top_k, top_p, penalty, ngram)
    banned = EOS if length == prompt_len else None
    want = processors(params, prompt_len)(torch.tensor([tokens]), logits[None].clone())[0].softmax(0)
    got = dense(process(logits.numpy(), tokens, params, banned), params)
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-6)


@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1, 2, 50, 5_000]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0, 40.0]),
    top_p=st.floats(1e-6, 1 - 1e-9),
    coarse=st.booleans(),
)
@settings(max_examples=300, deadline=None)
@example(0, 5_000, 0.0, 1 - 1e-9, False)  # all alike, and nearly all of them are inside
def test_the_nucleus_is_what_sorting_everything_finds(
    seed: int, size: int, spread: float, top_p: float, coarse: bool
) -> None:
    scores = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    weights = (scores.round() if coarse else scores).softmax(0)
    falling, order = weights.sort(descending=True, stable=True)
    inside = falling.double().cumsum(0) - falling < top_p * weights.sum(dtype=torch.float64)
    assert nucleus(weights.numpy(), top_p).tolist() == order[inside].tolist()


@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1, 2, 63, 64, 65, 200, 5_000]),
    k=st.integers(1, 5_000),
    order=st.sampled_from(["any", "rising", "falling"]),
    coarse=st.booleans(),
    forbidden=st.floats(0, 1),
    temperature=st.floats(0.1, 3),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1)),
)
@settings(max_examples=300, deadline=None)
def test_the_same_is_drawn_natively_and_without(
    seed: int, size: int, k: int, order: str, coarse: bool, forbidden: float, temperature: float, top_p: float
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=size, scale=4).astype(np.float32)
    scores = scores.round() if coarse else scores  # among them 0 and -0
    scores = {"any": scores, "rising": np.sort(scores), "falling": np.sort(scores)[::-1].copy()}[order]
    scores[rng.random(size) < forbidden * (np.arange(size) > 0)] = -np.inf
    least = sorted(scores.tolist())[-min(k, size)]
    assert largest(scores, min(k, size)).tolist() == [i for i, score in enumerate(scores.tolist()) if score >= least]
    params = SamplingParams(temperature, k, top_p)

    def drawn() -> list[int]:
        ways = itertools.product((False, bool((scores[1:] > -np.inf).any())), range(20))
        return [alone(scores, [0], params, i, eos_id=0, is_first=is_first) for is_first, i in ways]

    native = drawn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "open_library", lambda: None)
        assert drawn() == native


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("vocab", [1, 15, 16, 301, VOCAB])
def test_the_total_of_a_row_is_exact_and_its_own(vocab: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within float32's rounding of its size; the same bits in any batch, on any number of threads, and on any path that
    fuses multiply-adds."""
    if not native:
        monkeypatch.setattr(library, "open_library", lambda: None)
    rng = torch.Generator().manual_seed(vocab)
    spread = torch.tensor([0.0, 0.1, 1.0, 4.0, 30.0, 1e4, 1e30])[:, None]
    room = torch.randn(7, vocab + 15, generator=rng) * spread - 40  # rows stand apart, as those of the native step do
    logits = room[:, :vocab]
    totals = summarise(logits).totals
    assert totals == pytest.approx(logits.double().logsumexp(1).tolist(), rel=3e-7, abs=3e-7)
    found = library.open_library()
    for path in [path for path in range(len(library.PATHS)) if found and found.palaver_runs(path)] or [0]:
        if found:
            monkeypatch.setattr(found, "palaver_best_path", lambda path=path: path)
        if found and path == 0 and not library.ARM:
            own = summarise(logits).totals
            assert own == pytest.approx(totals, rel=3e-7, abs=3e-7)
        else:
            own = totals
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert summarise(logits).totals == own
            assert [summarise(row[None]).totals[0] for row in logits.clone()] == own


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 7, 300])
def test_the_total_of_a_row_that_is_not_finite_is_nan(
    bad: float, at: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(library, "open_library", lambda: None)
    logits = torch.zeros(3, 301)
    logits[1, at] = bad
    totals = torch.tensor(summarise(logits).totals)
    assert totals.isfinite().tolist() == [True, False, True] and totals[1].isnan()


@pytest.mark.parametrize("threads", [1, 2])
def test_each_draws_as_if_alone(threads: int) -> None:
    """Whoever is beside it, and however each is drawn: natively, by numpy, from altered logits."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(1)
    rules: list[dict[str, Any]] = [
        {}, {"temperature": 0.0}, {"top_k": 0}, {"repetition_penalty": 1.5}, {"no_repeat_ngram": 1}, {"top_p": 0.5},
    ]  # fmt: skip
    logits = torch.from_numpy(rng.normal(size=(40, 340), scale=3).astype(np.float32))[:, :300]
    draws = [
        Draw(
            row, [*range(row % 5 + 1)], replace(SamplingParams(temperature=1.0, top_k=30), **rules[row % 6]), row, first
        )
        for row, first in enumerate(rng.random(40) < 0.5)
    ]
    rng.shuffle(draws)
    one_by_one = [draw(logits, [d], 7)[0] for d in draws]
    assert draw(logits, draws, 7) == one_by_one and len(set(one_by_one)) > 15
    assert draw(logits, [], 7) == []


def test_greedy_is_argmax() -> None:
    logits = np.array([0, 3, 3, 1], np.float32)
    params = SamplingParams(temperature=0, repetition_penalty=2)
    assert alone(logits, [1], params, 0, eos_id=3, is_first=False) == 2
    assert alone(logits, [0], SamplingParams(temperature=0), 0, eos_id=3, is_first=False) == 1


def test_eos_is_never_first_and_free_afterwards() -> None:
    logits = np.array([0, 1, 50], np.float32)
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature)
        assert all(alone(logits, [0], params, i, eos_id=2, is_first=True) != 2 for i in range(50))
        assert alone(logits, [0], params, 0, eos_id=2, is_first=False) == 2


@pytest.mark.parametrize("rule", [{"no_repeat_ngram": 2}, {"repetition_penalty": 1.5}, {}])
def test_eos_is_never_first_whatever_else_is_forbidden(rule: dict[str, Any]) -> None:
    logits = np.array([0, 1, 2, 3, 50], np.float32)
    params = replace(SamplingParams(temperature=1.0, top_k=3), **rule)
    assert all(alone(logits, [0, 1, 0], params, i, eos_id=4, is_first=True) != 4 for i in range(50))


def test_a_vocabulary_that_is_used_up_may_repeat() -> None:
    logits = np.array([0, 1, 2], np.float32)
    params = SamplingParams(temperature=0, no_repeat_ngram=1)
    assert alone(logits, [0, 1, 2], params, 0, eos_id=2, is_first=True) == 1
    penalised = replace(params, repetition_penalty=2.0)
    assert process(logits, [0, 1, 2], penalised, 2).tolist() == [0, 0.5, -math.inf]


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 6,000 draws, with top_k and top_p in play."""
    logits = (torch.randn(60, generator=torch.Generator().manual_seed(3)) * 2).numpy()
    params = SamplingParams(temperature=0.9, top_k=20, top_p=0.9)
    expected = dense(logits, params)
    n = 6_000
    counts = Counter(alone(logits, [0], params, seed, eos_id=59, is_first=False) for seed in range(n))
    assert set(counts) <= set(expected.nonzero()[:, 0].tolist())
    degrees = int((expected > 0).sum()) - 1
    chi = sum((counts[i] - n * float(p)) ** 2 / (n * float(p)) for i, p in enumerate(expected) if p > 0)
    assert chi < degrees + 5 * (2 * degrees) ** 0.5


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4))
def test_repeated_ngrams_by_hand(tokens: list[int], n: int) -> None:
    grams = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
    tail = tuple(tokens[len(tokens) - n + 1 :]) if n > 1 else ()
    want = {t for t in range(4) if (*tail, t) in grams} if len(tokens) >= n else set()
    assert repeated(tokens, n) == want
