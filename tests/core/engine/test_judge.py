"""The judgement of candidates, by a reverse model or by the model itself, against Transformers' loss."""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.engine import judge as module
from core.engine.base import BadCheckpoint, Cancelled, Completion, SamplingParams
from core.engine.choice import open_runner
from core.engine.http_engine import connect_engine
from core.engine.judge import Case, Judge, Text
from core.engine.server import Server, bound
from core.engine.torch_engine import TorchEngine
from tests.checkpoints import make_checkpoint
from tests.core.engine.oracle import ask, prompts, reference

Open = Callable[..., Coroutine[Any, Any, TorchEngine]]
Make = Callable[..., Path]
EOS = 256
SOME = SamplingParams(temperature=1.0, max_tokens=12, seed=3, n=5)


def judge(folder: Path, device: str = "cpu", dtype: str = "float32", *, reverse: bool = True) -> Judge:
    return Judge(open_runner(folder, device, dtype, 1, cache_bytes=1).model, reverse=reverse)


def judged(of: Judge, message: Sequence[int], replies: Sequence[Sequence[int]]) -> list[float | None]:
    """As the engine asks it: step by step."""
    found = list[list[Completion]]()
    candidates = [Completion(list(reply), -1.0, "stop", 0) for reply in replies]
    of.cases.append(Case(message, candidates, found.append, lambda: True))
    with torch.inference_mode():
        while of.step():
            pass
    [ended] = found
    assert [replace(c, score=None) for c in ended] == candidates
    return [c.score for c in ended]


def loss(folder: Path, reply: Sequence[int], message: Sequence[int]) -> float:
    """By Transformers' logits, the mean over the message's ids after the reply."""
    with torch.no_grad():
        logits = reference(folder)(torch.tensor([[*reply, EOS, *message[:-1]]])).logits[0, len(reply) :]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(message)))


def against(folder: Path, completion: Completion) -> float:
    """What a completion's log-probability after nothing takes off its score."""
    end = [EOS] if completion.finish_reason == "stop" else []
    said = [*completion.token_ids, *end][:8]
    return 0.5 * -loss(folder, [], said) * len(said)


