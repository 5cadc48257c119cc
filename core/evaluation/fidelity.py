"""What a precision costs: a checkpoint's perplexity on held-out dialogues, in float32 and as the engine rounds it.

    python -m core.evaluation.fidelity FOLDER DIALOGUES [--dtypes int8 bfloat16 float16] [--most 200]

FOLDER holds the checkpoint, DIALOGUES is JSONL or TSV as for finetuning, of none the model was trained on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from core.engine.choice import DTYPES, build
from core.engine.config import read_config
from core.engine.model import Batch, Model, Rows
from core.tokenizer import Tokenizer
from core.training.datasets import Example, encode, read_dialogues

BAR = 0.01
"""How much higher than float32's a perplexity may be for DTYPE=auto to choose the precision."""


def perplexity(model: Model, examples: Sequence[Example]) -> float:
    """e to the mean loss, in nats, of the tokens that the examples want learnt; each example is one prefill."""
    losses = []
    with torch.inference_mode():
        for example in examples:
            ids, learn = list(example.ids), torch.tensor(example.learn[1:], dtype=torch.bool)
            count = len(ids) - 1
            kv = model.new_kv(count)
            logits, _ = model.forward(Batch(ids[:-1], [Rows(kv, 0, count)], list(range(count))))
            losses.append(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")[learn])
    return math.exp(float(torch.cat(losses).double().mean()))


def read_examples(folder: Path, dialogues: Path, most: int) -> list[Example]:
    """Raises BadData, BadCheckpoint."""
    config = read_config(folder / "config.json")
    tokenizer = Tokenizer.load(folder, config.vocab_size)
    return encode(islice(read_dialogues(dialogues), most), tokenizer, config.n_positions, cut=True)


def compare(folder: Path, examples: Sequence[Example], dtypes: Sequence[str]) -> Iterator[tuple[str, float]]:
    """(device, precision and path; perplexity) of float32, then of each of `dtypes`, on the CPU."""
    for name in ("float32", *dtypes):
        model = build(folder, torch.device("cpu"), DTYPES[name])
        yield model.how, perplexity(model, examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dialogues", type=Path)
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES], default=["int8"])
    parser.add_argument("--most", type=int, default=200, help="dialogues that are read")
    options = parser.parse_args()
    examples = read_examples(options.folder, options.dialogues, options.most)
    print(f"{len(examples)} dialogues, {sum(sum(e.learn) for e in examples):,} tokens to predict")
    exact = 0.0
    for how, value in compare(options.folder, examples, options.dtypes):
        exact = exact or value
        print(f"{how:44} perplexity {value:9.4f}  {value / exact - 1:+.3%} {'' if value <= exact * (1 + BAR) else '!'}")


if __name__ == "__main__":
    main()
