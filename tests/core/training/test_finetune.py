"""The trainer learns, stops, goes on where it stopped, and leaves a checkpoint with its plot and card."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from core.engine.base import BadCheckpoint
from core.tokenizer import Tokenizer
from core.training.datasets import BadData, encode, write_tsv
from core.training.finetune import Progress, Recipe, Trainer, finetune, optimizers
from core.training.outcome import summary
from core.training.tiny import train_tokenizer
from tests.checkpoints import make_checkpoint, save_tensors

TALK = [[(0, "how are you ?"), (1, "fine , thanks .")], [(0, "hello"), (1, "hello there .")]] * 40


def micro(tokenizer: Tokenizer, dropout: float = 0.0) -> GPT2Config:
    return GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
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


def make_trainer(folder: Path, name: str = "out", *, dropout: float = 0.0, **changes: object) -> Trainer:
    """A run in its folder `name`, of a model that is always the same."""
    tokenizer = Tokenizer.load(folder)
    examples = encode(TALK, tokenizer, 32)
    torch.manual_seed(1)
    (folder / name).mkdir(exist_ok=True)
    model = GPT2LMHeadModel(micro(tokenizer, dropout)).train(False)  # as from_pretrained leaves it
    return Trainer(model, examples, examples[:4], recipe(dropout=dropout, **changes), folder / name, quiet=True)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def interrupt(trainer: Trainer, seconds: float) -> None:
    """Run for that long, then a real Ctrl-C."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    with contextlib.suppress(KeyboardInterrupt):
        timer.start()
        trainer.run()
        timer.cancel()
        timer.join()


@pytest.mark.parametrize("threads", [1, 3])
def test_stopped_by_hand_at_any_time_it_ends_with_the_same_weights(folder: Path, threads: int) -> None:
    """Dropout included, to the last bit."""
    whole = make_trainer(folder, "whole", dropout=0.3, threads=threads)
    whole.run()
    stops, part = 0, make_trainer(folder, dropout=0.3, threads=threads)
    while not part.finished:
        interrupt(part, 0.03 + 0.02 * (stops % 5))
        stops, part = stops + 1, make_trainer(folder, dropout=0.3, threads=threads)
    assert stops > 2
    assert part.progress.step == whole.progress.step
    assert part.progress.tokens == whole.progress.tokens
    assert part.progress.train == whole.progress.train
    assert torch.equal(weights(part), weights(whole))


def test_more_epochs_go_on(folder: Path) -> None:
    make_trainer(folder, epochs=3, warmup=1).run()
    rest = make_trainer(folder, epochs=6, warmup=1)
    assert rest.progress.step == rest.steps / 2
    rest.run()
    whole = make_trainer(folder, "whole", epochs=6, warmup=1)
    whole.run()
    assert torch.equal(weights(rest), weights(whole))


def test_dropout_is_on_from_the_first_step(folder: Path) -> None:
    plain, dropped = (make_trainer(folder, f"{dropout}", dropout=dropout, epochs=0.01) for dropout in (0.0, 0.5))
    [(_, loss)], [(_, harder)] = plain.run().train, dropped.run().train
    assert abs(harder - loss) > 0.01


def test_a_short_run_by_the_clock_warms_up_for_a_tenth_of_it(folder: Path) -> None:
    trainer = make_trainer(folder, minutes=1, warmup=200)
    trainer.progress.step = 0
    assert trainer.rate() == 1 / 200
    for seconds, rate in ((3, 0.5), (6, 1), (30, math.sqrt(0.2)), (60, math.sqrt(0.1))):
        trainer.progress.step, trainer.progress.seconds = 10 * seconds, seconds
        assert trainer.rate() == pytest.approx(rate, rel=0.05)
    trainer.progress.step = 6000
    assert trainer.rate() == pytest.approx(math.sqrt(200 / 6000), rel=0.05)


