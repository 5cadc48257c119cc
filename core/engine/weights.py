"""A checkpoint on disk -> Config and tensors under the model's own names, every one of them checked.

Reads what the GPT-2 family comes in: model.safetensors or pytorch_model.bin, in one file or in shards, with or without
the `transformer.` prefix, with legacy attention buffers, with lm_head tied, explicit or (the reverse model of the
DialoGPT paper) as `lm_head.decoder.weight`, in any floating type.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.engine.base import BadCheckpoint

ACTIVATIONS = {
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_fast": "tanh",
    "gelu": "none",
    "relu": "relu",
}
"""What config.json calls it -> how GELU is approximated, or relu."""

BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|.*\.rotary_emb\..*")
"""Constants that old versions stored beside the weights."""


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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's numbers on the CPU, as stored; `tensors` has exactly the names of `config.shapes()`."""

    folder: Path
    config: Config
    tensors: dict[str, Tensor]


def load(folder: Path) -> Checkpoint:
    """Read and check the whole checkpoint. Raises BadCheckpoint, one line that names the file and the mend."""
    config = read_config(folder / "config.json")
    source, raw = _read_tensors(folder)
    tensors = _normalised(raw, config, source)
    _check(tensors, config, source)
    return Checkpoint(folder, config, tensors)


def read_config(path: Path) -> Config:
    """Raises BadCheckpoint where it is not a GPT-2 configuration that this engine computes exactly."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read ({error}): fetch the file again") from error
    kind = raw.get("model_type", "gpt2")
    if kind != "gpt2":
        raise BadCheckpoint(f"{path}: model_type is {kind}; Palaver runs the GPT-2 family (DialoGPT) only")
    if raw.get("add_cross_attention"):
        raise BadCheckpoint(f"{path}: add_cross_attention is on; Palaver runs decoder-only GPT-2 models")
    activation = ACTIVATIONS.get(str(raw.get("activation_function", "gelu_new")))
    if activation is None:
        raise BadCheckpoint(
            f"{path}: activation_function {raw['activation_function']} is not one of {', '.join(ACTIVATIONS)}"
        )
    sizes = {name: _size(raw, name, path) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    n_positions = _size(raw, "n_positions" if "n_positions" in raw else "n_ctx", path)
    if sizes["n_embd"] % sizes["n_head"]:
        raise BadCheckpoint(f"{path}: n_embd {sizes['n_embd']} is not a multiple of n_head {sizes['n_head']}")
    eos_id = raw.get("eos_token_id", 50256)
    if not isinstance(eos_id, int) or not 0 <= eos_id < sizes["vocab_size"]:
        raise BadCheckpoint(
            f"{path}: eos_token_id {eos_id} is not in the vocabulary of {sizes['vocab_size']}: "
            "write the right one there"
        )
    return Config(
        **sizes,
        n_inner=_size(raw, "n_inner", path) if raw.get("n_inner") else 4 * sizes["n_embd"],
        n_positions=n_positions,
        eos_id=eos_id,
        layer_norm_epsilon=float(raw.get("layer_norm_epsilon", 1e-5)),
        activation=activation,
        tied=bool(raw.get("tie_word_embeddings", True)),
        scale_attn_weights=bool(raw.get("scale_attn_weights", True)),
        scale_attn_by_inverse_layer_idx=bool(raw.get("scale_attn_by_inverse_layer_idx", False)),
    )


def _size(raw: dict[str, Any], name: str, path: Path) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadCheckpoint(
            f"{path}: {name} is {value!r}, not a whole number above 0: this is not a GPT-2 configuration"
        )
    return value


def _read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The first kind of weight file that is there, safetensors before .bin, shards after the single file."""
    for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_bin)):
        path, index = folder / name, folder / f"{name}.index.json"
        if path.is_file():
            return path, read(path)
        if index.is_file():
            tensors: dict[str, Tensor] = {}
            for shard in _shards(index):
                tensors |= read(folder / shard)
            return index, tensors
    raise BadCheckpoint(f"{folder} has neither model.safetensors nor pytorch_model.bin: fetch the weights")


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadCheckpoint(f"{index} is not an index of shards ({error!r}): fetch the file again") from error
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise BadCheckpoint(f"{index} names {name}, which is not there: fetch the missing shard")
    return names


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} is damaged or cut short ({_one_line(error)}): fetch the file again") from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken pickle or zip made it raise
        raise BadCheckpoint(
            f"{path} is damaged, cut short, or holds more than weights ({_one_line(error)}): fetch the file again"
        ) from error
    if not isinstance(raw, dict):
        raise BadCheckpoint(f"{path} holds no weights by name: save model.state_dict() there")
    raw = raw.get("state_dict", raw)
    return {str(name): value for name, value in raw.items() if isinstance(value, Tensor)}


def _normalised(raw: dict[str, Tensor], config: Config, source: Path) -> dict[str, Tensor]:
    """The model's own names: prefixes off, buffers out, lm_head only where it differs from the embedding."""
    tensors = {}
    for name, tensor in raw.items():
        name = name.removeprefix("module.").removeprefix("transformer.")
        if not BUFFERS.fullmatch(name):
            tensors["lm_head.weight" if name == "lm_head.decoder.weight" else name] = tensor
    head, embedding = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    if config.tied and head is not None:
        if embedding is None:
            tensors["wte.weight"] = head
        elif head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
            raise BadCheckpoint(
                f"{source}: lm_head.weight differs from wte.weight, but config.json ties them: "
                'write "tie_word_embeddings": false there if that is meant'
            )
        del tensors["lm_head.weight"]
    return tensors


def _check(tensors: dict[str, Tensor], config: Config, source: Path) -> None:
    shapes = config.shapes()
    for problem, names in (("lacks", shapes.keys() - tensors.keys()), ("has unknown", tensors.keys() - shapes.keys())):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise BadCheckpoint(f"{source} {problem} {listed}: it does not belong to config.json, or is no GPT-2 model")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise BadCheckpoint(f"{source}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}")
        if not tensor.is_floating_point():
            raise BadCheckpoint(f"{source}: {name} is {tensor.dtype}; quantised files are not read, use the original")
        if not math.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            raise BadCheckpoint(f"{source}: {name} holds NaN or infinity: the file is damaged, fetch it again")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
