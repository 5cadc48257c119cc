"""The engine end to end, on random checkpoints, against Transformers' `generate`."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.engine import choice, model_runner
from core.engine.base import BadCheckpoint, Cancelled, EngineClosed, Failed, PromptTooLong, QueueFull, SamplingParams
from core.engine.graphs import GraphedGPT2, PoolPages
from core.engine.kv_cache import Pages
from core.engine.model import TILE, Batch, Model
from core.engine.model_runner import ModelRunner
from core.engine.native import library
from core.engine.sampler import Summary, summarise
from core.engine.sequence import Request, Sequence, Span
from core.engine.torch_engine import TorchEngine, open_torch_engine
from tests.checkpoints import SHAPES
from tests.core.engine.oracle import GREEDY, ask, at_rest, greedy, prompts, reference, until_prepared

Open = Callable[..., Coroutine[Any, Any, TorchEngine]]
Make = Callable[..., Path]
SAMPLED = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, max_tokens=24, seed=7)


@pytest.fixture(params=["native", "guesses in int8", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways to compute on a CPU. (On CUDA the last has another draw, the second is as the first.)"""
    if request.param == "guesses in int8":
        drafted(monkeypatch)
    elif request.param == "torch":
        monkeypatch.setattr(library, "open_library", lambda: None)
    return str(request.param)


ON_A_CPU = pytest.mark.parametrize("device", ["cpu"])


def on(device: str, dtype: str) -> str:
    """Another precision in place of one that is for CPUs."""
    return "float16" if (device, dtype) == ("cuda", "int8") else dtype


def drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models have a copy that guesses, too, and their guesses cost nothing."""
    monkeypatch.setattr(choice, "DRAFTED", 0)
    monkeypatch.setattr(ModelRunner, "price", lambda *_: 0.0)


@pytest.mark.parametrize("shape", SHAPES)
async def test_greedy_is_transformers_alone_and_in_a_batch(
    engine: Open, checkpoint: Make, shape: str, path: str, device: str
) -> None:
    folder = checkpoint(shape)
    e = await engine(folder, dtype="float32")
    assert (path if device == "cpu" else "CUDA graphs") in e.info.how
    texts = prompts([1, 2, 7, 63, 64, 65, 100, e.info.max_positions - 3], e.info.vocab_size)
    want = [greedy(folder, p) for p in texts]
    assert len({tuple(w) for w in want}) > 4  # the model does not always say the same
    assert [(await ask(e, p)).token_ids for p in texts[::3]] == want[::3]
    together = await asyncio.gather(*(ask(e, p) for p in texts))
    assert [c.token_ids for c in together] == want


async def test_numbers_stored_column_by_column_are_the_same(
    engine: Open, checkpoint: Make, path: str, tmp_path: Path
) -> None:
    """As torch.save keeps them of a matrix that was turned."""
    shutil.copy(checkpoint("odd") / "config.json", tmp_path)
    tensors = load_file(checkpoint("odd") / "model.safetensors")
    turned = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    torch.save(turned, tmp_path / "pytorch_model.bin")
    e = await engine(tmp_path, dtype="float32")
    for prompt in prompts([1, 9, 70], 301):
        assert (await ask(e, prompt)).token_ids == greedy(checkpoint("odd"), prompt)


async def test_numbers_too_large_for_float16_are_one_line(checkpoint: Make, tmp_path: Path) -> None:
    shutil.copytree(checkpoint(), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] = 1e5
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"h\.1\.mlp\.c_fc\.weight holds numbers beyond float16's 65504: DTYPE="):
        await open_torch_engine(tmp_path, dtype="float16")


async def test_the_logprob_is_the_unfiltered_models(engine: Open, checkpoint: Make) -> None:
    e = await engine("odd")
    for seed, prompt in enumerate(prompts([3, 20, 60], 301)):
        params = SamplingParams(0.7, 5, 0.8, 1.3, 2, max_tokens=12, seed=seed)
        got = await ask(e, prompt, params)
        said = [*got.token_ids, *([e.info.eos_id] if got.finish_reason == "stop" else [])]
        shares = reference(checkpoint("odd"))(torch.tensor([prompt + said])).logits[0].detach().log_softmax(-1)
        want = sum(float(shares[len(prompt) - 1 + i, token]) for i, token in enumerate(said))
        assert got.logprob == pytest.approx(want, abs=1e-3)


async def test_no_reply_is_empty(engine: Open, checkpoint: Make) -> None:
    """The end of text is made what the model would say first."""
    likeliest = reference(checkpoint("plain"))(torch.tensor([[1, 2]])).logits[0, -1].argmax()
    folder = checkpoint("plain", eos_token_id=int(likeliest))
    reply = (await ask(await engine(folder), [1, 2])).token_ids
    assert reply == greedy(folder, [1, 2]) != []
    assert int(likeliest) not in reply


async def test_small_chunks_change_nothing(engine: Open, checkpoint: Make) -> None:
    e = await engine("odd", token_budget=8, max_running=3)
    texts = prompts([90, 3, 41, 64, 100], e.info.vocab_size, seed=3)
    got = await asyncio.gather(*(ask(e, p) for p in texts))
    assert [c.token_ids for c in got] == [greedy(checkpoint("odd"), p) for p in texts]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
async def test_every_bit_is_the_same_alone_and_beside_others(engine: Open, dtype: str, path: str, device: str) -> None:
    e = await engine("deep", dtype=on(device, dtype), token_budget=40, max_running=12)
    texts = prompts([5, 30, 64, 111, 17, 80, 200, 9], e.info.vocab_size, seed=1)
    wanted = [dataclasses.replace(SAMPLED, seed=i) for i in range(len(texts))]
    alone = [await ask(e, p, w) for p, w in zip(texts, wanted, strict=True)]
    rng = random.Random(5)
    for _ in range(3):
        order = rng.sample(range(len(texts)), len(texts))
        together = await asyncio.gather(*(ask(e, texts[i], wanted[i], session=str(i)) for i in order))
        for i, got in zip(order, together, strict=True):
            assert dataclasses.replace(got, cached_tokens=0) == alone[i]  # the log-probability to the last bit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
async def test_a_conversation_reuses_its_cache_and_says_the_same(
    engine: Open, checkpoint: Make, dtype: str, path: str, device: str
) -> None:
    """Over many turns the window grows, slides, and grows again; a second engine has no cache at all."""
    e, bare = [await engine("plain", dtype=on(device, dtype)) for _ in range(2)]
    rng = random.Random(2)
    history: list[int] = []
    reused = 0
    for turn in range(16):
        history += [rng.randrange(256) for _ in range(rng.randrange(1, 12))] + [256]
        if len(history) > 120:  # the window's start moves: every position changes
            history = history[len(history) // 2 :]
        params = dataclasses.replace(SAMPLED, seed=turn) if turn % 2 else GREEDY
        got, want = await ask(e, history, params, session="s"), await ask(bare, history, params)
        assert (got.token_ids, got.logprob) == (want.token_ids, want.logprob)
        if dtype == "float32" and not turn % 2:
            assert got.token_ids == greedy(checkpoint("plain"), history)
        reused += got.cached_tokens
        assert want.cached_tokens == 0
        history += [*got.token_ids, 256]
    assert reused > 600


async def test_only_new_tokens_are_prefilled(engine: Open) -> None:
    e = await engine()
    [prompt] = prompts([50], 256)
    first = await ask(e, prompt, session="s")
    longer = [*prompt, *first.token_ids, 256, 1, 2, 3]
    assert (await ask(e, longer, session="s")).cached_tokens >= 50 + len(first.token_ids) - 1
    assert (await ask(e, longer, session="other")).cached_tokens == 0
    assert (await ask(e, longer, session="s")).cached_tokens == len(longer) - 1  # the last token always runs
    await e.forget("s")
    assert (await ask(e, longer, session="s")).cached_tokens == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
async def test_a_turn_prepared_for_is_mostly_cached_and_says_the_same(engine: Open, dtype: str, device: str) -> None:
    """Windows slide; one engine is told before, while it also answers another session, the other has no cache."""
    e, bare = [await engine("plain", dtype=on(device, dtype)) for _ in range(2)]
    rng = random.Random(4)
    for turn in range(12):
        window = [rng.randrange(256) for _ in range(rng.randrange(40, 120))]
        params = dataclasses.replace(SAMPLED, seed=turn) if turn % 2 else GREEDY
        e.prepare("s", window)
        await ask(e, [turn, 2, 3], session="other")
        if turn % 3:
            await until_prepared(e)
        prompt = [*window, 1, 2, 256]
        got, want = await ask(e, prompt, params, session="s"), await ask(bare, prompt, params)
        assert (got.token_ids, got.logprob) == (want.token_ids, want.logprob)
        if turn % 3:
            assert got.cached_tokens == len(window)
    assert got.cached_tokens and not want.cached_tokens


async def test_what_is_no_prompt_is_not_prepared(engine: Open) -> None:
    e, steps = await engine("plain"), list[Batch]()
    await ask(e, [1, 2], session="s")
    Faulty(e, steps.append)
    for bad in ([], [-1], [384], [1] * 256):
        e.prepare("s", bad)
        await until_prepared(e)
    assert not steps
    e.prepare("s", [1] * 255)
    await until_prepared(e)
    assert steps


async def test_eviction_under_pressure_changes_nothing(engine: Open, checkpoint: Make) -> None:
    """Room for two or three sequences at a time, twelve channels of four turns each at once."""
    e = await engine("odd", cache_bytes=1)
    assert e.core.scheduler.cache.total == 256

    async def talk(channel: int) -> None:
        history: list[int] = []
        for turn in range(4):
            history += prompts([5 + channel], 256, seed=channel * 10 + turn)[0]
            got = await ask(e, history, SamplingParams(temperature=0, max_tokens=9), session=str(channel))
            assert got.token_ids == greedy(checkpoint("odd"), history, 9)
            history += [*got.token_ids, 256]

    await asyncio.gather(*map(talk, range(12)))


async def test_neighbours_that_leave_change_nothing(engine: Open, checkpoint: Make) -> None:
    e = await engine("plain", max_running=8)
    texts = prompts([20 + 3 * i for i in range(16)], 256, seed=8)
    tasks = [asyncio.create_task(ask(e, p, session=str(i % 5))) for i, p in enumerate(texts)]
    rng = random.Random(1)
    gone = [tasks[i] for i in rng.sample(range(16), 8)]
    for task in gone:
        await asyncio.sleep(rng.random() * 0.002)
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    for prompt, task, end in zip(texts, tasks, ends, strict=True):
        if task not in gone:
            assert not isinstance(end, BaseException)
            assert end.token_ids == greedy(checkpoint("plain"), prompt)
    assert any(isinstance(end, asyncio.CancelledError) for end in ends)
    await at_rest(e)


async def test_a_request_nobody_waits_for_stops_at_the_next_step(engine: Open) -> None:
    e = await engine("deep", max_running=1)
    long = SamplingParams(temperature=0, max_tokens=1000, no_repeat_ngram=1)
    tasks = [asyncio.create_task(ask(e, prompts([30], 256, seed=i)[0], long)) for i in range(40)]  # seconds of work
    await asyncio.sleep(0.1)
    assert len(e.core.scheduler.requests) >= 2
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await e.forget("a session")  # done in turn, after the cancellations
    assert not e.core.scheduler.requests and not e.core.scheduler.cache.running


async def test_a_deadline_ends_waiting_and_running_requests(engine: Open) -> None:
    e = await engine("deep", max_running=1)
    long = SamplingParams(temperature=0, max_tokens=1000, no_repeat_ngram=1)
    start = time.monotonic()
    ends = await asyncio.gather(
        *(e.generate(prompts([30], 256, seed=i)[0], long, deadline=0.02) for i in range(3)), return_exceptions=True
    )
    assert [type(end) for end in ends] == [Cancelled] * 3
    assert time.monotonic() - start < 30
    assert not e.core.scheduler.running


async def test_candidates_are_the_same_as_each_alone(engine: Open) -> None:
    """n = 5 is seeds s … s + 4, the prompt is prefilled once, also where only two may run at a time."""
    alone, few, many = await engine(), await engine(max_running=2), await engine()
    [prompt] = prompts([70], 256)
    want = [await ask(alone, prompt, dataclasses.replace(SAMPLED, seed=7 + k)) for k in range(5)]
    assert len({tuple(w.token_ids) for w in want}) > 1
    for e in (few, many):
        got = await e.generate(prompt, dataclasses.replace(SAMPLED, n=5), session="s")
        assert [(c.token_ids, c.logprob) for c in got] == [(w.token_ids, w.logprob) for w in want]
        assert [c.cached_tokens for c in got] == [0, 69, 69, 69, 69]
        short = dataclasses.replace(SAMPLED, n=5, max_tokens=1)  # whoever is first is through before another starts
        got = await e.generate([*prompt, 5], short, session="t")
        assert [c.cached_tokens for c in got] == [0, 70, 70, 70, 70]
    chosen = [*prompt, *want[3].token_ids, 256, 5, 6]
    assert (await ask(many, chosen, session="s")).cached_tokens >= 70 + len(want[3].token_ids) - 1


def ways(sampled: SamplingParams, greedy_tokens: int) -> list[SamplingParams]:
    """Every rule for the draw."""
    return [
        dataclasses.replace(GREEDY, max_tokens=greedy_tokens),
        sampled,
        dataclasses.replace(sampled, repetition_penalty=1.3, no_repeat_ngram=3),
        dataclasses.replace(sampled, top_k=0, top_p=0.5),
        dataclasses.replace(sampled, n=3),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
async def test_guessing_changes_steps_and_nothing_else(engine: Open, dtype: str, device: str) -> None:
    """The same replies to the last bit of the log-probability, greedy and sampled, under every rule for the draw.

    Each is asked twice: what was said the first time is guessed the second.
    """
    plain, guessing = [await engine("odd", dtype=on(device, dtype), guess=guess, price=0.0) for guess in (0, 3)]
    sampled = dataclasses.replace(SAMPLED, top_k=3, temperature=0.5, max_tokens=20)
    steps = []
    for e in (plain, guessing):
        counted, asked = (
            Faulty(e, lambda _: None),
            itertools.product(ways(sampled, 30), enumerate(prompts([5, 60], 301)), range(2)),
        )
        got = [await e.generate(p, dataclasses.replace(way, seed=s), session=str(s)) for way, (s, p), _ in asked]
        steps.append((counted.steps, [[(c.token_ids, c.logprob, c.finish_reason) for c in cs] for cs in got]))
    assert steps[0][1] == steps[1][1]
    assert steps[1][0] < 0.8 * steps[0][0]


@ON_A_CPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_copy_in_int8_guesses_and_changes_nothing_else(
    engine: Open, checkpoint: Make, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same replies to the last bit of the log-probability, of which most tokens were guessed."""
    drafted(monkeypatch)
    likely = greedy(checkpoint("odd"), prompts([60], 301)[0])[7]
    folder = checkpoint("odd", eos_token_id=likely)
    plain, guessing = [await engine(folder, dtype=dtype, guess=guess) for guess in (0, 4)]
    assert plain.core.runner.draft is None and guessing.core.runner.draft
    sampled = dataclasses.replace(SAMPLED, max_tokens=40)
    said = []
    for e in (plain, guessing):
        asked = itertools.product(ways(sampled, 40), enumerate(prompts([1, 5, 60, 140], 301)))
        got = [await e.generate(p, dataclasses.replace(way, seed=s), session=str(s)) for way, (s, p) in asked]
        said.append([[(c.token_ids, c.logprob, c.finish_reason) for c in cs] for cs in got])
    assert said[0] == said[1]
    assert {reason for cs in said[0] for _, _, reason in cs} == {"stop", "length"}
    steps = []
    for e in (plain, guessing):
        counted = Faulty(e, lambda _: None)
        for seed, prompt in enumerate(prompts([5, 60], 301)):
            await ask(e, prompt, dataclasses.replace(sampled, seed=seed))
        steps.append(counted.steps)
    assert steps[1] < 0.5 * steps[0]


