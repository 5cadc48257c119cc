"""Finds the compiled step.cpp; `open_library()` is None where there is none, and torch computes."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import struct
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

ARM = platform.machine() in ("aarch64", "arm64")
PATHS = ["portable", "Arm dot product"] if ARM else ["portable", "AVX2", "AVX-VNNI", "AVX512-VNNI", "AVX512-BF16"]
"""By number, the faster behind; `palaver_runs` says which ones this CPU can take."""

LAYOUT = 13
"""Goes up, here and in step.cpp, whenever a structure, a layout or a function changes."""


class Linear(Structure):
    _fields_ = [
        ("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("blocks", c_int32), ("groups", c_int32),
    ]  # fmt: skip


class Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class Layer(Structure):
    _fields_ = [
        ("ln_1", Norm), ("ln_2", Norm), ("c_attn", Linear), ("attn_c_proj", Linear), ("c_fc", Linear),
        ("mlp_c_proj", Linear), ("attention_scale", c_float),
    ]  # fmt: skip


class Model(Structure):
    _fields_ = [
        ("layers", POINTER(Layer)), ("wte", Linear), ("lm_head", Linear), ("wpe", c_void_p), ("ln_f", Norm),
        ("n_layer", c_int32), ("n_head", c_int32), ("n_embd", c_int32), ("n_positions", c_int32),
        ("activation", c_int32), ("weights", c_int32), ("keys", c_int32), ("epsilon", c_float),
    ]  # fmt: skip


class Span(Structure):
    _fields_ = [
        ("pages", c_void_p), ("start", c_int32), ("count", c_int32), ("row", c_int32),
    ]  # fmt: skip


class Step(Structure):
    _fields_ = [
        ("spans", POINTER(Span)), ("ids", POINTER(c_int32)), ("positions", POINTER(c_int32)),
        ("wanted", POINTER(c_int32)),
        ("n_spans", c_int32), ("rows", c_int32), ("n_wanted", c_int32), ("threads", c_int32),
        ("x", c_void_p), ("wide", c_void_p), ("mixed", c_void_p), ("logits", c_void_p),
        ("tops", c_void_p), ("sums", c_void_p), ("totals", POINTER(c_double)), ("scratch", c_void_p),
        ("narrow", c_void_p),
    ]  # fmt: skip


DRAW = struct.Struct("QQQddiiii")
"""Logits, tops, seed, temperature, top_p, n, k, banned, position."""


@cache
def open_library() -> Any | None:
    """The library that was built beside this file. NATIVE=0 in the environment leaves it out."""
    files = sorted(Path(__file__).parent.glob("step*.so")) if os.environ.get("NATIVE") != "0" else []
    for file in files:
        try:
            return load(file)
        except (OSError, AttributeError) as error:  # built for another machine, or from an older step.cpp
            log.warning("%s cannot be used (%s): torch computes instead", file.name, error)
    return None


def load(file: Path) -> Any:
    """The library with its functions typed. Raises OSError or AttributeError where it is not ours, or outdated."""
    library = ctypes.CDLL(str(file))
    if library.palaver_layout() != LAYOUT:
        raise OSError("it was built from another version of step.cpp")
    library.palaver_runs.argtypes = [c_int32]
    library.palaver_runs.restype = ctypes.c_bool
    library.palaver_pack.argtypes = [
        c_void_p, c_int32, c_int64, c_int64, c_int32, c_int32, c_void_p, c_void_p, c_int32, c_int32,
    ]  # fmt: skip
    library.palaver_pack.restype = None
    library.palaver_step.argtypes = [POINTER(Model), POINTER(Step), c_int32]
    library.palaver_step.restype = None
    library.palaver_logsumexp.argtypes = [c_void_p, c_int32, c_int32, c_int32, c_void_p, c_int32, c_int32]
    library.palaver_logsumexp.restype = None
    library.palaver_draw.argtypes = [c_void_p, c_int32, c_void_p, c_int32, c_int32]
    library.palaver_draw.restype = None
    return library


def is_fast() -> bool:
    """Does it beat torch in every kind of step here? (The portable path does for single rows, not for prompts.)"""
    library = open_library()
    return library is not None and PATHS[library.palaver_best_path()] != "portable"
