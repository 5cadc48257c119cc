"""What step.cpp makes of weights in int8, in torch: a slow oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from core.engine.kv_cache import round_up
from core.engine.native.gpt2 import BLOCK, products
from core.engine.weights import Checkpoint


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(n, k) -> int8 (N, K / 32, 32) and bfloat16 scales (N, K / 32, 1); N and K are the next multiples of 32.

    The scale is rounded up, so that no value is cut off.
    """
    blocks = whole(weight).view(round_up(len(weight), BLOCK), -1, BLOCK)
    exact = blocks.abs().amax(2, keepdim=True) / 127
    scale = exact.bfloat16()
    scale = torch.where(scale.float() < exact, (scale.view(torch.int16) + 1).view(torch.bfloat16), scale)
    quants = (blocks / scale.float().clamp(min=1e-30)).round_().to(torch.int8)
    return quants, scale


def whole(weight: Tensor) -> Tensor:
    """In float32 and row after row, with zeros up to the next multiples of 32."""
    n, k = weight.shape
    if n % BLOCK == k % BLOCK == 0:
        return weight.float().contiguous()
    padded = torch.zeros(round_up(n, BLOCK), round_up(k, BLOCK))
    padded[:n, :k] = weight
    return padded


def rounded(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with the weights that int8 leaves of it, for torch."""
    for name in products(checkpoint.config):
        tensor = checkpoint.tensors[name]
        checkpoint.tensors[name] = dequantised(tensor.T).T if name.startswith("h.") else dequantised(tensor)
    return checkpoint


def dequantised(weight: Tensor) -> Tensor:
    quants, scale = quantise(weight)
    n, k = weight.shape
    return (quants * scale.float()).view(len(quants), -1)[:n, :k]
