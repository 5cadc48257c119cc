"""llama.cpp through llama-cpp-python's low-level API: continuous batching, slots that keep each session's prompt.

One decode call takes the next token of every running reply and pieces of new prompts, as llama.cpp's own server does.
The candidates of one request share their prompt's keys and values (llama_memory_seq_cp).
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import llama_cpp

from benchmarks.serve.gguf_file import gguf, gguf_path
from benchmarks.serve.peers import SAMPLING, Asked, Worker, refuse_unusual
from core.engine.kv_cache import common_prefix

ROWS = 512
"""Tokens per decode call."""


@dataclass(slots=True)
class Slot:
    number: int
    session: str = ""
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Job:
    """One candidate. `pending` ids are to be computed; the leader waits with the last of them until it was forked."""

    asked: Asked
    slot: Slot
    sampler: Any
    pending: list[int]
    followers: list[Job] = field(default_factory=list)
    said: list[int] = field(default_factory=list)


class Llama(Worker):
    caches = True

    def convert(self) -> None:
        refuse_unusual(self.folder, "activation_function", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
        gguf(self.folder, self.kind)

    def load(self) -> str:
        path = gguf_path(self.folder, self.kind)
        llama_cpp.llama_log_set(_SILENT, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._ctx: Any = None
        self._expected = 1, 256
        self._waiting: deque[Asked] = deque()
        self._running: list[Job] = []
        self._batch = llama_cpp.llama_batch_init(ROWS, 0, 1)
        return f"{self.kind}, one slot per channel, prompt cache, continuous batching"

    async def expect(self, channels: int, tokens: int) -> None:
        """Taken up with the next request."""
        self._expected = channels, tokens
        self._stale = True

    def _new_context(self) -> None:
        if self._ctx:
            llama_cpp.llama_free(self._ctx)
        channels, tokens = self._expected
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = channels * -(-(tokens + 8) // 64) * 64
        params.n_seq_max = channels
        params.n_batch = params.n_ubatch = ROWS
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = (
            False  # in one pool, B does a quarter fewer replies a second: attention looks at all channels
        )
        self._ctx = llama_cpp.llama_init_from_model(self._model, params)
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self._idle = [Slot(number) for number in range(channels)]  # least recently used first
        self._stale = False

    def step(self, new: list[Asked]) -> bool:
        self._waiting = deque(asked for asked in (*self._waiting, *new) if not asked.future.done())  # given up
        if self._stale and not self._running:
            self._new_context()
        while self._waiting and len(self._idle) >= self._waiting[0].candidates:
            self._admit(self._waiting.popleft())
        if not self._running:
            return False
        drawing = self._fill()
        if code := llama_cpp.llama_decode(self._ctx, self._batch):
            raise RuntimeError(f"llama_decode returned {code}")
        for row, job in drawing:
            token = llama_cpp.llama_sampler_sample(job.sampler, self._ctx, row)
            job.said.append(token)
            job.pending = [token]
        self._fork()
        self._finish()
        return bool(self._running or self._waiting)

    def _admit(self, asked: Asked) -> None:
        own = [slot for slot in self._idle if slot.session == asked.session]
        best = max(own, key=lambda slot: common_prefix(slot.tokens, asked.prompt), default=self._idle[0])
        others = [slot for slot in (*own, *self._idle) if slot is not best]
        others = list({slot.number: slot for slot in others}.values())[: asked.candidates - 1]
        known = min(common_prefix(best.tokens, asked.prompt), len(asked.prompt) - 1) if best in own else 0
        llama_cpp.llama_memory_seq_rm(self._memory, best.number, known, -1)
        best.tokens = asked.prompt[:known]
        for slot in (best, *others):
            self._idle.remove(slot)
            slot.session = asked.session
        followers = [Job(asked, slot, _sampler(), []) for slot in others]
        job = Job(asked, best, _sampler(), asked.prompt[known : -1 if followers else None], followers)
        self._running += [job, *followers]
        self._fork()

    def _fork(self) -> None:
        """Where a leader's prompt is there but for its last id, its followers get a copy."""
        for job in self._running:
            if job.followers and not job.pending:
                for follower in job.followers:
                    llama_cpp.llama_memory_seq_rm(self._memory, follower.slot.number, -1, -1)
                    llama_cpp.llama_memory_seq_cp(self._memory, job.slot.number, follower.slot.number, -1, -1)
                    follower.slot.tokens = list(job.slot.tokens)
                    follower.pending = [job.asked.prompt[-1]]
                job.followers, job.pending = [], [job.asked.prompt[-1]]

    def _fill(self) -> list[tuple[int, Job]]:
        """Decode rows first, then prompts; (row, job) of those whose next token is drawn."""
        batch, rows, drawing = self._batch, 0, []
        for job in sorted(self._running, key=lambda job: len(job.pending) > 1):
            take = job.pending[: ROWS - rows]
            for id in take:
                batch.token[rows], batch.pos[rows] = id, len(job.slot.tokens)
                batch.n_seq_id[rows], batch.seq_id[rows][0], batch.logits[rows] = 1, job.slot.number, 0
                job.slot.tokens.append(id)
                rows += 1
            job.pending = job.pending[len(take) :]
            if take and not job.pending and not job.followers:
                batch.logits[rows - 1] = 1
                drawing.append((rows - 1, job))
        batch.n_tokens = rows
        return drawing

    def _finish(self) -> None:
        for asked in {id(job.asked): job.asked for job in self._running}.values():
            jobs = [job for job in self._running if job.asked is asked]
            done = [job for job in jobs if len(job.said) == asked.tokens]
            for job in done:
                job.pending = []
            if len(done) == len(jobs) or asked.future.done():  # or nobody waits for it any more
                self._running = [job for job in self._running if job.asked is not asked]
                self._idle += [job.slot for job in jobs]
                for job in jobs:
                    llama_cpp.llama_sampler_free(job.sampler)
                self.deliver(asked, [job.said for job in jobs])


def _sampler() -> Any:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_k(SAMPLING.top_k))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(SAMPLING.top_p, 1))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(SAMPLING.temperature))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(random.getrandbits(31)))
    return chain


_SILENT = llama_cpp.llama_log_callback(lambda *_: None)
