"""The trainer: DialoGPT's recipe on a file of dialogues, for a model of any size, from a checkpoint or from nothing.

`finetune()` goes on where an earlier run in the same folder stopped. In the end the folder holds a checkpoint that
the engine loads, `losses.png` and a model card, README.md.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from core.engine import hub
from core.engine.base import BadCheckpoint
from core.engine.model_runner import computes_bfloat16
from core.tokenizer import Tokenizer
from core.training.datasets import BadData, Example, batches, encode, read_dialogues
from core.training.muon import Muon


@dataclass(frozen=True, slots=True)
class Recipe:
    """DialoGPT's, arXiv 1911.00536 and its repository, unless told otherwise."""

    learning_rate: float = 5e-5
    """At its peak."""
    warmup: int = 200
    """Steps; a tenth of them all if that is less."""
    schedule: str = "noam"
    """noam: falls with the square root of the step. cosine: falls to nothing at the planned end."""
    epochs: float = 1.0
    minutes: float = 0.0
    """If above 0, the run takes that long, whatever `epochs` says; stops and resumes do not count."""
    batch_tokens: int = 4096
    """In one step, padding included."""
    threads: int = 2
    """On a CPU. As many parts of a batch are worked on at once, each with gradients of its own in memory; fewer where
    a part would be too small for a dialogue of `max_length`."""
    max_length: int = 128
    cut: bool = False
    """Shorten dialogues above `max_length` instead of dropping them."""
    reverse: bool = False
    weight_decay: float = 0.01
    dropout: float = 0.1
    clip: float = 1.0
    muon: bool = False
    """Muon for the blocks' matrices (arXiv 2502.16982); AdamW for the rest. Pays when training from nothing."""
    bfloat16: bool = True
    """Where the hardware has it; a CPU without would take a hundred times as long."""
    save_every: float = 300.0
    """Seconds."""
    seed: int = 1


@dataclass
class Progress:
    """How far a run is; kept in its checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch: int = 0
    batch: int = 0
    """Steps of this epoch that lie behind; a machine with other cores cuts the rest into other batches."""
    train: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss per learnt token in nats), averaged over the steps between."""
    valid: list[tuple[int, float]] = field(default_factory=list)


def finetune(
    data: Path,
    out: Path,
    base: str | Path | GPT2Config,
    *,
    valid: Path | None = None,
    recipe: Recipe | None = None,
    tokenizer_folder: Path | None = None,
    quiet: bool = False,
) -> Progress:
    """Train `base` (a folder, a hub name, or a config to start from nothing) on `data`; write everything to `out`.

    `valid`: dialogues to measure on; without it every 50th of `data` is kept back. The tokenizer comes from
    `tokenizer_folder`, by default the base's own folder. Stopped, also by Ctrl-C, the same call goes on where it was.
    Raises BadData, BadCheckpoint, OSError.
    """
    recipe = recipe or Recipe()
    torch.manual_seed(recipe.seed)
    model, folder = _open(base, tokenizer_folder, recipe.dropout)
    tokenizer = Tokenizer.load(folder, model.config.vocab_size)

    def read(path: Path) -> list[Example]:
        return encode(read_dialogues(path), tokenizer, recipe.max_length, reverse=recipe.reverse, cut=recipe.cut)

    if recipe.max_length > model.config.n_positions:
        raise BadData(f"max_length {recipe.max_length} is more than the model's {model.config.n_positions} positions")
    examples = read(data)
    held_back = read(valid) if valid else examples[::50]
    if not valid:
        examples = [example for index, example in enumerate(examples) if index % 50]
    if not examples or not held_back:
        raise BadData(f"{data} holds too few dialogues of at most {recipe.max_length} tokens")
    out.mkdir(parents=True, exist_ok=True)
    progress = Trainer(model, examples, held_back, recipe, out, quiet=quiet).run()
    save(model, folder, out)
    plot(progress, out / "losses.png")
    write_card(out / "README.md", model, recipe, progress, len(examples))
    return progress


