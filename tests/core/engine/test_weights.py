"""Every form a checkpoint comes in says the same; every broken one is one clear line."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.engine import weights
from core.engine.base import BadCheckpoint
from core.engine.config import read_config
from core.engine.torch_engine import TorchEngine
from tests.checkpoints import make_checkpoint, save_tensors
from tests.core.engine.oracle import ask, greedy, prompts

Open = Callable[..., Coroutine[Any, Any, TorchEngine]]
Make = Callable[..., Path]

FORMS: dict[str, dict[str, Any]] = {
    "safetensors": {},
    "bin": {"form": "bin"},
    "no prefix": {"prefix": False},
    "bin of an old torch": {"form": "bin-old"},
    "lm_head in a bin of an old torch": {"form": "bin-old", "head": "explicit", "buffers": True},
    "bin, no prefix, buffers": {"form": "bin", "prefix": False, "buffers": True},
    "buffers": {"buffers": True},
    "lm_head beside the tie": {"head": "explicit"},
    "lm_head in a bin": {"head": "explicit", "form": "bin"},
    "shards": {"form": "safetensors-shards"},
    "bin shards": {"form": "bin-shards", "buffers": True},
}


@pytest.mark.parametrize("form", FORMS)
async def test_every_form_says_the_same(engine: Open, checkpoint: Make, form: str) -> None:
    e = await engine(checkpoint("odd", **FORMS[form]))
    for prompt in prompts([3, 40], 301):
        assert (await ask(e, prompt)).token_ids == greedy(checkpoint("odd"), prompt)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
async def test_half_precision_files_run_in_float32(engine: Open, checkpoint: Make, form: str) -> None:
    folder = checkpoint("plain", dtype=torch.float16, form=form)
    e = await engine(folder)
    for prompt in prompts([3, 40], 384):
        assert (await ask(e, prompt)).token_ids == greedy(folder, prompt)


async def test_a_head_of_its_own(engine: Open, checkpoint: Make) -> None:
    """The reverse model's file calls it lm_head.decoder.weight."""
    own, reverse = checkpoint("plain", head="own"), checkpoint("plain", head="decoder", form="bin", prefix=False)
    e, r = await engine(own), await engine(reverse)
    for prompt in prompts([3, 40], 384):
        want = greedy(own, prompt)
        assert want != greedy(checkpoint("plain"), prompt)
        assert (await ask(e, prompt)).token_ids == (await ask(r, prompt)).token_ids == want


def test_dialogpts_own_config_has_defaults(tmp_path: Path) -> None:
    """The first DialoGPT files name neither model_type nor eos, activation or tying."""
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024, "n_ctx": 1024}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sizes | {"layer_norm_epsilon": 1e-5, "initializer_range": 0.02}), "utf-8")
    config = read_config(path)
    assert (config.eos_id, config.n_inner, config.activation, config.tied) == (50256, 3072, "tanh", True)


@pytest.mark.parametrize("form", ["safetensors", "bin", "bin-shards"])
def test_only_what_somebody_holds_takes_memory(checkpoint: Make, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(weights, "REMAP", 1 << 20)
    folder = checkpoint("plain", n_layer=8, n_embd=256, vocab_size=3000, form=form)
    tensors = weights.load(folder).tensors
    sizes = [4 * math.prod(shape) for shape in read_config(folder / "config.json").shapes().values()]
    biggest = max(sizes)
    assert sum(sizes) > biggest + (16 << 20)
    weights.trim()  # what made the file
    before = most = resident()
    for name in list(tensors):
        tensors.pop(name)
        most = max(most, resident())
    assert most - before < biggest + (4 << 20)
    assert not tensors


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_embedding_that_the_file_calls_head(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    want = weights.load(folder).tensors.pop("wte.weight").clone()
    edit_tensors(lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))(folder)
    assert torch.equal(weights.load(folder).tensors.pop("wte.weight"), want)


def test_what_was_set_stands_in_for_the_file(checkpoint: Make) -> None:
    tensors = weights.load(checkpoint("plain")).tensors
    other = torch.zeros(64)
    tensors["ln_f.bias"] = other
    assert tensors["ln_f.bias"] is other and tensors.pop("ln_f.bias") is other
    assert "ln_f.bias" not in tensors and "ln_f.weight" in tensors and "lm_head.weight" not in tensors
    assert torch.equal(tensors["ln_f.weight"], tensors.pop("ln_f.weight"))
    with pytest.raises(KeyError):
        tensors.pop("ln_f.weight")


def test_a_file_that_changes_while_it_is_read_is_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "REMAP", 0)
    folder, other = make_checkpoint(tmp_path / "model"), make_checkpoint(tmp_path / "other", seed=1)
    tensors = weights.load(folder).tensors
    tensors.pop("wte.weight")
    (other / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"model.safetensors was changed while it was read: start again"):
        tensors.pop("wpe.weight")


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        path.unlink()
        save_file(tensors, path)

    return edit


