"""GPT-2 on CUDA: a step's kernels (kernels.py) as one graph, launched at once instead of one by one.

A graph replays fixed work on fixed addresses. So the KV of all sequences stands in one pool of pages, and the rows of a
step are a table of numbers: id, position, where its key goes, which row's logits are wanted, pages. There is a graph
for each number of rows and of logits, rounded up; rows that pad write to a page which nobody reads. A prompt's rows are
rows like any other, so nothing depends on how it is cut.

On a device without CUDA a step is not captured but called again, on the same buffers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.engine.kv_cache import ROUND, Pages, round_up
from core.engine.model import GPT2, TILE, Batch, Linear
from core.engine.sampler import Summary, addresses

log = logging.getLogger(__name__)

MOST_ROWS = 256
"""Rows that are taken at once."""

SCRATCH = 0
"""The page where padding rows write."""

SPLIT, LEAST = 4, 64
"""Parts in which a product that is added to the residual is made, so that all of the GPU takes part; a part's length is
a multiple of the second."""

TURNS = 10
"""In as many a product's weights may all come before the kernel waits: more have no room beside other kernels'."""

SHARED_ROWS = 32
"""Rows of a step below which several programs share a row's head."""

VOCAB, PART = 64, 1024
"""Logits that a tile is wide, and of which a program finds the maxima."""

Step = Callable[[], None]
Numbers = NDArray[np.int32]


def lost(error: Exception) -> bool:
    """Is the device of no more use to this process? Not where it had no memory left (CUDA's error 2) or a capture was
    refused or went wrong (900 to 909; https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html).
    Triton's errors have no code: a device that is lost says so again when it is waited for."""
    if str(error).startswith("Triton Error ["):
        try:
            torch.cuda.synchronize()
        except RuntimeError as again:
            error = again
    code = getattr(error, "error_code", 0)
    return isinstance(error, torch.AcceleratorError) and code != 2 and not 900 <= code < 910


