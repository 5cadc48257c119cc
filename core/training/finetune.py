"""The trainer: DialoGPT's recipe on a file of dialogues, for a model of any size, from a checkpoint or from nothing.

`finetune()` goes on where an earlier run in the same folder stopped. In the end the folder holds a checkpoint that
the engine loads, `losses.png` and a model card, README.md. On a CPU, the same seed and threads give the same weights,
stopped in between or not; not with `minutes`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy, dropout
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel

from core.engine import hub, weights
from core.engine.base import BadCheckpoint
from core.engine.choice import choose_device, computes_bfloat16
from core.tokenizer import Tokenizer
from core.training.datasets import BadData, Example, Tally, batches, encode, read_dialogues
from core.training.muon import Muon
from core.training.outcome import plot, save, write_card

CHECKPOINT, HALF_DONE, NOTES, LOCK = "checkpoint.pt", "checkpoint.tmp", "progress.json", ".lock"

MEASURED = 500
"""Dialogues held out of a large file: more would be measured for longer than is trained between two saves."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """DialoGPT's, arXiv 1911.00536 and its repository, unless told otherwise."""

    learning_rate: float = 5e-5
    """At its peak."""
    warmup: int = 200
    """Steps; a tenth of them all if that is less, with `minutes` of as many as will be at the speed so far."""
    schedule: str = "noam"
    """noam: falls with the square root of the step. cosine: falls to nothing at the planned end."""
    epochs: float = 1.0
    minutes: float = 0.0
    """If above 0, the run takes that long, whatever `epochs` says; stops and resumes do not count."""
    batch_tokens: int = 4096
    """In one step, padding included."""
    device: str = "auto"
    """CUDA where there is one; or cpu, cuda or cuda:N."""
    threads: int = 2
    """On a CPU. As many parts of a batch are worked on at once, each with gradients of its own in memory; fewer where
    a part would be too small for a dialogue of `max_length`."""
    max_length: int = 128
    """Ids; longer dialogues are split between turns."""
    cut: bool = False
    """Keep only the beginning of those."""
    reverse: bool = False
    normalise: bool = True
    """Bring JSONL into DialoGPT's spelling, as a bot does that is set up so."""
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
    recent: list[float] = field(default_factory=list)
    """Losses of the steps since the last one in `train`."""
    train: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss per learnt token in nats), averaged over the steps between."""
    valid: list[tuple[int, float]] = field(default_factory=list)
    """As `train`, on what was held out; the first is that of the base."""
    dialogues: int = 0
    held_out: int = 0
    """Dialogues."""


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

    `valid`: dialogues to measure on; without it every 50th of `data`, some 500 at most, is kept back. The tokenizer
    comes from `tokenizer_folder`, by default the base's own folder. Stopped, also by Ctrl-C, the same call goes on
    where it was.
    Unless `quiet`, what was split or left out goes to standard error.
    Raises BadData, BadCheckpoint, HubAway, OSError.
    """
    recipe = recipe or Recipe()
    choose_device(recipe.device)  # a wrong one is told before anything is read
    torch.manual_seed(recipe.seed)
    model, folder = _open(base, tokenizer_folder, recipe.dropout)
    if out != tokenizer_folder:  # who has put the tokenizer there made the folder for this
        _spare(out, folder)
    tokenizer = Tokenizer.load(folder, model.config.vocab_size)

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    if recipe.max_length > model.config.n_positions:
        raise BadData(f"max_length {recipe.max_length} is more than the model's {model.config.n_positions} positions")
    talks = _read(data, tokenizer, recipe, say, quiet)
    every = max(50, len(talks) // MEASURED)
    held_back = _read(valid, tokenizer, recipe, say, quiet) if valid else talks[::every]
    if not valid:
        talks = [talk for index, talk in enumerate(talks) if index % every]
    if not talks or not held_back:
        few = valid if valid and talks else data
        raise BadData(f"{few} holds too few dialogues to learn from: two at least, each with something and its answer")
    if both := _in_both(talks, held_back):
        say(f"{both} of the {len(held_back)} dialogues to measure on are learnt as well: they flatter the model")
    examples, measured = ([example for talk in some for example in talk] for some in (talks, held_back))
    with _held(out):
        trainer = Trainer(model, examples, measured, recipe, out, quiet=quiet)
        progress = trainer.progress
        progress.dialogues, progress.held_out = len(talks), len(held_back)
        if trainer.finished:
            say(f"{out} is already finished, nothing was trained: more epochs or minutes go on")
        else:
            trainer.run()
        try:
            save(model, folder, out, recipe.reverse)
            plot(progress, out / "losses.png")
            write_card(out / "README.md", model, recipe, progress)
        except (OSError, SafetensorError) as error:
            raise _unwritten(out, error) from error
    return progress


def _in_both(talks: list[list[Example]], held_back: list[list[Example]]) -> int:
    """How many of `held_back` stand in `talks`, word for word."""

    def key(talk: list[Example]) -> tuple[bytes, ...]:
        return tuple(example.ids.tobytes() for example in talk)

    held = set(map(key, held_back))
    learnt = {found for talk in talks if (found := key(talk)) in held}
    return sum(key(talk) in learnt for talk in held_back)


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Make `out` if need be; nobody else trains in it meanwhile, or BadData is raised."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadData(f"{out} is being trained by another process: wait for it, or name another folder") from None
        yield


def _spare(out: Path, base: Path) -> None:
    """Raises BadData where `out` holds what is not a run's own and would be written over."""
    if not out.is_dir():
        return
    if out.samefile(base):
        raise BadData(f"{out} is the model to begin with: name another folder for the new one")
    names = {path.name for path in out.iterdir()}
    others = sorted(names - {HALF_DONE, NOTES, LOCK})
    if others and CHECKPOINT not in names:
        raise BadData(f"{out} holds {others[0]} and no run to go on with: name a new folder")


def _read(
    path: Path, tokenizer: Tokenizer, recipe: Recipe, say: Callable[[str], None], quiet: bool
) -> list[list[Example]]:
    """The examples of each dialogue that has some."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    tally, talks, console = Tally(), [], Console(stderr=True)
    dialogues = read_dialogues(path, normalised=recipe.normalise)
    hidden = quiet or not console.is_terminal  # where it would be an empty line
    for dialogue in track(dialogues, escape(f"reading {path}"), console=console, transient=True, disable=hidden):
        found = encode([dialogue], tokenizer, recipe.max_length, reverse=recipe.reverse, cut=recipe.cut, tally=tally)
        if found:
            talks.append(found)
    remarks = (
        (tally.split, f"longer than {recipe.max_length} tokens and split between turns"),
        (tally.empty, "left out, with nothing to learn"),
        (tally.wordless, "turns left out, without a sign the model knows, and what answers them not learnt"),
        (tally.long, f"turns not learnt, longer than {recipe.max_length - 2} tokens"),
    )
    said = [f"{number} {what}" for number, what in remarks if number]
    say("; ".join([f"{path}: {tally.dialogues} dialogues", *said]))
    return talks


def _open(base: str | Path | GPT2Config, tokenizer_folder: Path | None, dropout: float) -> tuple[GPT2LMHeadModel, Path]:
    dropouts: dict[str, Any] = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    if isinstance(base, GPT2Config):
        if tokenizer_folder is None:
            raise ValueError("a model from nothing needs tokenizer_folder")
        base.update(dropouts)
        model, folder = GPT2LMHeadModel(base), tokenizer_folder
    else:
        folder = hub.resolve(base)
        checkpoint = weights.load(folder)  # as the engine: transformers draws at random what it does not find
        found = {name: checkpoint.take(name, torch.float32) for name in checkpoint.config.shapes()}
        state = {name if name == "lm_head.weight" else f"transformer.{name}": found[name] for name in found}
        try:
            config = GPT2Config.from_pretrained(folder, n_positions=checkpoint.config.n_positions, **dropouts)
            model = GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
        except (OSError, ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
            raise BadCheckpoint(f"{base} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = torch.nn.GELU(approximate="tanh")  # type: ignore[union-attr]  # the same function in one operation
    return model, tokenizer_folder or folder


class Draws(TorchFunctionMode):
    """Dropout of this thread draws from here: torch's generator is one for all threads, whoever comes first."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def drawn(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
            if not training or not p:
                return x
            return x * torch.empty_like(x).bernoulli_(1 - p, generator=self.generator) / (1 - p)

        return (drawn if func is dropout else func)(*args, **kwargs or {})


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
        self.device = choose_device(recipe.device)
        self.model, self.examples, self.held_back = model, examples, held_back
        self.fingerprint = fingerprint(model, examples, held_back, recipe)
        torch.nn.Module.to(model, self.device)
        if self.device.type == "cpu" and recipe.dropout:
            model.set_attn_implementation("eager")  # the fused one draws from torch's generator, and is no faster
        self.recipe, self.out, self.quiet = recipe, out, quiet
        self.progress = Progress()
        self.bfloat16 = recipe.bfloat16 and computes_bfloat16(self.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = optimizers(model, recipe)
        self.per_epoch = len(batches(examples, recipe.batch_tokens, recipe.seed))
        self.steps = max(1, math.ceil(self.per_epoch * recipe.epochs))
        self._lock = Lock()
        """What is saved is from before a step or after it."""
        self._resume()

    @property
    def parts(self) -> int:
        if self.device.type != "cpu":
            return 1
        return max(1, min(self.recipe.threads, self.recipe.batch_tokens // self.recipe.max_length))

    def run(self) -> Progress:
        from rich.console import Console
        from rich.progress import Progress as Bar

        threads = torch.get_num_threads()
        if self.device.type == "cpu":  # parts of a batch side by side need no barrier at every operation
            torch.set_num_threads(max(1, self.recipe.threads // self.parts))
        torch.set_flush_denormal(True)  # numbers next to nothing make a CPU ten times slower
        # Ctrl-C breaks off this thread alone, so the others change and save what there is; one more than there are
        # parts, for a save that waits for none of them.
        pool = ThreadPoolExecutor(self.parts + 1, initializer=torch.set_flush_denormal, initargs=(True,))
        try:
            with Bar(console=Console(stderr=True), disable=self.quiet) as bar, pool:
                try:
                    self._train(bar, pool)
                except KeyboardInterrupt:
                    pool.submit(self._save).result()
                    raise
        finally:
            torch.set_num_threads(threads)
        return self.progress

    def _train(self, bar: Any, pool: ThreadPoolExecutor) -> None:
        self._note()
        task = bar.add_task("measuring", total=1, completed=self.share_done)
        if not self.progress.valid:
            self._measure(pool)
        self.model.train()
        saved = time.monotonic()
        started, ahead = saved - self.progress.seconds, self._batches()
        while self.share_done < 1:
            self._step(next(ahead), pool)
            self.progress.seconds = time.monotonic() - started
            if not self.progress.recent:
                self._note()
            step, loss = self.progress.step, (self.progress.recent or [self.progress.train[-1][1]])[-1]
            text = f"step {step} loss {loss:.3f} tokens {self.progress.tokens}"
            bar.update(task, completed=self.share_done, description=text)
            if time.monotonic() - saved > self.recipe.save_every:
                pool.submit(self._save).result()
                self._measure(pool)
                saved = time.monotonic()
        if self.progress.recent:
            self._average()
        pool.submit(self._save).result()
        if not self.finished:
            self._measure(pool)
            pool.submit(self._save).result()

    @property
    def share_done(self) -> float:
        if self.recipe.minutes > 0:
            return min(1.0, self.progress.seconds / (60 * self.recipe.minutes))
        return min(1.0, self.progress.step / self.steps)

    @property
    def finished(self) -> bool:
        """Trained and measured."""
        return self.share_done >= 1 and [step for step, _ in self.progress.valid][-1:] == [self.progress.step]

    @property
    def planned(self) -> float:
        """Steps in all; with `minutes`, at the speed so far."""
        if self.recipe.minutes > 0:
            return self.progress.step / self.share_done if self.share_done else math.inf
        return self.steps

    def rate(self) -> float:
        """The learning rate now, as a share of its peak."""
        step, warmup = self.progress.step + 1, min(self.recipe.warmup, self.planned / 10)
        if step < warmup:
            return step / warmup
        if self.recipe.schedule == "noam":
            return math.sqrt(max(1, warmup) / step)
        return 0.5 * (1 + math.cos(math.pi * self.share_done)) * 0.99 + 0.01

    def _batches(self) -> Iterator[list[int]]:
        """Epoch after epoch, from where the progress stands."""
        epochs, first = divmod(self.progress.step, self.per_epoch)
        for epoch in count(epochs):
            yield from batches(self.examples, self.recipe.batch_tokens, self.recipe.seed + epoch)[first:]
            first = 0

    def _step(self, batch: list[int], pool: ThreadPoolExecutor) -> None:
        """One update."""
        learnt = sum(sum(self.examples[i].learn) for i in batch)
        size = -(-len(batch) // self.parts)
        seeds = random.Random(f"{self.recipe.seed} {self.progress.step}")
        torch.manual_seed(seeds.getrandbits(63))  # for a GPU's attention; there is one part then

        def gradient(part: list[int], seed: int) -> tuple[float, tuple[torch.Tensor, ...]]:
            with Draws(torch.Generator(self.device).manual_seed(seed)):
                loss = self.loss([self.examples[i] for i in part]) / learnt
            return loss.item(), torch.autograd.grad(loss, self.parameters)

        parts = [batch[at : at + size] for at in range(0, len(batch), size)]
        done = list(pool.map(gradient, parts, [seeds.getrandbits(63) for _ in parts]))
        tokens = sum(len(self.examples[i].ids) for i in batch)
        pool.submit(self._update, [grads for _, grads in done], sum(loss for loss, _ in done), tokens).result()

    def _update(self, gradients: list[tuple[torch.Tensor, ...]], loss: float, tokens: int) -> None:
        """With the gradients of each part of a batch; `loss` is the mean of the tokens learnt from, in nats."""
        with self._lock:
            for parameter, *parts in zip(self.parameters, *gradients, strict=True):
                parameter.grad = sum(parts[1:], start=parts[0])
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * self.rate()
                optimizer.step()
            self.progress.step += 1
            self.progress.tokens += tokens
            self.progress.recent.append(loss)
            if len(self.progress.recent) >= min(50, self.planned / 20):
                self._average()

    def _average(self) -> None:
        recent = self.progress.recent
        self.progress.train.append((self.progress.step, sum(recent) / len(recent)))
        recent.clear()

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
        half_done = self.out / HALF_DONE
        with self._lock:
            state = {
                "fingerprint": self.fingerprint,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "progress": asdict(self.progress),
            }
            try:
                with half_done.open("wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                half_done.rename(self.out / CHECKPOINT)
            except (OSError, RuntimeError) as error:  # torch says RuntimeError when it cannot write
                half_done.unlink(missing_ok=True)
                raise _unwritten(half_done, error) from error
        self._note()

    def _note(self) -> None:
        try:
            (self.out / NOTES).write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
        except OSError as error:
            raise _unwritten(self.out / NOTES, error) from error

    def _resume(self) -> None:
        checkpoint = self.out / CHECKPOINT
        if not checkpoint.is_file():
            return
        with checkpoint.open("rb") as file:
            try:
                state = torch.load(file, map_location=self.device, weights_only=True)
                if state.get("fingerprint") == self.fingerprint:
                    self.model.load_state_dict(state["model"])
                    for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                        optimizer.load_state_dict(saved)
                    self.progress = Progress(**state["progress"])
                    return
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever unpickling meets in a damaged file
                raise BadData(f"{checkpoint} is damaged: put a copy in its place, or name a new folder") from error
        raise BadData(f"{self.out} holds a run with other data or options: name another folder, or empty it")


def fingerprint(
    model: GPT2LMHeadModel, examples: Sequence[Example], held_back: Sequence[Example], recipe: Recipe
) -> str:
    """Of all that a run hangs on, but for how long it goes, where, how it shares the work and how often it saves."""
    settings = asdict(recipe)
    for name in ("epochs", "minutes", "device", "threads", "save_every"):
        del settings[name]
    digest = blake2b(json.dumps([settings, len(examples), len(held_back)]).encode(), digest_size=16)
    for example in (*examples, *held_back):
        digest.update(example.ids)
        digest.update(example.learn)
    for parameter in model.parameters():
        digest.update(f"{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _unwritten(path: Path, error: Exception) -> OSError:
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    reason = cause.strerror if isinstance(cause, OSError) else " ".join(str(cause).split())[:200]
    return OSError(f"{path} cannot be written ({reason}): see to that, and the same command goes on from the last save")


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
