"""What the hardware allows, measured beside the peers, and what a reply would cost at that limit."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.engine.machine import cores

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16")
LIBRARIES = ("torch", "transformers", "ctranslate2", "llama_cpp_python", "numpy")


def describe(device: str) -> dict[str, Any]:
    """The GPU where it is asked, the processor, its instruction sets, memory, versions."""
    info = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").is_file() else ""
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    values = {name.strip(): value.strip() for name, value in lines.items()}
    flags = set((values.get("flags") or values.get("Features") or "").split())
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "processor": values.get("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "instructions": [flag for flag in FLAGS if flag in flags],
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **versions,
    }


def bandwidth(threads: int, device: str) -> dict[str, float]:
    """GB/s read from memory; half a second. It drifts where memory is shared with other machines: ask often."""
    torch.set_num_threads(threads)
    memory = torch.ones(1 << 27, device=device)  # 512 MB, written: fresh pages would be the kernel's one page of zeros
    found = memory.nbytes / 1e9 / min(_seconds(memory.sum, device) for _ in range(7))
    del memory
    torch.cuda.empty_cache()  # the peers are to have all of a GPU
    return {"read_gb_s": found}


def products(threads: int, device: str) -> dict[str, float]:
    """GFLOP/s (int8: GOP/s) of a square matrix product, as fast as torch has it."""
    torch.set_num_threads(threads)
    found = {
        "float32": _product(torch.float32, torch.mm, device),
        "bfloat16": _product(torch.bfloat16, torch.mm, device),
        "int8": _product(torch.int8, torch._int_mm, device),
    }
    torch.cuda.empty_cache()
    return found


def _product(dtype: torch.dtype, multiply: Callable[[Tensor, Tensor], Tensor], device: str) -> float:
    """With sides that double until it takes a while: some processors need seconds where others need microseconds."""
    best, side = 0.0, 128
    while side <= (2048 if device == "cpu" else 8192):
        a = (torch.randn(side, side) * 40).to(device, dtype)
        seconds = min(_seconds(partial(multiply, a, a), device) for _ in range(4))
        best = max(best, 2 * side**3 / 1e9 / seconds)
        if seconds > 0.05:
            break
        side *= 2
    return best


def _seconds(run: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    run()
    if device == "cuda":  # so far it has only been asked for
        torch.cuda.synchronize()
    return time.perf_counter() - began


def least_seconds(
    config: dict[str, Any],
    machine: dict[str, float],
    precision: str,
    asked: Sequence[tuple[int, int]],
    reply: int,
    together: int,
) -> float:
    """The mean seconds per reply when nothing costs but reading and multiplying, each prefix computed only once.

    `asked`: (prompt length, its new ids) of each reply, which has `reply` ids; `together`: how many replies share one
    reading of the weights.
    """
    width, layers, vocab = (int(config[name]) for name in ("n_embd", "n_layer", "vocab_size"))
    blocks, head = layers * width * (4 * width + 2 * (config.get("n_inner") or 4 * width)), vocab * width
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[precision]  # of a weight, and of a key's or value's number
    weights, token = (blocks + head) * size / 1e9, 2 * layers * width * size / 1e9
    rate = max(machine["float32"], machine[precision])

    def one(length: int, new: int) -> float:
        read: float = weights / together / machine["read_gb_s"]
        prefill = 2 * (blocks * new + head) / 1e9 / rate
        step = 2 * (blocks + head) / 1e9 / rate
        keys = sum(length + i for i in range(1, reply)) * token / machine["read_gb_s"]
        if together > 1:  # prefill and decode rows of different replies share steps
            return max(reply * read + keys, prefill + (reply - 1) * step)
        return max(read, prefill) + (reply - 1) * max(read, step) + keys

    return sum(one(*pair) for pair in asked) / len(asked)