def cut(name: str, keep: int | float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep if keep > 1 else len(data) * keep)])

    return edit


def poison(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    def put(tensors: dict[str, torch.Tensor]) -> None:
        name = "transformer.h.1.mlp.c_fc.weight"
        tensors[name] = tensors[name].to(dtype)
        tensors[name][3, 4] = value

    return edit_tensors(put)


def resave(form: Any) -> Callable[[Path], None]:
    """What is there, in another form."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_tensors(folder, tensors, form)

    return edit


def then(*edits: Callable[[Path], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


class Dangerous:
    """Pickled code, not weights."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


def dangerous(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": Dangerous()}, folder / "pytorch_model.bin")


def bin_of(what: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(what, folder / "pytorch_model.bin")

    return edit


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another family": (edit_config(model_type="llama"), "config.json: model_type is 'llama'"),
    "cross attention": (edit_config(add_cross_attention=True), "config.json: add_cross_attention"),
    "another activation": (edit_config(activation_function="silu"), "activation_function 'silu'"),
    "an activation of two lines": (edit_config(activation_function="si\nlu"), r"activation_function 'si\\nlu'"),
    "a flag in words": (
        edit_config(scale_attn_by_inverse_layer_idx="false"),
        "scale_attn_by_inverse_layer_idx is 'false', neither true nor false",
    ),
    "no size": (edit_config(n_layer=None), "n_layer is None"),
    "heads that do not divide": (edit_config(n_head=5), "n_embd 64 is not a multiple of n_head 5"),
    "eos outside": (edit_config(eos_token_id=50256), "eos_token_id 50256 is not one id in the vocabulary of 384"),
    "eos a truth": (edit_config(eos_token_id=True), "eos_token_id True is not one id in the vocabulary"),
    "two ends": (edit_config(eos_token_id=[256, 255]), r"eos_token_id \[256, 255\] is not one id in the vocabulary"),
    "nothing within": (edit_config(n_inner=0), "n_inner is 0, not a whole number from 1"),
    "no epsilon": (edit_config(layer_norm_epsilon=None), "layer_norm_epsilon is None, not a small number"),
    "epsilon a word": (edit_config(layer_norm_epsilon="1e-5"), "layer_norm_epsilon is '1e-5', not a small number"),
    "epsilon below 0": (edit_config(layer_norm_epsilon=-1), "layer_norm_epsilon is -1, not a small number"),
    "epsilon NaN": (edit_config(layer_norm_epsilon=float("nan")), "layer_norm_epsilon is nan, not a small number"),
    "layers without end": (edit_config(n_layer=2_000_000), "n_layer is 2000000, not a whole number from 1 to 1024"),
    "config all brackets": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json cannot be read"),
    "config no JSON": (cut("config.json", 0.5), "config.json cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json cannot be read .*: fetch the file again"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model.bin"),
    "header cut": (cut("model.safetensors", 100), "model.safetensors is damaged or cut short"),
    "data cut": (cut("model.safetensors", 0.7), "model.safetensors is damaged or cut short"),
    "empty": (cut("model.safetensors", 0), "model.safetensors is damaged or cut short"),
    "bin cut": (then(resave("bin"), cut("pytorch_model.bin", 0.7)), "pytorch_model.bin is damaged, cut short"),
    "bin empty": (then(resave("bin"), cut("pytorch_model.bin", 0)), "pytorch_model.bin is damaged, cut short"),
    "old bin cut": (then(resave("bin-old"), cut("pytorch_model.bin", 0.7)), "pytorch_model.bin is damaged, cut short"),
    "bin with code": (dangerous, "pytorch_model.bin is damaged, cut short, or holds more than weights"),
    "a git-lfs pointer": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        "model.safetensors is damaged or cut short .* git lfs pull brings it",
    ),
    "a git-lfs pointer of a .bin": (
        then(resave("bin"), lambda f: (f / "pytorch_model.bin").write_text(POINTER)),
        "pytorch_model.bin is damaged, .* git lfs pull brings it",
    ),
    "a git-lfs pointer of a config": (
        lambda f: (f / "config.json").write_text(POINTER),
        "config.json cannot be read .* git lfs pull brings it",
    ),
    "shard missing": (
        then(resave("bin-shards"), lambda f: (f / "pytorch_model-00002-of-00002.bin").unlink()),
        "names 'pytorch_model-00002-of-00002.bin', which is not there",
    ),
    "index broken": (then(resave("bin-shards"), cut("pytorch_model.bin.index.json", 0.5)), "is not an index of shards"),
    "index all brackets": (
        then(resave("bin-shards"), lambda f: (f / "pytorch_model.bin.index.json").write_text("[" * 100_000)),
        "is not an index of shards",
    ),
    "index of long names": (
        then(
            resave("bin-shards"),
            lambda f: (f / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 300}})),
        ),
        "names 'x.*, which is not there",
    ),
    "index of numbers": (
        then(resave("bin-shards"), lambda f: (f / "pytorch_model.bin.index.json").write_text('{"weight_map":{"a":5}}')),
        "names '5', which is not there",
    ),
    "bin without a state": (bin_of({"state_dict": None}), "pytorch_model.bin holds no weights by name"),
    "bin all sparse": (
        bin_of({"wte.weight": torch.eye(4).to_sparse()}),
        "pytorch_model.bin: wte.weight holds no numbers side by side",
    ),
    "bin without numbers": (
        bin_of({"wte.weight": torch.empty(384, 64, device="meta")}),
        "pytorch_model.bin: wte.weight holds no numbers side by side",
    ),
    "one missing": (edit_tensors(lambda t: t.pop("transformer.ln_f.bias")), "lacks ln_f.bias"),
    "many missing": (edit_config(n_layer=3), "lacks h.2.attn.c_attn.bias, .* and 9 more"),
    "surplus": (edit_config(n_layer=1), "has unknown h.1.attn.c_attn.bias"),
    "wrong shape": (edit_config(n_positions=300), r"wpe.weight has shape \(256, 64\), config.json says \(300, 64\)"),
    "wrong vocabulary": (edit_config(vocab_size=400), r"wte.weight has shape \(384, 64\)"),
    "NaN": (poison(float("nan")), "h.1.mlp.c_fc.weight holds NaN or infinity"),
    "infinity": (poison(float("inf")), "h.1.mlp.c_fc.weight holds NaN or infinity"),
    "NaN in float16": (poison(float("nan"), torch.float16), "h.1.mlp.c_fc.weight holds NaN or infinity"),
    "infinity in bfloat16": (poison(-float("inf"), torch.bfloat16), "h.1.mlp.c_fc.weight holds NaN or infinity"),
    "NaN in an old bin": (
        then(poison(float("nan")), resave("bin-old")),
        "pytorch_model.bin: h.1.mlp.c_fc.weight holds NaN or infinity",
    ),
    "too large for float32": (
        edit_tensors(lambda t: t.update({"transformer.ln_f.bias": torch.full((64,), 1e39, dtype=torch.float64)})),
        "ln_f.bias holds NaN or infinity",
    ),
    "whole numbers": (
        edit_tensors(lambda t: t.update({"transformer.ln_f.bias": torch.zeros(64, dtype=torch.int8)})),
        "ln_f.bias is torch.int8",
    ),
    "an untied head": (
        edit_tensors(lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})),
        "lm_head.weight differs from wte.weight",
    ),
    "a name twice": (
        edit_tensors(lambda t: t.update({"ln_f.bias": t["transformer.ln_f.bias"] + 1})),
        "model.safetensors holds ln_f.bias a second time",
    ),
    "a vocabulary of one": (edit_config(vocab_size=1, eos_token_id=0), "vocab_size is 1, not a whole number from 2"),
    "a single position": (edit_config(n_positions=1), "n_positions is 1, not a whole number from 2"),
    "no head": (edit_config(tie_word_embeddings=False), "lacks lm_head.weight"),
}


def test_a_config_may_begin_with_a_mark(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "plain")
    before = read_config(folder / "config.json")
    text = (folder / "config.json").read_text("utf-8")
    (folder / "config.json").write_text(text, "utf-8-sig")
    assert read_config(folder / "config.json") == before


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_clear_line(tmp_path: Path, name: str) -> None:
    edit, words = BROKEN[name]
    folder = make_checkpoint(tmp_path / "model", "plain")
    edit(folder)
    with pytest.raises(BadCheckpoint) as caught:
        dict(weights.load(folder).tensors)  # numbers are checked when they are read
    line = str(caught.value)
    assert re.search(words, line), line
    assert str(folder) in line and line.isprintable() and len(line) < 400
