"""Compiles every kernel that a step launches, for GPUs that are not here, where Triton interprets nothing.

python -m tests.core.engine.compiled FOLDER     a line for each: its name, the GPU, shared memory in bytes,
                                                and memory of a thread's, where registers are too few
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from core.engine import kernels, model, weights
from core.engine.graphs import GraphedGPT2

NAMES = "norm", "linear", "attend", "summary", "summed"
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
GPUS = {75: torch.float16, 80: torch.float32, 90: torch.bfloat16}
"""A precision for each compute capability: Turing, which has no bfloat16, Ampere, Hopper."""


class Compiler:
    """Stands in for a kernel: a launch compiles it, once for each set of types and constants."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability, self.seen = kernel, capability, set[str]()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(count > 0 for count in grid)
        return self.launch

    def launch(
        self, *args: Any, num_warps: int = 4, num_stages: int = 3, launch_pdl: bool = False, **constants: Any
    ) -> None:
        names = self.kernel.arg_names
        constants |= {name: value for name, value in zip(names, args, strict=False) if value is None}
        kinds = dict.fromkeys(constants, "constexpr")
        kinds |= {name: kind(value) for name, value in zip(names, args, strict=False) if value is not None}
        assert set(kinds) == set(names)
        if (key := str((names, kinds, constants, num_warps, num_stages))) not in self.seen:
            self.seen.add(key)
            signature = {name: kinds[name] for name in names}
            values = {(names.index(name),): v for name, v in constants.items()}
            even = {(i,): [["tt.divisibility", 16]] for i, value in enumerate(args) if self.is_even(names[i], value)}
            source = ASTSource(self.kernel, signature, values, even)
            options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": launch_pdl}
            done = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
            [cubin] = [path for name, path in done.metadata_group.items() if name.endswith(".cubin")]
            command = triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin
            [stack] = re.findall(
                r"STACK:(\d+)", subprocess.run(command, capture_output=True, text=True, check=True).stdout
            )
            print(self.kernel.fn.__name__, self.capability, done.metadata.shared, stack, flush=True)

    @staticmethod
    def is_even(name: str, value: Any) -> bool:
        """Is it compiled for multiples of 16? As a launch finds out; torch's memory begins at one."""
        return isinstance(value, Tensor) or (type(value) is int and value % 16 == 0 and name not in kernels.CHANGING)


def kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def main(folder: Path) -> None:
    model.pack = lambda weight: None
    for capability, dtype in GPUS.items():
        graphed = GraphedGPT2(model.GPT2(weights.load(folder), torch.device("cpu"), dtype), 1024)
        graphed.capability = divmod(capability, 10)
        graphed.early = capability >= 90
        compilers = {name: Compiler(getattr(kernels, name), capability) for name in NAMES}
        graphed.kernels = SimpleNamespace(**vars(kernels) | compilers)  # type: ignore[assignment]
        for rows, wanted in ((1, 1), (32, 32), (8, 1)):
            graphed._step(rows, wanted)


if __name__ == "__main__":
    with torch.inference_mode():
        main(Path(sys.argv[1]))
