"""The reverse model's judgement of candidates, against Transformers' loss."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.engine import backward as module
from core.engine.backward import Backward
from core.engine.base import BadCheckpoint, Completion, SamplingParams
from core.engine.choice import open_runner
from core.engine.http_engine import connect_engine
from core.engine.server import Server, bound
from core.engine.torch_engine import TorchEngine
from tests.core.engine.oracle import ask, prompts, reference

Open = Callable[..., Coroutine[Any, Any, TorchEngine]]
Make = Callable[..., Path]
EOS = 256
SOME = SamplingParams(temperature=1.0, max_tokens=12, seed=3, n=5)


def judge(folder: Path, device: str = "cpu", dtype: str = "float32") -> Backward:
    return Backward(open_runner(folder, device, dtype, 1, cache_bytes=1).model)


def loss(folder: Path, reply: Sequence[int], message: Sequence[int]) -> float:
    """Transformers', of the message's ids alone."""
    ids = torch.tensor([[*reply, EOS, *message]])
    labels = ids.clone()
    labels[:, : -len(message)] = -100
    with torch.no_grad():
        return float(reference(folder)(ids, labels=labels).loss)


@pytest.mark.parametrize("shape", ["plain", "odd", "deep"])
def test_it_is_the_loss_of_the_message_after_the_reply(checkpoint: Make, shape: str, device: str) -> None:
    folder = checkpoint(shape)
    message, *replies = prompts([9, 1, 2, 12, 40, 64], 256)
    with torch.inference_mode():
        found = judge(folder, device).scores(message, replies)
        assert found == pytest.approx([-loss(folder, reply, message) for reply in replies], rel=1e-4)
        assert len(set(found)) == len(replies)
        [one] = judge(folder, device).scores(message[:1], replies[:1])
        assert one == pytest.approx(-loss(folder, replies[0], message[:1]), rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_it_does_not_depend_on_the_other_candidates(
    checkpoint: Make, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on how many of them are in a step."""
    message, *replies = prompts([20, *range(1, 65)], 256)
    of = judge(checkpoint("odd"), dtype=dtype)
    with torch.inference_mode():
        together = of.scores(message, replies)
        assert [of.scores(message, [reply])[0] for reply in replies] == together
        monkeypatch.setattr(module, "ROWS", 1)
        assert of.scores(message, replies) == together


def test_of_a_long_message_the_end_counts(checkpoint: Make) -> None:
    folder = checkpoint("odd")  # of 150 positions
    message, reply = prompts([200, 30], 256)
    with torch.inference_mode():
        [found] = judge(folder).scores(message, [reply])
        assert found == pytest.approx(-loss(folder, reply, message[-119:]), rel=1e-4)
        assert math.isnan(judge(folder).scores(message, [[1] * 149])[0])


async def test_the_engine_judges_candidates_by_the_last_turn(engine: Open, checkpoint: Make, device: str) -> None:
    reverse = checkpoint("plain", seed=5)
    e = await engine(reverse=reverse)
    assert e.info.how.endswith(f", candidates judged by {reverse.name}")
    first, message = prompts([7, 9], 256)
    prompt = [*first, EOS, *message, EOS]
    found = await e.generate(prompt, SOME)
    assert [c.backward for c in found] == pytest.approx([-loss(reverse, c.token_ids, message) for c in found], rel=1e-4)
    without = await (await engine()).generate(prompt, SOME)
    assert [replace(c, backward=None) for c in found] == without
    assert (await ask(e, prompt)).backward is None  # there is nothing to choose among
    assert (await e.generate([EOS], SOME))[0].backward is None  # nobody has said anything
    others = [asyncio.create_task(ask(e, other)) for other in prompts([5, 30], 256)]
    assert await asyncio.gather(*(e.generate(prompt, SOME) for _ in range(3))) == [found] * 3
    await asyncio.gather(*others)


async def test_what_the_reverse_model_cannot_judge_is_answered_nevertheless(
    engine: Open, checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    e = await engine(reverse=checkpoint("plain", seed=5))
    monkeypatch.setattr(Backward, "scores", lambda *_: [0.0, math.nan, 0.0, 0.0, 0.0])
    assert {c.backward for c in await e.generate([1, EOS], SOME)} == {None}
    monkeypatch.undo()

    def raises(*_: object) -> list[float]:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Backward, "scores", raises)
    assert {c.backward for c in await e.generate([1, EOS], SOME)} == {None}
    assert "the reverse model raised RuntimeError('no memory')" in caplog.text


async def test_it_crosses_the_wire(engine: Open, checkpoint: Make, tmp_path: Path) -> None:
    e = await engine(reverse=checkpoint("plain", seed=5))
    with bound(f"unix:{tmp_path / 'socket'}") as sock:
        async with Server(e, "").listening(sock):
            client = await connect_engine(f"unix:{tmp_path / 'socket'}")
            try:
                found: list[Completion] = await client.generate([1, 2, EOS], SOME)
                assert found == await e.generate([1, 2, EOS], SOME)
                assert None not in {c.backward for c in found}
            finally:
                await client.aclose()


async def test_a_reverse_model_of_other_ids_is_one_line(engine: Open, checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(
        BadCheckpoint, match=r"^REVERSE_MODEL: .*odd\d* has another vocabulary than MODEL: train it from"
    ):
        await engine(reverse=checkpoint("odd"))
    with pytest.raises(BadCheckpoint, match=r"^REVERSE_MODEL: .* has no tokenizer"):
        await engine(reverse=tmp_path)
    with pytest.raises(BadCheckpoint, match=r"^DEVICE=tpu"):
        await engine(reverse=checkpoint("plain", seed=5), device="tpu")
