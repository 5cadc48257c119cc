"""Small random checkpoints of the GPT-2 family, in every form they come in. The weights vary: no ties, no monotony."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

Form = Literal["safetensors", "bin", "bin-old", "safetensors-shards", "bin-shards"]

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 256, "vocab_size": 384},
    "odd": {"n_layer": 3, "n_embd": 39, "n_head": 3, "n_positions": 150, "vocab_size": 301},
    "inner": {"n_layer": 2, "n_embd": 48, "n_head": 2, "n_inner": 100, "n_positions": 200, "vocab_size": 333},
    "one-head": {"n_layer": 1, "n_embd": 44, "n_head": 1, "n_positions": 130, "vocab_size": 290},
    "deep": {"n_layer": 5, "n_embd": 32, "n_head": 8, "n_positions": 1024, "vocab_size": 517},
    "relu": {
        "n_layer": 2, "n_embd": 40, "n_head": 5, "n_positions": 128, "vocab_size": 300,
        "activation_function": "relu",
    },
    "erf": {
        "n_layer": 2, "n_embd": 40, "n_head": 5, "n_positions": 128, "vocab_size": 300,
        "activation_function": "gelu",
    },
    "scaled": {
        "n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 128, "vocab_size": 300,
        "scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3,
    },
    "unscaled": {
        "n_layer": 2, "n_embd": 16, "n_head": 4, "n_positions": 128, "vocab_size": 300,
        "scale_attn_weights": False, "reorder_and_upcast_attn": True,
    },
}  # fmt: skip
"""What differs from GPT-2's configuration, by name."""

LINES = [
    "hi , how are you ?",
    "i am fine , thanks ! and you ?",
    "what do you like ? i like music and long walks .",
    "tell me a joke about the rain in the town .",
    "my name is Anna . nice to meet you !",
    "where do you live ? by the sea , in a small house .",
]


def make_config(shape: str = "plain", **changes: Any) -> dict[str, Any]:
    """config.json's content. The end of text is id 256, after the bytes, as in `make_tokenizer`."""
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 256, "eos_token_id": 256}
    return config | SHAPES[shape] | changes


def make_tensors(config: dict[str, Any], *, std: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Random weights by the names of GPT2LMHeadModel.state_dict(), without lm_head. Linear layers stand (in, out)."""
    rng = torch.Generator().manual_seed(seed)
    e = config["n_embd"]
    inner = config.get("n_inner") or 4 * e

    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=rng) * std + mean

    tensors = {"wte.weight": normal(config["vocab_size"], e), "wpe.weight": normal(config["n_positions"], e)}
    for i in range(config["n_layer"]):
        for ln in ("ln_1", "ln_2"):
            tensors |= {f"h.{i}.{ln}.weight": normal(e, mean=1.0), f"h.{i}.{ln}.bias": normal(e)}
        for name, rows, columns in (
            ("attn.c_attn", e, 3 * e),
            ("attn.c_proj", e, e),
            ("mlp.c_fc", e, inner),
            ("mlp.c_proj", inner, e),
        ):
            tensors |= {f"h.{i}.{name}.weight": normal(rows, columns), f"h.{i}.{name}.bias": normal(columns)}
    tensors |= {"ln_f.weight": normal(e, mean=1.0), "ln_f.bias": normal(e)}
    return {f"transformer.{name}": tensor for name, tensor in tensors.items()}


def save_tensors(folder: Path, tensors: dict[str, Tensor], form: Form = "safetensors") -> None:
    """Write the weights' file, or two shards and their index. `bin-old` is as torch wrote it before 1.6."""
    if form == "bin-old":
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        return
    name = "model.safetensors" if form.startswith("safetensors") else "pytorch_model.bin"
    write = save_file if name == "model.safetensors" else torch.save
    if not form.endswith("shards"):
        write({k: v.contiguous() for k, v in tensors.items()}, folder / name)
        return
    stem, _, ending = name.rpartition(".")
    weight_map: dict[str, str] = {}
    for shard in (0, 1):
        part = {k: v.contiguous() for i, (k, v) in enumerate(tensors.items()) if i % 2 == shard}
        file = f"{stem}-{shard + 1:05}-of-00002.{ending}"
        write(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{name}.index.json").write_text(json.dumps(index), "utf-8")


def make_tokenizer(folder: Path, vocab_size: int = 300) -> None:
    """A byte-level BPE in tokenizer.json: ids 0 to 255 are the bytes, 256 is <|endoftext|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"<|endoftext|>": len(alphabet)}
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(LINES * 3, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def make_checkpoint(
    folder: Path,
    shape: str = "plain",
    *,
    form: Form = "safetensors",
    prefix: bool = True,
    buffers: bool = False,
    head: Literal["tied", "explicit", "own", "decoder"] = "tied",
    dtype: torch.dtype = torch.float32,
    std: float = 0.3,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A folder that loads. `head`: absent; a copy of the embedding; its own; its own as in the reverse model's file."""
    folder.mkdir(parents=True, exist_ok=True)
    if head in ("own", "decoder"):
        changes["tie_word_embeddings"] = False
    config = make_config(shape, **changes)
    tensors = make_tensors(config, std=std, seed=seed)
    embedding = tensors["transformer.wte.weight"]
    if head != "tied":
        own = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(seed + 1)) * std
        name = "lm_head.decoder.weight" if head == "decoder" else "lm_head.weight"
        tensors[name] = embedding.clone() if head == "explicit" else own
    if buffers:
        n = config["n_positions"]
        for i in range(config["n_layer"]):
            tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(n, n, dtype=torch.uint8).tril().view(1, 1, n, n)
            tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if not prefix:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    save_tensors(folder, tensors, form)
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    make_tokenizer(folder, config["vocab_size"])
    return folder


EMBEDDED = Path(__file__).parents[1] / "core/models/tiny"


def make_outlying(folder: Path, times: float) -> Path:
    """The embedded model as int8 likes it less: in every norm one channel is so many times larger and the weights that
    read it smaller, as large GPT-2 models have them. In float32 it computes the same."""
    tensors = {name: tensor.float() for name, tensor in load_file(EMBEDDED / "model.safetensors").items()}
    for layer in range(4):
        for norm, linear in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            here, channel = f"transformer.h.{layer}", 11 + 37 * layer
            tensors[f"{here}.{norm}.weight"][channel] *= times
            tensors[f"{here}.{norm}.bias"][channel] *= times
            tensors[f"{here}.{linear}.weight"][channel] /= times
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(EMBEDDED / name, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
