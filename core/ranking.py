"""Choose among candidates: first those that say something new, then those that came to their end, then the one after
which the reverse model finds the message likeliest, or without such a model the likeliest per token. (A reply that runs
in a circle until it is cut off is the likeliest of all.)"""

from __future__ import annotations

from collections.abc import Sequence

from core.engine.base import Completion


def choose(completions: Sequence[Completion], said: Sequence[str], recent: Sequence[str]) -> tuple[int, bool]:
    """(index of the best candidate, whether it is new and not blank). `said`: their texts; `recent`: the bot's last."""
    old = {_core(text) for text in (*recent, "")}

    def score(index: int) -> tuple[bool, bool, float]:
        completion = completions[index]
        ended = completion.finish_reason == "stop"
        likely = completion.logprob / (len(completion.token_ids) + 1)
        return (
            _core(said[index]) not in old,
            ended,
            likely if completion.reverse_logprob is None else completion.reverse_logprob,
        )

    best = max(range(len(completions)), key=score)
    return best, score(best)[0]


def _core(text: str) -> str:
    """Letters and digits only: "Why?" repeats "why"."""
    return "".join(char for char in text.casefold() if char.isalnum())
