"""The corpus is large, valid and survives the way to the model and back; mistakes in it are named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from core.text import normalise, restore
from core.training.corpus import SLOT, CorpusError, Topic, choose, read_corpus
from core.training.slots import SLOTS, is_held_out, names, values


@pytest.fixture(scope="module")
def topics() -> list[Topic]:
    return read_corpus()


def test_the_corpus_is_broad(topics: list[Topic]) -> None:
    exchanges = {(tuple(exchange.person), tuple(exchange.bot)) for topic in topics for exchange in topic.walk()}
    assert len({topic.title for topic in topics}) == len(topics) >= 60
    assert len(exchanges) >= 2000
    follow_ups = len(exchanges) - sum(len(topic.exchanges) for topic in topics)
    assert follow_ups > 0.25 * len(exchanges)


def test_every_reply_comes_back_as_it_was_written(topics: list[Topic]) -> None:
    rng, lost = random.Random(1), []
    for topic in topics:
        for exchange in topic.walk():
            for reply in (whole for text in exchange.bot for whole in choose(text)):
                filled = SLOT.sub(lambda match: rng.choice(SLOTS[match[1]]), reply)
                filled = filled[0].upper() + filled[1:]
                if restore(normalise(filled)) != filled:
                    lost.append((exchange.where, filled, restore(normalise(filled))))
    assert not lost[10:], lost


def test_no_reply_is_long(topics: list[Topic]) -> None:
    words = [len(text.split()) for topic in topics for exchange in topic.walk() for text in exchange.bot]
    assert max(words) <= 45
    assert sum(words) / len(words) < 15


@pytest.mark.parametrize(
    ("lines", "mistake"),
    [
        ("> hi\n< Hello!", "a.txt:1: the first line is the title"),
        ("# A\n> hi\n> ho\n< Hello!", "a.txt:3: a '>' stands where"),
        ("# A\n< Hello!", "a.txt:2: a '<' answers"),
        ("# A\n> hi\n    < Hello!", "a.txt:3: a '<' answers"),
        ("# A\n> hi\n< Hello!\n  > and?\n  < Yes.", "a.txt:4: lines start with"),
        ("# A\n> hi {nobody}\n< Hello!", "a.txt:2: unknown slot {nobody}"),
        ("# A\n> hi\n< Hello; you!", "a.txt:3: ';' does not belong"),
        ("# A\n> hi | \n< Hello!", "a.txt:2: an empty alternative"),
        ("# A\n> hi", "a.txt: the last '>' has no '<'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, lines: str, mistake: str) -> None:
    (tmp_path / "a.txt").write_text(lines, encoding="utf-8")
    with pytest.raises(CorpusError) as raised:
        read_corpus(tmp_path)
    assert mistake in str(raised.value)


def test_an_empty_folder_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no \.txt files"):
        read_corpus(tmp_path)


def test_follow_ups_hang_below_their_exchange(tmp_path: Path) -> None:
    text = "# A\n> a | b\n< A.\n    > c\n    < C.\n        > d\n        < D.\n    > e\n    < E.\n> f\n< F."
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (topic,) = read_corpus(tmp_path)
    assert [exchange.person for exchange in topic.exchanges] == [["a", "b"], ["f"]]
    first = topic.exchanges[0]
    assert [exchange.person[0] for exchange in first.follow_ups] == ["c", "e"]
    assert [exchange.person[0] for exchange in first.walk()] == ["a", "c", "d", "e"]


def test_choices_are_read_in_every_way() -> None:
    assert choose("[oh, /]it's [the/this] one") == [
        "oh, it's the one",
        "oh, it's this one",
        "it's the one",
        "it's this one",
    ]


def test_what_is_held_out_stays_out() -> None:
    for slot in SLOTS:
        assert not set(values(slot, held_out=False)) & set(values(slot, held_out=True))
        assert values(slot, held_out=False)
    assert not set(names(held_out=False)) & set(names(held_out=True))
    assert len(names(held_out=False)) > 4000
    assert all(is_held_out(name) for name in names(held_out=True))
