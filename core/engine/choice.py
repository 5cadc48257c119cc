"""Which model computes, chosen once at start: device, precision, implementation, threads, room for the cache.

device, precision            where                                    model
cpu, int8                    there is a compiled step                 native.gpt2.NativeGPT2
cpu, int8                    torch has VNNI, and its rows agree       model.GPT2 in int8
cpu, int8                    else                                     model.GPT2 in float32
cpu, 32 or 16 bits           the compiled step is faster than torch   native.gpt2.NativeGPT2
cuda, 32 or 16 bits          graphs compute what torch does           graphs.GraphedGPT2
cpu or cuda, 32 or 16 bits   else                                     model.GPT2
"""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from core.engine import weights
from core.engine.base import BadCheckpoint
from core.engine.checks import check_graphs, first_layer, rows_agree
from core.engine.config import read_config
from core.engine.graphs import GraphedGPT2, lost
from core.engine.kv_cache import ROUND, round_up
from core.engine.machine import cores, free_memory
from core.engine.model import GPT2, MIN_ROWS, TILE, Model, multiplies_int8
from core.engine.model_runner import ModelRunner
from core.engine.native import gpt2, library
from core.engine.reference import divergence

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
LARGE = 1_000_000
"""Parameters from which on int8 is worth what it rounds off: the embedded model has 4 million, DialoGPT-small 124."""
THREADED = 30_000_000
"""Parameters from which on threads share a step; below, they would wait for each other longer than they compute."""
DRAFTED = 30_000_000
"""Parameters from which on a step of one row is as long as its weights take to read, and a copy in int8 saves time."""

FAR = 0.03
"""Nats by which int8 may differ from float32 for DTYPE=auto to keep it: the embedded model's 0.005 cost it 0.04 % of
perplexity; made to bear int8 badly, 0.02 cost 0.3 %, 0.06 0.7 % and 0.16 2.4 %."""

NARROW = 64
"""Width of a head up to which attention's queries are alike in every number that is a multiple of MIN_ROWS."""
WAYS = (0, MIN_ROWS), (0, 16), (16, 16)
"""`block` and `queries` of model.GPT2 on a CPU, the fastest first: with which rows agree, machine and shape decide."""


def open_runner(
    folder: Path, device: str, dtype: str, threads: int, cache_bytes: int = 0, with_draft: bool = False
) -> ModelRunner:
    """Choose, load, check, warm up; `with_draft`, with a copy that guesses where one may pay. Raises BadCheckpoint."""
    place = choose_device(device)
    if place.type == "cpu":
        torch.set_num_threads(threads or (cores() if parameters(folder) >= THREADED else 1))
    else:
        torch.cuda.set_device(place.index or 0)  # of this thread: kernels are launched where it is
        torch.set_num_threads(threads or min(8, cores()))  # for draws
    with torch.inference_mode():
        runner = ModelRunner(choose(folder, place, dtype, cache_bytes))
        runner.draft = copy_in_int8(runner.model, folder) if with_draft else None
        runner.warm_up()
    if runner.draft:
        runner.model.how += ", guesses in int8"
    if place.type == "cpu":
        count = torch.get_num_threads()
        runner.model.how += f", {count} thread{'s' if count > 1 else ''}"
    return runner


def choose(folder: Path, device: torch.device, dtype: str, cache_bytes: int) -> Model:
    """`build` with the precision that DTYPE names. auto tries whether int8 suits this model."""
    precision = choose_dtype(dtype, device, folder)
    model = build(folder, device, precision, cache_bytes)
    if dtype == "auto" and precision is torch.int8:
        why = ""
        if model.dtype is not torch.int8:
            why = "this machine's products of int8 depend on the batch"
        elif not (far := divergence(model, weights.load(folder))) <= FAR:  # it may be NaN
            why = f"this model bears int8 badly ({far:.2f} nats from float32)"
        if why:
            precision = without_int8(device)
            log.warning("%s: DTYPE=auto takes %s", why, str(precision).removeprefix("torch."))
            del model
            model = build(folder, device, precision, cache_bytes)
    return model


def build(folder: Path, device: torch.device, dtype: torch.dtype, cache_bytes: int = 0) -> Model:
    """The fastest model whose rows do not depend on each other. GRAPHS=0 in the environment leaves CUDA graphs out."""
    native = library.open_library() if device.type == "cpu" and dtype in gpt2.WEIGHTS else None
    model: Model
    if native and (dtype is torch.int8 or library.is_fast()):
        model = gpt2.NativeGPT2(weights.load(folder), native, dtype)
    elif dtype is torch.int8:
        model = int8_in_torch(folder)
    elif device.type == "cpu":
        model = in_torch(lambda: weights.load(folder), dtype)
    else:
        model = eager = GPT2(weights.load(folder), device, dtype, block=TILE, queries=TILE)
        if os.environ.get("GRAPHS") != "0":
            model = graphed(eager, cache_tokens(eager, cache_bytes))
        if model is eager:
            model = eager.with_float32_logits()  # as graphs have them
            if not rows_agree(first_layer(model)):
                log.warning("without CUDA graphs this device's rows depend on the batch: so may replies, in rare cases")
    weights.trim()
    return model