def _open(base: str | Path | GPT2Config, tokenizer_folder: Path | None, dropout: float) -> tuple[GPT2LMHeadModel, Path]:
    dropouts: dict[str, Any] = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    if isinstance(base, GPT2Config):
        if tokenizer_folder is None:
            raise ValueError("a model from nothing needs tokenizer_folder")
        base.update(dropouts)
        model, folder = GPT2LMHeadModel(base), tokenizer_folder
    else:
        folder = hub.resolve(base)
        try:
            model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, **dropouts)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise BadCheckpoint(f"{base} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = torch.nn.GELU(approximate="tanh")  # type: ignore[union-attr]  # the same function in one operation
    return model, tokenizer_folder or folder


class Trainer:
    """One run. `run()` returns when it is over; the checkpoint in `out` lets it go on after any stop."""

    def __init__(
        self,
        model: GPT2LMHeadModel,
        examples: list[Example],
        held_back: list[Example],
        recipe: Recipe,
        out: Path,
        *,
        quiet: bool = False,
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.examples, self.held_back = model, examples, held_back
        torch.nn.Module.to(model, self.device)
        self.recipe, self.out, self.quiet = recipe, out, quiet
        self.progress = Progress()
        self.bfloat16 = recipe.bfloat16 and computes_bfloat16(self.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = optimizers(model, recipe)
        per_epoch = len(batches(examples, recipe.batch_tokens // self.parts, recipe.seed)) / self.parts
        self.steps = max(1, math.ceil(per_epoch * recipe.epochs))
        self._resume()

    @property
    def parts(self) -> int:
        if self.device.type != "cpu":
            return 1
        return max(1, min(self.recipe.threads, self.recipe.batch_tokens // self.recipe.max_length))

    def run(self) -> Progress:
        from rich.progress import Progress as Bar

        started, saved, recent = time.monotonic() - self.progress.seconds, time.monotonic(), []
        threads = torch.get_num_threads()
        if self.device.type == "cpu":  # parts of a batch side by side need no barrier at every operation
            torch.set_num_threads(max(1, self.recipe.threads // self.parts))
        torch.set_flush_denormal(True)  # numbers next to nothing make a CPU ten times slower
        pool = ThreadPoolExecutor(self.parts, initializer=torch.set_flush_denormal, initargs=(True,))
        with Bar(disable=self.quiet) as bar, pool:
            task = bar.add_task("training", total=1)
            ahead = self._batches()
            try:
                while self.share_done < 1:
                    recent.append(self._step(next(ahead), pool))
                    self.progress.seconds = time.monotonic() - started
                    if self.progress.step % 50 == 0:
                        self.progress.train.append((self.progress.step, sum(recent) / len(recent)))
                        recent.clear()
                        self._note()
                        loss, done = self.progress.train[-1][1], self.progress
                        text = f"step {done.step} loss {loss:.3f} tokens {done.tokens}"
                        bar.update(task, completed=self.share_done, description=text)
                    if time.monotonic() - saved > self.recipe.save_every:
                        self._measure(pool)
                        self._save()
                        saved = time.monotonic()
            except KeyboardInterrupt:
                self._save()
                raise
            self._measure(pool)
        torch.set_num_threads(threads)
        self._save()
        return self.progress

    @property
    def share_done(self) -> float:
        if self.recipe.minutes > 0:
            return min(1.0, self.progress.seconds / (60 * self.recipe.minutes))
        return min(1.0, self.progress.step / self.steps)

    def rate(self) -> float:
        """The learning rate now, as a share of its peak."""
        step, warmup = self.progress.step + 1, self.recipe.warmup
        if not self.recipe.minutes:
            warmup = min(warmup, self.steps // 10)
        if step < warmup:
            return step / warmup
        if self.recipe.schedule == "noam":
            return math.sqrt(max(1, warmup) / step)
        return 0.5 * (1 + math.cos(math.pi * self.share_done)) * 0.99 + 0.01

    def _batches(self) -> Iterator[list[list[int]]]:
        """`parts` batches at a time, epoch after epoch, from where the progress stands."""
        while True:
            found = batches(
                self.examples, self.recipe.batch_tokens // self.parts, self.recipe.seed + self.progress.epoch
            )
            for at in range(self.progress.batch * self.parts, len(found), self.parts):
                self.progress.batch += 1
                yield found[at : at + self.parts]
            self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0

    def _step(self, step_batches: list[list[int]], pool: ThreadPoolExecutor) -> float:
        """One update; the mean loss of the tokens learnt from, in nats."""
        learnt = sum(sum(self.examples[i].learn[1:]) for batch in step_batches for i in batch)

        def gradient(batch: list[int]) -> tuple[float, tuple[torch.Tensor, ...]]:
            loss = self.loss([self.examples[i] for i in batch]) / learnt
            return loss.item(), torch.autograd.grad(loss, self.parameters)

        done = list(pool.map(gradient, step_batches))
        for parameter, *parts in zip(self.parameters, *(grads for _, grads in done), strict=True):
            parameter.grad = sum(parts[1:], start=parts[0])
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.rate()
            optimizer.step()
        self.progress.step += 1
        self.progress.tokens += sum(len(self.examples[i].ids) for batch in step_batches for i in batch)
        return sum(loss for loss, _ in done)

    def loss(self, examples: list[Example]) -> torch.Tensor:
        """Sum of -ln p over the tokens to learn. Right-padded; the padding is never looked at."""
        longest = max(len(example.ids) for example in examples)
        ids = torch.zeros(len(examples), longest, dtype=torch.long)  # (B, T)
        learn = torch.zeros(len(examples), longest, dtype=torch.bool)  # (B, T)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            learn[row, : len(example.ids)] = torch.tensor(example.learn, dtype=torch.bool)
        ids, learn = ids.to(self.device), learn.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            hidden = self.model.transformer(ids[:, :-1], use_cache=False).last_hidden_state  # (B, T-1, D)
            logits = self.model.lm_head(hidden[learn[:, 1:]])  # (learnt, V)
        return cross_entropy(logits.float(), ids[:, 1:][learn[:, 1:]], reduction="sum")

    @torch.no_grad()
    def _measure(self, pool: ThreadPoolExecutor) -> None:
        self.model.train(False)
        parts = [self.held_back[at : at + 16] for at in range(0, len(self.held_back), 16)]

        def loss(part: list[Example]) -> float:
            with torch.no_grad():
                return self.loss(part).item()

        total = sum(pool.map(loss, parts))
        self.model.train()
        learnt = sum(sum(example.learn[1:]) for example in self.held_back)
        self.progress.valid.append((self.progress.step, total / learnt))

    def _save(self) -> None:
        half_done = self.out / "checkpoint.tmp"
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
        }
        torch.save(state, half_done)
        half_done.rename(self.out / "checkpoint.pt")
        self._note()

    def _note(self) -> None:
        (self.out / "progress.json").write_text(json.dumps(asdict(self.progress)), encoding="utf-8")

    def _resume(self) -> None:
        checkpoint = self.out / "checkpoint.pt"
        if not checkpoint.is_file():
            return
        state = torch.load(checkpoint, map_location=self.device, weights_only=True)
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError:
            raise BadData(f"{self.out} holds a run of another model: name another folder, or empty it") from None
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            peaks = [group["peak"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak"] = peak
        self.progress = Progress(**state["progress"])


def optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW without decay on biases and norms; with `muon`, the blocks' matrices go to Muon."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks = [p for name, p in named if recipe.muon and ".h." in name and p.ndim == 2]
    rest = [(name, p) for name, p in named if not any(p is block for block in blocks)]
    peak = recipe.learning_rate
    groups = [
        {"params": [p for _, p in rest if p.ndim > 1], "weight_decay": recipe.weight_decay, "peak": peak},
        {"params": [p for _, p in rest if p.ndim == 1], "weight_decay": 0.0, "peak": peak},
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)]
    if blocks:
        muon = Muon(blocks, lr=peak, weight_decay=recipe.weight_decay)
        muon.param_groups[0]["peak"] = peak
        found.append(muon)
    return found


def save(model: GPT2LMHeadModel, tokenizer_folder: Path, out: Path) -> None:
    """Config, weights as safetensors, and the tokenizer's files."""
    model.save_pretrained(out)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        if (tokenizer_folder / name).is_file():
            (out / name).write_bytes((tokenizer_folder / name).read_bytes())


def plot(progress: Progress, path: Path) -> None:
    """Training and held-out loss over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for points, label in ((progress.train, "training"), (progress.valid, "held out")):
        axes.plot(
            [step for step, _ in points],
            [loss for _, loss in points],
            label=label,
            marker="." if len(points) < 40 else "",
        )
    axes.set(xlabel="step", ylabel="loss per token (nats)", title=f"{progress.tokens / 1e6:.1f} million tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def write_card(path: Path, model: GPT2LMHeadModel, recipe: Recipe, progress: Progress, dialogues: int) -> None:
    """What was trained, on how much, with which settings and losses."""
    size = sum(p.numel() for p in model.parameters())
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(recipe).items())
    train, valid = (points[-1][1] if points else math.nan for points in (progress.train, progress.valid))
    path.write_text(
        f"""# A model for Palaver

{size / 1e6:.1f} million parameters, trained with `palaver finetune` on {dialogues} dialogues:
{progress.step} steps, {progress.tokens / 1e6:.2f} million tokens, {progress.seconds / 60:.0f} minutes.
Loss per token: {train:.3f} in training, {valid:.3f} on held-out dialogues (perplexity {math.exp(valid):.1f}).

![losses](losses.png)

| setting | value |
|---|---|
{settings}

It answers in the spelling it was trained on and knows only what its dialogues taught it. It is no source of facts or
advice, and nothing has checked its replies: keep the safety filter on.
""",
        encoding="utf-8",
    )
