"""From the corpus to dialogues: choices made, slots filled, typing slips added, topics chained, memory tested.

`Expander(topics).chain(rng)` is one dialogue, a list of `Said`. The same seed gives the same dialogue. Turns carry a
loss weight of 0 or 1: the bot's always 1, the person's only where cleanly typed, so that slips are understood and
never learnt.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Literal

from core.text import normalise
from core.training import memory, slips
from core.training.corpus import SLOT, Exchange, Topic, choose
from core.training.memory import Fact
from core.training.slots import PROPER, SLOTS, names, values

Kind = Literal["name", "made-up name", "like"]
"""What `recall` tells and asks for."""
EVERYDAY = frozenset(
    ("greetings", "how_are_you", "goodbyes", "thanks_and_sorry", "agreement_and_fillers", "about_the_bot", "smalltalk")
)
"""Topics met in every talk: drawn twice as often."""


@dataclass(frozen=True, slots=True)
class Said:
    weight: int
    text: str
    """In the model's spelling."""


@lru_cache(maxsize=500_000)
def _spelled(text: str) -> str:
    return normalise(text)


def spelled(text: str) -> str:
    return _spelled(" ".join(text.split()))


@dataclass
class Told:
    """What the person has told so far in one dialogue."""

    facts: dict[str, tuple[Fact, str]] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    """Words of this dialogue that are no facts: what kind of pet, which relative."""
    lower: bool = False
    """This person types without capitals."""

    def likes(self) -> list[str]:
        return [value for fact, value in self.facts.values() if fact in memory.FAVORITES]


