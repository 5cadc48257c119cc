"""Palaver itself, through the port that its bots use: the engine in a child process, as `palaver run` has it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.serve.peers import SAMPLING, Peer, device
from core.app import open_engine
from core.engine.base import Engine
from core.settings import Settings


class Palaver(Peer):
    caches = True

    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        if kind.endswith("-torch"):
            os.environ["NATIVE"] = os.environ["GRAPHS"] = "0"  # as on a machine without a compiler
        dtype = kind.removesuffix("-torch")
        self._settings = Settings(model=str(folder), dtype=dtype, device=device(), threads=threads, engine="process")
        self._engine: Engine
        self._stack = contextlib.AsyncExitStack()

    async def open(self) -> str:
        self._engine = await self._stack.enter_async_context(open_engine(self._settings))
        return self._engine.info.how

    async def expect(self, channels: int, tokens: int) -> None: ...

    async def reply(self, prompt: Sequence[int], session: str, candidates: int, tokens: int) -> list[list[int]]:
        """No other peer stops at an end of text: here too it counts as an id, and what follows it is asked for."""
        params = replace(SAMPLING, max_tokens=tokens, n=candidates)
        replies = [done.token_ids for done in await self._engine.generate(prompt, params, session=session)]
        for said in replies:
            while len(said) < tokens:
                said.append(self._engine.info.eos_id)
                if rest := tokens - len(said):
                    params = replace(SAMPLING, max_tokens=rest)
                    [more] = await self._engine.generate([*prompt, *said], params, session=session)
                    said += more.token_ids
        return replies

    def prepare(self, session: str, ids: Sequence[int]) -> None:
        self._engine.prepare(session, ids)

    async def aclose(self) -> None:
        await self._stack.aclose()
