"""The forward pass, bit by bit: whatever stands beside a row and however its prompt is cut, its logits are the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.engine import choice, weights
from core.engine import model as models
from core.engine.checks import rows_agree
from core.engine.model import GPT2, TILE, Batch, Int8Linear, Model, Rows, multiplies_int8, quantise, tiles
from tests.core.engine.oracle import prompts, reference

pytestmark = pytest.mark.usefixtures("inference")
Make = Callable[..., Path]
CPU = torch.device("cpu")
INT8 = multiplies_int8() or torch.cpu.get_capabilities().get("avx512_vnni", False)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, *([torch.int8] if INT8 else [])]
"""What torch computes in here."""


def run(model: Model, ids: list[int], counts: list[int], mates: Callable[[], int] = lambda: 0) -> Tensor:
    """Logits of all positions, computed in steps of `counts` rows beside `mates()` rows of strangers."""
    kv, results, start = model.new_kv(len(ids)), [], 0
    for count in counts:
        before, after = mates(), mates()
        strangers = [Rows(model.new_kv(max(n, 1)), 0, n) for n in (before, after)]
        rows = [strangers[0], Rows(kv, start, count), strangers[1]]
        everything = ids[:before] + ids[start : start + count] + ids[:after]
        batch = Batch(everything, [r for r in rows if r.count], list(range(before, before + count)))
        results.append(model.forward(batch)[0].clone())
        start += count
    return torch.cat(results)


@pytest.mark.parametrize("shape", ["plain", "odd", "inner", "one-head", "deep", "erf", "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_wide_heads_takes_as_many_queries_as_it_must(checkpoint: Make, dtype: torch.dtype) -> None:
    """Of 96 numbers and more, 4 queries are not the bits of 64."""
    folder = checkpoint("plain", n_embd=320, n_head=2)
    model, agrees = choice.agreeing(lambda: weights.load(folder), dtype)
    assert agrees and model.block == 0
    [ids] = prompts([200], model.config.vocab_size)
    assert torch.equal(run(model, ids, [1, 1, 60, 3, 70, 65], lambda: 5), run(model, ids, [200]))


@pytest.mark.parametrize(("dtype", "error"), list(zip(DTYPES, (2e-5, 0.05, 0.01, 0.15), strict=False)))
def test_logits_are_close_to_transformers(checkpoint: Make, dtype: torch.dtype, error: float) -> None:
    """Relative to the spread of the logits."""
    folder = checkpoint("inner")
    [ids] = prompts([150], 333)
    want = reference(folder)(torch.tensor([ids])).logits[0]
    got = run(GPT2(weights.load(folder), CPU, dtype), ids, [150])
    assert float((got - want).std() / want.std()) < error


@pytest.mark.parametrize(("dtype", "error"), list(zip(DTYPES[1:], (0.05, 0.01, 0.15), strict=False)))
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


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_of_int8_are_exact_sums(rows: int) -> None:
    """Of the largest factors, too: a quarter of a row's numbers are as large as its largest."""
    dice = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(70, 200, generator=dice), torch.randn(rows, 200, generator=dice)
    weight[:, ::4], x[:, ::4] = 9.0, 7.0
    weight[5], x[0, 0] = 0.0, 7.5
    quants, scale = quantise(weight)
    most = x.abs().amax(1, keepdim=True)
    of_x = (x / (most / 127) + 128.5).floor() - 128
    want = (of_x.double() @ quants.double().T) * scale.double() * most.double() / 127
    bias = torch.arange(70.0)
    if INT8:  # elsewhere a sum of two products may not fit its 16 bits
        torch.testing.assert_close(Int8Linear(weight, bias)(x).double(), want + bias, rtol=1e-6, atol=1e-4)
    assert (quants.float() * scale[:, None] - weight).abs().max() <= scale.max() / 2
    x[0, 3] = float("nan")
    assert Int8Linear(weight, bias)(x)[0].isnan().all(), "a number that is none does not get lost"
    x[0, 3] = float("inf")
    assert not Int8Linear(weight, bias)(x)[0].isfinite().any()


def test_int8_is_torchs_where_the_processor_has_it_and_its_sums_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    assert multiplies_int8() is INT8
    for able, product, so in (
        ({"avx512_vnni": True}, lambda _: torch.full((1, 32), 64.0), True),
        ({"avx_vnni": True}, lambda _: torch.full((1, 32), 64.0), True),
        ({"avx2": True}, lambda _: torch.full((1, 32), 64.0), False),
        ({"avx512_vnni": True}, lambda _: torch.full((1, 32), 32.5), False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        monkeypatch.setattr(models, "Int8Linear", lambda *_, product=product: product)
        assert multiplies_int8.__wrapped__() is so

    def there_is_none(*_: object) -> None:
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_prepack'")

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    monkeypatch.setattr(models, "Int8Linear", there_is_none)
    assert not multiplies_int8.__wrapped__()


def test_a_machine_whose_products_depend_on_height_gets_blocks(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    product = models.Linear._product

    def fickle(self: models.Linear, x: Tensor) -> Tensor:
        """Adds up in another order in high batches."""
        return product(self, x) if len(x) < 20 else product(self, x.flip(0)).flip(0) * (1 + 2**-23)

    monkeypatch.setattr(models.Linear, "_product", fickle)
    model = choice.in_torch(lambda: weights.load(checkpoint("plain")), torch.float32)
    assert model.block == 16
    assert "slower blocks" in caplog.text
    [ids] = prompts([100], 384)
    assert torch.equal(run(model, ids, [100]), run(model, ids, [1, 40, 3, 56], lambda: 30))


def test_tiles_cover_every_position_once() -> None:
    for start, count in ((0, 1), (63, 1), (63, 2), (64, 64), (10, 200), (0, 64)):
        cut = tiles(start, count)
        assert [p for a, b in cut for p in range(a, b)] == list(range(start, start + count))
        assert all(a // TILE == (b - 1) // TILE for a, b in cut)
