"""The embedded model as it ships: small, in DialoGPT's format, and no worse than its card says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.engine.base import SamplingParams
from core.engine.torch_engine import TorchEngine, open_torch_engine
from core.evaluation.recall import recall
from core.evaluation.selfchat import Talker, health, self_chats
from core.tokenizer import Tokenizer
from core.voice import Voice

FOLDER = Path(__file__).parents[3] / "core/models/tiny"


@pytest.fixture
async def engine() -> AsyncIterator[TorchEngine]:
    engine = await open_torch_engine(FOLDER, device="cpu", dtype="float32", threads=1)
    yield engine
    await engine.aclose()


def test_it_is_small_and_complete() -> None:
    sizes = {file.name: file.stat().st_size for file in FOLDER.iterdir() if file.is_file()}
    assert sum(sizes.values()) <= 20_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(sizes)


def test_its_config_is_dialogpts() -> None:
    config, tokenizer = json.loads((FOLDER / "config.json").read_text()), Tokenizer.load(FOLDER)
    assert config["eos_token_id"] == config["bos_token_id"] == tokenizer.eos_id == len(tokenizer) - 1
    assert config["vocab_size"] == len(tokenizer)
    special = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert [token["content"] for token in special] == ["<|endoftext|>"]


async def test_it_remembers(engine: TorchEngine) -> None:
    talker = Talker(Voice(engine, Tokenizer.load(FOLDER), SamplingParams(max_tokens=32), 192))
    for distance in (1, 3):
        found = await recall(talker, "name", distance, 40, held_out=False, seed=9)
        assert found.share >= 0.8, found.wrong


async def test_it_keeps_talking(engine: TorchEngine) -> None:
    talker = Talker(Voice(engine, Tokenizer.load(FOLDER), SamplingParams(), 128))
    found = health(await self_chats(talker, 6, turns=20, seed=3))
    assert found.replies == 120
    assert found.silent == 0
    assert found.repeated < 12
    assert 4 < found.length < 20
