"""Says it back: the house without weights. For tests, and for whoever wants to see a platform work first.

Its tokenizer is the embedded model's. A reply is the last turn of the prompt, cut at max_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.engine.base import (
    Cancelled,
    Completion,
    EngineClosed,
    ModelInfo,
    PromptTooLong,
    SamplingParams,
)
from core.engine.config import read_config
from core.engine.hub import EMBEDDED


class EchoEngine:
    ended = ""

    def __init__(self, folder: Path = EMBEDDED) -> None:
        """`folder`: a checkpoint's config.json and tokenizer; no weights are read. Raises BadCheckpoint."""
        config = read_config(folder / "config.json")
        self._info = ModelInfo(
            name="echo",
            max_positions=config.n_positions,
            vocab_size=config.vocab_size,
            eos_id=config.eos_id,
            path=str(folder),
            how="says it back, no model",
        )
        self._closed = False

    @property
    def info(self) -> ModelInfo:
        return self._info

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, session: str = "", deadline: float | None = None
    ) -> list[Completion]:
        """`params.n` times the prompt's last turn."""
        if self._closed:
            raise EngineClosed("the engine is closed")
        prompt = self._info.prompt(prompt)
        if len(prompt) >= self._info.max_positions:
            raise PromptTooLong(f"{len(prompt)} tokens; at most {self._info.max_positions - 1} are taken")
        if deadline is not None and deadline <= 0:
            raise Cancelled("the deadline has passed")
        turn = self._info.last_turn(prompt)
        said = turn[: params.max_tokens]
        return [Completion(list(said), 0.0, "stop" if said == turn else "length", 0) for _ in range(params.n)]

    def prepare(self, session: str, ids: Sequence[int]) -> None:
        """Nothing is computed."""

    async def ready(self) -> str:
        return "the engine is closed" if self._closed else ""

    async def forget(self, session: str) -> None:
        """Nothing is kept."""

    async def aclose(self) -> None:
        self._closed = True
