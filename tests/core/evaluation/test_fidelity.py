"""Perplexity as Transformers computes it, and what int8 adds to that of the embedded model: under one percent."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from core.engine import weights
from core.engine.model import GPT2
from core.evaluation import fidelity
from core.evaluation.fidelity import BAR, compare, main, perplexity, read_examples
from core.training.datasets import write_tsv
from core.training.tiny import dialogues
from tests.checkpoints import EMBEDDED, make_outlying
from tests.core.engine.rounding import rounded

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "held-out.tsv"
    write_tsv(path, dialogues(25, seed=99, held_out=True))
    return path


def test_perplexity_is_that_of_transformers(held_out: Path) -> None:
    examples = read_examples(EMBEDDED, held_out, 3)
    model = GPT2LMHeadModel.from_pretrained(EMBEDDED, dtype=torch.float32).train(False)
    total, count = 0.0, 0
    for example in examples:
        ids, learn = torch.tensor([list(example.ids)]), torch.tensor([list(example.learn)])
        with torch.inference_mode():
            loss = model(ids, labels=ids.masked_fill(learn == 0, -100)).loss
        total, count = total + float(loss) * sum(example.learn), count + sum(example.learn)
    [(how, exact)] = compare(EMBEDDED, examples, [])
    assert "float32" in how
    assert exact == pytest.approx(math.exp(total / count), rel=1e-4)


def test_int8_is_within_the_bar_of_float32(held_out: Path) -> None:
    """As the engine runs it here, and in torch with the same rounded weights."""
    examples = read_examples(EMBEDDED, held_out, 25)
    assert sum(sum(e.learn) for e in examples) > 1000
    (_, exact), (how, int8) = compare(EMBEDDED, examples, ["int8"])
    assert "int8" in how
    torch_int8 = perplexity(GPT2(rounded(weights.load(EMBEDDED)), CPU, torch.float32), examples)
    assert exact < 30
    assert int8 == pytest.approx(exact, rel=BAR) and torch_int8 == pytest.approx(exact, rel=BAR)


def test_int8_bears_a_channel_twenty_times_the_others(held_out: Path, tmp_path: Path) -> None:
    """A scale for a whole row would be spoiled by it; ours is for 32 numbers."""
    make_outlying(tmp_path, 20)
    examples = read_examples(EMBEDDED, held_out, 25)
    [(_, plain)] = compare(EMBEDDED, examples, [])
    (_, exact), (_, int8) = compare(tmp_path, examples, ["int8"])
    assert exact == pytest.approx(plain, rel=1e-5)
    assert int8 == pytest.approx(exact, rel=BAR)


def test_the_command_marks_what_misses_the_bar(
    held_out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled = [1.0]

    def built(folder: Path, device: torch.device, dtype: torch.dtype) -> GPT2:
        checkpoint = weights.load(folder)
        if dtype is torch.int8:
            checkpoint.tensors["ln_f.weight"] = checkpoint.tensors["ln_f.weight"] * spoiled[-1]
        return GPT2(checkpoint, device, torch.float32)

    monkeypatch.setattr(fidelity, "build", built)
    monkeypatch.setattr("sys.argv", ["fidelity", str(EMBEDDED), str(held_out), "--most", "4"])
    for by, marked in ((1.0, False), (0.5, True)):
        spoiled.append(by)
        main()
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.endswith("!") is marked
