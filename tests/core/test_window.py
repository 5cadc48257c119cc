"""Whole turns inside a budget, with a start that rarely moves."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import window as window_module
from core.messages import Turn
from core.window import Window

EOS = 0


def encode(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def turns(lengths: list[int], first: int = 0) -> list[Turn]:
    return [
        Turn("user" if i % 2 == 0 else "assistant", "u", " ".join([str(i + 1)] * n), i)
        for i, n in enumerate(lengths, first)
    ]


def test_a_dialogue_is_turns_closed_by_eos() -> None:
    assert Window(encode, EOS, 100).prompt(turns([2, 1, 3])) == [1, 1, 0, 2, 0, 3, 3, 3, 0]


def test_whole_turns_leave_from_the_front() -> None:
    window = Window(encode, EOS, 7, keep=1)
    assert window.prompt(turns([2, 1, 3])) == [2, 0, 3, 3, 3, 0]


def test_an_over_long_turn_loses_its_left() -> None:
    turn = Turn("user", "u", "1 2 3 4 5 6", 0)
    assert Window(encode, EOS, 4).prompt([turn]) == [4, 5, 6, 0]
    assert Window(encode, EOS, 4).prompt([*turns([1]), turn]) == [4, 5, 6, 0]


def test_turns_without_a_token_are_left_out() -> None:
    assert Window(encode, EOS, 9).prompt(turns([1, 0, 1])) == [1, 0, 3, 0]
    assert Window(encode, EOS, 9).prompt(turns([1, 1, 0])) == []
    assert Window(encode, EOS, 9).prompt([]) == []


def test_the_start_stands_at_indices_divisible_by_a_power_of_two() -> None:
    window = Window(encode, EOS, 12, keep=0.5)
    assert window.prompt(turns([1] * 7))[0] == 5  # from 1 on all fits, from 4 on half; of four, one is divisible by 4
    assert window.prompt(turns([1] * 9))[0] == 5
    assert window.prompt(turns([1] * 11))[0] == 9
    assert window.prompt(turns([1, 1, 1, 1, 1, 5, 5]))[0] == 6  # there is no choice: as much as fits
    assert window.prompt(turns([1, 9, 2, 2, 1]))[0] == 3  # the question itself is no start
    assert Window(encode, EOS, 12, keep=0.8).prompt(turns([1] * 7))[0] == 3  # of 1 and 2, the even one
    assert Window(encode, EOS, 12, keep=1).prompt(turns([1] * 7))[0] == 2
    assert Window(encode, EOS, 12, keep=0).prompt(turns([1] * 9))[0] == 5  # of 3 to 7, one is divisible by 4


def test_where_an_exchange_is_missing_the_next_turn_stands_for_it() -> None:
    """One that failed, or was deleted. Else the start would move with every exchange until another is in reach."""
    window, spoken = Window(encode, EOS, 40), turns([1] * 33)
    spoken = [turn for turn in spoken if turn.index not in (8, 9, 16, 17)]
    starts = [window.prompt(spoken[:end])[0] - 1 for end in range(1, len(spoken) + 1, 2)]
    assert starts == [0] * 10 + [10] * 4 + [18]


def test_a_talk_that_fits_is_whole_wherever_it_begins() -> None:
    """After a /reset the indices go on, and a first exchange may be deleted: then it begins at no mark."""
    window, spoken = Window(encode, EOS, 20), turns([1] * 11, first=2)
    assert window.prompt(spoken[:3]) == [3, EOS, 4, EOS, 5, EOS]
    prompts = [window.prompt(spoken[:end]) for end in range(1, 12, 2)]
    assert [prompt[0] for prompt in prompts] == [3, 3, 3, 3, 3, 5]  # at 4, once it does not fit
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(prompts[:5]))
    assert [window.ahead(spoken[:end]) for end in (2, 8, 10)] == [
        window.prompt(spoken[:end])[:-2] for end in (3, 9, 11)
    ]


LENGTHS, BUDGETS, KEPT = st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(2, 40), st.floats(0, 1)


@given(LENGTHS, BUDGETS, KEPT)
def test_never_over_budget_never_half_a_turn_never_without_the_question(
    lengths: list[int], budget: int, keep: float
) -> None:
    spoken = turns(lengths)
    prompt = Window(encode, EOS, budget, keep).prompt(spoken)
    assert len(prompt) <= budget
    whole = [id for turn in spoken for id in ([*encode(turn.text), EOS] if turn.text else [])]
    assert whole[len(whole) - len(prompt) :] == prompt or not lengths[-1]
    if lengths[-1]:
        last = [*encode(spoken[-1].text), EOS]
        assert prompt[-len(last) :] == last[-budget:]
        boundary = len(whole) - len(prompt)
        assert boundary == 0 or whole[boundary - 1] == EOS or len(last) > budget


@given(LENGTHS, BUDGETS, KEPT)
def test_so_much_of_the_budget_is_used_as_is_to_be_kept(lengths: list[int], budget: int, keep: float) -> None:
    spoken = turns(lengths)
    prompt, most = (Window(encode, EOS, budget, share).prompt(spoken) for share in (keep, 1))
    assert min(keep * budget, len(most)) <= len(prompt) <= len(most)


@given(LENGTHS, BUDGETS, KEPT)
def test_ahead_is_the_next_prompts_beginning_when_the_guess_is_right(
    lengths: list[int], budget: int, keep: float
) -> None:
    """The next question is as long as the window's were on average, cut down: then not a token is missing."""
    window, spoken = Window(encode, EOS, budget, keep), turns(lengths[: len(lengths) // 2 * 2])
    ahead = window.ahead(spoken)
    recent = [turn for turn, _ in window._fitting(spoken, budget)]
    asked = [len(encode(t.text)) + bool(t.text) for t in recent if t.role == "user"]
    if not asked:
        assert ahead == []
    elif (mean := sum(asked) // len(asked)) > 1:
        question = Turn("user", "u", " ".join(["7"] * (mean - 1)), len(spoken))
        assert window.prompt([*spoken, question]) == [*ahead, *[7] * (mean - 1), EOS]


def test_older_turns_do_not_change_the_prompt() -> None:
    lengths = [random.Random(1).randint(1, 9) for _ in range(200)]
    window = Window(encode, EOS, 60)
    assert window.prompt(turns(lengths)) == window.prompt(turns(lengths)[-64:])


class Counting:
    """Encodes, and keeps what it was asked."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def __call__(self, text: str) -> list[int]:
        self.encoded.append(text)
        return encode(text)


def test_a_turn_is_encoded_once_and_anew_when_its_text_is_another() -> None:
    count = Counting()
    window, spoken = Window(count, EOS, 60), turns([3] * 9)
    for length in range(1, 10, 2):
        window.prompt(spoken[:length])
        window.ahead(spoken[: length + 1])
    assert count.encoded == [turn.text for turn in spoken]
    edited = [*spoken[:-1], Turn("user", "u", "42", 8)]
    assert window.prompt(edited)[-2:] == [42, EOS]
    assert count.encoded[9:] == ["42"]


def test_the_same_words_of_bot_and_person_are_two_turns() -> None:
    window = Window(encode, EOS, 60, spelled=lambda turn: "1" if turn.role == "user" else "2")
    assert window.prompt([Turn("assistant", "", "7", 1), Turn("user", "u", "7", 2)]) == [2, EOS, 1, EOS]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "REMEMBERED", 5)
    count = Counting()
    window = Window(count, EOS, 8)
    for text in ("1", "2", "3", "4", "5", "1", "6", "1", "2", "9 " * 2000):
        window.ids(Turn("user", "u", text, 0))
    assert count.encoded == ["1", "2", "3", "4", "5", "6", "2", "9 " * 2000]  # the longest unused went first
    assert [len(ids) for ids in window._ids.values()] == [2, 2, 2, 2, 9]
    window.forget()
    assert not window._ids


@pytest.mark.parametrize("budget", [128, 256, 900])
def test_the_start_moves_rarely_however_long_the_window(budget: int) -> None:
    """By a quarter of the budget or more, on average; where all is kept, with every exchange."""
    dice = random.Random(0)
    lengths = [dice.randint(5, 14) for _ in range(1000)]
    spoken = turns(lengths)

    def moves(keep: float) -> int:
        window = Window(encode, EOS, budget, keep)
        starts = [window.prompt(spoken[:end])[0] for end in range(1, len(lengths), 2)]
        return sum(a != b for a, b in itertools.pairwise(starts))

    said = sum(lengths) + len(lengths)
    assert moves(0.5) <= said / (budget / 4)
    assert moves(1) > 450 - budget / 8
