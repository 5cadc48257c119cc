"""Choose among candidates: first those that say something new, then those that came to their end, then the one that
answers best (core/engine/judge.py), or where nobody judged, the likeliest per token. (A reply that runs in a circle
until it is cut off is the likeliest of all.)"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from core.engine.base import Completion
from core.messages import Turn

LAST = 4
"""Lines of the bot that it does not say again, whatever is asked."""


def stale(turns: Sequence[Turn]) -> list[str]:
    """What the bot has said before: its last lines, and of those before them what did not answer what is asked now. (To
    the same question the same answer is right, but not over and over.)"""
    lines = [turn.text for turn in turns if turn.role == "assistant"][-LAST:]
    asked = _core(turns[-1].text)
    others = [turn.text for before, turn in pairwise(turns) if turn.role == "assistant" and _core(before.text) != asked]
    return [*lines, *others]


def choose(completions: Sequence[Completion], said: Sequence[str], old_lines: Sequence[str]) -> tuple[int, bool]:
    """(index of the best candidate, whether it is new and not blank). `said`: their texts; `old_lines`: see `stale`."""
    old = {_core(text) for text in (*old_lines, "")}

    def score(index: int) -> tuple[bool, bool, float]:
        completion = completions[index]
        ended = completion.finish_reason == "stop"
        likely = completion.logprob / (len(completion.token_ids) + 1)
        return (
            _core(said[index]) not in old,
            ended,
            likely if completion.score is None else completion.score,
        )

    best = max(range(len(completions)), key=score)
    return best, score(best)[0]


def _core(text: str) -> str:
    """Letters and digits only: "Why?" repeats "why"."""
    return "".join(char for char in text.casefold() if char.isalnum())
