"""The trainer learns, stops, goes on where it stopped, and leaves a checkpoint with its plot and card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from core.tokenizer import Tokenizer
from core.training.datasets import BadData, encode, write_tsv
from core.training.finetune import Recipe, Trainer, finetune, optimizers
from core.training.tiny import train_tokenizer

TALK = [[(0, "how are you ?"), (1, "fine , thanks .")], [(0, "hello"), (1, "hello there .")]] * 40


def micro(tokenizer: Tokenizer) -> GPT2Config:
    return GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_tokenizer([text for talk in TALK for _, text in talk], tmp_path)
    write_tsv(tmp_path / "talk.tsv", TALK)
    return tmp_path


def recipe(**changes: object) -> Recipe:
    plain = {"learning_rate": 1e-2, "warmup": 5, "epochs": 20, "batch_tokens": 256, "max_length": 32, "bfloat16": False}
    return Recipe(**plain | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["noam", "cosine"])
def test_it_learns_its_dialogues(folder: Path, schedule: str) -> None:
    out = folder / "out"
    progress = finetune(
        folder / "talk.tsv", out, micro(Tokenizer.load(folder)), tokenizer_folder=folder, quiet=True,
        recipe=recipe(schedule=schedule, muon=schedule == "cosine"),
    )  # fmt: skip
    assert progress.valid[-1][1] < 0.5
    assert progress.step > 50
    tokenizer, model = Tokenizer.load(out), GPT2LMHeadModel.from_pretrained(out)
    said = [*tokenizer.encode("hello"), tokenizer.eos_id]
    asked = len(said)
    while said[-1] != tokenizer.eos_id or len(said) == asked:
        said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
    assert tokenizer.decode(said[asked:]) == "hello there ."
    assert (out / "losses.png").stat().st_size > 5000
    assert "perplexity" in (out / "README.md").read_text()


def test_it_goes_on_where_it_stopped(folder: Path) -> None:
    tokenizer, config = Tokenizer.load(folder), micro(Tokenizer.load(folder))
    examples = encode(TALK, tokenizer, 32)

    def trainer(name: str, epochs: float) -> Trainer:
        torch.manual_seed(1)
        (folder / name).mkdir(exist_ok=True)
        return Trainer(
            GPT2LMHeadModel(config), examples, examples[:4], recipe(epochs=epochs), folder / name, quiet=True
        )

    whole = trainer("whole", 6)
    whole.run()
    half = trainer("halves", 3)
    half.run()
    rest = trainer("halves", 6)
    assert rest.progress.step == half.progress.step > 0
    rest.run()
    assert rest.progress.step == whole.progress.step
    assert rest.progress.tokens == whole.progress.tokens
    for ours, theirs in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_checkpoint_is_trained_further(folder: Path) -> None:
    base = folder / "base"
    GPT2LMHeadModel(micro(Tokenizer.load(folder))).save_pretrained(base)
    (base / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    progress = finetune(folder / "talk.tsv", folder / "out", base, recipe=recipe(epochs=2), quiet=True)
    assert progress.step > 0
    assert Tokenizer.load(folder / "out").eos_id == Tokenizer.load(base).eos_id


def test_parts_of_a_batch_add_up(folder: Path) -> None:
    """Two threads, or one, take the same step."""
    tokenizer = Tokenizer.load(folder)
    examples, after = encode(TALK, tokenizer, 32), []
    for threads in (1, 2):
        torch.manual_seed(1)
        model = GPT2LMHeadModel(micro(tokenizer))
        trainer = Trainer(model, examples, examples, recipe(threads=threads), folder / f"{threads}", quiet=True)
        (folder / f"{threads}").mkdir()
        from concurrent.futures import ThreadPoolExecutor

        whole = list(range(8))
        with ThreadPoolExecutor(2) as pool:
            trainer._step([whole] if threads == 1 else [whole[:4], whole[4:]], pool)
        after.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-5)


def test_with_other_cores_as_much_of_an_epoch_is_left(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    examples, left = encode(TALK, tokenizer, 32), list[int]()
    for threads in (1, 2, 4, 64):
        half = recipe(threads=threads, batch_tokens=128)
        trainer = Trainer(GPT2LMHeadModel(micro(tokenizer)), examples, examples, half, folder, quiet=True)
        trainer.progress.batch = 4
        left.append(0)
        for _ in trainer._batches():
            if trainer.progress.epoch:
                break
            left[-1] += 1
    assert max(left) - min(left) <= 1 < min(left), left


def test_biases_and_norms_do_not_decay(folder: Path) -> None:
    model = GPT2LMHeadModel(micro(Tokenizer.load(folder)))
    for muon in (False, True):
        groups = [group for optimizer in optimizers(model, recipe(muon=muon)) for group in optimizer.param_groups]
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        for group in groups:
            assert all((p.ndim == 1) == (group["weight_decay"] == 0) for p in group["params"])


def test_too_little_to_learn_from(folder: Path) -> None:
    write_tsv(folder / "few.tsv", [[(0, "a"), (1, "b " * 100)]])
    model = micro(Tokenizer.load(folder))
    for length, complaint in ((32, "too few dialogues"), (33, "more than the model's 32 positions")):
        with pytest.raises(BadData, match=complaint):
            finetune(
                folder / "few.tsv", folder / "out", model, recipe=recipe(max_length=length), tokenizer_folder=folder
            )


def test_stopped_by_hand_nothing_is_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, tokenizer = Trainer._step, Tokenizer.load(folder)

    def stopped(self: Trainer, *arguments: Any) -> float:
        if self.progress.step == 7:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        finetune(folder / "talk.tsv", folder / "out", micro(tokenizer), recipe=recipe(), tokenizer_folder=folder)
    monkeypatch.undo()
    examples = encode(TALK, tokenizer, 32)
    resumed = Trainer(GPT2LMHeadModel(micro(tokenizer)), examples, examples, recipe(), folder / "out")
    assert resumed.progress.step == 7


def test_another_models_run_is_left_alone(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    short = recipe(epochs=1)
    finetune(folder / "talk.tsv", folder / "out", micro(tokenizer), recipe=short, tokenizer_folder=folder, quiet=True)
    other = micro(tokenizer)
    other.n_embd = 64
    with pytest.raises(BadData, match="another model"):
        finetune(folder / "talk.tsv", folder / "out", other, recipe=short, tokenizer_folder=folder, quiet=True)
