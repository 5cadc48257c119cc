"""All figures of one model as a page of Markdown: what `palaver eval` prints and a model card holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from core.evaluation.recall import recall
from core.evaluation.selfchat import Talker, health, read_openers, self_chats
from core.training.expand import Kind
from core.voice import Voice

KINDS: tuple[Kind, ...] = ("name", "like", "made-up name")


async def evaluate(
    voice: Voice, *, chats: int = 50, cases: int = 200, tell: Callable[[str], None] = lambda line: None
) -> str:
    """`chats` self-chats of 30 turns; `cases` questions per distance, for values seen in training and not.

    `tell` hears what is being measured.
    """
    talker = Talker(voice)
    lines = [_settings(voice), ""]
    lines += await _recall_table(talker, cases, tell)
    tell(f"{chats} self-chats of 30 turns")
    lines += ["", *await _health_table(talker, chats)]
    return "\n".join(lines)


async def first_replies(voice: Voice) -> list[tuple[str, str]]:
    """Each of the 200 openers with the reply a stranger would read."""
    talker = Talker(voice)
    replies = []
    for number, opener in enumerate(read_openers()):
        replies.append((opener, voice.restore(await talker.reply([voice.spelled(opener) or "?"], number))))
    return replies


def _settings(voice: Voice) -> str:
    drawn = ", ".join(f"{name} {value}" for name, value in asdict(voice.params).items() if name != "seed")
    spelling = "" if voice.spaced else " Texts as people spell them."
    return f"Sampling: {drawn}; {voice.window.budget} tokens of history, stride {voice.window.stride}.{spelling}"


async def _recall_table(talker: Talker, cases: int, tell: Callable[[str], None]) -> list[str]:
    lines = ["| recalled, told N exchanges earlier | 1 | 2 | 3 | 4 |", "|---|---|---|---|---|"]
    for kind in KINDS:
        for held_out in (False, True):
            who = f"{kind}, {'never ' if held_out else ''}seen in training"
            tell(f"recall of a {who}")
            found = [await recall(talker, kind, distance, cases, held_out=held_out) for distance in (1, 2, 3, 4)]
            lines.append(f"| {who} | " + " | ".join(f"{one.share:.1%}" for one in found) + " |")
    return lines


async def _health_table(talker: Talker, chats: int) -> list[str]:
    found = health(await self_chats(talker, chats))
    rows = {
        "replies": f"{found.replies}",
        "empty": f"{found.empty:.1%}",
        "equal to the same side's previous reply": f"{found.repeated:.1%}",
        "equal to anything it said before": f"{found.said_before:.1%}",
        "length, words": f"{found.length:.1f}",
        "change of length per turn, words": f"{found.length_slope:+.3f}",
        "ENT-4 / DIST-1 / DIST-2": f"{found.ent4:.2f} / {found.dist1:.1%} / {found.dist2:.1%}",
    }
    return [
        f"| {chats} self-chats of 30 turns | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