class PoolPages(Pages[int]):
    """A sequence's pages in the pool, by number."""

    def __init__(self, free: list[int]) -> None:
        super().__init__(free, none_left)
        self.numbers = np.array([], np.int32)

    def grown(self) -> None:
        self.numbers = np.array(self.pages, np.int32)

    def slots(self, start: int, count: int) -> Numbers:
        """Where positions start, start + 1, … stand in the pool."""
        positions = np.arange(start, start + count)
        return self.numbers[positions // TILE] * TILE + positions % TILE


def none_left() -> int:
    raise torch.OutOfMemoryError("no page of keys and values is free")


class GraphedGPT2:
    """Satisfies `core.engine.model.Model`. KV is `PoolPages`."""

    def __init__(self, eager: GPT2, tokens: int, *, plain: bool = False) -> None:
        """Shares the weights of `eager`. `tokens`: the room that sequences may take together. With `plain`, products
        have one shape of tile for all, and no kernel starts before the one before it has ended. ImportError without
        Triton, which comes with torch for CUDA on Linux."""
        from core.engine import kernels

        self.eager, self.tokens, self.plain, self.kernels = eager, tokens, plain, kernels
        self.config, self.device, self.dtype = eager.config, eager.device, eager.dtype
        c, self.cuda = self.config, self.device.type == "cuda"
        self.token_bytes = 2 * c.n_layer * c.n_embd * self.dtype.itemsize
        self.how = f"{self.device}, {str(self.dtype).removeprefix('torch.')}, CUDA graphs"
        self._capture: Callable[[Step], Step] = Capture(self.device) if self.cuda else uncaptured
        self._graphs: dict[tuple[int, int], Step] = {}
        window = round_up(c.n_positions, ROUND)  # a judge's, and what nobody counts any more and is given back late
        pages = 1 + (tokens + 3 * window) // TILE
        self._free = list(range(pages - 1, SCRATCH, -1))
        self.pool = self._new(c.n_layer, 2, pages * TILE, c.n_embd, dtype=self.dtype)
        self._columns = 4 + window // TILE
        self._table = self._new(MOST_ROWS, self._columns, dtype=torch.int32)
        self._x, self._parts = self._new(MOST_ROWS, c.n_embd), self._new(SPLIT, MOST_ROWS, c.n_embd)
        self._normed, self._q, self._mixed = (self._new(MOST_ROWS, c.n_embd, dtype=self.dtype) for _ in range(3))
        self._inner = self._new(MOST_ROWS, c.n_inner, dtype=self.dtype)
        d = power(eager.head_dim)  # what several programs found of a row's head, and how many have
        self._seen = self._new(SHARED_ROWS * c.n_head * -(-window // keys(d)) * (d + 2))
        self._arrived = self._new(SHARED_ROWS * c.n_head, dtype=torch.int32)
        self._sums = self._new(MOST_ROWS, -(-c.vocab_size // PART))
        self._words = -(-c.vocab_size // 32)
        # A row: logits, maxima of each 32 of them, log(sum(e^x)).
        self._found = self._new(MOST_ROWS, round_up(33 * self._words + 1, 32))
        self._filled = self._answers = torch.empty(0)
        self._make_room(MOST_ROWS, MOST_ROWS)
        nvidia = self.cuda and torch.version.hip is None
        self.capability = torch.cuda.get_device_capability(self.device) if nvidia else (8, 0)
        self.early = not plain and self.capability >= (9, 0)
        """Is each kernel ready to go on when the one before it ends? (PDL, programmatic dependent launch.)"""

    @property
    def _launched(self) -> dict[str, bool]:
        return {"PDL": True, "launch_pdl": True} if self.early else {"PDL": False}

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _pinned(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """On the host, where the device copies from and to."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self.cuda)

    def new_kv(self, capacity: int) -> PoolPages:
        return self.grow_kv(PoolPages(self._free), capacity, 0)

    def grow_kv(self, kv: PoolPages, capacity: int, count: int) -> PoolPages:
        kv.grow(-(-capacity // TILE))
        return kv

    def copy_kv(self, source: PoolPages, target: PoolPages, count: int) -> None:
        old, new = (torch.from_numpy(kv.slots(0, count)).to(self.device) for kv in (source, target))
        self.pool.index_copy_(2, new, self.pool.index_select(2, old))

    def forward(self, batch: Batch) -> tuple[Tensor, Summary]:
        """Rows in order, MOST_ROWS at a time: what a row needs of the ones before it is there or made beside it."""
        table, wanted = self._filled_in(batch), np.array(batch.wanted, np.int32)
        self._make_room(len(table), len(wanted))
        answers = self._answers[: len(wanted)]
        try:
            for begin in range(0, len(table), MOST_ROWS):
                first, behind = np.searchsorted(wanted, (begin, begin + MOST_ROWS))
                picked = wanted[first:behind] - begin
                self._run(begin, table[begin : begin + MOST_ROWS], picked, answers[first:behind])
        finally:  # what is on its way to the device or from it stays as it is until it is there
            if self.cuda:
                torch.cuda.current_stream(self.device).synchronize()
        tops, totals = answers[:, 32 * self._words :], answers[:, 33 * self._words].tolist()
        return answers[:, : self.config.vocab_size], Summary(totals, addresses(tops))

    def _run(self, begin: int, table: Numbers, wanted: Numbers, answers: Tensor) -> None:
        """What is found of those rows of `table` that are `wanted` is on its way to `answers`. On the host each run of
        a step has memory of its own, from row `begin` on, so that none waits for another's copies."""
        rows, picks = len(table), len(wanted)
        key = shape(rows, picks)
        filled = self._filled[begin : begin + key[0]]
        numbers = filled.numpy()
        numbers[:rows], numbers[rows:] = table, 0
        numbers[:picks, 3] = wanted
        self._table[: key[0]].copy_(filled, non_blocking=True)
        if key in self._graphs:
            self._graphs[key]()
        else:  # a kernel that must be compiled or loaded yet cannot be captured
            self._step(*key)
            self._graphs[key] = self._captured(lambda: self._step(*key))
        answers.copy_(self._found[:picks], non_blocking=True)

    def _make_room(self, rows: int, wanted: int) -> None:
        """On the host, for a step's table and for what is found."""
        if rows > len(self._filled):
            self._filled = self._pinned(round_up(rows, MOST_ROWS), self._columns, dtype=torch.int32)
        if wanted > len(self._answers):
            self._answers = self._pinned(round_up(wanted, MOST_ROWS), self._found.shape[1])

    def _filled_in(self, batch: Batch) -> Numbers:
        """(rows, columns)"""
        width = self._columns - 4
        pages = np.zeros((len(batch.rows), width), np.int32)
        for i, r in enumerate(batch.rows):
            pages[i, : len(r.kv.numbers)] = r.kv.numbers[:width]  # room for a prompt to come may reach over the last
        counts = np.array([r.count for r in batch.rows])
        of, ends = np.repeat(np.arange(len(counts)), counts), counts.cumsum()
        starts = np.array([r.start for r in batch.rows]) - (ends - counts)
        positions = np.arange(len(of)) + starts[of]
        table = np.empty((len(of), self._columns), np.int32)
        table[:, 0], table[:, 1], table[:, 3], table[:, 4:] = batch.ids, positions, 0, pages[of]
        table[:, 2] = pages[of, positions // TILE] * TILE + positions % TILE
        return table

    def _captured(self, step: Step) -> Step:
        try:
            return self._capture(step)
        except RuntimeError as error:
            if lost(error):
                raise
            log.warning("a CUDA graph cannot be captured (%r): its steps are launched kernel by kernel", error)
            return step

    def _step(self, rows: int, wanted: int) -> None:
        """What a graph does: from the first rows of the table to the first rows that are found."""
        normed, c, layers, head_dim = self._normed, self.config, self.eager.h, self.eager.head_dim
        d, ways = power(head_dim), 1 if self.plain else shares(rows)
        self._norm("embed", rows, None, layers[0].ln_1)
        for i, layer in enumerate(layers):
            self._linear("qkv", rows, normed, layer.c_attn, self._q, pool=self.pool[i])
            self.kernels.attend[rows, c.n_head, ways](
                self._q, self.pool[i], self._mixed, self._table, self._seen, self._arrived, self._columns,
                self.pool.shape[2], c.n_embd, head_dim, self.eager.scales[i], WAYS=ways, PAGE=TILE, N=keys(d), D=d,
                **self._launched,
            )  # fmt: skip
            self._linear("part", rows, self._mixed, layer.attn_c_proj, self._parts)
            self._norm("add", rows, layer.attn_c_proj, layer.ln_2)
            self._linear("wide", rows, normed, layer.c_fc, self._inner)
            self._linear("part", rows, self._inner, layer.mlp_c_proj, self._parts)
            if layer is not layers[-1]:
                self._norm("add", rows, layer.mlp_c_proj, layers[i + 1].ln_1)
        self._norm("picked", rows, layers[-1].mlp_c_proj, self.eager.ln_f, wanted)
        self._linear("logits", wanted, normed, self.eager.lm_head, self._found)
        (across, parts), words = (self._found.shape[1], self._sums.shape[1]), self._words
        self.kernels.summary[wanted, parts](
            self._found, self._sums, c.vocab_size, words, across, N=PART, **self._launched
        )
        self.kernels.summed[(wanted,)](self._found, self._sums, words, across, parts, N=power(parts), **self._launched)

    def _norm(
        self, kind: str, rows: int, added: Linear | None, ln: tuple[Tensor, Tensor], programs: int | None = None
    ) -> None:
        bias, e = added.bias if added else None, self.config.n_embd
        self.kernels.norm[(programs or rows,)](
            self._x, self._parts, bias, *ln, self._normed, self._table, self.eager.wte, self.eager.wpe, rows, e,
            self._columns, self.config.layer_norm_epsilon, KIND=kind, SPLIT=SPLIT, E=power(e),
            num_warps=8 if e > 1024 else 4, **self._launched,
        )  # fmt: skip

    def _linear(self, kind: str, rows: int, x: Tensor, by: Linear, out: Tensor, pool: Tensor | None = None) -> None:
        assert by.weight is not None
        wide, deep = by.weight.shape
        split = SPLIT if kind == "part" else 1
        length = round_up(-(-deep // split), LEAST)
        m, n, k, stages = 32, 32 if rows <= 64 else 64, 32, 3
        turns = 0
        if self.dtype is torch.float32 or self.capability < (8, 0):  # made by other units, with a thread's registers
            m, n, k, stages = 16, 32, 16, 2
        elif rows <= 16 or self.plain:
            m, n, stages = 8 if rows <= 8 and not self.plain else 16, 16, 4
            turns = -(-length // (self.kernels.WARPS.value * k)) if self.early and kind != "logits" else 0
        if kind == "logits":
            n = VOCAB
        self.kernels.linear[-(-rows // m), -(-wide // n), split](
            x, by.weight, by.bias, out, self._table, pool, rows, wide, deep, length, self._columns, self.pool.shape[2],
            self._found.shape[1], KIND=kind, ACTIVATION=by.activation, M=m, N=n, K=k,
            C=turns if turns <= TURNS else 0, num_stages=stages, **self._launched,
        )  # fmt: skip


def shape(rows: int, wanted: int) -> tuple[int, int]:
    """Of the graph that a step takes: so few that all are made at start."""
    rows = power(rows)
    return rows, next(count for count in (1, 16, rows) if wanted <= count <= rows)


def shapes(most: int) -> list[tuple[int, int]]:
    """All that steps of up to `most` rows may have."""
    powers = [1 << i for i in range((most - 1).bit_length() + 1)]
    return sorted({shape(rows, min(wanted, rows)) for rows in powers for wanted in (1, 16, most)})


def keys(d: int) -> int:
    """That attention takes together, of heads of d numbers."""
    return min(128, max(16, 16384 // d))


def shares(rows: int) -> int:
    """Programs that share the keys of a row's head, so that few rows give work to all of the GPU."""
    return max(1, min(8, SHARED_ROWS // rows))


def power(number: int) -> int:
    """The power of two from `number` up."""
    return 1 << (number - 1).bit_length()


def uncaptured(step: Step) -> Step:
    """Stands in for `Capture`: calls the step again."""
    return step


class Capture:
    """Makes graphs of steps, on a stream of their own. They allocate nothing, so they share no pool of torch's: one in
    which a capture has failed takes no other."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda.device(device)
        with self._device:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # The inner stream is today's again at the end: torch.cuda.graph stays on its own where a capture fails.
        with self._device, torch.cuda.stream(torch.cuda.current_stream()):
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                step()
        return graph.replay
