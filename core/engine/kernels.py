"""GPT-2's arithmetic on a GPU, in Triton. A step is `norm`, `linear` and `attend`, layer by layer, over rows of ids.

A row's numbers are the same bits whatever stands beside it: a row of `norm` and a head of a row of `attend` have a
program of their own, or several that share it in parts of one length, and in `linear` each number is a sum along K
in one order, whichever tile it belongs to.

PDL is programmatic dependent launch: a kernel may start while the one before it runs, and waits for its end before it
reads what that wrote. https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

from __future__ import annotations

import triton
import triton.language as tl

CHANGING = ["rows", "columns", "room"]
"""Numbers for whose values no kernel of its own is compiled."""

WARPS = tl.constexpr(4)
"""That share a product's depth; how their sums are added is written for so many."""


@triton.jit(do_not_specialize=CHANGING)
def norm(
    x, parts, bias, weight, shift, out, table, wte, wpe, rows, wide, columns, eps,
    KIND: tl.constexpr, SPLIT: tl.constexpr, E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x += the sum of `parts` + bias; out = its layer norm. A program is a row. KIND "embed": x is made, of embeddings;
    "picked": of the rows that the table says, and x stays as it is."""
    at = tl.program_id(0)
    row = tl.load(table + at * columns + 3) if KIND == "picked" else at
    i = tl.arange(0, E)
    inside = i < wide
    place = x + row * wide + i
    factor, offset = tl.load(weight + i, inside, 0.0), tl.load(shift + i, inside, 0.0)
    added = 0.0 if KIND == "embed" else tl.load(bias + i, inside, 0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if KIND == "embed":
        id, position = tl.load(table + row * columns), tl.load(table + row * columns + 1)
        now = tl.load(wte + id.to(tl.int64) * wide + i, inside, 0.0).to(tl.float32)
        now += tl.load(wpe + position * wide + i, inside, 0.0)
    else:
        now = tl.load(place, inside, 0.0) + added
        for part in tl.static_range(SPLIT):
            now += tl.load(parts + (part * rows + row) * wide + i, inside, 0.0)
    if KIND != "picked":
        tl.store(place, now, inside)
    mean = tl.sum(now, 0) / wide
    off = tl.where(inside, now - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(off * off, 0) / wide + eps)
    tl.store(out + at * wide + i, (off * scale * factor + offset).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=CHANGING)
def linear(
    x, weight, bias, out, table, pool, rows, wide, deep, length, columns, room, across,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """weight (wide, deep) times x (rows, deep) turned: a tile of N x M, of `deep` a part of `length`.

    WARPS of them go along `deep` side by side, K at a time each, and their sums are added in the end. In C turns, if C
    is not 0: then all weights come near before the kernel waits. KIND says what becomes of the tile: "qkv", queries go
    to `out` and keys and values to `pool`; "wide", activated, to `out`; "part" and "logits", as it is.
    """
    row = tl.program_id(0) * M + tl.arange(0, M)
    col = tl.program_id(1) * N + tl.arange(0, N)
    first = tl.program_id(2) * length
    left = tl.minimum(length, deep - first)
    here, there = row < rows, col < wide
    k = tl.arange(0, WARPS)[:, None] * K + tl.arange(0, K)[None, :]
    w = weight + col[None, :, None].to(tl.int64) * deep + (first + k)[:, None, :]
    a = x + row[None, None, :].to(tl.int64) * deep + (first + k)[:, :, None]
    total = tl.zeros((WARPS, N, M), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if C:
        ws = ()  # type: tuple[object, ...]
        for turn in tl.static_range(0, C * WARPS * K, WARPS * K):
            ws = ws + (tl.load(w + turn, there[None, :, None] & (turn + k < left)[:, None, :], 0.0),)  # noqa: RUF005
        if PDL:
            tl.extra.cuda.gdc_wait()
        xs = ()  # type: tuple[object, ...]
        for turn in tl.static_range(0, C * WARPS * K, WARPS * K):
            xs = xs + (tl.load(a + turn, here[None, None, :] & (turn + k < left)[:, :, None], 0.0),)  # noqa: RUF005
        for i in tl.static_range(C):
            total = tl.dot(ws[i], xs[i], total, input_precision="ieee")
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
        for turn in range(0, left, WARPS * K):
            near = tl.load(w + turn, there[None, :, None] & (turn + k < left)[:, None, :], 0.0)
            beside = tl.load(a + turn, here[None, None, :] & (turn + k < left)[:, :, None], 0.0)
            total = tl.dot(near, beside, total, input_precision="ieee")
    even, odd = tl.split(tl.reshape(tl.permute(total, (1, 2, 0)), (N, M, 2, 2)))
    one, two = tl.split(even + odd)
    y = one + two  # (N, M)
    row, here = row[None, :], here[None, :]
    if KIND == "part":
        tl.store(out + (tl.program_id(2) * rows + row) * wide + col[:, None], y, here & there[:, None])
    elif KIND == "logits":
        tl.store(out + row.to(tl.int64) * across + col[:, None], y, here & there[:, None])
    else:
        y += tl.load(bias + col, there, 0.0).to(tl.float32)[:, None]
        if ACTIVATION == "tanh":
            y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
        elif ACTIVATION == "none":
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        elif ACTIVATION == "relu":
            y = tl.where(y < 0.0, 0.0, y)
        y = y.to(out.dtype.element_ty)
        if KIND == "qkv":
            third = wide // 3
            which = (col // third)[:, None]
            inner = col[:, None] - which * third
            tl.store(out + row * third + inner, y, here & (which == 0))
            slot = tl.load(table + row * columns + 2, here, 0).to(tl.int64)
            at = (which - 1).to(tl.int64) * room * third + slot * third + inner
            tl.store(pool + at, y, here & (which > 0) & there[:, None])
        else:
            tl.store(out + row * wide + col[:, None], y, here & there[:, None])


@triton.jit(do_not_specialize=CHANGING)
def attend(
    q, pool, out, table, parts, arrived, columns, room, wide, head_dim, scale,
    WAYS: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row's head, over all keys up to the row's position, in parts of N (Milakov and Gimelshein 2018, "Online
    normalizer calculation for softmax"). WAYS programs share the parts; who arrives last puts them together."""
    row, head, way = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d, n = tl.arange(0, D), tl.arange(0, N)
    inside = d < head_dim
    mine = row * wide + head * head_dim + d
    table += row * columns
    keys = tl.load(table + 1) + 1
    count = tl.cdiv(keys, N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        key = tl.minimum(way * N + n, keys - 1)
        slot = tl.load(table + 4 + key // PAGE).to(tl.int64) * PAGE + key % PAGE
        fetch(pool + slot * wide + head * head_dim)
        fetch(pool + (room.to(tl.int64) + slot) * wide + head * head_dim)
        tl.extra.cuda.gdc_wait()
    query = tl.load(q + mine, inside, 0.0).to(tl.float32) * scale
    most, share, mixed = float("-inf"), 0.0, tl.zeros((D,), tl.float32)
    at = row * tl.num_programs(1) + head
    parts += at * (tl.cdiv((columns - 4) * PAGE, N) * (D + 2))
    shared = count > 1 if WAYS > 1 else False
    for part in range(way, count, WAYS):
        key = part * N + n
        seen = key < keys
        slot = tl.load(table + 4 + key // PAGE, seen, 0).to(tl.int64) * PAGE + key % PAGE
        place = pool + slot[:, None] * wide + head * head_dim + d[None, :]
        mask = seen[:, None] & inside[None, :]
        k = tl.load(place, mask, 0.0)
        v = tl.load(place + room.to(tl.int64) * wide, mask, 0.0)  # on its way while k is looked at
        score = tl.where(seen, tl.sum(k.to(tl.float32) * query[None, :], 1), float("-inf"))
        top = tl.max(score, 0)
        weight = tl.exp(score - top)
        s, m = tl.sum(weight, 0), tl.sum(weight[:, None] * v.to(tl.float32), 0)
        if shared:
            tl.store(parts + part * (D + 2) + d, m)
            tl.store(parts + part * (D + 2) + D, top)
            tl.store(parts + part * (D + 2) + D + 1, s)
        else:
            most, share, mixed = joined(most, share, mixed, top, s, m)
    last = way == 0
    if shared:
        last = False
        if way < count:
            tl.debug_barrier()  # every thread has stored its share
            last = tl.atomic_add(arrived + at, 1) == tl.minimum(count, WAYS) - 1
        if last:
            for part in range(count):
                m = tl.load(parts + part * (D + 2) + d, cache_modifier=".cg")
                top = tl.load(parts + part * (D + 2) + D, cache_modifier=".cg")
                s = tl.load(parts + part * (D + 2) + D + 1, cache_modifier=".cg")
                most, share, mixed = joined(most, share, mixed, top, s, m)
            tl.store(arrived + at, 0)
    if last:
        tl.store(out + mine, (mixed / share).to(out.dtype.element_ty), inside)


@triton.jit
def joined(most, share, mixed, top, s, m):
    """What was seen so far, and one part more: the maximum, the sum of weights, and of weighted values."""
    now = tl.maximum(most, top)
    old, new = tl.exp(most - now), tl.exp(top - now)
    return now, share * old + s * new, mixed * old + m * new


@triton.jit
def fetch(pointers):
    """Brings the lines near that they point to."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def summary(found, sums, vocab, words, across, N: tl.constexpr, PDL: tl.constexpr):
    """Of N logits of a row the largest of each 32, and log(sum(e^x)) of all, NaN where one is not finite. It has one
    shape however many rows there are: in which order is summed up depends on that."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0), tl.program_id(1)
    found += row.to(tl.int64) * across
    i = part * N + tl.arange(0, N)
    x = tl.load(found + i, i < vocab, float("-inf"))
    most = tl.max(x, 0)
    bad = tl.sum(tl.where(i < vocab, x, 0.0) * 0.0, 0)
    share = most + tl.log(tl.sum(tl.exp(x - most), 0)) + bad
    tl.store(sums + row * tl.num_programs(1) + part, share)
    word = part * (N // 32) + tl.arange(0, N // 32)
    tl.store(found + 32 * words + word, tl.max(tl.reshape(x, (N // 32, 32)), 1), word < words)


@triton.jit
def summed(found, sums, words, across, count, N: tl.constexpr, PDL: tl.constexpr):
    """log(sum(e^x)) of a row, from those of its parts."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row, i = tl.program_id(0), tl.arange(0, N)
    share = tl.load(sums + row * count + i, i < count, float("-inf"))
    most = tl.max(share, 0)
    total = most + tl.log(tl.sum(tl.exp(share - most), 0))
    tl.store(found + row.to(tl.int64) * across + 33 * words, total)
