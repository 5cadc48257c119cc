"""GPT-2 with its weights packed once for step.cpp, one call of it a step, made without the interpreter's lock."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.engine.config import Config
from core.engine.kv_cache import Pages, round_up
from core.engine.model import Batch
from core.engine.native import library as c
from core.engine.native.memory import Arena
from core.engine.sampler import Summary, addresses
from core.engine.weights import Checkpoint

PAGE = 128
"""Positions that a page of keys and values has room for."""

BLOCK = 32
"""Columns of a group; in int8 also the numbers along a row that share a scale."""

WEIGHTS = {torch.int8: 0, torch.bfloat16: 1, torch.float32: 2, torch.float16: 3}
"""step.cpp's number of each type. float16's weights are multiplied as float32."""

SHORT = torch.float16, torch.bfloat16
"""What float32 is kept in where a checkpoint's numbers are of 16 bits, as DialoGPT's are: half as much to read for the
same."""

SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""step.cpp's number of what a checkpoint may store; anything else becomes float32 first."""

BEYOND = -3e38
"""A logit beyond the vocabulary: finite, and e to it too small to count beside any other."""

ACTIVATION = {"relu": 2, "tanh": 3, "none": 4}
"""step.cpp's number of each value of `config.ACTIVATIONS`; "none" is the exact GELU."""


class KV(Pages[Tensor]):
    """Pages (layer, key/value, head, PAGE, head_width); step.cpp says how keys stand in them. Stale numbers are there,
    which nothing reads."""

    def grown(self) -> None:
        self.addresses = (ctypes.c_void_p * len(self.pages))(*(page.data_ptr() for page in self.pages))


