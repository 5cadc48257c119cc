"""GPT-2's forward pass over a flat batch: rows of many sequences side by side, no padding. Names are the checkpoint's.

A row's logits are the same bits whatever stands beside it and however its prompt was cut into steps, because
- the linear layers compute a row alike in any batch of MIN_ROWS rows or more (oneDNN's packed kernels sum along K in
  one order; with fewer rows some switch kernels), or in blocks of exactly `block` rows.
- attention takes each query in the tile of TILE positions it belongs to, over keys up to that tile's end: the number
  of keys is a function of the position alone, keys after the query weigh exactly 0, and the queries of one product are
  a multiple of `queries`.
- all else works on rows or elements one by one.

Which `block` and `queries` that takes, machine and shape decide: `choice.agreeing` tries at start.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from core.engine.config import Config
from core.engine.kv_cache import round_up
from core.engine.sampler import Summary, summarise
from core.engine.weights import Checkpoint

TILE = 64
"""Positions that attention takes together; on a GPU a page of keys and values has as many."""
MIN_ROWS = 4
"""Rows that a product has at least."""
ONE, MOST, HALF = torch.tensor(1.0), torch.tensor(127.0), torch.tensor(128.5)
BEND, CUBE = torch.tensor(1 / 0.044715), torch.tensor(-2 * (2 / math.pi) ** 0.5 * 0.044715)
"""As tensors: Python's numbers are made one each time, which takes as long as using it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows of one sequence, at positions start, start + 1, …; `kv` is where its keys and values stand."""

    kv: Any
    """What the model's `new_kv` gave; nobody else looks into it."""
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: `ids` of all rows in order, the sequences they belong to, and the rows whose logits are wanted,
    ascending."""

    ids: list[int]
    rows: Sequence[Rows]
    wanted: list[int]

    @property
    def positions(self) -> list[int]:
        return [p for r in self.rows for p in range(r.start, r.start + r.count)]

    @property
    def placed(self) -> list[tuple[int, Rows]]:
        """Each sequence with the row that is its first."""
        firsts = itertools.accumulate((r.count for r in self.rows), initial=0)
        return list(zip(firsts, self.rows, strict=False))


class Model(Protocol):
    """One step of a model. Another implementation (native/gpt2.py, graphs.py) stands in by having these."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    """Of the weights that products read."""
    how: str
    """Device, precision and path, for people."""
    token_bytes: int
    """Bytes of KV for one token."""

    def new_kv(self, capacity: int) -> Any:
        """Room for `capacity` tokens."""
        ...

    def grow_kv(self, kv: Any, capacity: int, count: int) -> Any:
        """`kv`, or one in its place that has its first `count` tokens, with room for `capacity`."""
        ...

    def copy_kv(self, source: Any, target: Any, count: int) -> None:
        """The first `count` tokens."""
        ...

    def forward(self, batch: Batch) -> tuple[Tensor, Summary]:
        """Write the rows' KV; return the logits (len(batch.wanted), vocab_size), float32, on the CPU, and what the step
        found out about them. Valid until the next step."""
        ...


class Linear:
    """y = act(x W^T + b), weights packed for the CPU where oneDNN can. x: (T, in) -> (T, out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "", *, block: int = 0) -> None:
        """`weight` is (out, in). With `block`, T must be a multiple of it."""
        self.bias, self.activation, self.block = bias, activation, block
        self.packed = pack(weight)
        self.weight = weight.contiguous() if self.packed is None else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.block and len(x) > self.block:
            return torch.cat([self._product(rows) for rows in torch.split(x, self.block)])
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            fused = {"": "none", "relu": "relu"}.get(self.activation, "gelu")
            approximation = self.activation if fused == "gelu" else ""
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, fused, [], approximation)
            return y
        assert self.weight is not None
        return activate(F.linear(x.to(self.weight.dtype), self.weight, self.bias), self.activation)


def activate(y: Tensor, activation: str) -> Tensor:
    """One of `config.ACTIVATIONS`; "" leaves y as it is."""
    if activation == "relu":
        return F.relu(y)
    if activation == "tanh":  # F.gelu(approximate="tanh") treats the last elements of a batch differently
        z = (y * y).add_(BEND).mul_(CUBE).mul_(y).exp_().add_(ONE)  # in place: fresh memory is what takes time
        return torch.div(y, z, out=z)  # y / (1 + e^(-2 sqrt(2 / pi) (y + 0.044715 y^3)))
    if activation == "none":
        return F.gelu(y.float()).to(y.dtype)  # of half its last elements, too
    return y


