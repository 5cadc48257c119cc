from __future__ import annotations

from core.engine.base import Completion
from core.ranking import choose


def completion(logprob: float, length: int = 1) -> Completion:
    return Completion([1] * length, logprob, "stop", 0)


def test_the_likeliest_per_token_wins() -> None:
    assert choose([completion(-2), completion(-1), completion(-3)], ["a", "b", "c"], []) == (1, True)
    assert choose([completion(-2, 1), completion(-3, 5)], ["a", "b"], []) == (1, True)


def test_what_was_just_said_loses_to_anything_new() -> None:
    assert choose([completion(-1), completion(-9)], ["Why ?", "I see ."], ["why?"]) == (1, True)
    assert choose([completion(-1)], ["why ?"], ["Why?"]) == (0, False)
    assert choose([completion(-1), completion(-5)], [" . ", "hm"], []) == (1, True)