class NativeGPT2:
    """Satisfies `core.engine.model.Model`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        native: Any,
        dtype: torch.dtype = torch.int8,
        path: int | None = None,
        kv_dtype: torch.dtype = torch.int8,
    ) -> None:
        """Takes the tensors out of `checkpoint` one by one. `path` indexes `library.PATHS`; None, the best. `kv_dtype`
        is for int8 alone."""
        self.config = config = checkpoint.config
        self.native = native
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.kv_dtype = {torch.int8: kv_dtype, torch.float16: torch.float32}.get(dtype, dtype)
        self.stored = kept_in(checkpoint) if dtype is torch.float32 else dtype
        self.path: int = native.palaver_best_path() if path is None else path
        self.head_width = round_up(config.head_dim, 32)
        if self.kv_dtype is torch.int8:
            self.head_width += self.head_width // 8  # a float32 scale for each 32 bytes
        self.token_bytes = self.kv_dtype.itemsize * 2 * config.n_layer * config.n_head * self.head_width
        self.width = round_up(config.n_embd, BLOCK)
        self.wide = round_up(max(3 * config.n_embd, config.n_inner), BLOCK)
        names = dict.fromkeys(str(of).removeprefix("torch.") for of in (dtype, self.stored))  # one, or two
        self.how = f"cpu, {' kept in '.join(names)}, native {c.PATHS[self.path]}"
        self._arena, self._room_for_kv = Arena(), Arena()
        self._free: list[Tensor] = []
        self._alive: list[Tensor] = []
        self._step = c.Step()
        self._memory: dict[str, Tensor] = {}
        self._totals: Any = ()
        self._room: tuple[int, ...] = (0, 0, 0)
        tensors = checkpoint.tensors

        def vector(name: str) -> Any:
            return self._address(padded(tensors.pop(name)))

        def weight(name: str) -> Tensor:
            name = f"{name}.weight"
            return checkpoint.take(name, dtype) if dtype is torch.float16 else tensors.pop(name)

        def linear(name: str) -> c.Linear:
            return self._linear(weight(name).T, vector(f"{name}.bias"))

        def norm(name: str) -> c.Norm:
            return c.Norm(vector(f"{name}.weight"), vector(f"{name}.bias"))

        wte = self._linear(weight("wte"))
        head = self._linear(weight("lm_head")) if "lm_head.weight" in tensors else wte
        beyond = torch.zeros(BLOCK * head.groups)
        beyond[config.vocab_size :] = BEYOND
        self._layers = (c.Layer * config.n_layer)(
            *(
                c.Layer(
                    norm(f"h.{i}.ln_1"),
                    norm(f"h.{i}.ln_2"),
                    linear(f"h.{i}.attn.c_attn"),
                    linear(f"h.{i}.attn.c_proj"),
                    linear(f"h.{i}.mlp.c_fc"),
                    linear(f"h.{i}.mlp.c_proj"),
                    config.attention_scale(i),
                )
                for i in range(config.n_layer)
            )
        )
        self._model = c.Model(
            self._layers,
            wte,
            c.Linear(head.weight, head.scale, self._address(beyond), head.blocks, head.groups),
            self._address(tensors.pop("wpe.weight").to(torch.float32, copy=True).contiguous()),
            norm("ln_f"),
            config.n_layer,
            config.n_head,
            config.n_embd,
            config.n_positions,
            ACTIVATION[config.activation],
            WEIGHTS[self.stored],
            WEIGHTS[self.kv_dtype],
            config.layer_norm_epsilon,
        )

    def new_kv(self, capacity: int) -> KV:
        return self.grow_kv(KV(self._free, self._new_page), capacity, 0)

    def grow_kv(self, kv: KV, capacity: int, count: int) -> KV:
        kv.grow(-(-capacity // PAGE))
        return kv

    def copy_kv(self, source: KV, target: KV, count: int) -> None:
        for old, new in zip(source.pages, target.pages, strict=False):
            some = min(PAGE, round_up(count, 16))
            new[:, :, :, :some] = old[:, :, :, :some]
            count = max(0, count - PAGE)

    def _new_page(self) -> Tensor:
        shape = self.config.n_layer, 2, self.config.n_head, PAGE, self.head_width
        return self._room_for_kv.empty(shape, self.kv_dtype)

    def forward(self, batch: Batch) -> tuple[Tensor, Summary]:
        rows, wanted, threads = len(batch.ids), len(batch.wanted), torch.get_num_threads()
        self._make_room(rows, wanted, threads)
        spans, row = (c.Span * len(batch.rows))(), 0
        for span, r in zip(spans, batch.rows, strict=True):
            span.pages, span.start, span.count = ctypes.addressof(r.kv.addresses), r.start, r.count
            span.row, row = row, row + r.count
        step = self._step
        step.spans, step.ids, step.positions = spans, integers(batch.ids), integers(batch.positions)
        step.wanted = integers(batch.wanted)
        step.n_spans, step.rows, step.n_wanted, step.threads = len(spans), rows, wanted, threads
        self.native.palaver_step(self._model, step, self.path)
        places = addresses(self._memory["tops"][:wanted])
        return self._memory["logits"][:wanted, : self.config.vocab_size], Summary(self._totals[:wanted], places)

    def _make_room(self, rows: int, wanted: int, threads: int) -> None:
        """The step's own memory, kept from step to step."""
        if rows <= self._room[0] and wanted <= self._room[1] and threads <= self._room[2]:
            return
        rows, wanted, threads = self._room = tuple(
            map(max, self._room, (round_up(rows, 16), round_up(wanted, 16), threads))
        )
        config, width, wide = self.config, self.width, self.wide
        groups = round_up(config.vocab_size, BLOCK) // BLOCK
        self._memory = {
            "x": torch.zeros(rows, width),
            "wide": torch.zeros(rows, wide),
            "mixed": torch.zeros(rows, width),
            "logits": torch.empty(wanted, BLOCK * groups),
            "tops": torch.full((wanted, round_up(groups, 16)), BEYOND),
            "sums": torch.zeros(wanted, round_up(groups, 16)),
            "scratch": torch.zeros(threads, 4, 2 * round_up(config.n_positions, 16) + round_up(config.head_dim, 32)),
            "narrow": torch.zeros(rows, width + wide, dtype=torch.bfloat16),  # a block of int8 has room in it, too
        }
        self._step.totals = self._totals = (ctypes.c_double * wanted)()
        for name, tensor in self._memory.items():
            setattr(self._step, name, tensor.data_ptr())

    def _linear(self, weight: Tensor, bias: int | None = None) -> c.Linear:
        """Of a weight (out, in)."""
        source = weight if weight.dtype in SOURCES else weight.float()
        groups, blocks = (round_up(size, BLOCK) // BLOCK for size in source.shape)
        is_int8 = self.dtype is torch.int8
        packed = self._arena.empty((groups, blocks, 32 * 32), torch.uint8 if is_int8 else self.stored)
        scales = self._arena.empty((groups, blocks, 32), torch.bfloat16) if is_int8 else torch.empty(0)
        self.native.palaver_pack(
            source.data_ptr(),
            SOURCES[source.dtype],
            *source.stride(),
            *source.shape,
            packed.data_ptr(),
            scales.data_ptr(),
            WEIGHTS[self.stored],
            torch.get_num_threads(),
        )
        return c.Linear(self._address(packed), self._address(scales), bias, blocks, groups)

    def _address(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        return tensor.data_ptr()


def products(config: Config) -> list[str]:
    """The names of the weights that products read."""
    return [name for name, shape in config.shapes().items() if len(shape) == 2 and name != "wpe.weight"]


def kept_in(checkpoint: Checkpoint) -> torch.dtype:
    """The type of 16 bits that has every number of the products' weights, or float32. (What was loaded from 16 bits is
    often saved in 32. Of other weights, a few rows of the first tell.)"""

    def has(tensor: Tensor, to: torch.dtype) -> bool:
        parts = (tensor[i : i + 1024] for i in range(0, len(tensor), 1024))
        return tensor.dtype is to or all(torch.equal(part.to(to).to(part.dtype), part) for part in parts)

    return next(
        (to for to in SHORT if all(has(checkpoint.tensors[name], to) for name in products(checkpoint.config))),
        torch.float32,
    )


def padded(vector: Tensor) -> Tensor:
    """(n,) -> float32 (N,), with zeros; N is the next multiple of 32."""
    whole = torch.zeros(round_up(len(vector), BLOCK))
    whole[: len(vector)] = vector
    return whole


def integers(values: Sequence[int]) -> Any:
    return (ctypes.c_int32 * len(values))(*values)