def pack(weight: Tensor) -> Tensor | None:
    """oneDNN's own layout of a CPU weight, or None where it has none for this type or machine."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        return packed
    except RuntimeError:
        return None


class Int8Linear(Linear):
    """Of 8-bit integers, by oneDNN's product for quantised layers. A scale for each row of the weight and of x; sums
    are exact, so a row is the same in any batch."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "") -> None:
        self.bias, self.activation, self.block, self.weight = bias, activation, 0, None
        quants, self.scale = quantise(weight)
        self.packed = torch.ops.onednn.qlinear_prepack(quants, None)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)

    def _product(self, x: Tensor) -> Tensor:
        near = x.abs()
        scale = near.amax(1, keepdim=True).div_(MOST)  # of zeros 0: 0 / 0 becomes any number, which 0 multiplies
        quants = torch.div(x, scale, out=near).add_(HALF).byte()  # 128 stands for 0; the half rounds
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            quants, 1.0, 128, self.packed, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y *= scale
        return activate(y if self.bias is None else y.add_(self.bias), self.activation)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(n, k) -> int8 (n, k) and what each row is multiplied by, (n)."""
    scale = weight.abs().amax(1).clamp_(min=1e-30) / 127
    return (weight / scale[:, None]).round_().to(torch.int8).contiguous(), scale


@cache
def multiplies_int8() -> bool:
    """Are torch's products of 8-bit integers fast and exact on this processor? Without VNNI they are neither."""
    able = torch.cpu.get_capabilities()
    if not able.get("avx512_vnni") and not able.get("avx_vnni"):
        return False
    try:
        return bool((Int8Linear(torch.ones(32, 64), None)(torch.ones(1, 64)) - 64).abs().max() < 1e-3)
    except (AttributeError, RuntimeError):
        return False


class GPT2:
    """The torch model. In float32, bfloat16 and float16 products are rounded to that, in int8 what is multiplied.
    Residuals stay float32; on the CPU so do attention and KV."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        block: int = 0,
        queries: int = MIN_ROWS,
    ) -> None:
        """Takes the tensors out of `checkpoint` one by one, so that the originals are freed while it packs."""
        self.config = config = checkpoint.config
        self.device, self.block, self.queries = device, block, queries
        self.min_rows = 1 if dtype is torch.int8 else MIN_ROWS
        self.dtype = dtype
        self.whole = whole = torch.float32 if dtype is torch.int8 else dtype
        self.kv_dtype = torch.float32 if device.type == "cpu" else dtype
        self.head_dim = config.head_dim
        self.token_bytes = 2 * config.n_layer * config.n_embd * self.kv_dtype.itemsize
        tensors = checkpoint.tensors

        def take(name: str, to: torch.dtype = torch.float32) -> Tensor:
            return checkpoint.take(name, to, device)

        def product(weight: Tensor, bias: Tensor | None, activation: str = "") -> Linear:
            if dtype is torch.int8:
                return Int8Linear(weight, bias, activation)
            return Linear(weight, bias, activation, block=block)

        def linear(name: str, activation: str = "") -> Linear:
            return product(take(f"{name}.weight", whole).T, take(f"{name}.bias", whole), activation)

        self.wte = take("wte.weight", whole)
        head = take("lm_head.weight", whole) if "lm_head.weight" in tensors else self.wte
        # Logits of a real model are some -100 all together, where a step of bfloat16 is 0.5: what they have in common
        # is left out of the product, and added in float32. On CUDA `with_float32_logits` does more.
        self.common = head.float().mean(0) if device.type == "cpu" and dtype is not torch.float32 else None
        self.lm_head = product(head if self.common is None else (head - self.common).to(whole), None)
        self.wte_scale: Tensor | None = None
        if dtype is torch.int8:
            self.wte, self.wte_scale = quantise(self.wte)
        self.wpe = take("wpe.weight")
        self.ln_f = take("ln_f.weight"), take("ln_f.bias")
        self.h = [
            Layer(
                ln_1=(take(f"h.{i}.ln_1.weight"), take(f"h.{i}.ln_1.bias")),
                c_attn=linear(f"h.{i}.attn.c_attn"),
                attn_c_proj=linear(f"h.{i}.attn.c_proj"),
                ln_2=(take(f"h.{i}.ln_2.weight"), take(f"h.{i}.ln_2.bias")),
                c_fc=linear(f"h.{i}.mlp.c_fc", config.activation),
                mlp_c_proj=linear(f"h.{i}.mlp.c_proj"),
            )
            for i in range(config.n_layer)
        ]
        self.scales = [config.attention_scale(i) for i in range(config.n_layer)]
        self._positions = round_up(config.n_positions, TILE)
        self.mask = causal_mask(config.n_positions, queries).to(device, self.kv_dtype)
        packed = ", oneDNN packed" if self.lm_head.packed is not None else ""
        self.how = f"{device}, {str(dtype).removeprefix('torch.')}, torch{packed}"

    def with_float32_logits(self) -> GPT2:
        """A copy, with the same weights, whose last product is float32's. For CUDA, where nothing is packed."""
        model, head = copy.copy(self), self.lm_head.weight
        assert head is not None
        model.lm_head = Linear(head.float(), None, block=self.block)
        return model

    def new_kv(self, capacity: int) -> Any:
        """(layer, key/value, head, position, head_dim); zeros, for what is not written yet weighs 0, if it is finite"""
        c = self.config
        shape = c.n_layer, 2, c.n_head, round_up(capacity, TILE), self.head_dim
        return torch.zeros(shape, dtype=self.kv_dtype, device=self.device)

    def grow_kv(self, kv: Any, capacity: int, count: int) -> Any:
        if capacity <= kv.shape[3]:
            return kv
        larger = self.new_kv(capacity)
        self.copy_kv(kv, larger, count)
        return larger

    def copy_kv(self, source: Any, target: Any, count: int) -> None:
        target[:, :, :, :count] = source[:, :, :, :count]

    def forward(self, batch: Batch) -> tuple[Tensor, Summary]:
        wanted = self._padded(batch.wanted)
        ids, positions = self._padded(batch.ids), self._padded(batch.positions)
        x = F.embedding(ids, self.wte).float()  # (T, E)
        if self.wte_scale is not None:
            x *= self.wte_scale[ids, None]
        x += F.embedding(positions, self.wpe)
        attention = Attention(self, batch, len(ids))
        for i, layer in enumerate(self.h):
            mixed = attention(i, layer.c_attn(self._norm(x, layer.ln_1))).to(self.whole)
            if layer is self.h[-1]:  # nobody reads its other rows
                x, mixed = x[wanted], mixed[wanted]
            x += layer.attn_c_proj(mixed)
            x += layer.mlp_c_proj(layer.c_fc(self._norm(x, layer.ln_2)))
        if not batch.wanted:
            return torch.empty(0, self.config.vocab_size), Summary([], [])
        x = self._norm(x, self.ln_f)
        logits = self.lm_head(x).float()
        if self.common is not None:
            logits += (x * self.common).sum(1, keepdim=True)
        logits = logits[: len(batch.wanted)].cpu()
        return logits, summarise(logits)

    def _norm(self, x: Tensor, ln: tuple[Tensor, Tensor]) -> Tensor:
        return torch.layer_norm(x, ln[0].shape, *ln, self.config.layer_norm_epsilon).to(self.whole)

    def _padded(self, values: list[int]) -> Tensor:
        """With zeros, up to the number of rows that the products are made with."""
        count = round_up(max(len(values), 1), self.block) if self.block else max(len(values), self.min_rows)
        return torch.tensor(values + [0] * (count - len(values)), device=self.device)


