"""Dialogues made from the corpus: the same from the same seed, true to what was told."""

from __future__ import annotations

import random

import pytest

from core.evaluation.report import KINDS
from core.text import normalise, restore
from core.training import memory, slips
from core.training.corpus import read_corpus
from core.training.expand import Expander, Kind, could_be, spelled
from core.training.slots import is_held_out


@pytest.fixture(scope="module")
def expander() -> Expander:
    return Expander(read_corpus())


@pytest.fixture(scope="module")
def unseen() -> Expander:
    return Expander(read_corpus(), held_out=True)


def test_the_same_seed_gives_the_same_dialogue(expander: Expander) -> None:
    first, again, other = (expander.chain(random.Random(seed), 150) for seed in (5, 5, 6))
    assert first == again != other


def test_chains_are_as_long_as_asked(expander: Expander) -> None:
    for seed in range(50):
        assert 30 <= sum(len(turn.text.split()) for turn in expander.chain(random.Random(seed), 60)) < 240


def test_every_turn_is_in_the_models_spelling(expander: Expander) -> None:
    for seed in range(100):
        for turn in expander.chain(random.Random(seed), 100):
            assert turn.text
            assert normalise(turn.text) == turn.text
            assert "{" not in turn.text


def test_drills_only_tell_ask_and_repeat(expander: Expander) -> None:
    for seed in range(50):
        said = expander.drill(random.Random(seed), 40)
        assert [turn.weight for turn in said] == [0, 1] * (len(said) // 2)
        assert all(normalise(turn.text) == turn.text for turn in said)


def test_dialogues_differ(expander: Expander) -> None:
    openings = {tuple(turn.text for turn in expander.chain(random.Random(seed), 40)[:4]) for seed in range(500)}
    assert len(openings) > 480


def test_bots_are_learnt_and_people_sometimes(expander: Expander) -> None:
    weights = [turn.weight for seed in range(200) for turn in expander.chain(random.Random(seed), 100)]
    assert 0.5 < sum(weights) / len(weights) < 0.8


@pytest.mark.parametrize("distance", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_recall_asks_for_what_was_told(expander: Expander, kind: Kind, distance: int) -> None:
    for seed in range(50):
        turns, value = expander.recall(random.Random(seed), kind, distance)
        assert len(turns) == 2 * distance + 1
        assert f" {value} ".lower() in f" {turns[0]} ".lower()
        assert f" {value} ".lower() not in f" {turns[-1]} ".lower()


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_recall_uses_unseen_values(unseen: Expander, kind: Kind) -> None:
    for seed in range(50):
        value = unseen.recall(random.Random(seed), kind, 1)[1]
        assert any(map(is_held_out, (value, value.removesuffix("s"), value.removesuffix("es"))))


def test_facts_have_many_phrasings() -> None:
    for fact in (memory.NAME, memory.CITY, memory.PET, memory.MOOD, memory.JOB, *memory.FAVORITES):
        assert len(fact.tell) >= 7
        assert len(fact.ask) >= 7
        assert len(fact.acknowledge) >= 4
        assert all("{v}" in text for text in (*fact.tell, *fact.answer, *fact.change, *fact.bare))
        assert not any("{v}" in text for text in (*fact.ask, *fact.unknown))


@pytest.mark.parametrize(
    ("one", "many"), [("fox", "foxes"), ("cherry", "cherries"), ("wolf", "wolves"), ("monkey", "monkeys")]
)
def test_plurals(one: str, many: str) -> None:
    assert memory.plural(one) == many


def test_slips_leave_slots_alone() -> None:
    rng = random.Random(3)
    texts = {slips.mistype(rng, "what's your favorite {food}, really?") for _ in range(300)}
    assert len(texts) > 30
    assert all("{food}" in text for text in texts)


def test_replies_read_well_when_restored(expander: Expander) -> None:
    for seed in range(50):
        for turn in expander.chain(random.Random(seed), 60)[1::2]:
            shown = restore(turn.text)
            assert " ," not in shown
            assert " ." not in shown


def test_spelled_ignores_white_space() -> None:
    assert spelled(" hi   there") == "hi there"


def test_nobody_asks_in_vain_for_what_may_have_been_told() -> None:
    told = {fact.noun: fact for fact in memory.FAVORITES}
    assert could_be(told["hobby"], told["sport"], "swimming"), "it is both"
    assert could_be(told["food"], told["animal"], "otrepuk"), "a made-up word may be anything"
    assert not could_be(told["food"], told["city"], "paris")
    assert not could_be(memory.NAME, told["animal"], "otrepuk")
