"""The forward pass, bit by bit: whatever stands beside a row and however its prompt is cut, its logits are the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.engine import model as models
from core.engine import model_runner, weights
from core.engine.model import GPT2, TILE, Batch, Model, Rows, tiles
from core.engine.model_runner import rows_agree
from tests.core.engine.oracle import prompts, reference

pytestmark = pytest.mark.usefixtures("inference")
Make = Callable[..., Path]
CPU = torch.device("cpu")


def run(model: Model, ids: list[int], counts: list[int], mates: Callable[[], int] = lambda: 0) -> Tensor:
    """Logits of all positions, computed in steps of `counts` rows beside `mates()` rows of strangers."""
    kv, results, start = model.new_kv(len(ids)), [], 0
    for count in counts:
        before, after = mates(), mates()
        strangers = [Rows(model.new_kv(max(n, 1)), 0, n) for n in (before, after)]
        rows = [strangers[0], Rows(kv, start, count), strangers[1]]
        everything = ids[:before] + ids[start : start + count] + ids[:after]
        batch = Batch(everything, [r for r in rows if r.count], list(range(before, before + count)))
        results.append(model.forward(batch).clone())
        start += count
    return torch.cat(results)


@pytest.mark.parametrize("shape", ["plain", "odd", "inner", "one-head", "deep", "erf", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [0, 16])
def test_rows_do_not_depend_on_each_other(checkpoint: Make, shape: str, dtype: torch.dtype, block: int) -> None:
    torch.set_num_threads(2 if shape == "inner" else 1)
    model = GPT2(weights.load(checkpoint(shape)), CPU, dtype, block=block)
    assert rows_agree(model)
    [ids] = prompts([min(model.config.n_positions, 3 * TILE + 10)], model.config.vocab_size)
    whole = run(model, ids, [len(ids)])
    rng = random.Random(shape)
    for _ in range(3):
        counts: list[int] = []
        while (left := len(ids) - sum(counts)) > 0:
            counts.append(min(rng.choice([1, 1, 1, 2, 3, 33, 35, 50]), left))
        assert torch.equal(run(model, ids, counts, lambda: rng.choice([0, 0, 1, 3, 13, 40])), whole)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_logits_are_close_to_transformers(checkpoint: Make, dtype: torch.dtype, error: float) -> None:
    """Relative to the spread of the logits."""
    folder = checkpoint("inner")
    [ids] = prompts([150], 333)
    want = reference(folder)(torch.tensor([ids])).logits[0]
    got = run(GPT2(weights.load(folder), CPU, dtype), ids, [150])
    assert float((got - want).std() / want.std()) < error


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_what_all_logits_have_in_common_rounds_none_of_them(checkpoint: Make, dtype: torch.dtype, error: float) -> None:
    """As in GPT-2's own models, where it is -100 and more."""
    [ids] = prompts([60], 333)
    logits = []
    for common in (0.0, -300.0):
        loaded = weights.load(checkpoint("inner"))
        head = loaded.tensors["wte.weight"].clone()
        loaded.tensors["ln_f.weight"][0], loaded.tensors["ln_f.bias"][0] = 0.0, 1.0
        head[:, 0] = common
        loaded.tensors["lm_head.weight"] = head
        logits.append(run(GPT2(loaded, CPU, dtype), ids, [60]))
    assert float((logits[1] - logits[0]).mean()) == pytest.approx(-300, abs=1)
    assert float(((logits[1] - logits[0]).std(1) / logits[0].std(1)).max()) < error


def test_a_machine_whose_products_depend_on_height_gets_blocks(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    product = models.Linear._product

    def fickle(self: models.Linear, x: Tensor) -> Tensor:
        """Adds up in another order in high batches."""
        return product(self, x) if len(x) < 20 else product(self, x.flip(0)).flip(0) * (1 + 2**-23)

    monkeypatch.setattr(models.Linear, "_product", fickle)
    model = model_runner.agreeing(lambda: weights.load(checkpoint("plain")), CPU, torch.float32)
    assert model.block == model_runner.BLOCK_ROWS["cpu"]
    assert "slower blocks" in caplog.text
    [ids] = prompts([100], 384)
    assert torch.equal(run(model, ids, [100]), run(model, ids, [1, 40, 3, 56], lambda: 30))


def test_tiles_cover_every_position_once() -> None:
    for start, count in ((0, 1), (63, 1), (63, 2), (64, 64), (10, 200), (0, 64)):
        cut = tiles(start, count)
        assert [p for a, b in cut for p in range(a, b)] == list(range(start, start + count))
        assert all(a // TILE == (b - 1) // TILE for a, b in cut)
