"""GPT-2's arithmetic on a GPU, in Triton. A step is `norm`, `linear` and `attend`, layer by layer, over rows of ids.

A row's numbers are the same bits whatever stands beside it: a row of `norm` and a head of a row of `attend` have a
program of their own, and in `linear` each number is a sum along K in one order, whichever tile it belongs to.

PDL is programmatic dependent launch: a kernel may start while the one before it runs, and waits for its end before it
reads what that wrote. https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

from __future__ import annotations

import triton
import triton.language as tl

CHANGING = ["rows", "columns", "room"]
"""Numbers for whose values no kernel of its own is compiled."""


@triton.jit(do_not_specialize=CHANGING)
def norm(
    x, parts, bias, weight, shift, out, table, wte, wpe, rows, wide, columns, eps,
    KIND: tl.constexpr, SPLIT: tl.constexpr, E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x += the sum of `parts` + bias; out = its layer norm. A program is a row. KIND "embed": x is made, of embeddings;
    "picked": of the rows that the table says, and x stays as it is."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0)
    row = tl.load(table + at * columns + 3) if KIND == "picked" else at
    i = tl.arange(0, E)
    inside = i < wide
    place = x + row * wide + i
    if KIND == "embed":
        id, position = tl.load(table + row * columns), tl.load(table + row * columns + 1)
        now = tl.load(wte + id.to(tl.int64) * wide + i, inside, 0.0).to(tl.float32)
        now += tl.load(wpe + position * wide + i, inside, 0.0)
    else:
        now = tl.load(place, inside, 0.0) + tl.load(bias + i, inside, 0.0).to(tl.float32)
        for part in tl.static_range(SPLIT):
            now += tl.load(parts + (part * rows + row) * wide + i, inside, 0.0)
    if KIND != "picked":
        tl.store(place, now, inside)
    mean = tl.sum(now, 0) / wide
    off = tl.where(inside, now - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(off * off, 0) / wide + eps)
    normed = off * scale * tl.load(weight + i, inside, 0.0) + tl.load(shift + i, inside, 0.0)
    tl.store(out + at * wide + i, normed.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=CHANGING)
def linear(
    x, weight, bias, out, table, pool, tops, sums, rows, wide, deep, length, columns, room, across,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (rows, deep) times weight (wide, deep): a tile of M x N, of `deep` a part of `length`, K at a time.

    KIND says what becomes of it: "qkv", queries go to `out` and keys and values to `pool`; "wide", activated, to `out`;
    "part", as it is; "logits", with maxima of each 32 to `tops` and log(sum(e^x)) of each tile to `sums`.
    """
    row = tl.program_id(0) * M + tl.arange(0, M)
    col = tl.program_id(1) * N + tl.arange(0, N)
    first = tl.program_id(2) * length
    last = tl.minimum(first + length, deep)
    here, there = row < rows, col < wide
    a = x + row[:, None].to(tl.int64) * deep
    w = weight + col[None, :].to(tl.int64) * deep
    total = tl.zeros((M, N), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # A loop, be it of one turn: to a product alone Triton adds the bias first, which rounds otherwise than in a loop.
    for begin in range(first, last, K):
        k = begin + tl.arange(0, K)
        left = tl.load(a + k[None, :], here[:, None] & (k < last)[None, :], 0.0)
        right = tl.load(w + k[:, None], there[None, :] & (k < last)[:, None], 0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    if KIND == "part":
        place = out + (tl.program_id(2) * rows + row[:, None]) * wide + col[None, :]
        tl.store(place, total, here[:, None] & there[None, :])
    elif KIND == "logits":
        at = row[:, None].to(tl.int64) * across
        tl.store(out + at + col[None, :], total, here[:, None] & there[None, :])
        seen = tl.where(there[None, :], total, float("-inf"))
        most = tl.max(seen, 1)
        bad = tl.sum(tl.where(there[None, :], total * 0.0, 0.0), 1)  # NaN where one is not finite
        share = most + tl.log(tl.sum(tl.exp(seen - most[:, None]), 1)) + bad
        tl.store(sums + row * tl.num_programs(1) + tl.program_id(1), share, here)
        word = tl.program_id(1) * (N // 32) + tl.arange(0, N // 32)
        best = tl.max(tl.reshape(seen, (M, N // 32, 32)), 2)
        tl.store(tops + at + word[None, :], best, here[:, None] & (word < tl.cdiv(wide, 32))[None, :])
    else:
        total += tl.load(bias + col, there, 0.0).to(tl.float32)[None, :]
        if ACTIVATION == "tanh":
            total = total / (1.0 + tl.exp(-1.5957691216057308 * (total + 0.044715 * total * total * total)))
        elif ACTIVATION == "none":
            total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
        elif ACTIVATION == "relu":
            total = tl.where(total < 0.0, 0.0, total)
        y = total.to(out.dtype.element_ty)
        if KIND == "qkv":
            third = wide // 3
            which = col // third
            inner = col - which * third
            tl.store(out + row[:, None] * third + inner[None, :], y, here[:, None] & (which == 0)[None, :])
            slot = tl.load(table + row * columns + 2, here, 0).to(tl.int64)
            at = (which - 1).to(tl.int64)[None, :] * room * third + slot[:, None] * third + inner[None, :]
            tl.store(pool + at, y, here[:, None] & ((which > 0) & there)[None, :])
        else:
            tl.store(out + row[:, None] * wide + col[None, :], y, here[:, None] & there[None, :])


@triton.jit(do_not_specialize=CHANGING)
def attend(
    q, pool, out, table, columns, room, wide, head_dim, scale,
    PAGE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row's head, over all keys up to the row's position, N at a time (Milakov and Gimelshein 2018, "Online
    normalizer calculation for softmax")."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, head = tl.program_id(0), tl.program_id(1)
    d, n = tl.arange(0, D), tl.arange(0, N)
    inside = d < head_dim
    mine = row * wide + head * head_dim + d
    query = tl.load(q + mine, inside, 0.0).to(tl.float32) * scale
    table += row * columns
    keys = tl.load(table + 1) + 1
    most, share = float("-inf"), 0.0
    mixed = tl.zeros((D,), tl.float32)
    for begin in range(0, keys, N):
        key = begin + n
        seen = key < keys
        slot = tl.load(table + 4 + key // PAGE, seen, 0).to(tl.int64) * PAGE + key % PAGE
        at = pool + slot[:, None] * wide + head * head_dim + d[None, :]
        mask = seen[:, None] & inside[None, :]
        k = tl.load(at, mask, 0.0)
        v = tl.load(at + room.to(tl.int64) * wide, mask, 0.0)  # on its way while k is looked at
        score = tl.where(seen, tl.sum(k.to(tl.float32) * query[None, :], 1), float("-inf"))
        now = tl.maximum(most, tl.max(score, 0))
        weight = tl.exp(score - now)
        old = tl.exp(most - now)
        share = share * old + tl.sum(weight, 0)
        mixed = mixed * old + tl.sum(weight[:, None] * v.to(tl.float32), 0)
        most = now
    tl.store(out + mine, (mixed / share).to(out.dtype.element_ty), inside)


@triton.jit
def summed(sums, totals, count, across, N: tl.constexpr, PDL: tl.constexpr):
    """log(sum(e^x)) of a row, from those of its tiles."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row, i = tl.program_id(0), tl.arange(0, N)
    share = tl.load(sums + row * count + i, i < count, float("-inf"))
    most = tl.max(share, 0)
    tl.store(totals + row * across, most + tl.log(tl.sum(tl.exp(share - most), 0)))