@ON_A_CPU
@pytest.mark.parametrize("wrong", [False, True])
async def test_a_bad_copy_costs_no_reply(
    engine: Open, checkpoint: Make, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with wrong weights is given up; one whose numbers are not finite guesses nothing."""
    drafted(monkeypatch)
    e = await engine("odd", dtype="float32")
    draft, guesses, calls = cast("Any", e.core.runner.draft), e.core.scheduler.guesses, list[Batch]()
    forward, guesses.price = draft.forward, 0.3

    def spoilt(batch: Batch) -> tuple[torch.Tensor, Summary]:
        calls.append(batch)
        logits, _ = forward(batch)
        logits = torch.rand_like(logits) if wrong else torch.full_like(logits, float("nan"))
        return logits, summarise(logits)

    draft.forward = spoilt
    for _ in range(4):
        for prompt in prompts([5, 60], 301):
            assert (await ask(e, prompt)).token_ids == greedy(checkpoint("odd"), prompt)
    assert guesses.right < 0.3 if wrong else guesses.right == 1.0
    count = len(calls)
    await ask(e, prompts([30], 301)[0])
    assert wrong == (len(calls) - count <= 4), "wrong guesses were not given up, but for one to see"


@ON_A_CPU
async def test_a_copy_that_raises_costs_no_reply(
    engine: Open, checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drafted(monkeypatch)
    e = await engine("odd", dtype="float32")
    draft, e.core.scheduler.guesses.price = cast("Any", e.core.runner.draft), 0.3
    draft.forward = lambda _: 1 / 0
    for prompt in prompts([5, 60], 301):
        assert (await ask(e, prompt)).token_ids == greedy(checkpoint("odd"), prompt)
    assert 1 <= caplog.text.count("guessing raised ZeroDivisionError") <= 2, "it was asked again and again"


@pytest.mark.parametrize("positions", [2, 8])
async def test_a_model_of_few_positions_opens_and_talks(
    engine: Open, checkpoint: Make, positions: int, path: str
) -> None:
    folder = checkpoint("odd", n_positions=positions)
    e = await engine(folder, dtype="float32", price=None)
    assert (await ask(e, [5])).token_ids == greedy(folder, [5], positions - 1)


async def test_a_guess_is_priced_where_there_are_guesses(engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, "price", lambda _, guess: float(guess))
    engines = [await engine("odd", guess=guess) for guess in (0, 3)]
    assert [e.core.scheduler.guesses.price for e in engines] == [0.0, 3.0]


def test_the_price_of_a_guess_has_the_copys_steps_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(model_runner, "perf_counter", lambda: clock[0])

    def timed(one: float, row: float) -> Any:
        """A model whose step takes `one` and for each further row `row`."""

        def forward(batch: Batch) -> torch.Tensor:
            clock[0] += one + row * (len(batch.ids) - 1)
            return torch.zeros(1)

        return SimpleNamespace(new_kv=lambda _: None, forward=forward, config=SimpleNamespace(n_positions=64))

    runner = ModelRunner(timed(0.010, 0.0005))
    assert runner.price(4) == pytest.approx(0.05)
    runner.draft = timed(0.003, 0.001)
    assert runner.price(4) == pytest.approx(0.35)
    runner.draft, end = timed(0.003, 0.001), clock[0] + 0.3
    calm = runner.draft.forward

    def disturbed(batch: Batch) -> torch.Tensor:
        clock[0] += 0.02 * (clock[0] < end)
        return cast("torch.Tensor", calm(batch))

    runner.draft.forward = disturbed  # type: ignore[method-assign]
    assert runner.price(4) == pytest.approx(0.35), "it looked once, and something came between"
    runner.draft = timed(0.009, 0.001)
    assert runner.price(4) == pytest.approx(0.95)


def test_guesses_leave_the_distribution_as_it_is() -> None:
    """Chi-square over 8,000 pairs of draws, the second from the row of a guess that the first makes right or wrong."""
    rows = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    runner = ModelRunner(cast("Model", SimpleNamespace(config=SimpleNamespace(eos_id=11))))
    request = Request([1, 2], SamplingParams(temperature=1.0, top_k=0, top_p=1.0), "", None, lambda _: None)
    guess = int(rows[0].argmax())
    counts: tuple[Counter[int], Counter[int]] = Counter(), Counter()
    for seed in range(8_000):
        sequence = Sequence(request, seed, 10)
        sequence.append(3, 0.0, 11)
        [drawn] = runner._draw([Span(sequence, 2, 1, (guess,))], rows, Summary([0.0, 0.0], [0, 0]))
        assert drawn and (len(drawn) == 2) == (drawn[0][0] == guess)
        for count, (token, _) in zip(counts, drawn, strict=False):
            count[token] += 1
    for count, row in zip(counts, rows, strict=True):
        n = count.total()
        chi = sum((count[i] - n * float(p)) ** 2 / (n * float(p)) for i, p in enumerate(row.double().softmax(0)))
        assert n > 1_000 and chi < 11 + 5 * (2 * 11) ** 0.5


async def test_bad_numbers_behind_a_guess_cost_a_retry_and_no_reply(engine: Open, checkpoint: Make) -> None:
    e = await engine("odd", price=0.0)
    prompt = prompts([20], 301)[0]
    want = greedy(checkpoint("odd"), prompt)
    assert (await ask(e, prompt, session="a")).token_ids == want

    def spoil(batch: Batch) -> None:
        """The cache behind the first guess, once."""
        if batch.rows[0].count > 1 and batch.rows[0].start > 0 and not spoiled:
            spoiled.append(batch.rows[0].start)
            poison(e, batch.rows[0].kv, batch.rows[0].start)

    spoiled: list[int] = []
    Faulty(e, spoil)
    assert (await ask(e, prompt, session="b")).token_ids == want
    assert spoiled


async def test_a_step_that_raises_with_a_guess_runs_without_it(engine: Open, checkpoint: Make) -> None:
    e = await engine("odd", price=0.0)
    prompt = prompts([20], 301)[0]
    want = (await ask(e, prompt, session="a")).token_ids

    def refuse(batch: Batch) -> Exception | None:
        is_guess = batch.rows[0].start > 0 and batch.rows[0].count > 1
        refused.append(is_guess)
        return ZeroDivisionError() if is_guess else None

    refused: list[bool] = []
    Faulty(e, refuse)
    assert (await ask(e, prompt, session="b")).token_ids == want
    assert any(refused)


async def test_an_engines_seed_makes_unseeded_requests_repeatable(engine: Open) -> None:
    unseeded = dataclasses.replace(SAMPLED, seed=None)
    said = []
    for seed in (1, 1, 2):
        e = await engine(seed=seed)
        said.append([(await ask(e, [1, 2, 3], unseeded)).token_ids for _ in range(4)])
    assert said[0] == said[1] != said[2]
    assert len({tuple(s) for s in said[0]}) > 1


async def test_what_does_not_fit_is_refused_in_one_line(engine: Open) -> None:
    e = await engine("plain")
    with pytest.raises(PromptTooLong, match="256 tokens; the model takes at most 255"):
        await ask(e, [1] * 256)
    assert len((await ask(e, [1] * 255)).token_ids) == 1
    assert (await ask(e, [1] * 255)).finish_reason == "length"
    for bad in ([], [-1], [384], ["a"], [1.5], torch.tensor([1, 400])):
        e.prepare("s", cast("Any", bad))
        with pytest.raises(ValueError, match="from 0 below 384"):
            await ask(e, cast("Any", bad))
    for params, session in (({"n": 2}, "s"), (None, "s"), (GREEDY, None), (GREEDY, ["s"])):
        with pytest.raises(ValueError, match="params must be SamplingParams, and session text"):
            await e.generate([1], cast("Any", params), session=cast("Any", session))
    assert (await ask(e, [1])).token_ids


async def test_a_prompt_that_can_be_looked_through_once_harms_nobody(engine: Open) -> None:
    e = await engine("plain")
    e.prepare("s", cast("Any", iter([1, 2])))
    assert (await ask(e, cast("Any", iter([1, 2, 256])))).token_ids == (await ask(e, [1, 2, 256])).token_ids


async def test_too_many_waiting_are_turned_away(engine: Open) -> None:
    e = await engine("plain", max_running=1, max_waiting=3)
    assert e.info.at_once == 1
    ends = await asyncio.gather(*(ask(e, [i + 1, 2]) for i in range(40)), return_exceptions=True)
    full = [end for end in ends if isinstance(end, QueueFull)]
    assert full and len(full) < 40
    assert all(isinstance(end, QueueFull) or end.token_ids for end in ends)  # type: ignore[union-attr]


class Faulty:
    """Stands before a model: what `spoil` says of a batch is raised, or put over the logits."""

    def __init__(self, engine: TorchEngine, spoil: Callable[[Batch], Exception | None]) -> None:
        self._model = engine.core.runner.model
        self._spoil = spoil
        self.largest = self.steps = 0
        self.spoilt: PoolPages | None = None
        """Whose next rows are not finite: on a GPU they read no more than they wrote, so a clean start is never bad."""
        runner: Any = engine.core.runner
        runner.model = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Summary]:
        error = self._spoil(batch)
        if error:
            raise error
        self.largest = max(self.largest, len(batch.ids))
        self.steps += 1
        logits, found = self._model.forward(batch)
        if isinstance(self._model, GraphedGPT2):
            for i, wanted in enumerate(batch.wanted):
                if any(r.kv is self.spoilt and 0 <= wanted - first < r.count for first, r in batch.placed):
                    found.totals[i] = float("nan")
        self.spoilt = None
        return logits, found


def poison(engine: TorchEngine, kv: Any, count: int) -> None:
    """The first `count` keys and values."""
    if isinstance(kv, PoolPages):
        cast("Any", engine.core.runner.model).pool[:, :, kv.slots(0, min(count, TILE * len(kv.numbers)))] = float("nan")
    else:
        for page in kv.pages if isinstance(kv, Pages) else [kv]:
            page[:, :, :, :count] = float("nan")


def prefills(batch: Batch) -> list[list[int]]:
    """The ids of each sequence that runs more than one."""
    ends = itertools.accumulate(rows.count for rows in batch.rows)
    return [batch.ids[end - r.count : end] for end, r in zip(ends, batch.rows, strict=True) if r.count > 1]


async def test_a_request_that_raises_fails_alone(engine: Open, checkpoint: Make) -> None:
    e = await engine()
    Faulty(e, lambda batch: ZeroDivisionError() if [1, 77, 3] in prefills(batch) else None)
    texts = [[i % 60 + 1, 2, 3] for i in range(9)]
    texts[4] = [1, 77, 3]
    ends = await asyncio.gather(*(ask(e, p) for p in texts), return_exceptions=True)
    assert [i for i, end in enumerate(ends) if isinstance(end, Failed)] == [4]
    assert str(ends[4]) == "the model raised ZeroDivisionError"
    for i in (0, 3, 5, 8):
        assert ends[i].token_ids == greedy(checkpoint("plain"), texts[i])  # type: ignore[union-attr]


async def test_out_of_memory_runs_smaller_batches(engine: Open, checkpoint: Make) -> None:
    e = await engine()
    await ask(e, [1], session="s")
    faulty = Faulty(e, lambda batch: torch.OutOfMemoryError() if len(batch.ids) > 30 else None)
    texts = prompts([20] * 6, 256)
    got = await asyncio.gather(*(ask(e, p) for p in texts))
    assert [c.token_ids for c in got] == [greedy(checkpoint("plain"), p) for p in texts]
    assert faulty.largest == 20
    assert not e.core.scheduler.cache.idle  # what could be spared was given back


async def test_a_lone_request_has_the_memory_that_was_given_back_for_it(engine: Open, checkpoint: Make) -> None:
    e = await engine()
    await ask(e, [1], session="s")
    cache = e.core.scheduler.cache
    Faulty(e, lambda _: torch.OutOfMemoryError() if cache.idle else None)
    assert (await ask(e, [5, 6])).token_ids == greedy(checkpoint("plain"), [5, 6])


async def test_bad_numbers_are_tried_once_more_and_then_fail_alone(
    engine: Open, checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "open_library", lambda: None)  # the native step never looks where `poison` writes
    e = await engine(dtype="float32")
    poisoned: list[int] = []

    def spoil(batch: Batch) -> None:
        """The cache of the prompt with id 66 once, of the prompt with id 77 always."""
        for rows, ids in zip([r for r in batch.rows if r.count > 1], prefills(batch), strict=True):
            if 77 in ids or (66 in ids and 66 not in poisoned):
                poisoned.extend(ids)
                poison(e, rows.kv, rows.start + rows.count + 1)
                faulty.spoilt = rows.kv

    faulty = Faulty(e, spoil)
    for start in ([9], [9, 5]):  # the second time from a warm cache
        texts = [[*start, 2], [*start, 66], [*start, 77], [*start, 4, 4]]
        ends = await asyncio.gather(*(ask(e, p, session=str(i)) for i, p in enumerate(texts)), return_exceptions=True)
        assert isinstance(ends[2], Failed) and 66 in poisoned
        for i in (0, 1, 3):
            assert ends[i].token_ids == greedy(checkpoint("plain"), texts[i])  # type: ignore[union-attr]
        poisoned.clear()


async def test_closing_ends_what_is_under_way(engine: Open) -> None:
    e = await engine("deep")
    tasks = [asyncio.create_task(ask(e, [i + 1], SamplingParams(temperature=0, max_tokens=900))) for i in range(4)]
    await asyncio.sleep(0.05)
    await e.aclose()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, EngineClosed) or hasattr(end, "token_ids") for end in ends)
    assert await e.ready() == "the engine is closed"
    with pytest.raises(EngineClosed):
        await ask(e, [1])
    await e.forget("s")
    await e.aclose()


async def test_a_dead_engine_says_so(engine: Open) -> None:
    e = await engine()
    Faulty(e, lambda batch: torch.AcceleratorError("lost", 1) if 9 in batch.ids else None)
    with pytest.raises(EngineClosed, match="the engine died: AcceleratorError"):
        await ask(e, [9])
    assert await e.ready() == e.ended == "the engine died: AcceleratorError"
    with pytest.raises(EngineClosed):
        await ask(e, [1])


@pytest.mark.parametrize("code", [2, 901])
async def test_no_memory_or_a_capture_that_is_refused_is_no_lost_device(
    engine: Open, checkpoint: Make, code: int
) -> None:
    e, error = await engine(), cast("Any", torch.AcceleratorError("refused"))
    error.error_code = code
    Faulty(e, lambda batch: error if [9, 9] in prefills(batch) else None)
    with pytest.raises(Failed, match="AcceleratorError"):
        await ask(e, [9, 9])
    assert (await ask(e, [1])).token_ids == greedy(checkpoint("plain"), [1])


async def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"config\.json cannot be read"):
        await open_torch_engine(tmp_path)


@pytest.mark.parametrize(("options", "words"), [({"device": "tpu"}, "DEVICE=tpu"), ({"dtype": "int3"}, "DTYPE=int3")])
async def test_a_wrong_setting_is_one_line(checkpoint: Make, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadCheckpoint, match=words):
        await open_torch_engine(checkpoint(), **options)


LEAVES = """
import asyncio
from core.engine.base import SamplingParams
from core.engine.hub import EMBEDDED
from core.engine.torch_engine import open_torch_engine

async def main():
    engine = await open_torch_engine(EMBEDDED, device="cpu", threads=1, guess=0, max_running=64, token_budget=16_000)
    asking = [asyncio.ensure_future(engine.generate([i] * 250, SamplingParams())) for i in range(64)]
    await asyncio.sleep(0.05)  # in the midst of a step that takes far longer

asyncio.run(main())
"""


def test_a_script_that_closes_nothing_ends_well() -> None:
    command, root = [sys.executable, "-c", LEAVES], Path(__file__).parents[3]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
