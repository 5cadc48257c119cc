"""GPT-2 whose short steps are CUDA graphs: one launch for a whole step instead of hundreds.

A graph replays fixed work on fixed addresses. So the KV of all sequences stands in one pool of pages, and the rows of a
step are a table of numbers: id, position, pages. There is a graph for each number of rows and of pages that a table may
have, captured when it is first wanted. A sequence's rows are taken one by one where they are few (decode, guesses, the
rest of a prompt that was cached); a step with more of a prompt is launched kernel by kernel, on the same KV.

Rows are the same bits whatever stands beside them, as model.py promises, because
- products are made in the same blocks, with padding rows that write to a page which nobody reads.
- a row attends to a number of keys that is a function of its position alone; rows with other numbers are another graph.
  Its own keys end where its tile ends, the rest are zeros, and keys after its position weigh exactly 0.
- on CUDA the attention's backend is the one that gives each tile of queries of a head to one thread block, which goes
  through the keys in order: no other row and no number of rows changes how it sums.

On a device without CUDA a step is not captured but called again, on the same buffers.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.engine.kv_cache import ROUND, round_up
from core.engine.model import GPT2, MIN_ROWS, TILE, Batch, Rows, causal_mask

log = logging.getLogger(__name__)

SHORT = 16
"""Rows of one sequence up to which each gathers its keys for itself."""

FEWEST, MOST = 4, 256
"""Pages that a table has at least, and rows that are taken at once with so many; with twice the pages half the rows, so
that what a step gathers of the pool stays as large (of a medium model in 16 bits 256 MiB)."""

ZEROS, SCRATCH = 0, 1
"""The page of zeros that fills tables up, never written; and where padding rows write."""

NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far logits may be from those of the same weights launched kernel by kernel, relative to their spread."""

Step = Callable[[], None]
Chunk = tuple[list[int], list[list[int]]]
"""Rows that are taken at once, and for each its id, its position and its pages."""


def lost(error: Exception) -> bool:
    """Is the device of no more use to this process? Not where it had no memory left (CUDA's error 2) or a capture was
    refused or went wrong (900 to 909; https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html)."""
    code = getattr(error, "error_code", 0)
    return isinstance(error, torch.AcceleratorError) and code != 2 and not 900 <= code < 910


