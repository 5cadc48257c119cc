"""A checkpoint as llama.cpp reads it. Torch-free, so that llama.cpp's memory is its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants
from safetensors.numpy import load_file


def gguf_path(folder: Path, kind: str) -> Path:
    return folder / f"{kind}.gguf"


def gguf(folder: Path, kind: str) -> None:
    """Write the checkpoint as llama.cpp reads it; matrices as f32, bf16 or q8_0, all else f32."""
    path = gguf_path(folder, kind)
    if path.is_file():
        return
    c = json.loads((folder / "config.json").read_text("utf-8"))
    part = path.with_suffix(".part")
    writer = GGUFWriter(part, "gpt2")
    writer.add_context_length(c["n_positions"])
    writer.add_embedding_length(c["n_embd"])
    writer.add_feed_forward_length(c.get("n_inner") or 4 * c["n_embd"])
    writer.add_block_count(c["n_layer"])
    writer.add_head_count(c["n_head"])
    writer.add_layer_norm_eps(c["layer_norm_epsilon"])
    writer.add_file_type({"f32": LlamaFileType.ALL_F32, "bf16": LlamaFileType.MOSTLY_BF16}.get(kind, 7))
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(c["vocab_size"])
    matrix = {"f32": "F32", "bf16": "BF16", "q8_0": "Q8_0"}[kind]
    for name, tensor in load_file(folder / "model.safetensors").items():
        new, is_linear = _gguf_name(name.removeprefix("transformer."))
        values = numpy.ascontiguousarray(tensor.T if is_linear else tensor, numpy.float32)
        big = values.ndim == 2 and new != "position_embd.weight"
        to = GGMLQuantizationType[matrix if big else "F32"]
        writer.add_tensor(new, quants.quantize(values, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.move(part, path)


def _gguf_name(name: str) -> tuple[str, bool]:
    """(llama.cpp's name, whether it is a matrix that stands (in, out) here and (out, in) there)"""
    top = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight"}
    if not name.startswith("h."):
        return top.get(name, name.replace("ln_f", "output_norm")), False
    _, layer, rest = name.split(".", 2)
    module, _, end = rest.rpartition(".")
    short = {
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }[module]
    return f"blk.{layer}.{short}.{end}", end == "weight" and "c_" in module
