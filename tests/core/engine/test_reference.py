"""The plain model is Transformers', in float32; and auto leaves int8 to the models that bear it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core.engine import choice, weights
from core.engine.base import BadCheckpoint
from core.engine.checks import rows_agree
from core.engine.choice import FAR, build, open_runner
from core.engine.native import library
from core.engine.reference import divergence, logits
from tests.checkpoints import EMBEDDED, SHAPES, make_outlying
from tests.core.engine import oracle

Make = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "options"),
    [(shape, {}) for shape in SHAPES]
    + [("plain", {"head": "own"}), ("plain", {"form": "bin", "dtype": torch.float16})],
)
def test_the_plain_model_is_transformers(checkpoint: Make, shape: str, options: dict[str, object]) -> None:
    folder = checkpoint(shape, **options)
    [ids] = oracle.prompts([60], SHAPES[shape]["vocab_size"])
    here = logits(weights.load(folder), ids)
    with torch.inference_mode():
        theirs = oracle.reference(folder)(torch.tensor([ids])).logits[0]
    assert float((here - theirs).abs().max() / theirs.std()) < 1e-4


def test_the_further_a_precision_is_from_float32_the_more_it_diverges(checkpoint: Make, tmp_path: Path) -> None:
    def far(folder: Path, dtype: torch.dtype) -> float:
        return divergence(build(folder, CPU, dtype), weights.load(folder))

    assert abs(far(EMBEDDED, torch.float32)) < 1e-5
    assert far(EMBEDDED, torch.bfloat16) < 0.001 < far(EMBEDDED, torch.int8) < FAR / 4
    assert (
        far(make_outlying(tmp_path / "20", 20), torch.int8) < FAR < far(make_outlying(tmp_path / "60", 60), torch.int8)
    )


def test_auto_takes_int8_where_the_model_bears_it(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outlying = make_outlying(tmp_path, 60)
    assert "int8" in open_runner(EMBEDDED, "cpu", "auto", 1).model.how
    assert caplog.text == ""
    assert "bfloat16" in open_runner(outlying, "cpu", "auto", 1).model.how
    assert "bears int8 badly (0.1" in caplog.text and "DTYPE=auto takes bfloat16" in caplog.text
    assert "int8" in open_runner(outlying, "cpu", "int8", 1).model.how, "who asks for it gets it"
    monkeypatch.setattr(choice, "divergence", lambda model, checkpoint: float("nan"))
    assert "bfloat16" in open_runner(EMBEDDED, "cpu", "auto", 1).model.how


def test_auto_takes_no_int8_that_depends_on_the_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where torch's products of int8 depend on the batch, DTYPE=int8 is float32."""
    monkeypatch.setattr(library, "open_library", lambda: None)
    monkeypatch.setattr(choice, "multiplies_int8", lambda: True)
    monkeypatch.setattr(choice, "computes_bfloat16", lambda _: False)
    agree = rows_agree
    monkeypatch.setattr(choice, "rows_agree", lambda model: model.dtype is not torch.int8 and agree(model))
    assert "in place of int8 (the compiled step" in open_runner(EMBEDDED, "cpu", "int8", 1).model.how
    assert caplog.text == ""
    assert "float32, torch" in (how := open_runner(EMBEDDED, "cpu", "auto", 1).model.how) and "int8" not in how
    assert "products of int8 depend on the batch: DTYPE=auto takes float32" in caplog.text


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_without_the_native_step_auto_takes_what_torch_computes_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_bfloat16: bool
) -> None:
    """bfloat16 that a processor does not have is dozens of times slower than float32 there."""
    monkeypatch.setattr(library, "open_library", lambda: None)
    monkeypatch.setattr(choice, "multiplies_int8", lambda: True)
    monkeypatch.setattr(choice, "computes_bfloat16", lambda _: has_bfloat16)
    name = "bfloat16" if has_bfloat16 else "float32"
    assert f"{name}, torch" in open_runner(make_outlying(tmp_path, 60), "cpu", "auto", 1).model.how
    assert f"DTYPE=auto takes {name}" in caplog.text


def test_a_tokenizer_with_more_tokens_and_few_positions_are_no_hindrance(checkpoint: Make, tmp_path: Path) -> None:
    small = checkpoint("plain", n_positions=8)
    for file in (small / "config.json", small / "model.safetensors", EMBEDDED / "tokenizer.json"):
        (tmp_path / file.name).symlink_to(file)
    assert divergence(build(tmp_path, CPU, torch.float32), weights.load(tmp_path)) == pytest.approx(0, abs=1e-5)


def test_a_checkpoint_without_a_tokenizer_is_named(checkpoint: Make, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(EMBEDDED / name)
    with pytest.raises(BadCheckpoint, match="has no tokenizer"):
        open_runner(tmp_path, "cpu", "auto", 1)
