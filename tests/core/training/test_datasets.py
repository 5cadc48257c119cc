"""Dialogues from TSV and JSONL, and what of them is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.tokenizer import Tokenizer
from core.training.datasets import BadData, batches, encode, read_dialogues, write_tsv
from core.training.tiny import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["hello there , how are you ?"] * 5, folder)
    return Tokenizer.load(folder)


def test_tsv_goes_there_and_back(tmp_path: Path) -> None:
    dialogues = [[(1, "hi"), (0, "hm ?"), (1, "hello .")], [(0, "a"), (1, "b")]]
    assert write_tsv(tmp_path / "a.tsv", dialogues) == 2
    assert (tmp_path / "a.tsv").read_text().splitlines()[0] == "1 hi EOS 0 hm ?\t1 hello ."
    assert list(read_dialogues(tmp_path / "a.tsv")) == dialogues


def test_dialogpts_own_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("0.0 hi EOS 1.0 hello\t1.0 how are you ?\n")
    assert list(read_dialogues(tmp_path / "a.tsv")) == [[(0, "hi"), (1, "hello"), (1, "how are you ?")]]


def test_jsonl_may_hold_strings_or_objects(tmp_path: Path) -> None:
    rows = [["Hi!", "Hello, you."], {"turns": [{"text": "Hi", "weight": 0}, {"text": "Yes."}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert list(read_dialogues(tmp_path / "a.jsonl")) == [
        [(1, "Hi !"), (1, "Hello , you .")],
        [(0, "Hi"), (1, "Yes .")],
    ]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.tsv", "hi EOS 1 ho"),
        ("a.tsv", "1 alone"),
        ("a.jsonl", "{"),
        ("a.jsonl", '"hi"'),
        ("a.jsonl", '{"a": 1}'),
        ("a.jsonl", '["hi"]'),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / name).write_text("\n" + line + "\n")
    with pytest.raises(BadData, match=f"{name}:2: "):
        list(read_dialogues(tmp_path / name))


def test_loss_stands_on_weighted_turns_after_the_first(tokenizer: Tokenizer) -> None:
    (example,) = encode([[(1, "hello"), (0, "how"), (1, "you")]], tokenizer, 128)
    spans = [[*tokenizer.encode(text), tokenizer.eos_id] for text in ("hello", "how", "you")]
    assert list(example.ids) == [id for span in spans for id in span]
    assert list(example.learn) == [0] * len(spans[0]) + [0] * len(spans[1]) + [1] * len(spans[2])


def test_reverse_turns_the_turns_not_the_tokens(tokenizer: Tokenizer) -> None:
    (example,) = encode([[(1, "hello there"), (1, "you")]], tokenizer, 128, reverse=True)
    assert list(example.ids) == [
        *tokenizer.encode("you"),
        tokenizer.eos_id,
        *tokenizer.encode("hello there"),
        tokenizer.eos_id,
    ]


def test_long_dialogues_are_dropped_or_cut_at_a_turn(tokenizer: Tokenizer) -> None:
    long = [(1, "hello there")] * 20
    turn = len(tokenizer.encode("hello there")) + 1
    assert encode([long], tokenizer, 5 * turn + 1) == []
    (example,) = encode([long], tokenizer, 5 * turn + 1, cut=True)
    assert len(example.ids) == 5 * turn


def test_batches_hold_every_example_once_within_the_budget(tokenizer: Tokenizer) -> None:
    examples = encode([[(1, "hello")] * n for n in range(2, 60)], tokenizer, 128)
    found = batches(examples, 256, seed=1)
    assert sorted(i for batch in found for i in batch) == list(range(len(examples)))
    assert all(len(batch) * max(len(examples[i].ids) for i in batch) <= 256 for batch in found)
    assert batches(examples, 256, seed=1) == found != batches(examples, 256, seed=2)