def copy_in_int8(model: Model, folder: Path) -> Model | None:
    """To guess for a large model of another precision; it takes the same keys and values."""
    if not isinstance(model, gpt2.NativeGPT2) or model.dtype is torch.int8 or model.config.parameters < DRAFTED:
        return None
    draft = gpt2.NativeGPT2(weights.load(folder), model.native, torch.int8, kv_dtype=model.kv_dtype)
    weights.trim()
    return draft


def graphed(eager: GPT2, tokens: int) -> Model:
    """`eager` with CUDA graphs where they are seen to compute the same; else `eager`, and a warning why."""
    for plain in (False, True):
        try:
            return checked(GraphedGPT2(eager, tokens, plain=plain), eager)  # no name here holds it, should that fail
        except Exception as error:
            if lost(error):
                log.error("the device was lost in trying CUDA graphs: GRAPHS=0 in the environment leaves them out")
                raise
            what = (
                "CUDA graphs are left out, steps are slower" if plain else "CUDA graphs are tried with plainer kernels"
            )
            log.warning("%s: %r", what, error)
        gc.collect()
        torch.cuda.empty_cache()  # the memory that they took
    return eager


def checked(model: GraphedGPT2, eager: GPT2) -> GraphedGPT2:
    check_graphs(model, eager)
    if not rows_agree(model):
        raise ValueError("rows depend on how a prompt is cut")
    return model


def in_torch(load: Callable[[], weights.Checkpoint], dtype: torch.dtype) -> GPT2:
    model, agrees = agreeing(load, dtype)
    if not agrees:
        log.warning("in torch this machine's rows depend on the batch: so may replies, in rare cases")
    elif model.block:
        log.warning("this machine's matrix products depend on the batch's size: slower blocks of %d rows", model.block)
    return model


def agreeing(load: Callable[[], weights.Checkpoint], dtype: torch.dtype) -> tuple[GPT2, bool]:
    """On the CPU, in the fastest way in which its rows agree; False: they do in none."""
    for block, queries in WAYS:
        checkpoint = load()
        if checkpoint.config.head_dim > NARROW and queries == MIN_ROWS:
            continue  # they may depend on it and yet agree here, where 16 bits round that off
        model = GPT2(checkpoint, CPU, dtype, block=block, queries=queries)
        if rows_agree(first_layer(model)):
            return model, True
    return model, False


def int8_in_torch(folder: Path) -> Model:
    """float32 where it has no fast product whose rows agree: nothing that rounds more would be faster."""
    if multiplies_int8():
        fast, agrees = agreeing(lambda: weights.load(folder), torch.int8)
        if agrees:
            return fast
    model = in_torch(lambda: weights.load(folder), torch.float32)
    model.how = f"{model.how}, in place of int8 (the compiled step is not here)"
    return model


def choose_device(name: str) -> torch.device:
    """auto: CUDA where there is one. Raises BadCheckpoint for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise BadCheckpoint(f"DEVICE={name} is not known: auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadCheckpoint(f"DEVICE={name}: this machine (or this build of torch) has no such device; try auto or cpu")
    return device


def choose_dtype(name: str, device: torch.device, folder: Path) -> torch.dtype:
    """auto: the fastest that most models bear within 1 % of perplexity; on a CPU, exact float32 for a small model."""
    if name == "auto":
        if device.type != "cpu":
            return torch.bfloat16 if computes_bfloat16(device) else torch.float16
        if parameters(folder) < LARGE:
            return torch.float32
        return torch.int8 if library.is_fast() or multiplies_int8() else without_int8(device)
    if name not in DTYPES:
        raise BadCheckpoint(f"DTYPE={name} is not known: auto, {', '.join(DTYPES)}")
    if name == "int8" and device.type != "cpu":
        raise BadCheckpoint("DTYPE=int8 is for CPUs; on CUDA use auto, bfloat16 or float16")
    return DTYPES[name]


def without_int8(device: torch.device) -> torch.dtype:
    """The fastest on a CPU after int8. The native step wants no instructions for bfloat16, torch does."""
    return torch.bfloat16 if library.is_fast() or computes_bfloat16(device) else torch.float32


def computes_bfloat16(device: torch.device) -> bool:
    """Has it products of bfloat16? For a CPU without, torch emulates them, up to 100 times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def parameters(folder: Path) -> int:
    """Of a checkpoint that is not loaded yet."""
    return read_config(folder / "config.json").parameters


def cache_tokens(model: Model, cache_bytes: int) -> int:
    """How many tokens' KV fit in `cache_bytes`; 0 takes a quarter of the memory that is free, on a GPU three quarters,
    at most 4 GiB. At least a whole window's."""
    if isinstance(model, GraphedGPT2):  # it has taken its memory already
        return model.tokens
    on_gpu = model.device.type == "cuda"
    some = torch.cuda.mem_get_info(model.device)[0] * 3 // 4 if on_gpu else free_memory() // 4
    room = (cache_bytes or min(some, 4 << 30)) // model.token_bytes
    return max(room, round_up(model.config.n_positions, ROUND))
