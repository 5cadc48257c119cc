"""What a training leaves: the checkpoint, a plot of the losses, a model card, and in one line what it brought."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import GPT2LMHeadModel

from core.engine.config import REVERSE

if TYPE_CHECKING:
    from core.training.finetune import Progress, Recipe


SPEAKS = """It answers in the spelling it was trained on and knows only what its dialogues taught it. It is no source of
facts or advice, and nothing has checked its replies."""
JUDGES = """It does not talk: it says how likely a message is when its reply is known. `REVERSE_MODEL=this-folder
SAMPLING__N=8` chooses so among the replies of a model with the same vocabulary."""


FAR = 0.005
"""How far a training can move a weight (about the learning rate in each step), below which it has hardly learnt."""


def save(model: GPT2LMHeadModel, tokenizer_folder: Path, out: Path, reverse: bool) -> None:
    """Config, weights as safetensors, and the tokenizer's files."""
    setattr(model.config, REVERSE, reverse)
    model.save_pretrained(out)
    for weights in out.glob("*.safetensors"):  # written for this user alone
        shutil.copymode(out / "config.json", weights)
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
    axes.set(xlabel="step", ylabel="loss per token (nats)", title=f"{progress.tokens:,} tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def summary(progress: Progress) -> str:
    """What the training brought, in one line."""
    (_, before), *_, (_, after) = [*progress.valid[:1], *progress.valid]
    return (
        f"held-out loss {before:.3f} → {after:.3f} nats per token, perplexity {_perplexity(before)} → "
        f"{_perplexity(after)}, on {progress.held_out} dialogue{'s' * (progress.held_out != 1)}"
    )


def doubt(progress: Progress, recipe: Recipe) -> str:
    """What speaks against the new model, and what to try; "" where nothing does."""
    if not progress.valid[-1][1] < progress.valid[0][1]:
        return "that is no better than before: try more dialogues, fewer --epochs or a lower --learning-rate"
    if progress.step * recipe.learning_rate < FAR:
        return f"so few steps ({progress.step}) teach little: try more --epochs or a higher --learning-rate"
    return ""


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.1f}" if not loss > math.log(1e6) else "over a million"


def write_card(path: Path, model: GPT2LMHeadModel, recipe: Recipe, progress: Progress) -> None:
    """What was trained, on how much, with which settings and losses."""
    size = sum(p.numel() for p in model.parameters())
    used = asdict(recipe) | {"warmup": min(recipe.warmup, progress.step // 10)}
    settings = "\n".join(f"| {name} | {value} |" for name, value in used.items())
    kind, nature = ("reverse model", JUDGES) if recipe.reverse else ("model", SPEAKS)
    path.write_text(
        f"""# A {kind} for Palaver

{size / 1e6:.1f} million parameters, trained with `palaver finetune` on {progress.dialogues} dialogues:
{progress.step} steps, {progress.tokens:,} tokens, {progress.seconds / 60:.1f} minutes.
Training loss in the end {progress.train[-1][1]:.3f}; {summary(progress)}.

![losses](losses.png)

| setting | value |
|---|---|
{settings}

{nature}
""",
        encoding="utf-8",
    )
