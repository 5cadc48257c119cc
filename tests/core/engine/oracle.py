"""Transformers' `generate`, the judge of what greedy float32 must say; and prompts to ask."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel
from transformers.utils import logging

from core.engine.base import Completion, SamplingParams
from core.engine.torch_engine import TorchEngine

quiet: Any = logging
quiet.set_verbosity_error()
quiet.disable_progress_bar()

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@cache
def reference(folder: Path) -> Any:
    model: Any = GPT2LMHeadModel
    return model.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(folder: Path, prompt: Sequence[int], max_tokens: int = 24, **options: Any) -> list[int]:
    """The reply to `prompt` alone, without its eos, which never comes first."""
    return list(_greedy(folder, tuple(prompt), max_tokens, **options))


@cache
def _greedy(folder: Path, prompt: tuple[int, ...], max_tokens: int, **options: Any) -> list[int]:
    model = reference(folder)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=min(max_tokens, model.config.n_positions - len(prompt)),
        min_new_tokens=1,
        pad_token_id=model.config.eos_token_id,
        **options,
    )
    reply: list[int] = out[0, len(prompt) :].tolist()
    return reply[:-1] if reply[-1] == model.config.eos_token_id else reply


def prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=rng).tolist() for n in lengths]


async def ask(engine: TorchEngine, prompt: Sequence[int], params: SamplingParams = GREEDY, **how: Any) -> Completion:
    [completion] = await engine.generate(prompt, params, **how)
    return completion


async def at_rest(engine: TorchEngine) -> None:
    """Wait until nothing runs; then the books must be right."""
    scheduler = engine.core.scheduler
    await asyncio.gather(*(engine.forget("nobody") for _ in range(2)))
    async with asyncio.timeout(60):
        while scheduler.requests:
            await asyncio.sleep(0.005)
    scheduler.check_integrity()
    assert not scheduler.cache.running and not scheduler.waiting


async def until_prepared(engine: TorchEngine) -> None:
    """Until what it was told to prepare is computed or dropped."""
    await engine.forget("nobody")  # the hints before it are taken
    async with asyncio.timeout(60):
        while engine.core.scheduler.preparing:
            await asyncio.sleep(0.005)