def test_a_checkpoint_is_trained_further(folder: Path) -> None:
    base = folder / "base"
    GPT2LMHeadModel(micro(Tokenizer.load(folder))).save_pretrained(base)
    (base / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    progress = finetune(folder / "talk.tsv", folder / "out", base, recipe=recipe(epochs=2), quiet=True)
    assert progress.step > 0
    assert Tokenizer.load(folder / "out").eos_id == Tokenizer.load(base).eos_id


def test_it_begins_with_what_the_engine_loads(folder: Path) -> None:
    """Nothing of a base is drawn at random, whatever its numbers are called; a wrong one is refused."""
    own = make_checkpoint(folder / "own", head="own")
    decoder = make_checkpoint(folder / "decoder", head="decoder", form="bin", n_ctx=256)
    module = make_checkpoint(folder / "module", head="own")
    save_tensors(module, {f"module.{name}": tensor for name, tensor in load_file(own / "model.safetensors").items()})
    short = recipe(epochs=0.1)
    losses = [
        finetune(folder / "talk.tsv", folder / f"{base.name}-out", base, recipe=short, quiet=True).valid
        for base in (own, decoder, module)
    ]
    assert losses[0] == losses[1] == losses[2]
    save_tensors(module, {"lm_head.weight": torch.zeros(384, 64)})
    odd = make_checkpoint(folder / "odd", initializer_range="small")
    for base, complaint in ((module, "safetensors lacks"), (odd, "odd cannot be loaded: .*initializer_range")):
        with pytest.raises(BadCheckpoint, match=complaint):
            finetune(folder / "talk.tsv", folder / "out", base, recipe=short, quiet=True)


def test_threads_change_neither_batches_nor_steps(folder: Path) -> None:
    """Two threads, or one, learn the same, but for what rounding makes of it."""
    plans, after = [], []
    for threads in (1, 2, 4, 64):
        trainer = make_trainer(folder, f"{threads}", threads=threads, batch_tokens=128, epochs=2.5)
        assert trainer.steps == math.ceil(2.5 * trainer.per_epoch)
        ahead = trainer._batches()
        plans.append([next(ahead) for _ in range(2 * trainer.per_epoch)])
        seen = sorted(i for batch in plans[-1] for i in batch)
        assert seen == sorted([*range(len(TALK))] * 2)
        with ThreadPoolExecutor(5) as pool:
            trainer._step(plans[-1][0], pool)
        after.append(weights(trainer))
    for plan, moved in zip(plans[1:], after[1:], strict=True):
        assert plan == plans[0]
        torch.testing.assert_close(moved, after[0], rtol=1e-4, atol=1e-5)


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


def test_what_was_learnt_is_saved_before_it_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Trainer._measure

    def killed(self: Trainer, pool: ThreadPoolExecutor) -> None:
        if self.progress.step:
            raise RuntimeError("as kill -9 would")
        measure(self, pool)

    monkeypatch.setattr(Trainer, "_measure", killed)
    with pytest.raises(RuntimeError):
        make_trainer(folder, epochs=2).run()
    monkeypatch.undo()
    resumed = make_trainer(folder, epochs=2)
    assert resumed.progress.step == resumed.steps and not resumed.finished
    resumed.run()
    assert [step for step, _ in resumed.progress.valid] == [0, resumed.steps]


def make_base(folder: Path, name: str = "base", seed: int = 1) -> Path:
    torch.manual_seed(seed)
    GPT2LMHeadModel(micro(Tokenizer.load(folder))).save_pretrained(folder / name)
    (folder / name / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return folder / name


def test_another_run_is_left_alone(folder: Path) -> None:
    base, other = make_base(folder), make_base(folder, "other", seed=2)
    write_tsv(folder / "more.tsv", [*TALK, [(1, "hello"), (1, "hm ?")]])
    out, short = folder / "out", recipe(epochs=1)
    finetune(folder / "talk.tsv", out, base, recipe=short, quiet=True)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for data, begin, changed in (
        ("more.tsv", base, short),
        ("talk.tsv", other, short),
        ("talk.tsv", base, recipe(epochs=1, batch_tokens=128)),
        ("talk.tsv", base, recipe(epochs=1, learning_rate=1e-3)),
    ):
        with pytest.raises(BadData, match="out holds a run with other data or options"):
            finetune(folder / data, out, begin, recipe=changed, quiet=True)
    with pytest.raises(BadData, match="out holds a run with other data or options"):
        finetune(folder / "talk.tsv", out, base, valid=folder / "more.tsv", recipe=short, quiet=True)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    longer = recipe(epochs=2, threads=1, save_every=1)
    assert finetune(folder / "talk.tsv", out, base, recipe=longer, quiet=True).step > 0


def test_a_finished_run_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, short = make_base(folder), recipe(epochs=1)
    first = finetune(folder / "talk.tsv", folder / "out", base, recipe=short)
    assert "already finished" not in capsys.readouterr().err
    assert finetune(folder / "talk.tsv", folder / "out", base, recipe=short) == first
    assert "out is already finished, nothing was trained: more epochs" in capsys.readouterr().err


def test_other_peoples_folders_are_left_alone(folder: Path) -> None:
    base, mine = make_base(folder), folder / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("My notes.")
    with pytest.raises(BadData, match=r"mine holds README.md and no run to go on with: name a new folder"):
        finetune(folder / "talk.tsv", mine, base, recipe=recipe())
    assert [path.read_text() for path in mine.iterdir()] == ["My notes."]
    with pytest.raises(BadData, match="base is the model to begin with: name another folder"):
        finetune(folder / "talk.tsv", base, base, recipe=recipe())


def test_nobody_trains_where_another_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> None:
        base = micro(Tokenizer.load(folder))
        finetune(folder / "talk.tsv", folder / "out", base, tokenizer_folder=folder, recipe=recipe(), quiet=True)

    monkeypatch.setattr(Trainer, "run", lambda _: train())
    with pytest.raises(BadData, match="out is being trained by another process: wait for it"):
        train()


def test_a_full_disk_leaves_what_was_saved(folder: Path) -> None:
    make_trainer(folder, epochs=1).run()
    more = make_trainer(folder, epochs=2)
    half_done = folder / "out/checkpoint.tmp"
    half_done.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"checkpoint.tmp cannot be written \(No space left.*\): see to that"):
        more.run()
    assert not half_done.is_symlink()
    assert make_trainer(folder, epochs=1).finished
    (folder / "out/progress.json").unlink()
    (folder / "out/progress.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"progress.json cannot be written \(No space left"):
        make_trainer(folder, epochs=2).run()


@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.99])
def test_a_damaged_checkpoint_is_named(folder: Path, kept: float) -> None:
    make_trainer(folder, epochs=1).run()
    checkpoint = folder / "out/checkpoint.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(BadData, match=r"checkpoint.pt is damaged: .* name a new folder"):
        make_trainer(folder, epochs=1)


def test_a_short_run_has_losses_and_files_for_everybody(folder: Path) -> None:
    out, mask = folder / "out", os.umask(0o022)
    try:
        progress = finetune(folder / "talk.tsv", out, make_base(folder), recipe=recipe(epochs=5.75), quiet=True)
    finally:
        os.umask(mask)
    assert {path.name: oct(path.stat().st_mode) for path in out.iterdir() if path.stat().st_mode & 0o777 != 0o644} == {}
    assert len(progress.train) > 1 and progress.train[-1][0] == progress.step == 23
    assert [step for step, _ in progress.valid] == [0, progress.step]
    card = (out / "README.md").read_text()
    assert "nan" not in card and "safety filter" not in card
    assert summary(progress) in card and "on 2 dialogues" in card and "on 78 dialogues" in card


def test_losses_of_any_size_can_be_read() -> None:
    for loss, shown in ((2.0, "7.4 → 7.4"), (2000.0, "over a million"), (math.nan, "nan")):
        assert shown in summary(Progress(valid=[(0, loss)], held_out=1))


def test_long_talks_are_held_out_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[f"Hello, {n}!", "Hi.", "", "привет"] * 8 for n in range(4)]
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    progress = finetune(folder / "talk.jsonl", folder / "out", make_base(folder), recipe=recipe(epochs=1))
    assert (progress.dialogues, progress.held_out) == (3, 1)
    said = capsys.readouterr().err
    assert "talk.jsonl: 4 dialogues; 4 longer than 32 tokens and split between turns; 64 turns left out" in said


