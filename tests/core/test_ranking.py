from __future__ import annotations

from dataclasses import replace

from core.engine.base import Completion, FinishReason
from core.messages import Turn
from core.ranking import choose, stale


def completion(logprob: float, length: int = 1, reason: FinishReason = "stop") -> Completion:
    return Completion([1] * length, logprob, reason, 0)


def test_the_likeliest_per_token_wins() -> None:
    assert choose([completion(-2), completion(-1), completion(-3)], ["a", "b", "c"], []) == (1, True)
    assert choose([completion(-2, 1), completion(-3, 5)], ["a", "b"], []) == (1, True)


def test_what_was_just_said_loses_to_anything_new() -> None:
    assert choose([completion(-1), completion(-9)], ["Why ?", "I see ."], ["why?"]) == (1, True)
    assert choose([completion(-1)], ["why ?"], ["Why?"]) == (0, False)
    assert choose([completion(-1), completion(-5)], [" . ", "hm"], []) == (1, True)


def test_what_was_cut_off_loses_to_what_ended_but_not_to_a_repetition() -> None:
    found = [completion(-1, 64, "length"), completion(-9, 3)]
    assert choose(found, ["ha ha ha", "that is funny ."], []) == (1, True)
    assert choose(found, ["ha ha ha", "that is funny ."], ["That is funny."]) == (0, True)


def test_the_reverse_model_decides_among_what_is_new_and_ended() -> None:
    found = [replace(completion(-1), score=-4.0), replace(completion(-5), score=-2.0)]
    assert choose(found, ["i do not know .", "by the sea ."], []) == (1, True)
    assert choose(found, ["i do not know .", "by the sea ."], ["By the sea!"]) == (0, True)
    cut = [found[0], replace(completion(-5, 64, "length"), score=-1.0)]
    assert choose(cut, ["i do not know .", "the sea the sea"], []) == (0, True)


def talk(*texts: str) -> list[Turn]:
    return [Turn("assistant" if i % 2 else "user", "", text, i) for i, text in enumerate(texts)]


def test_whatever_the_bot_has_said_is_old_but_the_answer_to_the_same_question() -> None:
    talked = talk("my name?", "Anna .", *(f"{word} {i}" for i in range(5) for word in ("and", "so")), "weather?")
    assert set(stale(talked)) == {"Anna .", *(f"so {i}" for i in range(5))}
    again = [*talked[:-1], talk("My name!")[0]]
    assert set(stale(again)) == {f"so {i}" for i in range(5)}
    assert set(stale(talk("my name?", "Anna .", "my name?"))) == {"Anna ."}  # but not over and over
