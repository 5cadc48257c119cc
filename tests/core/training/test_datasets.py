"""Dialogues from TSV and JSONL, and what of them is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.tokenizer import Tokenizer
from core.training.datasets import BadData, Tally, batches, encode, read_dialogues, write_tsv
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
        ("a.jsonl", '["hi", 5]'),
        ("a.jsonl", '["hi", null]'),
        ("a.jsonl", "[1, 2]"),
        ("a.jsonl", '[{"text": 5}, "x"]'),
        ("a.jsonl", '["x", {"text": "hi", "weight": "much"}]'),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}'),
        ("a.jsonl", "[" * 100_000),
    ],
)
def test_bad_lines_are_named_with_what_they_should_be(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / name).write_text("\n" + line + "\n")
    for normalised in (True, False):
        with pytest.raises(BadData, match=f"{name}:2: a line is .*, for example.*hello ?, who"):
            list(read_dialogues(tmp_path / name, normalised=normalised))


def test_the_examples_in_complaints_can_be_read(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.tsv"):
        (tmp_path / name).write_text("?\n")
        with pytest.raises(BadData) as complaint:
            list(read_dialogues(tmp_path / name))
        (tmp_path / name).write_text(str(complaint.value).split("for example")[1].strip(": "))
        assert list(read_dialogues(tmp_path / name)) == [[(1, "hi !"), (1, "hello , who is there ?")]]


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'["hi", "ho"]\n["caf\xe9", "ho"]\n')
    with pytest.raises(BadData, match=r"a.jsonl:2: bytes that are no UTF-8"):
        list(read_dialogues(tmp_path / "a.jsonl"))


def test_what_windows_writes_is_read(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_bytes('\ufeff["hi", "ho"]\r\n\ufeff["a", "b"]\r\n\ufeff'.encode())
    assert list(read_dialogues(tmp_path / "A.JSONL")) == [[(1, "hi"), (1, "ho")], [(1, "a"), (1, "b")]]


@pytest.mark.parametrize("name", ["talks.html", "talks.txt", "talks"])
def test_other_files_are_refused_by_their_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('["hi", "ho"]\n')
    with pytest.raises(BadData, match=f"{name}: dialogues come as .jsonl or .tsv"):
        list(read_dialogues(tmp_path / name))


def test_texts_stay_as_they_are_where_asked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(["Hi, you!", "naïve  😉"]))
    assert list(read_dialogues(tmp_path / "a.jsonl", normalised=False)) == [[(1, "Hi, you!"), (1, "naïve 😉")]]


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


def spell(tokenizer: Tokenizer, *texts: str) -> list[int]:
    return [id for text in texts for id in (*tokenizer.encode(text), tokenizer.eos_id)]


def test_long_dialogues_are_split_between_turns_and_every_turn_is_learnt_once(tokenizer: Tokenizer) -> None:
    texts = [f"hello {'there ' * (n % 4)}{n}" for n in range(20)]
    for length in (24, 30, 64):
        tally, found = Tally(), list[int]()
        examples = encode([[(1, text) for text in texts]], tokenizer, length, tally=tally)
        assert len(examples) > 1
        for example in examples:
            assert len(example.ids) <= length and not example.learn[0] and example.learn[-1]
            found += [id for id, learn in zip(example.ids, example.learn, strict=True) if learn]
        assert found == spell(tokenizer, *texts[1:])
        assert tally == Tally(dialogues=1, split=1)


def test_of_a_long_dialogue_only_the_beginning_where_asked(tokenizer: Tokenizer) -> None:
    turn = len(spell(tokenizer, "hello there"))
    (example,) = encode([[(1, "hello there")] * 20], tokenizer, 5 * turn + 1, cut=True)
    assert len(example.ids) == 5 * turn


def test_a_long_question_loses_its_left_and_a_long_answer_is_not_learnt(tokenizer: Tokenizer) -> None:
    long, tally = "hello " * 60 + "you", Tally()
    asked, unlearnt = encode(
        [[(1, long), (1, "how are you")], [(1, "how"), (1, long), (1, "are")]], tokenizer, 32, tally=tally
    )
    answer = spell(tokenizer, "how are you")
    assert list(asked.ids) == spell(tokenizer, long)[-32 + len(answer) :] + answer
    assert sum(asked.learn) == len(answer)
    assert unlearnt.ids[-2:].tolist() == spell(tokenizer, "are")[-2:]
    assert sum(unlearnt.learn) == len(spell(tokenizer, "are"))
    assert tally == Tally(dialogues=2, long=1)


def test_turns_without_text_are_left_out_and_their_answers_not_learnt(tokenizer: Tokenizer) -> None:
    tally = Tally()
    talk = [(1, "hello"), (1, "how"), (1, ""), (1, "are"), (1, "you")]
    (example,) = encode([talk, [(1, "hello"), (1, "")], [(1, ""), (1, "how")]], tokenizer, 64, tally=tally)
    assert list(example.ids) == spell(tokenizer, "hello", "how", "are", "you")
    learnt = [id for id, learn in zip(example.ids, example.learn, strict=True) if learn]
    assert learnt == spell(tokenizer, "how", "you")
    assert tally == Tally(dialogues=3, empty=2, wordless=3)


def test_batches_hold_every_example_once_within_the_budget(tokenizer: Tokenizer) -> None:
    examples = encode([[(1, "hello")] * n for n in range(2, 60)], tokenizer, 128)
    found = batches(examples, 256, seed=1)
    assert sorted(i for batch in found for i in batch) == list(range(len(examples)))
    assert all(len(batch) * max(len(examples[i].ids) for i in batch) <= 256 for batch in found)
    assert batches(examples, 256, seed=1) == found != batches(examples, 256, seed=2)


def test_every_epoch_has_as_many_batches(tokenizer: Tokenizer) -> None:
    examples = encode([[(1, "hello " * (n % 7)), (1, "you " * (n % 5 + 1))] for n in range(1, 200)], tokenizer, 128)
    assert len({len(batches(examples, 96, seed)) for seed in range(30)}) == 1
