"""Hugging Face Transformers: one request at a time, batches of 16, and its own continuous batching."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.serve.peers import SAMPLING, Absent, Asked, Batcher, Peer, device
from core.engine.machine import cores

ON_CUDA = device() == "cuda"
BATCHED = "bfloat16" if ON_CUDA else "float32"
"""What batches are computed in."""
transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
torch.set_grad_enabled(False)


def load(folder: Path, dtype: str, threads: int) -> Any:
    torch.set_num_threads(threads)
    model: Any = transformers.GPT2LMHeadModel
    return model.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device()).eval()


def sampling(tokens: int, candidates: int = 1) -> Any:
    """No end of text is known, so every reply has `tokens` ids."""
    return transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=SAMPLING.temperature,
        top_k=SAMPLING.top_k,
        top_p=SAMPLING.top_p,
        max_new_tokens=tokens,
        num_return_sequences=candidates,
        pad_token_id=0,
        eos_token_id=None,
    )


class Serial(Batcher):
    """What nearly every bot does."""

    limit = 1

    def load(self) -> str:
        self._model = load(self.folder, self.kind, self.threads)
        self._model.generation_config.eos_token_id = None
        return f"generate(), {self.kind}, {self._model.config._attn_implementation}, one request at a time"

    def run(self, batch: list[Asked]) -> list[list[list[int]]]:
        """Padded on the left."""
        longest = max(len(asked.prompt) for asked in batch)
        ids = torch.tensor([[0] * (longest - len(a.prompt)) + a.prompt for a in batch], device=device())
        mask = torch.tensor([[0] * (longest - len(a.prompt)) + [1] * len(a.prompt) for a in batch], device=device())
        config = sampling(batch[0].tokens, batch[0].candidates)
        rows = self._model.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
        return [list(group) for group in zip(*[iter(rows)] * batch[0].candidates, strict=True)]


class Static(Serial):
    """Whoever waits is answered in one padded batch: batches of equal lengths answer half as many a second here."""

    limit = 256 if ON_CUDA else 16

    def load(self) -> str:
        self.kind = BATCHED
        return super().load().replace("one request at a time", f"batches of up to {self.limit}")


class Continuous(Peer):
    """Its paged cache and its scheduler (`init_continuous_batching`). On CUDA it chooses for itself."""

    caches = True

    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads or cores()
        self._numbers = itertools.count()

    async def open(self) -> str:
        if not hasattr(transformers.GPT2LMHeadModel, "init_continuous_batching"):
            raise Absent(f"transformers {transformers.__version__} has no init_continuous_batching")
        model = load(self.folder, BATCHED, self.threads)
        by_hand: dict[str, Any] = {
            "page_size": 32,
            "num_blocks": 1024,
            "max_batch_tokens": 256,
            "use_cuda_graph": False,
        }
        config = transformers.ContinuousBatchingConfig(**({} if ON_CUDA else by_hand))
        self._manager = model.init_continuous_batching(sampling(16), config)
        self._manager.start()
        return f"continuous batching, {BATCHED}, {model.config._attn_implementation}, pages of {config.page_size}"

    async def expect(self, channels: int, tokens: int) -> None: ...

    async def reply(self, prompt: Sequence[int], session: str, candidates: int, tokens: int) -> list[list[int]]:
        """Candidates are requests of their own; equal prefixes share pages."""
        return await asyncio.gather(*(self._one(prompt, tokens) for _ in range(candidates)))

    async def _one(self, prompt: Sequence[int], tokens: int) -> list[int]:
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()

        def done(result: Any) -> None:
            if result.is_finished() and not future.done():
                if result.error:
                    future.set_exception(RuntimeError(str(result.error)))
                else:
                    future.set_result(list(result.generated_tokens))

        name = f"r{next(self._numbers)}"
        self._manager.register_result_handler(name, done)
        self._manager.add_request(list(prompt), request_id=name, max_new_tokens=tokens, eos_token_id=-1)
        try:
            return await future
        except asyncio.CancelledError:
            self._manager.cancel_request(name)
            raise

    def prepare(self, session: str, ids: Sequence[int]) -> None: ...

    async def aclose(self) -> None:
        await asyncio.to_thread(self._manager.stop, True, 10.0)
