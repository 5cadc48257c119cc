"""Guesses how a reply goes on, from what was said after the same three tokens before. Pure Python, no torch.

A guess is run in the step of the token it follows, whose reading of the weights it shares, and counts only where the
draw says the same (speculative decoding by lookup): it changes the cost of a reply, never the reply.
"""

from __future__ import annotations

from collections.abc import Sequence

CONTEXT = 3
MOST = 1 << 16
"""Contexts that are remembered."""
PROBE = 64
"""While guesses are bad, one of so many is made nevertheless, to see whether that is still so."""


class Phrases:
    def __init__(self, price: float = 0.0) -> None:
        """`price`: what the rows of a guess make a step longer, as a share of a step without. Guesses that are right
        less often than that do not pay."""
        self.price = price
        self._next: dict[tuple[int, ...], int] = {}
        """What followed last, oldest first."""
        self.right = 1.0
        """Right tokens per guess, lately."""
        self._chances = 0

    def learn(self, ids: Sequence[int]) -> None:
        """Remember what was said."""
        for i in range(CONTEXT, len(ids)):
            context = tuple(ids[i - CONTEXT : i])
            self._next.pop(context, None)
            self._next[context] = ids[i]
        while len(self._next) > MOST:
            del self._next[next(iter(self._next))]

    def after(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`."""
        said = list(ids[-CONTEXT:])
        while len(said) < CONTEXT + most and (token := self._next.get(tuple(said[-CONTEXT:]))) is not None:
            said.append(token)
        guess = said[CONTEXT:]
        if guess and self.right < self.price:
            self._chances += 1
            return [] if self._chances % PROBE else guess
        return guess

    def judge(self, right: int) -> None:
        """So many tokens of a guess were right."""
        self.right += 0.1 * (right - self.right)

    def clear(self) -> None:
        self._next.clear()
