"""What the peers load: a checkpoint of the wanted shape whose end of text is never drawn, so no reply ends early.

Speed depends on shapes, not on what the numbers mean, so the true shapes get random weights; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.engine.base import BadCheckpoint
from core.engine.config import read_config
from core.engine.hub import EMBEDDED
from core.engine.weights import load

SHAPES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20)}
"""DialoGPT's three: layers, width, heads; 50,257 ids, `POSITIONS` positions."""
POSITIONS = 1024


def check(shape: str, model: Path | None, message: int, reply: int) -> None:
    """Raises BadCheckpoint where there is no room for two exchanges, each turn with its end, and a reply."""
    source = _source(shape, model)
    positions = read_config(source / "config.json").n_positions if source else POSITIONS
    least = 2 * (message + 1 + reply + 1) + reply
    if positions < least:
        raise BadCheckpoint(
            f"{source or shape} has {positions} positions: name a model with {least} or more, or shorter --lengths"
        )


def make(shape: str, model: Path | None, folder: Path) -> Path:
    """The checkpoint's folder inside `folder`, kept for the next run. `model` stands in for a shape.

    Raises BadCheckpoint; OSError or SafetensorError where `folder` cannot be written.
    """
    source = _source(shape, model)
    path = folder / (_name(source) if source else f"{shape}-float16")
    if not (path / "model.safetensors").is_file():
        tensors, config = read(source) if source else draw(shape)
        path.mkdir(parents=True, exist_ok=True)
        names(path, config["vocab_size"])
        (path / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
        save_file(tensors, path / "model.safetensors.part", {"format": "pt"})
        (path / "model.safetensors.part").rename(path / "model.safetensors")
    return path


def _source(shape: str, model: Path | None) -> Path | None:
    return model or (EMBEDDED if shape == "tiny" else None)


def _name(source: Path) -> str:
    """Its folder's, and what tells it from others of that name, from a shape and from what it was before."""
    source = source.resolve()
    stats = [(path.name, path.stat()) for path in sorted(source.glob("*")) if path.is_file()]
    seen = str(source), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return f"{source.name}-{hashlib.sha256(repr(seen).encode()).hexdigest()[:8]}"


def draw(shape: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Random weights, spread as GPT-2's at its start; the end of text's row is zero, far below the 50 likeliest.

    In float16, as DialoGPT's three are stored; whoever computes in another precision makes that of them.
    """
    layers, width, heads = SHAPES[shape]
    vocab, positions, rng = 50_257, POSITIONS, torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng) * 0.02

    tensors = {"wte.weight": normal(vocab, width), "wpe.weight": normal(positions, width)}
    tensors["wte.weight"][vocab - 1] = 0.0
    for i in range(layers):
        for name, size in (
            ("attn.c_attn", (width, 3 * width)),
            ("attn.c_proj", (width, width)),
            ("mlp.c_fc", (width, 4 * width)),
            ("mlp.c_proj", (4 * width, width)),
        ):
            tensors[f"h.{i}.{name}.weight"] = normal(*size)
            tensors[f"h.{i}.{name}.bias"] = normal(size[1])
        for name in ("ln_1", "ln_2"):
            tensors |= {f"h.{i}.{name}.weight": torch.ones(width), f"h.{i}.{name}.bias": torch.zeros(width)}
    tensors |= {"ln_f.weight": torch.ones(width), "ln_f.bias": torch.zeros(width)}
    config = _config(layers, width, heads, positions, vocab, vocab - 1)
    return {f"transformer.{name}": tensor.half() for name, tensor in tensors.items()}, config


def read(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A real checkpoint, its end of text moved to the id that its last layer's bias likes least.

    In float16 if it is stored so, else in float32, for numpy has no bfloat16. Which id that is changes no shape; where
    it is drawn all the same, Palaver's peer goes on behind it. bos stays what ended a turn: with it between turns as
    before, nothing the model reads teaches it to say the new one.
    """
    found, c = load(source), read_config(source / "config.json")
    tensors = {
        f"transformer.{name}": (tensor if tensor.dtype is torch.float16 else tensor.float()).contiguous().clone()
        for name, tensor in found.tensors.items()
    }
    if "transformer.lm_head.weight" in tensors:
        raise BadCheckpoint(f"{source} has an output layer of its own, which not every peer can load: name another")
    liked = tensors["transformer.wte.weight"].float() @ tensors["transformer.ln_f.bias"].float()
    liked[c.eos_id] = torch.inf
    config = _config(c.n_layer, c.n_embd, c.n_head, c.n_positions, c.vocab_size, int(liked.argmin()))
    raw = json.loads((source / "config.json").read_text("utf-8"))
    return tensors, config | {
        "bos_token_id": c.eos_id,
        "n_inner": c.n_inner,
        "activation_function": raw.get("activation_function", "gelu_new"),
        "layer_norm_epsilon": c.layer_norm_epsilon,
        "scale_attn_weights": c.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": c.scale_attn_by_inverse_layer_idx,
    }


def _config(layers: int, width: int, heads: int, positions: int, vocab: int, eos: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "n_positions": positions,
        "vocab_size": vocab,
        "eos_token_id": eos,
        "bos_token_id": eos,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }


def names(path: Path, vocab: int) -> None:
    """A tokenizer's files with a made-up word per id: some converters will not do without."""
    words = {f"<{i}>": i for i in range(vocab)}
    (path / "vocab.json").write_text(json.dumps(words), "utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    end = f"<{vocab - 1}>"
    said = {"tokenizer_class": "GPT2Tokenizer", "bos_token": end, "eos_token": end, "unk_token": end}
    (path / "tokenizer_config.json").write_text(json.dumps(said), "utf-8")
