"""Guesses how a reply goes on. Pure Python, no torch.

A guess is run in the step of the token it follows, whose reading of the weights it shares, and counts only where the
draw says the same (speculative decoding: Leviathan et al. 2023, "Fast inference from transformers via speculative
decoding", with draws that are a function of seed and position): it changes the cost of a reply, never the reply.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Ids

from core.engine.sequence import Sequence

CONTEXT = 3
MOST_CONTEXTS = 1 << 16
"""Contexts that are remembered."""
PROBE = 64
"""While guesses are bad, one of so many is made nevertheless, to see whether that is still so."""


class Guesses(ABC):
    """Somebody who guesses, and how well."""

    def __init__(self, price: float = 0.0) -> None:
        """`price`: what a guessed token makes a step longer, as a share of a step without. Where fewer of them are
        right, guesses do not pay."""
        self.price = price
        self.right = 1.0
        """The share of guessed tokens that were right, lately."""
        self._chances = 0

    @abstractmethod
    def after(self, sequence: Sequence, most: int) -> list[int]:
        """Up to `most` tokens that may come next."""

    def pays(self) -> bool:
        """Is the next guess worth its price, or made to see whether it would be?"""
        if self.right >= self.price:
            return True
        self._chances += 1
        return self._chances % PROBE == 0

    def count(self, right: int, guessed: int) -> None:
        """So many tokens of a guess were right."""
        self.right += 0.1 * (right / guessed - self.right)

    @abstractmethod
    def learn(self, ids: Ids[int]) -> None:
        """This was said."""

    @abstractmethod
    def clear(self) -> None:
        """Forget what was said."""


class Phrases(Guesses):
    """What was said after the same three tokens before (lookup)."""

    def __init__(self, price: float = 0.0) -> None:
        super().__init__(price)
        self._next: dict[tuple[int, ...], int] = {}
        """What followed last, oldest first."""

    def learn(self, ids: Ids[int]) -> None:
        for i in range(CONTEXT, len(ids)):
            context = tuple(ids[i - CONTEXT : i])
            self._next.pop(context, None)
            self._next[context] = ids[i]
        while len(self._next) > MOST_CONTEXTS:
            del self._next[next(iter(self._next))]

    def after(self, sequence: Sequence, most: int) -> list[int]:
        said = sequence.tokens[-CONTEXT:]
        while len(said) < CONTEXT + most and (token := self._next.get(tuple(said[-CONTEXT:]))) is not None:
            said.append(token)
        guess = said[CONTEXT:]
        return guess if guess and self.pays() else []

    def clear(self) -> None:
        self._next.clear()
