"""Who answers. A peer is a class with open, reply, aclose; a new one is a line in PEERS."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import queue
import threading
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from core.engine.base import SamplingParams
from core.engine.futures import settle
from core.engine.machine import cores

SAMPLING = SamplingParams(temperature=0.8, top_k=50, top_p=0.9)
"""The same for all."""
PEERS = {
    "palaver-float32": "palaver:Palaver",
    "palaver-bfloat16": "palaver:Palaver",
    "palaver-int8": "palaver:Palaver",
    "palaver-int8-torch": "palaver:Palaver",
    "palaver-bfloat16-torch": "palaver:Palaver",
    "transformers-float32": "transformers_peer:Serial",
    "transformers-bfloat16": "transformers_peer:Serial",
    "transformers-static": "transformers_peer:Static",
    "transformers-continuous": "transformers_peer:Continuous",
    "ctranslate2-float32": "ctranslate2_peer:CTranslate2",
    "ctranslate2-int8": "ctranslate2_peer:CTranslate2",
    "llama.cpp-f32": "llama_peer:Llama",
    "llama.cpp-bf16": "llama_peer:Llama",
    "llama.cpp-q8_0": "llama_peer:Llama",
}
"""name -> module:class. What follows the first hyphen is the peer's `kind`: its precision or way of batching."""
ON_CUDA = "palaver-float32", "palaver-bfloat16", "transformers"
USUAL: dict[str, tuple[object, ...]] = {
    "activation_function": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
"""What GPT-2's configuration says, in every spelling; some formats have no place for anything else."""


def device() -> str:
    """cpu or cuda: the same for all, from the environment, as Palaver has it."""
    return os.environ.get("DEVICE") or "cpu"


class Absent(Exception):
    """This peer cannot run here; str() says why."""


def refuse_unusual(folder: Path, *names: str) -> None:
    """Raises Absent where the checkpoint differs from GPT-2 in one of these."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for name in names:
        if config.get(name, USUAL[name][0]) not in USUAL[name]:
            raise Absent(f"its format has no place for {name} {config[name]}")


class Peer(Protocol):
    caches: bool
    """Keeps what it computed for a session's next turn."""

    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        """`folder`: the checkpoint; `threads`: 0 is every core."""
        ...

    def convert(self) -> None:
        """Write beside the checkpoint what this peer loads in its place, unless it is there: once, and not measured."""
        return

    async def open(self) -> str:
        """Load; one line on how it runs. Raises Absent."""
        ...

    async def expect(self, channels: int, tokens: int) -> None:
        """So many channels come next, each with at most so many ids: for peers that allot their cache beforehand."""
        ...

    async def reply(self, prompt: Sequence[int], session: str, candidates: int, tokens: int) -> list[list[int]]:
        """`candidates` continuations of exactly `tokens` ids each."""
        ...

    def prepare(self, session: str, ids: Sequence[int]) -> None:
        """The next prompt will begin with `ids`, as far as one can tell: for peers that compute while nobody waits."""
        ...

    async def aclose(self) -> None: ...


def make(name: str, folder: Path, threads: int) -> Peer:
    """Raises Absent when its library is not installed, or it is for CPUs."""
    if device() == "cuda" and not name.startswith(ON_CUDA):
        raise Absent("measured on CPUs alone")
    module, _, cls = PEERS[name].partition(":")
    try:
        found = getattr(importlib.import_module(f"benchmarks.serve.{module}"), cls)
    except ImportError as error:
        raise Absent(f"not installed ({error})") from error
    peer: Peer = found(name.partition("-")[2], folder, threads)
    return peer


@dataclass(slots=True)
class Asked:
    prompt: list[int]
    session: str
    candidates: int
    tokens: int
    future: asyncio.Future[list[list[int]]]


class Worker(Peer):
    """A peer whose library is synchronous: one thread loads it and runs it, as libraries like best."""

    caches = False

    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        self.kind, self.folder, self.threads = kind, folder, threads or cores()
        self._inbox: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()

    @abstractmethod
    def load(self) -> str:
        """In the thread: load, and say how it runs. Raises Absent."""

    @abstractmethod
    def step(self, new: list[Asked]) -> bool:
        """In the thread: take `new` in and go on; False when nothing is left to do."""

    async def open(self) -> str:
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[str] = self._loop.create_future()
        self._closed: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._work, daemon=True).start()
        return await self._opened

    async def expect(self, channels: int, tokens: int) -> None: ...

    async def reply(self, prompt: Sequence[int], session: str, candidates: int, tokens: int) -> list[list[int]]:
        asked = Asked(list(prompt), session, candidates, tokens, self._loop.create_future())
        self._inbox.put(asked)
        return await asked.future

    def prepare(self, session: str, ids: Sequence[int]) -> None: ...

    async def aclose(self) -> None:
        self._inbox.put(None)
        await self._closed

    def deliver(self, asked: Asked, replies: list[list[int]]) -> None:
        settle(asked.future, replies)

    def _work(self) -> None:
        try:
            settle(self._opened, self.load())
            busy = False
            while True:
                new: list[Asked] = []
                with contextlib.suppress(queue.Empty):
                    while True:
                        asked = self._inbox.get(block=not busy and not new)
                        if asked is None:
                            return
                        new.append(asked)
                busy = self.step(new)
        except BaseException as error:
            if not self._opened.done():
                settle(self._opened, error)
            else:
                os._exit(_say(error))  # whoever waits would wait for ever
        finally:
            settle(self._closed, None)


class Batcher(Worker):
    """Whoever waits is answered together, `limit` replies at most; who comes later waits for the next batch."""

    limit = 16
    equal = False
    """Only prompts as long as the oldest one share its batch: for libraries that compute the padding of others."""

    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        super().__init__(kind, folder, threads)
        self._waiting: list[Asked] = []

    @abstractmethod
    def run(self, batch: list[Asked]) -> list[list[list[int]]]:
        """All with the same number of candidates and tokens."""

    def step(self, new: list[Asked]) -> bool:
        self._waiting = [asked for asked in (*self._waiting, *new) if not asked.future.done()]  # given up
        if not self._waiting:
            return False
        oldest = self._waiting[0]
        fit = [asked for asked in self._waiting if not self.equal or len(asked.prompt) == len(oldest.prompt)]
        batch = fit[: max(1, self.limit // oldest.candidates)]
        self._waiting = [asked for asked in self._waiting if asked not in batch]
        for asked, replies in zip(batch, self.run(batch), strict=True):
            self.deliver(asked, replies)
        return bool(self._waiting)


def _say(error: BaseException) -> int:
    import traceback

    traceback.print_exception(error)
    return 1
