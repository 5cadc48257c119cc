"""The echo satisfies the contract and makes sense to people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.engine.base import BadCheckpoint, Cancelled, Engine, EngineClosed, PromptTooLong, SamplingParams
from core.engine.echo_engine import EchoEngine

EOS = 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"vocab_size": 300, "eos_token_id": EOS, "n_positions": 12, "n_layer": 1, "n_head": 1, "n_embd": 8}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([1, 2, 3, EOS], [1, 2, 3]),
        ([1, EOS, 2, EOS, 3, 4, EOS], [3, 4]),
        ([1, EOS, 2, 3], [2, 3]),
        ([EOS], []),
        ([7, EOS, EOS], [7]),
    ],
)
async def test_it_says_the_last_turn(folder: Path, prompt: list[int], said: list[int]) -> None:
    engine: Engine = EchoEngine(folder)
    (completion,) = await engine.generate(prompt, SamplingParams(seed=3))
    assert completion.token_ids == said
    assert completion.finish_reason == "stop"
    assert await engine.ready() == ""


async def test_it_cuts_at_max_tokens_and_draws_n(folder: Path) -> None:
    completions = await EchoEngine(folder).generate([1, 2, 3, EOS], SamplingParams(max_tokens=2, n=3))
    assert [(c.token_ids, c.finish_reason) for c in completions] == [([1, 2], "length")] * 3


async def test_it_refuses_like_any_engine(folder: Path) -> None:
    engine = EchoEngine(folder)
    for prompt in ([], [300], [-1]):
        with pytest.raises(ValueError, match="from 0 below 300"):
            await engine.generate(prompt, SamplingParams())
        engine.prepare("anybody", prompt)
    with pytest.raises(PromptTooLong, match="12 tokens; at most 11"):
        await engine.generate([1] * 12, SamplingParams())
    with pytest.raises(Cancelled):
        await engine.generate([1], SamplingParams(), deadline=0)
    await engine.forget("anybody")
    engine.prepare("anybody", [1, 2])
    await engine.aclose()
    assert await engine.ready()
    with pytest.raises(EngineClosed):
        await engine.generate([1], SamplingParams())


def test_it_knows_of_a_config_what_a_model_would(tmp_path: Path) -> None:
    """DialoGPT's first files name no end of text, and older ones `n_ctx` alone."""
    config = {"vocab_size": 50257, "n_ctx": 512, "n_layer": 1, "n_head": 1, "n_embd": 8}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    info = EchoEngine(tmp_path).info
    assert (info.eos_id, info.max_positions) == (50256, 512)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"vocab_size": 3}', '{"vocab_size": null, "eos_token_id": 1}'])
def test_a_folder_without_a_readable_config_is_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, "utf-8")
    with pytest.raises(BadCheckpoint) as caught:
        EchoEngine(tmp_path)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)
