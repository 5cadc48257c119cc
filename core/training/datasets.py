"""Dialogues on disk, as DialoGPT's TSV or as JSONL, and as token ids.

TSV, one dialogue a line: `weight turn EOS weight turn ... <tab> weight target`; weight 0 means no loss on that turn.
JSONL, one dialogue a line: a list of turns, or an object whose "turns" is one; a turn is a string (weight 1) or an
object with "text" and, if it should not be learnt, "weight": 0.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.text import normalise
from core.tokenizer import Tokenizer

Dialogue = list[tuple[int, str]]
"""(weight, text) of each turn, oldest first."""


class BadData(ValueError):
    """One line: the file, the line's number, what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Example:
    ids: array[int]
    """`turn eos turn eos ...`"""
    learn: array[int]
    """1 where the token is to be predicted, 0 elsewhere; as long as `ids`."""


def read_dialogues(path: Path) -> Iterator[Dialogue]:
    """Every dialogue of a .jsonl or TSV file. Raises BadData."""
    read = _from_json if path.suffix == ".jsonl" else _from_tsv
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                dialogue = read(line.rstrip("\n"))
            except (ValueError, TypeError, KeyError) as error:
                raise BadData(f"{path}:{number}: {error}") from None
            if len(dialogue) < 2:
                raise BadData(f"{path}:{number}: a dialogue has at least two turns")
            yield dialogue


def write_tsv(path: Path, dialogues: Iterable[Dialogue]) -> int:
    """Write DialoGPT's format; returns how many dialogues."""
    count = 0
    with path.open("w", encoding="utf-8") as out:
        for dialogue in dialogues:
            turns = [f"{weight:d} {text}" for weight, text in dialogue]
            out.write(" EOS ".join(turns[:-1]) + "\t" + turns[-1] + "\n")
            count += 1
    return count


def _from_tsv(line: str) -> Dialogue:
    turns = []
    for part in line.replace("\t", " EOS ").split(" EOS "):
        weight, _, text = part.strip().partition(" ")
        turns.append((int(float(weight) > 0), text))
    return turns


def _from_json(line: str) -> Dialogue:
    whole = json.loads(line)
    turns = whole["turns"] if isinstance(whole, dict) else whole
    if not isinstance(turns, list):
        raise ValueError("the turns are a list")
    return [
        (1, normalise(t)) if isinstance(t, str) else (int(t.get("weight", 1) > 0), normalise(t["text"])) for t in turns
    ]


def encode(
    dialogues: Iterable[Dialogue], tokenizer: Tokenizer, max_length: int, *, reverse: bool = False, cut: bool = False
) -> list[Example]:
    """Token ids with loss on every weighted turn after the first, its eos included.

    Longer dialogues are dropped, as DialoGPT did, or with `cut` lose whole turns at the end. `reverse` turns the order
    of the turns round (the backward model of MMI).
    """
    examples = []
    for dialogue in dialogues:
        ids, learn = array("i"), array("b")
        for index, (weight, text) in enumerate(reversed(dialogue) if reverse else dialogue):
            turn = [*tokenizer.encode(text), tokenizer.eos_id]
            if cut and len(ids) + len(turn) > max_length:
                break
            ids.extend(turn)
            learn.extend([int(weight > 0 and index > 0)] * len(turn))
        if len(ids) <= max_length and any(learn):
            examples.append(Example(ids, learn))
    return examples


def batches(examples: Sequence[Example], tokens: int, seed: int) -> list[list[int]]:
    """Indices of `examples` in batches of at most `tokens` (padding counted), like lengths together, shuffled."""
    rng = random.Random(seed)
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids) // 8, rng.random()))
    found: list[list[int]] = [[]]
    longest = 0
    for i in order:
        longest = max(longest, len(examples[i].ids))
        if found[-1] and longest * (len(found[-1]) + 1) > tokens:
            found.append([])
            longest = len(examples[i].ids)
        found[-1].append(i)
    rng.shuffle(found)
    return [batch for batch in found if batch]
