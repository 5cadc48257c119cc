"""config.json of the GPT-2 family. Torch-free: who only plans, or answers without weights, uses it too."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.engine.base import BadCheckpoint

ACTIVATIONS = {
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_fast": "tanh",
    "gelu": "none",
    "relu": "relu",
}
"""What config.json calls it -> how GELU is approximated, or relu."""

REVERSE = "palaver_reverse"

MOST, MOST_LAYERS = 1 << 24, 1 << 10
"""Beyond these a size is a mistake: nobody should wait for a list of a billion names."""


@dataclass(frozen=True, slots=True)
class Config:
    """What config.json says, in its own names. `activation` is a value of ACTIVATIONS."""

    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int
    n_positions: int
    vocab_size: int
    eos_id: int
    layer_norm_epsilon: float
    activation: str
    tied: bool
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    reverse: bool | None
    """Was it trained with the turns in reverse, to judge and not to talk? None: only `palaver finetune` writes that."""

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def attention_scale(self, layer: int) -> float:
        """What a query's products with keys are multiplied by."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(map(math.prod, self.shapes().values()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model; linear layers stand (in, out), as GPT-2 stores them."""
        e, inner = self.n_embd, self.n_inner
        layer: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (e,), "ln_1.bias": (e,),
            "attn.c_attn.weight": (e, 3 * e), "attn.c_attn.bias": (3 * e,),
            "attn.c_proj.weight": (e, e), "attn.c_proj.bias": (e,),
            "ln_2.weight": (e,), "ln_2.bias": (e,),
            "mlp.c_fc.weight": (e, inner), "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, e), "mlp.c_proj.bias": (e,),
        }  # fmt: skip
        whole: dict[str, tuple[int, ...]] = {"wte.weight": (self.vocab_size, e), "wpe.weight": (self.n_positions, e)}
        whole |= {f"h.{i}.{name}": shape for i in range(self.n_layer) for name, shape in layer.items()}
        whole |= {"ln_f.weight": (e,), "ln_f.bias": (e,)}
        return whole if self.tied else whole | {"lm_head.weight": (self.vocab_size, e)}


def mend(path: Path) -> str:
    """What to do about a checkpoint's file that could not be read."""
    try:
        with path.open("rb") as file:
            pointer = file.read(24).startswith(b"version https://git-lfs")
    except PermissionError:
        return "let the user that runs Palaver read it"
    except OSError:
        pointer = False
    return "it only says where Git LFS has the file: git lfs pull brings it" if pointer else "fetch the file again"


def read_config(path: Path) -> Config:
    """Raises BadCheckpoint where it is not a GPT-2 configuration that this engine computes exactly."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text("utf-8-sig"))  # editors on Windows begin a file with a mark
        if not isinstance(raw, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read ({error}): {mend(path)}") from error
    kind = raw.get("model_type", "gpt2")
    if kind != "gpt2":
        raise BadCheckpoint(f"{path}: model_type is {kind!r}; Palaver runs the GPT-2 family (DialoGPT) only")
    if _flag(raw, "add_cross_attention", False, path):
        raise BadCheckpoint(f"{path}: add_cross_attention is on; Palaver runs decoder-only GPT-2 models")
    activation = ACTIVATIONS.get(str(raw.get("activation_function", "gelu_new")))
    if activation is None:
        raise BadCheckpoint(
            f"{path}: activation_function {raw['activation_function']!r} is not one of {', '.join(ACTIVATIONS)}"
        )
    sizes = {name: _size(raw, name, path) for name in ("n_layer", "n_head", "n_embd")}
    sizes["vocab_size"] = _size(raw, "vocab_size", path, least=2)  # the closing token alone says nothing
    n_positions = _size(raw, "n_positions" if "n_positions" in raw else "n_ctx", path, least=2)
    if sizes["n_embd"] % sizes["n_head"]:
        raise BadCheckpoint(f"{path}: n_embd {sizes['n_embd']} is not a multiple of n_head {sizes['n_head']}")
    eos_id = raw.get("eos_token_id", 50256)
    if not isinstance(eos_id, int) or isinstance(eos_id, bool) or not 0 <= eos_id < sizes["vocab_size"]:
        raise BadCheckpoint(
            f"{path}: eos_token_id {eos_id!r:.40} is not one id in the vocabulary of {sizes['vocab_size']}: "
            "write the right one there"
        )
    epsilon = raw.get("layer_norm_epsilon", 1e-5)
    if not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise BadCheckpoint(f"{path}: layer_norm_epsilon is {epsilon!r}, not a small number above 0 (GPT-2's is 1e-5)")
    return Config(
        **sizes,
        n_inner=4 * sizes["n_embd"] if raw.get("n_inner") is None else _size(raw, "n_inner", path),
        n_positions=n_positions,
        eos_id=eos_id,
        layer_norm_epsilon=float(epsilon),
        activation=activation,
        tied=_flag(raw, "tie_word_embeddings", True, path),
        scale_attn_weights=_flag(raw, "scale_attn_weights", True, path),
        scale_attn_by_inverse_layer_idx=_flag(raw, "scale_attn_by_inverse_layer_idx", False, path),
        reverse=_flag(raw, REVERSE, False, path) if REVERSE in raw else None,
    )


def _flag(raw: dict[str, Any], name: str, default: bool, path: Path) -> bool:
    value = raw.get(name, default)
    if not isinstance(value, bool):
        raise BadCheckpoint(f"{path}: {name} is {value!r:.40}, neither true nor false: write one of them there")
    return value


def _size(raw: dict[str, Any], name: str, path: Path, least: int = 1) -> int:
    value = raw.get(name)
    most = MOST_LAYERS if name == "n_layer" else MOST
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BadCheckpoint(
            f"{path}: {name} is {value!r:.40}, not a whole number from {least} to {most}: "
            "this is not a GPT-2 configuration"
        )
    return value
