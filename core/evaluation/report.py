"""All figures of one model as a page of Markdown: what `palaver eval` prints and a model card holds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import asdict

from core.evaluation.recall import recall
from core.evaluation.selfchat import Talker, health, read_openers, self_chats
from core.training.expand import Kind
from core.voice import Voice

KINDS: tuple[Kind, ...] = ("name", "like", "made-up name")


async def evaluate(
    voice: Voice, *, chats: int = 50, cases: int = 200, tell: Callable[[str], None] = lambda line: None
) -> AsyncIterator[str]:
    """The page's lines, each as soon as it is known: who ends it early keeps what is through.

    `chats` self-chats of 30 turns; `cases` questions per distance, for values of Palaver's corpus, which the embedded
    model was trained on, and for others. `tell` hears what is being measured.
    """
    talker = Talker(voice)
    yield _settings(voice)
    yield ""
    yield "| recalled, told N exchanges earlier | 1 | 2 | 3 | 4 |"
    yield "|---|---|---|---|---|"
    for kind in KINDS:
        for held_out in (False, True):
            who = f"{kind}, {'not ' if held_out else ''}in Palaver's corpus"
            tell(f"recall of a {who}")
            found = [await recall(talker, kind, distance, cases, held_out=held_out) for distance in (1, 2, 3, 4)]
            yield f"| {who} | " + " | ".join(_share(one.right, one.asked) for one in found) + " |"
    yield ""
    yield f"| {chats} self-chats of 30 turns | |"
    yield "|---|---|"
    tell(f"{chats} self-chats of 30 turns")
    for name, value in (await _health(talker, chats)).items():
        yield f"| {name} | {value} |"


async def first_replies(voice: Voice) -> list[tuple[str, str]]:
    """Each of the 200 openers with the reply a stranger would read."""
    talker = Talker(voice)
    replies = []
    for number, opener in enumerate(read_openers()):
        replies.append((opener, voice.restore(await talker.reply([voice.spelled(opener) or "?"], number))))
    return replies


def _settings(voice: Voice) -> str:
    info = voice.engine.info
    drawn = ", ".join(f"{name} {value}" for name, value in asdict(voice.params).items() if name != "seed")
    spelling = "" if voice.spaced else " Texts as people spell them."
    window = f"{voice.window.budget} tokens of history, keep {voice.window.keep:g}"
    return f"Model {info.name}: {info.how}. Sampling: {drawn}; {window}.{spelling}"


async def _health(talker: Talker, chats: int) -> dict[str, str]:
    found = health(await self_chats(talker, chats))
    return {
        "talks that fell silent": f"{found.silent} of {chats}",
        "replies": f"{found.replies}",
        "equal to the same side's previous reply": _share(found.repeated, found.replies),
        "equal to anything it said before": _share(found.said_before, found.replies),
        "length, words": f"{found.length:.1f}",
        "change of length per turn, words": f"{found.length_slope:+.3f}",
        "ENT-4 / DIST-1 / DIST-2": f"{found.ent4:.2f} / {found.dist1:.1%} / {found.dist2:.1%}",
    }


def _share(count: int, whole: int) -> str:
    return f"{count / whole:.1%} ({count} of {whole})"