class Expander:
    """`held_out` swaps in the values, and the wordings of the person, that training never sees."""

    def __init__(self, topics: Iterable[Topic], *, held_out: bool = False) -> None:
        self.held_out = held_out
        self.openers = [exchange for topic in topics for exchange in topic.exchanges]
        self._slots = [self._slots_of(exchange) for exchange in self.openers]
        often = [2 if exchange.where.split(".")[0] in EVERYDAY else 1 for exchange in self.openers]
        self._often = list(accumulate(often))

    def chain(self, rng: random.Random, words: int) -> list[Said]:
        """Dialogues of 2 to 8 turns, one after the other, `words` long or a little more."""
        said: list[Said] = []
        told = Told(lower=rng.random() < 0.35)
        remembers = rng.random() < 0.4
        while sum(len(turn.text.split()) for turn in said) < words:
            if remembers and rng.random() < 0.5:
                said += self._remember(rng, told)
            else:
                said += self._talk(rng, told, at_most=2 if remembers else 4)
        return said[1:] if rng.random() < 0.15 and len(said) > 3 else said

    def drill(self, rng: random.Random, words: int) -> list[Said]:
        """Only telling, asking and saying after: what teaches a young model to copy."""
        said: list[Said] = []
        told = Told(lower=rng.random() < 0.35)
        while sum(len(turn.text.split()) for turn in said) < words:
            said += self._repeat(rng, told) if rng.random() < 0.2 else self._remember(rng, told)
        return [Said(index % 2, turn.text) for index, turn in enumerate(said)]

    def _repeat(self, rng: random.Random, told: Told) -> list[Said]:
        words = " ".join(rng.choice(self._words(rng)) for _ in range(rng.choice((1, 1, 2, 3, 4, 6))))
        filled = {"w": words.lower() if told.lower else words}
        return self._pair(rng, rng.choice(memory.REPEAT), rng.choice(memory.REPEATED), filled, told)

    @staticmethod
    def _words(rng: random.Random) -> tuple[str, ...]:
        slot = rng.choice(("food", "animal", "color", "city", "name", "name", "job", "music", "invented", "invented"))
        return names(held_out=False) if slot == "invented" else values(slot, held_out=False)

    def recall(self, rng: random.Random, kind: Kind, distance: int) -> tuple[list[str], str]:
        """Turns that end with a question about something told `distance` exchanges before, and the answer."""
        told, fact = Told(), memory.NAME
        while kind == "like" and not _told_values(fact := rng.choice(memory.FAVORITES), self.held_out):
            pass
        value = rng.choice(
            names(held_out=self.held_out) if kind == "made-up name" else _told_values(fact, self.held_out)
        )
        told.facts[fact.noun] = (fact, value)
        turns = self._pair(rng, rng.choice(fact.tell), rng.choice(fact.acknowledge), {"v": value}, told)
        for _ in range(distance - 1):
            turns += self._talk(rng, told, at_most=1)
        turns += self._pair(rng, rng.choice(fact.ask), "", {"v": value}, told)
        return [turn.text for turn in turns[:-1]], spelled(value)

    def _talk(self, rng: random.Random, told: Told, at_most: int) -> list[Said]:
        """One walk down from an opener, away from what was told."""
        avoid = {fact.slot for fact, _ in told.facts.values()}
        for _ in range(20):
            index = bisect(self._often, rng.randrange(self._often[-1]))
            if not self._slots[index] & avoid:
                break
        exchange, filled, said = self.openers[index], dict(self._fill(rng, told)), []
        for depth in range(at_most):
            said += self._pair(rng, self._wording(rng, exchange), rng.choice(exchange.bot), filled, told)
            if not exchange.follow_ups or rng.random() > (0.8 if depth == 0 else 0.9):
                break
            exchange = rng.choice(exchange.follow_ups)
        return said

    def _wording(self, rng: random.Random, exchange: Exchange) -> str:
        """One way for the person to say it; one in ten exchanges keeps its last wording out of training."""
        if len(exchange.person) < 4 or hash_of(exchange.where) % 10:
            return rng.choice(exchange.person)
        return exchange.person[-1] if self.held_out else rng.choice(exchange.person[:-1])

    def _remember(self, rng: random.Random, told: Told) -> list[Said]:
        """Something told, changed, asked for, or asked for in vain."""
        draw = rng.random()
        if told.facts and draw < 0.55:
            return self._asked(rng, told)
        if told.facts and draw < 0.61:
            return self._tell(rng, told, rng.choice(list(told.facts.values()))[0], change=True)
        if draw < 0.66:
            return self._pair(rng, rng.choice(memory.YOUR_NAME), rng.choice(memory.MY_NAME), {}, told)
        fact = self._some_fact(rng)
        if fact.noun in told.facts:
            return self._asked(rng, told)
        if draw < 0.71 and not any(could_be(fact, *like) for like in told.facts.values()):
            return self._asked_in_vain(rng, told, fact)
        if draw < 0.76 and "name" not in told.facts and not told.likes():
            return self._two_at_once(rng, told)
        return self._tell(rng, told, fact)

    def _some_fact(self, rng: random.Random) -> Fact:
        if rng.random() < 0.6:
            return rng.choice(memory.FAVORITES)
        kinds = [memory.NAME, memory.CITY, memory.PET, memory.FRIEND, memory.MOOD, memory.JOB, memory.AGE]
        return rng.choices(kinds, (6, 2, 2, 1, 2, 1, 1))[0]

    def _tell(self, rng: random.Random, told: Told, fact: Fact, *, change: bool = False) -> list[Said]:
        value = self._value(rng, told, fact)
        told.facts.pop(fact.noun, None)
        told.facts[fact.noun] = (fact, value)
        return self._pair(
            rng, rng.choice(fact.change if change else fact.tell), rng.choice(fact.acknowledge), {"v": value}, told
        )

    def _two_at_once(self, rng: random.Random, told: Told) -> list[Said]:
        like = rng.choice(memory.FAVORITES)
        for fact in (memory.NAME, like):
            told.facts[fact.noun] = (fact, self._value(rng, told, fact))
        filled = {"name": told.facts["name"][1], "like": told.facts[like.noun][1]}
        return self._pair(rng, rng.choice(memory.TWO_AT_ONCE), rng.choice(memory.TWO_NOTED), filled, told)

    def _asked(self, rng: random.Random, told: Told) -> list[Said]:
        fact, value = rng.choice(list(told.facts.values()))
        if "name" in told.facts and rng.random() < 0.2:
            fact, value = told.facts["name"]
        ask, answer = rng.choice(fact.ask), rng.choice(fact.answer)
        filled, likes = {"v": value}, told.likes()
        if len(likes) == 1 and value == likes[0] and rng.random() < 0.35:
            ask, answer = rng.choice(memory.WHAT_I_LIKE), rng.choice(memory.LIKE_ANSWERS)
        elif len(likes) == 1 and "name" in told.facts and rng.random() < 0.2:
            ask, answer = rng.choice(memory.ABOUT_ME), rng.choice(memory.ABOUT_YOU)
            filled = {"name": told.facts["name"][1], "like": likes[0]}
        said = self._pair(rng, ask, answer, filled, told)
        if rng.random() < 0.2:
            said += self._pair(rng, rng.choice(memory.RIGHT), rng.choice(memory.PLEASED), {}, told)
        return said

    def _asked_in_vain(self, rng: random.Random, told: Told, fact: Fact) -> list[Said]:
        if not told.facts and rng.random() < 0.1:
            ask, answer, fact = rng.choice(memory.ABOUT_ME), rng.choice(memory.ABOUT_NOBODY), memory.NAME
        else:
            ask, answer = rng.choice(fact.ask), rng.choice(fact.unknown)
        said = self._pair(rng, ask, answer, {}, told)
        if rng.random() < 0.7:
            value = self._value(rng, told, fact)
            told.facts[fact.noun] = (fact, value)
            said += self._pair(rng, rng.choice(fact.bare), rng.choice(fact.acknowledge), {"v": value}, told)
        return said

    def _value(self, rng: random.Random, told: Told, fact: Fact) -> str:
        value = fact.value(rng, held_out=False)
        return value.lower() if told.lower and fact.slot in PROPER else value

    def _pair(self, rng: random.Random, person: str, bot: str, filled: dict[str, str], told: Told) -> list[Said]:
        """What the person says, now and then mistyped, and the bot's reply."""
        person, bot = rng.choice(choose(person)), rng.choice(choose(bot))
        slipped = person if self.held_out else slips.mistype(rng, person)
        weight = int(slipped == person and rng.random() < 0.25)
        filler = self._filler(rng, filled, told)
        asked = SLOT.sub(filler, slipped)
        if told.lower:
            asked = asked.lower()
        return [Said(weight, spelled(asked) or "hm"), Said(1, spelled(SLOT.sub(filler, bot)))]

    def _fill(self, rng: random.Random, told: Told) -> dict[str, str]:
        return {slot: value for slot, (_, value) in told.facts.items() if slot == "name"}

    def _filler(self, rng: random.Random, filled: dict[str, str], told: Told) -> Callable[..., str]:
        """Fills one slot, the same way each time within a dialogue."""
        told.fixed.setdefault("pet", rng.choice(SLOTS["pet"]))
        told.fixed.setdefault("kin", rng.choice(memory.KIN))

        def fill(match: object) -> str:
            slot, second = match.group(1), match.group(2)  # type: ignore[attr-defined]
            key = slot + second
            if key == "kin" or (key == "pet" and "v" in filled):
                return told.fixed[key]
            if key not in filled:
                used = filled.get(slot if second else slot + "2")
                filled[key] = self._slot_value(rng, slot, used, told)
            return filled[key]

        return fill

    def _slot_value(self, rng: random.Random, slot: str, used: str | None, told: Told) -> str:
        pool = values(slot, held_out=False)
        if slot == "name" and rng.random() < 0.5:
            pool = names(held_out=False)
        value = rng.choice([v for v in rng.sample(pool, 2) if v.lower() != (used or "").lower()])
        return value.lower() if told.lower and slot in PROPER else value

    @staticmethod
    def _slots_of(exchange: Exchange) -> set[str]:
        texts = [text for part in exchange.walk() for text in (*part.person, *part.bot)]
        return {slot for text in texts for slot, _ in SLOT.findall(text)}


def hash_of(text: str) -> int:
    return sum((index + 1) * ord(char) for index, char in enumerate(text))


def could_be(asked: Fact, told: Fact, value: str) -> bool:
    """Whether someone asked for `asked` may well answer with this value: swimming is a hobby too, and what a made-up
    word is, nobody knows."""
    if asked not in memory.FAVORITES or told not in memory.FAVORITES:
        return False
    return value.lower() in _known(asked) or value.lower() not in _known(told)


def _known(fact: Fact) -> set[str]:
    return {value.lower() for value in _told_values(fact, held_out=False)}


def _told_values(fact: Fact, held_out: bool) -> list[str]:
    """What training may, or may not, put into `fact`, spelled as it is told."""
    known = values(fact.slot, held_out=held_out)
    return [memory.plural(value) if fact.slot in ("animal", "fruit") else value for value in known]