class Pages:
    """A sequence's pages in the pool; given back when nobody holds this any more."""

    def __init__(self, free: list[int], count: int) -> None:
        if count > len(free):
            raise torch.OutOfMemoryError(f"{count} pages wanted, {len(free)} free")
        self.numbers = [free.pop() for _ in range(count)]
        weakref.finalize(self, free.extend, self.numbers)

    def slots(self, start: int, count: int) -> list[int]:
        """Where positions start, start + 1, … stand in the pool."""
        return [self.numbers[p // TILE] * TILE + p % TILE for p in range(start, start + count)]


class Places(NamedTuple):
    """For b rows with n pages each: slots to write (b,), pages to read (b * n,), mask (b, 1, MIN_ROWS, n * TILE)."""

    slots: Tensor
    pages: Tensor
    mask: Tensor


class GraphedGPT2(GPT2):
    """Satisfies `core.engine.model.Model`. KV is `Pages`."""

    def __init__(self, eager: GPT2, tokens: int) -> None:
        """Shares the weights of `eager`. `tokens`: the room that sequences may take together."""
        vars(self).update(vars(eager))
        c, self.tokens = self.config, tokens
        self.how = f"{self.device}, {str(self.dtype).removeprefix('torch.')}, CUDA graphs"
        cuda = self.device.type == "cuda"
        self._backend = SDPBackend.EFFICIENT_ATTENTION if cuda else SDPBackend.FLASH_ATTENTION
        self._capture: Callable[[Step], Step] = Capture(self.device) if cuda else uncaptured
        self._graphs: dict[tuple[int, int], Step] = {}
        window = round_up(c.n_positions, ROUND)  # a slot that moves stands in two places until it is copied
        pages = 2 + (tokens + 2 * window) // TILE
        self._free = list(range(pages - 1, SCRATCH, -1))
        shape = c.n_layer, 2, pages, TILE, c.n_head, self.head_dim
        self.pool = torch.zeros(shape, dtype=self.kv_dtype, device=self.device)
        widest = self._pages(c.n_positions)
        self._columns = torch.arange(widest * TILE, device=self.device)
        self.mask = causal_mask(c.n_positions, self.min_queries, widest * TILE).to(self.device, self.kv_dtype)
        self._table = torch.zeros(MOST, 2 + widest, dtype=torch.long, device=self.device)
        self._logits = torch.zeros(MOST, c.vocab_size, dtype=self.dtype, device=self.device)

    def new_kv(self, capacity: int) -> Pages:
        pages = Pages(self._free, -(-capacity // TILE))
        self.pool.index_fill_(2, self._indices(pages.numbers), 0)
        return pages

    def copy_kv(self, source: Pages, target: Pages, count: int) -> None:
        pool = self.pool.flatten(2, 3)
        taken = pool.index_select(2, self._indices(source.slots(0, count)))
        pool.index_copy_(2, self._indices(target.slots(0, count)), taken)

    def forward(self, batch: Batch) -> Tensor:
        groups: dict[int, list[int]] = {}
        table: dict[int, list[int]] = {}
        long: list[tuple[int, Rows]] = []
        for first, r in batch.placed:
            if r.count > SHORT:
                long.append((first, r))
                continue
            for row, position in enumerate(range(r.start, r.start + r.count), first):
                groups.setdefault(self._pages(position + 1), []).append(row)
                table[row] = [batch.ids[row], position, *self._filled(r.kv, position + 1)]
        chunks: list[Chunk] = []
        for pages, rows in sorted(groups.items()):
            most = MOST * FEWEST // pages
            parts = (rows[i : i + most] for i in range(0, len(rows), most))
            chunks += [(part, [table[row] for row in part]) for part in parts]
        # What a sequence's row needs of its earlier ones is there: they are in a chunk before, or in its own.
        with sdpa_kernel(self._backend):
            if long:
                return self._launch(batch, self._attending(long, chunks))
            return self._replayed(batch.wanted, chunks)

    def _replayed(self, wanted: list[int], chunks: list[Chunk]) -> Tensor:
        """The logits of `wanted` rows. All numbers are there before the first graph, and come back after the last:
        each copy waits for the device."""
        asked, place = set(wanted), dict[int, int]()
        steps: list[tuple[Tensor, Tensor]] = []
        for rows, table in chunks:
            picked = [i for i, row in enumerate(rows) if row in asked]
            place |= {rows[i]: k for k, i in enumerate(picked, len(place))}
            steps.append((self._indices(padded(table)), self._indices(picked)))
        order = self._indices([place[row] for row in wanted])
        return torch.cat([self._replay(*step) for step in steps])[order].float().cpu()

    def _replay(self, table: Tensor, picked: Tensor) -> Tensor:
        """One step of the rows of a `padded` table; the logits of those that are `picked`, in `dtype`."""
        count, pages = len(table), table.shape[1] - 2
        self._table[:count, : 2 + pages] = table
        if (count, pages) not in self._graphs:
            self._graphs[count, pages] = self._captured(lambda: self._step(count, pages))
        self._graphs[count, pages]()
        return self._logits[picked]

    def _captured(self, step: Step) -> Step:
        try:
            return self._capture(step)
        except RuntimeError as error:
            if lost(error):
                raise
            log.warning("a CUDA graph cannot be captured (%r): new ones are launched kernel by kernel", error)
            self._capture = uncaptured
            return step

    def _step(self, count: int, pages: int) -> None:
        """What a graph does: from the first rows of `_table` to the first of `_logits`."""
        table, more = self._table[:count, : 2 + pages], self._height(count) - count
        places = self._places(table)
        x = self.hidden(
            F.pad(table[:, 0], (0, more)),
            F.pad(table[:, 1], (0, more)),
            lambda layer, qkv: F.pad(self._attend_singly(layer, qkv[:count], places), (0, 0, 0, more)),
        )
        self._logits[:count] = self.logits(x)[:count]

    def _attending(self, long: list[tuple[int, Rows]], short: list[Chunk]) -> Callable[[int, Tensor], Tensor]:
        """Attention of a mixed step: `long` tile by tile, of `short` each chunk at once."""
        spans = []
        for first, r in long:
            end = r.start + r.count
            kv = self._indices(r.kv.slots(r.start, r.count)), self._indices(self._filled(r.kv, end))
            spans.append((first, replace(r, kv=kv)))
        groups = [(self._indices(rows), self._places(self._indices(table))) for rows, table in short]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            out = self._attend(layer, qkv, spans)
            for rows, places in groups:
                out[rows] = self._attend_singly(layer, qkv[rows], places)
            return out

        return attend

    def _attend_singly(self, layer: int, qkv: Tensor, places: Places) -> Tensor:
        """Write all rows' keys and values, then attend, each row from its own pages. (b, 3 E) -> (b, E)"""
        qkv = self._heads(qkv)
        kv = self.pool[layer]  # (2, page, TILE, H, D)
        kv.flatten(1, 2).index_copy_(1, places.slots, qkv[:, 1:].transpose(0, 1))
        kv = kv.index_select(1, places.pages).view(2, len(qkv), -1, *kv.shape[3:]).transpose(2, 3)
        q = qkv[:, 0, :, None].repeat(1, 1, MIN_ROWS, 1)  # (b, H, MIN_ROWS, D)
        mixed = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=places.mask, scale=self.scales[layer])
        return mixed[:, :, 0].flatten(1).to(self.dtype)

    def _keep(self, layer: int, r: Rows, new: Tensor) -> Tensor:
        slots, pages = r.kv
        kv = self.pool[layer]
        kv.flatten(1, 2).index_copy_(1, slots, new)
        return kv.index_select(1, pages).flatten(1, 2).transpose(1, 2)

    def _keys(self, end: int) -> int:
        return self._pages(end) * TILE

    def _pages(self, end: int) -> int:
        """How many pages a row's table has, `end` being the position after it: few numbers, to be few graphs."""
        most = -(-self.config.n_positions // TILE)
        return min(max(FEWEST, 1 << ((end - 1) // TILE).bit_length()), max(FEWEST, most))

    def _filled(self, kv: Pages, end: int) -> list[int]:
        """The pages of the positions before `end`, and ZEROS up to the table's end."""
        own = kv.numbers[: -(-end // TILE)]
        return own + [ZEROS] * (self._pages(end) - len(own))

    def _places(self, table: Tensor) -> Places:
        """`table` (b, 2 + pages): id, position, pages of each row."""
        positions, pages = table[:, 1:2], table[:, 2:]
        slots = pages.gather(1, positions // TILE) * TILE + positions % TILE
        hidden = self._columns[: pages.shape[1] * TILE] > positions
        mask = torch.zeros(hidden.shape, dtype=self.kv_dtype, device=self.device).masked_fill(hidden, float("-inf"))
        return Places(slots[:, 0], pages.flatten(), mask[:, None, None].expand(-1, -1, MIN_ROWS, -1))

    def _indices(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def padded(table: list[list[int]]) -> list[list[int]]:
    """With rows that write to SCRATCH, up to a number of rows that a graph has."""
    count = 1 << (len(table) - 1).bit_length()
    return table + [[0, 0, SCRATCH, *[ZEROS] * (len(table[0]) - 3)]] * (count - len(table))


def uncaptured(step: Step) -> Step:
    """Stands in for `Capture`: calls the step again."""
    return step


class Capture:
    """Makes graphs of steps. They share the memory they work in, since none runs beside another, and a stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda.device(device)
        with self._device:
            self._memory, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, step: Step) -> Step:
        """Calls `step` a few times first, on the side: what libraries allocate at first use must not be captured."""
        graph = torch.cuda.CUDAGraph()
        # The inner stream is today's again at the end: torch.cuda.graph stays on its own where a capture fails.
        with self._device, torch.cuda.stream(torch.cuda.current_stream()):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(self._stream)
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
                step()
        return graph.replay


def check(model: GraphedGPT2, eager: GPT2) -> None:
    """Raises ValueError where a few steps of several batches are not those of `eager`, or depend on the batch."""
    c = model.config
    lengths = [n for n in (1, 20, TILE - 1, TILE, 250, 500) if n + SHORT < c.n_positions]
    ids = [[(7 * i + 11 * k) % c.vocab_size for i in range(c.n_positions)] for k in range(len(lengths))]
    sides = [(m, [m.new_kv(n + SHORT + 1) for n in lengths]) for m in (model, eager)]

    def step(side: int, which: Sequence[int], begin: Sequence[int], count: int) -> Tensor:
        m, kv = sides[side]
        rows = [Rows(kv[k], begin[k], count) for k in which]
        flat = [i for k in which for i in ids[k][begin[k] : begin[k] + count]]
        return m.forward(Batch(flat, rows, list(range(len(flat)))))

    everyone = range(len(lengths))
    for k in everyone:
        for side in range(2):
            step(side, [k], [0] * len(lengths), lengths[k])
    for count in (1, SHORT):
        got, want = (step(side, everyone, lengths, count) for side in range(2))
        spread, far = want.std(1), NEAR[model.dtype]
        if not got.isfinite().all():
            raise ValueError("numbers are not finite")
        if not bool(((got - want).std(1) <= far * spread).all()):
            raise ValueError("logits are not those of the same weights without graphs")
        chosen = want.gather(1, got.argmax(1, keepdim=True))[:, 0]
        if not bool((chosen >= want.amax(1) - far * spread).all()):
            raise ValueError("other tokens are the likeliest")
        if not torch.equal(got, torch.cat([step(0, [k], lengths, count) for k in everyone])):
            raise ValueError("rows depend on the batch")