@dataclass(frozen=True, slots=True)
class Layer:
    """An ln is (weight, bias)."""

    ln_1: tuple[Tensor, Tensor]
    c_attn: Linear
    attn_c_proj: Linear
    ln_2: tuple[Tensor, Tensor]
    c_fc: Linear
    mlp_c_proj: Linear


class Attention:
    """A step's. What is read and written, sequence by sequence and tile by tile, is found once for all layers."""

    def __init__(self, model: GPT2, batch: Batch, rows: int) -> None:
        """`rows`: with those that pad."""
        heads = model.config.n_head, model.head_dim
        qkv, mixed = (  # (rows, …, H, D); a tile's padding may reach over the end
            torch.zeros(rows + model.queries, n, *heads, dtype=model.kv_dtype, device=model.device) for n in (3, 1)
        )
        self.qkv, self.mixed, self.scales = qkv[:rows].flatten(1), mixed[:rows].flatten(1), model.scales
        self.fresh = list[tuple[Sequence[Tensor], Tensor]]()
        self.tiles = list[tuple[Tensor, Sequence[Tensor], Tensor, Tensor]]()
        for row, r in batch.placed:
            kv: Tensor = r.kv  # (layer, 2, H, P, D)
            stored = kv[:, :, :, r.start : r.start + r.count].permute(0, 3, 1, 2, 4).unbind()
            self.fresh.append((stored, qkv[row : row + r.count, 1:]))
            for begin, end in tiles(r.start, r.count):
                first, keys, at = row + begin - r.start, round_up(end, TILE), begin % TILE
                queries, left = round_up(end - begin, model.queries), model.mask.shape[1] - keys
                # (1, H, queries, D); where a tile's padding is mixed, the next tile's rows are written later
                q, out = (t[None, first : first + queries, 0].transpose(1, 2) for t in (qkv, mixed))
                pairs = kv[:, :, None, :, :keys].flatten(0, 1).unbind()  # (1, H, keys, D), layer by layer
                self.tiles.append((q, pairs, model.mask[at : at + queries, left:], out))

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Write keys and values, then attend. (T, 3 E) -> (T, E), valid until the next layer."""
        self.qkv.copy_(qkv)
        for stored, fresh in self.fresh:
            stored[layer].copy_(fresh)
        for q, pairs, mask, out in self.tiles:
            k, v = pairs[2 * layer : 2 * layer + 2]
            out.copy_(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scales[layer]))
        return self.mixed


def tiles(start: int, count: int) -> list[tuple[int, int]]:
    """Positions start .. start + count - 1, cut where a multiple of TILE begins."""
    end = start + count
    cuts = [start, *range((start // TILE + 1) * TILE, end, TILE), end]
    return list(itertools.pairwise(cuts))


def causal_mask(positions: int, queries: int) -> Tensor:
    """(TILE + queries, P): row i from column P - TILE * (t + 1) on masks position TILE * t + i."""
    width = round_up(positions, TILE)
    mask = torch.zeros(TILE + queries, width)
    mask[:TILE, width - TILE :] = torch.full((TILE, TILE), float("-inf")).triu(1)
    return mask
