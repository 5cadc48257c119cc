"""Dialogues on disk, as DialoGPT's TSV, as JSONL or as a chat's export, and as token ids.

TSV, one dialogue a line: `weight turn EOS weight turn ... <tab> weight target`; weight 0 means no loss on that turn.
Its texts are in DialoGPT's spelling already.
JSONL, one dialogue a line: a list of turns, or an object whose "turns" is one; a turn is a string (weight 1) or an
object with "text" and, if it should not be learnt, "weight": 0.
JSON, a chat's export or a folder of them: core.training.exports.
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
from core.training.exports import read_export

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


@dataclass(slots=True)
class Tally:
    """What `encode` was given, and what of it could not be taken as it was."""

    dialogues: int = 0
    split: int = 0
    """Dialogues in several windows."""
    empty: int = 0
    """Dialogues with nothing to learn."""
    wordless: int = 0
    """Turns without text."""
    long: int = 0
    """Turns to learn that leave no room for what they answer."""


EXAMPLES = {
    ".jsonl": 'a list of at least two turns, for example ["hi!", "hello, who is there?"]',
    ".tsv": "weights and at least two turns, for example: 1 hi ! EOS 1 hello , who is there ?",
}
"""What a line should be, by the file's suffix."""


def read_dialogues(path: Path, *, normalised: bool = True) -> Iterator[Dialogue]:
    """Every dialogue of a .jsonl or .tsv file, or of an export or a folder of them. Raises BadData, OSError.

    `normalised`: bring the texts, TSV's excepted, into DialoGPT's spelling; what has no sign in it becomes a turn
    without text.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == ".json":
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            yield from _from_export(file, normalised)
        return
    if suffix not in EXAMPLES:
        raise BadData(
            f"{path}: dialogues come as .jsonl or .tsv, or as a chat exported to .json: convert the file, or give it "
            "the name that fits"
        )
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig").strip("\r\n")  # files that were put together have its sign anywhere
                if not text.strip():
                    continue
                dialogue = _from_json(text, normalised) if suffix == ".jsonl" else _from_tsv(text)
                if len(dialogue) < 2:
                    raise ValueError("one turn alone")
            except UnicodeDecodeError:
                raise BadData(f"{path}:{number}: bytes that are no UTF-8: save the file as UTF-8") from None
            except (ValueError, TypeError, KeyError, RecursionError):
                raise BadData(f"{path}:{number}: a line is {EXAMPLES[suffix]}") from None
            yield dialogue


def _from_export(path: Path, normalised: bool) -> Iterator[Dialogue]:
    try:
        for talk in read_export(path):
            yield [(1, _spelled(text, normalised)) for text in talk]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadData(
            f"{path} is no whole export of Telegram Desktop or DiscordChatExporter: export the chat again, as JSON"
        ) from None


def _spelled(text: str, normalised: bool) -> str:
    return normalise(text) if normalised else " ".join(text.split())


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


def _from_json(line: str, normalised: bool) -> Dialogue:
    whole = json.loads(line)
    turns = whole["turns"] if isinstance(whole, dict) else whole
    if not isinstance(turns, list):
        raise TypeError("no list")
    dialogue = []
    for turn in turns:
        text, weight = (turn, 1) if isinstance(turn, str) else (turn["text"], turn.get("weight", 1))
        if not isinstance(text, str):
            raise TypeError("no text")
        dialogue.append((int(weight > 0), _spelled(text, normalised)))
    return dialogue


def encode(
    dialogues: Iterable[Dialogue],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    reverse: bool = False,
    cut: bool = False,
    tally: Tally | None = None,
) -> list[Example]:
    """Token ids, at most `max_length` (3 or more) an example, with loss on every weighted turn but an example's first.

    The eos of a turn is learnt with it. A longer dialogue becomes several examples, each from the turn that the one
    before ended with; with `cut` only the first. `reverse` turns the order of the turns round (the backward model of
    MMI). `tally` counts what did not fit.
    """
    tally = tally or Tally()
    examples = []
    for dialogue in dialogues:
        turns = _turns(dialogue[::-1] if reverse else dialogue, tokenizer, max_length, tally)
        windows = _windows(turns, max_length)
        found = [example for window in windows[: 1 if cut else None] if any((example := _example(window)).learn)]
        tally.dialogues += 1
        tally.split += len(found) > 1
        tally.empty += not found
        examples += found
    return examples


def _turns(dialogue: Dialogue, tokenizer: Tokenizer, max_length: int, tally: Tally) -> list[tuple[int, list[int]]]:
    """(learn it?, ids and eos) of each turn with text, short enough for two ids of another one before it.

    What answers a turn without text is not learnt: nobody will ask nothing.
    """
    turns: list[tuple[int, list[int]]] = []
    unasked = False
    for weight, text in dialogue:
        if not text.strip():
            tally.wordless += 1
            unasked = True
            continue
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        learn, fits = weight > 0 and not unasked and bool(turns), len(ids) <= max_length - 2
        tally.long += learn and not fits
        turns.append((int(learn and fits), ids[2 - max_length :]))
        unasked = False
    return turns


def _windows(turns: list[tuple[int, list[int]]], max_length: int) -> list[list[tuple[int, list[int]]]]:
    """Runs of `turns` of at most `max_length` ids. Each goes on from the last turn of the one before, which loses its
    left where it must, as a prompt does."""
    windows: list[list[tuple[int, list[int]]]] = [[]]
    room = max_length
    for learn, ids in turns:
        if len(ids) > room:
            before = windows[-1][-1][1][len(ids) - max_length :]
            if len(windows[-1]) > 1:
                windows.append([])
            windows[-1][:] = [(0, before)]
            room = max_length - len(before)
        windows[-1].append((learn, ids))
        room -= len(ids)
    return windows


def _example(window: list[tuple[int, list[int]]]) -> Example:
    ids, learn = array("i"), array("b")
    for wanted, turn in window:
        ids.extend(turn)
        learn.extend([wanted] * len(turn))
    return Example(ids, learn)


def batches(examples: Sequence[Example], tokens: int, seed: int) -> list[list[int]]:
    """Indices of `examples` in batches of at most `tokens` (padding counted), like lengths together, shuffled.

    How many batches there are does not hang on the seed: lengths count in eights, and those alike change places.
    """
    rng = random.Random(seed)
    eights = [-(-len(example.ids) // 8) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: (eights[i], rng.random()))
    found: list[list[int]] = []
    for i in order:
        if not found or 8 * eights[i] * (len(found[-1]) + 1) > tokens:
            found.append([])
        found[-1].append(i)
    rng.shuffle(found)
    return found
