"""How the embedded model was made: `python -m core.training.tiny --minutes 55`.

Expands the corpus, trains a byte-level BPE and a small GPT-2 on it, and writes runs/tiny. Every part is repeatable
from the seed; the run may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from core.tokenizer import END_OF_TEXT, Tokenizer
from core.training.corpus import read_corpus
from core.training.datasets import Dialogue, write_tsv
from core.training.expand import Expander

VOCABULARY = 4096
POSITIONS = 256
HEAD = 64
"""Width of one attention head."""


def dialogues(count: int, seed: int, *, held_out: bool = False, drills: float = 0.0) -> Iterator[Dialogue]:
    """`count` chains of dialogues: half of them a few turns, others longer, or as long as the positions. A
    share is `drills`."""
    expander = Expander(read_corpus(), held_out=held_out)
    for index in range(count):
        rng = random.Random(f"{seed}-{index}-{held_out}")
        if rng.random() < drills:
            yield [
                (turn.weight, turn.text) for turn in expander.drill(rng, rng.randrange(8, rng.choice((30, 60, 180))))
            ]
            continue
        words = rng.choice((rng.randrange(8, 30), rng.randrange(8, 30), rng.randrange(10, 200), 205))
        yield [(turn.weight, turn.text) for turn in expander.chain(rng, words)]


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Byte-level BPE; `<|endoftext|>` is the only special token and has the last id."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=3,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([END_OF_TEXT])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))


def export(run: Path, folder: Path) -> None:
    """Write what the run in `run` has reached to `folder`, in float16: half the bytes, the same replies."""
    import torch
    from safetensors.torch import save_file

    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["model"]
    tensors = {name: tensor.half().contiguous() for name, tensor in state.items() if name != "lm_head.weight"}
    vocabulary, width = tensors["transformer.wte.weight"].shape
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".h." in name)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_positions": POSITIONS,
        "n_embd": width,
        "n_layer": layers,
        "n_head": width // HEAD,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": vocabulary - 1,
        "eos_token_id": vocabulary - 1,
        "tie_word_embeddings": True,
        "dtype": "float16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    from transformers import GPT2Config

    from core.training.finetune import Recipe, finetune

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--chains", type=int, default=80_000)
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--base", type=Path, help="begin with the weights and the tokenizer of this folder")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=4096, help="tokens in one step")
    parser.add_argument("--adamw", action="store_true", help="AdamW for all weights, no Muon")
    parser.add_argument("--drills", type=float, default=0.0, help="share of dialogues that only teach to copy")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--export", type=Path, help="only write what the run has reached to this folder")
    arguments = parser.parse_args()

    if arguments.export:
        export(arguments.out, arguments.export)
        return
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "train.tsv").is_file():
        write_tsv(out / "valid.tsv", dialogues(400, arguments.seed, held_out=True))
        write_tsv(out / "train.tmp", dialogues(arguments.chains, arguments.seed, drills=arguments.drills))
        (out / "train.tmp").rename(out / "train.tsv")
    if arguments.base:
        (out / "tokenizer.json").write_bytes((arguments.base / "tokenizer.json").read_bytes())
    elif not (out / "tokenizer.json").is_file():
        train_tokenizer((text for talk in dialogues(6000, arguments.seed) for _, text in talk), out)
    tokenizer = Tokenizer.load(out)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=arguments.width // HEAD,
        activation_function="gelu_new",
        bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id,
    )
    recipe = Recipe(
        learning_rate=arguments.rate, warmup=100, schedule="cosine", minutes=arguments.minutes, epochs=1,
        batch_tokens=arguments.batch, max_length=POSITIONS, cut=True, dropout=0.0, muon=not arguments.adamw,
        seed=arguments.seed,
    )  # fmt: skip
    finetune(
        out / "train.tsv", out, arguments.base or config, valid=out / "valid.tsv", recipe=recipe, tokenizer_folder=out
    )


if __name__ == "__main__":
    main()