def test_of_a_large_file_no_more_is_held_out_than_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.training.finetune.MEASURED", 10)
    write_tsv(folder / "many.tsv", TALK * 10)
    progress = finetune(folder / "many.tsv", folder / "out", make_base(folder), recipe=recipe(epochs=0.1), quiet=True)
    assert (progress.dialogues, progress.held_out) == (790, 10)


def test_what_is_learnt_and_measured_too_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, short = make_base(folder), recipe(epochs=0.1)
    finetune(folder / "talk.tsv", folder / "out", base, recipe=short)
    assert "2 of the 2 dialogues to measure on are learnt as well" in capsys.readouterr().err
    write_tsv(folder / "other.tsv", [[(0, "how are you ?"), (1, "hello .")]])
    finetune(folder / "talk.tsv", folder / "valid", base, valid=folder / "other.tsv", recipe=short)
    assert "learnt as well" not in capsys.readouterr().err


def test_reading_shows_at_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    talk = Path("talk.tsv").rename("talk [part 2].tsv")
    for forced in (False, True):
        if forced:
            monkeypatch.setenv("FORCE_COLOR", "1")
        finetune(talk, folder / f"{forced}", make_base(folder), recipe=recipe(epochs=0.1))
        assert ("reading talk [part 2].tsv" in capsys.readouterr().err) == forced