@pytest.mark.parametrize("shape", ["plain", "odd", "deep"])
def test_it_is_the_loss_of_the_message_after_the_reply(checkpoint: Make, shape: str, device: str) -> None:
    folder = checkpoint(shape)
    message, *replies = prompts([9, 1, 2, 12, 40, 64], 256)
    of = judge(folder, device)
    found = judged(of, message, replies)
    assert found == pytest.approx([-loss(folder, reply, message) for reply in replies], rel=1e-4)
    assert len(set(found)) == len(replies)
    one = judged(of, message[:1], replies[:2])
    assert one == pytest.approx([-loss(folder, reply, message[:1]) for reply in replies[:2]], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_it_does_not_depend_on_the_other_candidates(
    checkpoint: Make, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on how many of them are in a step, nor does one that was drawn twice take twice as long."""
    message, *replies = prompts([20, *range(1, 65)], 256)
    of = judge(checkpoint("odd"), dtype=dtype)
    together = judged(of, message, replies)
    assert None not in together
    assert [judged(of, message, [reply, [7] * 64])[0] for reply in replies] == together
    asked, read = list[list[int]](), of.read

    def seen(texts: Sequence[Text]) -> list[float]:
        asked.extend([*text.given][:-1] for text in texts)
        return read(texts)

    monkeypatch.setattr(of, "read", seen)
    monkeypatch.setattr(module, "ROWS", 1)
    assert judged(of, message, replies * 2) == together * 2
    assert asked == replies


def test_of_a_long_message_the_end_counts(checkpoint: Make) -> None:
    odd, deep = checkpoint("odd"), checkpoint("deep")  # of 150 and of 1024 positions
    message, reply, longer = prompts([200, 30, 40], 256)
    found = judged(judge(odd), message, [reply, longer])
    assert found == pytest.approx([-loss(odd, r, message[-110:]) for r in (reply, longer)], rel=1e-4)
    found = judged(judge(deep), message, [reply, longer])
    assert found == pytest.approx([-loss(deep, r, message[-128:]) for r in (reply, longer)], rel=1e-4)
    assert judged(judge(odd), message, [reply, [1] * 150]) == [None, None]


@pytest.mark.parametrize("shape", ["plain", "odd", "deep"])
def test_without_a_second_model_what_is_said_to_nothing_counts_half_against(
    checkpoint: Make, shape: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its first 8 ids, read once where two begin alike; of one that was cut off, without an end."""
    folder = checkpoint(shape)
    of = judge(folder, device, reverse=False)
    replies = prompts([1, 2, 12, 40, 125 if shape == "odd" else 300], 256)
    asked, read = list[Text](), of.read

    def seen(texts: Sequence[Text]) -> list[float]:
        asked.extend(texts)
        return read(texts)

    monkeypatch.setattr(of, "read", seen)
    candidates = [
        *(Completion(list(reply), -7.0, "stop", 0) for reply in (*replies, [*replies[-1][:-1], 0])),
        Completion([], -1.0, "stop", 0),
        Completion([5, 6, 7], -2.0, "length", 0),
    ]
    found = list[list[Completion]]()
    of.cases.append(Case([], candidates, found.append, lambda: True))
    with torch.inference_mode():
        while of.step():
            pass
    expected = [c.logprob - against(folder, c) for c in candidates]
    assert [c.score for c in found[0]] == pytest.approx(expected, rel=1e-4)
    assert len(asked) == len(candidates) - 1


def test_there_must_be_a_message_and_a_choice(checkpoint: Make) -> None:
    of = judge(checkpoint())
    assert judged(of, [], [[1], [2]]) == judged(of, [5], [[1], [1]]) == [None, None]
    assert judged(judge(checkpoint(), reverse=False), [5], [[1], [1]]) == [None, None]


def test_who_has_waited_long_enough_or_is_gone_is_not_judged(checkpoint: Make) -> None:
    of, found = judge(checkpoint()), list[list[Completion]]()
    two = [Completion([id], -1.0, "stop", 0) for id in (1, 2)]
    of.cases.append(Case([5], two, found.append, lambda: False))
    of.cases.append(Case([5], two, found.append, lambda: True, 0.0))
    assert of.step() and not of.step()
    assert found == [two]


async def test_others_go_on_while_candidates_are_judged(
    engine: Open, checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of the judge at a time, and none for who hangs up."""
    monkeypatch.setattr(module, "ROWS", 1)
    e = await engine(reverse=checkpoint("plain", seed=5))
    judge = e.core.judge
    read = judge.read

    def slow(texts: Sequence[Text]) -> list[float]:
        time.sleep(0.02)
        return read(texts)

    monkeypatch.setattr(judge, "read", slow)
    prompt = [*prompts([30], 256)[0], EOS]
    long = asyncio.create_task(e.generate(prompt, replace(SOME, n=64, max_tokens=2)))
    while not judge.cases:
        await asyncio.sleep(0.001)
    await ask(e, [1, 2, 3], replace(SOME, n=1, max_tokens=2))
    assert not long.done() and judge.cases
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    await ask(e, [1, 2, 3], replace(SOME, n=1, max_tokens=2))
    assert not judge.cases
    with pytest.raises(Cancelled):
        await e.generate(prompt, SOME, deadline=0.0)


async def test_the_engine_judges_candidates_by_the_last_turn(engine: Open, checkpoint: Make, device: str) -> None:
    reverse = checkpoint("plain", seed=5)
    e = await engine(reverse=reverse)
    assert ", REVERSE_MODEL judges candidates" in e.info.how
    first, message = prompts([7, 9], 256)
    prompt = [*first, EOS, *message, EOS]
    found = await e.generate(prompt, SOME)
    assert [c.score for c in found] == pytest.approx([-loss(reverse, c.token_ids, message) for c in found], rel=1e-4)
    itself = await engine()
    without = await itself.generate(prompt, SOME)
    assert [replace(c, score=None) for c in found] == [replace(c, score=None) for c in without]
    folder = Path(itself.info.path)
    assert [c.score for c in without] == pytest.approx([c.logprob - against(folder, c) for c in without], rel=1e-4)
    assert (await ask(e, prompt)).score is None  # there is nothing to choose among
    assert (await e.generate([EOS], SOME))[0].score is None  # nobody has said anything
    others = [asyncio.create_task(ask(e, other)) for other in prompts([5, 30], 256)]
    assert await asyncio.gather(*(e.generate(prompt, SOME) for _ in range(3))) == [found] * 3
    await asyncio.gather(*others)


async def test_what_cannot_be_judged_is_answered_nevertheless(
    engine: Open, checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    e = await engine(reverse=checkpoint("plain", seed=5))
    monkeypatch.setattr(Judge, "read", lambda _, texts: [math.nan] * len(texts))
    assert {c.score for c in await e.generate([1, EOS], SOME)} == {None}
    monkeypatch.undo()

    def raises(*_: object) -> list[float]:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Judge, "read", raises)
    assert {c.score for c in await e.generate([1, EOS], SOME)} == {None}
    assert "judging candidates raised RuntimeError('no memory')" in caplog.text


async def test_what_is_not_judged_in_time_arrives_as_it_is(
    engine: Open, checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in another process, which gives up at the same deadline."""
    e = await engine(reverse=checkpoint("plain", seed=5))
    monkeypatch.setattr(module, "ROWS", 1)

    def slow(texts: Sequence[Text]) -> list[float]:
        time.sleep(0.1)
        return [-1.0] * len(texts)

    monkeypatch.setattr(e.core.judge, "read", slow)
    with bound(f"unix:{tmp_path / 'socket'}") as sock:
        async with Server().open(e).listening(sock):
            client = await connect_engine(f"unix:{tmp_path / 'socket'}")
            try:
                found = await client.generate([1, 2, EOS], replace(SOME, n=64, max_tokens=4), deadline=2.0)
                assert {c.score for c in found} == {None}
            finally:
                await client.aclose()


def test_whose_time_is_over_waits_for_nobody(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 1)
    of, ends = judge(checkpoint()), list[str]()

    def case(name: str, deadline: float | None = None, wanted: bool = True) -> Case:
        some = [Completion([id], -1.0, "stop", 0) for id in (1, 2, 3)]
        return Case([5], some, lambda _: ends.append(name), lambda: wanted, deadline)

    of.cases += [case("first"), case("late", time.monotonic()), case("gone", wanted=False), case("last")]
    with torch.inference_mode():
        assert of.step() and ends == ["late"]
        while of.step():
            pass
    assert ends == ["late", "first", "last"]


async def test_it_crosses_the_wire(engine: Open, checkpoint: Make, tmp_path: Path) -> None:
    e = await engine(reverse=checkpoint("plain", seed=5))
    with bound(f"unix:{tmp_path / 'socket'}") as sock:
        async with Server().open(e).listening(sock):
            client = await connect_engine(f"unix:{tmp_path / 'socket'}")
            try:
                found: list[Completion] = await client.generate([1, 2, EOS], SOME)
                assert found == await e.generate([1, 2, EOS], SOME)
                assert None not in {c.score for c in found}
            finally:
                await client.aclose()


async def test_a_reverse_model_of_other_ids_is_one_line(engine: Open, checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(
        BadCheckpoint, match=r"^REVERSE_MODEL: .*odd\d* has another vocabulary than MODEL: train it from"
    ):
        await engine(reverse=checkpoint("odd"))
    with pytest.raises(BadCheckpoint, match=r"^REVERSE_MODEL: .*config\.json cannot be read"):
        await engine(reverse=tmp_path)
    with pytest.raises(BadCheckpoint, match=r"^REVERSE_MODEL: .*config\.json cannot be read"):
        await engine(reverse=tmp_path / "nowhere")
    shutil.copy(checkpoint() / "tokenizer.json", make_checkpoint(tmp_path, vocab_size=383))
    with pytest.raises(
        BadCheckpoint, match=r"^REVERSE_MODEL: .* has another vocabulary"
    ):  # fewer ids than MODEL may say
        await engine(reverse=tmp_path)
    with pytest.raises(BadCheckpoint, match=r"^REVERSE_MODEL: is MODEL itself"):
        await engine(reverse=checkpoint("plain"))
    with pytest.raises(BadCheckpoint, match=r"^DEVICE=tpu"):
        await engine(reverse=checkpoint("plain", seed=5), device="tpu")
