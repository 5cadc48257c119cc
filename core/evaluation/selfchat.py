"""The model talks to itself for 30 turns. What goes wrong in long talks shows: empty, repeated, shorter replies."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.evaluation.metrics import distinct, entropy, mean_length, slope
from core.messages import Turn
from core.voice import Voice

OPENERS = Path(__file__).parent / "openers.txt"
"""200 things a stranger may say first."""


@dataclass(frozen=True, slots=True)
class Health:
    """Lengths in words."""

    replies: int
    silent: int
    """Talks that an empty reply ended."""
    repeated: int
    """Replies equal to what the same side said the turn before."""
    said_before: int
    """Equal to anything that side said before in this talk."""
    length: float
    length_slope: float
    """Words per turn; below 0 the replies dry up."""
    ent4: float
    dist1: float
    dist2: float


def read_openers() -> list[str]:
    return OPENERS.read_text(encoding="utf-8").splitlines()


class Talker:
    """Continues talks given as plain texts, in the model's spelling, as the bots do: what repeats is drawn again."""

    def __init__(self, voice: Voice) -> None:
        self.voice = voice

    async def reply(self, texts: Sequence[str], seed: int) -> str:
        """What comes after `texts`, oldest first, the last of them to be answered."""
        turns = [
            Turn("assistant" if (len(texts) - i) % 2 == 0 else "user", "", text, i) for i, text in enumerate(texts)
        ]
        spoken = await self.voice.speak(turns, seed=seed)
        return spoken[0] if spoken else ""


async def self_chat(talker: Talker, opener: str, seed: int, turns: int = 30) -> list[str]:
    """`turns` texts after the opener, both sides by the model; an empty one ends the talk."""
    texts = [talker.voice.spelled(opener)]
    for turn in range(turns):
        texts.append(await talker.reply(texts, seed * 1000 + turn))
        if not texts[-1]:
            break
    return texts


def health(talks: Sequence[Sequence[str]]) -> Health:
    """Over all texts but the openers."""
    spoken = [text for talk in talks for text in talk[1:]]
    again = before = 0
    for talk in talks:
        for i in range(1, len(talk)):
            own = talk[i % 2 : i : 2]
            again += bool(own) and talk[i] == own[-1]
            before += talk[i] in own
    rows = [[len(talk[i].split()) for talk in talks if i < len(talk)] for i in range(1, max(map(len, talks)))]
    return Health(
        replies=len(spoken),
        silent=sum(not text for text in spoken),
        repeated=again,
        said_before=before,
        length=mean_length(spoken),
        length_slope=slope([sum(row) / len(row) for row in rows]),
        ent4=entropy(spoken, 4),
        dist1=distinct(spoken, 1),
        dist2=distinct(spoken, 2),
    )


async def self_chats(talker: Talker, count: int, *, turns: int = 30, seed: int = 1) -> list[list[str]]:
    """`count` talks from the list of openers, 16 side by side."""
    openers, gate = read_openers(), asyncio.Semaphore(16)

    async def one(number: int) -> list[str]:
        async with gate:
            return await self_chat(talker, openers[number % len(openers)], seed + number, turns)

    return list(await asyncio.gather(*(one(number) for number in range(count))))
