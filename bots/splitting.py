"""Long text in pieces that a platform takes: cut at paragraphs, lines, sentences or words, code fences kept whole."""

from __future__ import annotations

import re
from typing import Literal

Units = Literal["characters", "utf-16"]

_CUTS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"(?<=[.!?…])[\"')\]]*\s"), re.compile(r"\s"))
_FENCE = re.compile(r"^```[^\n`]*$", re.MULTILINE)
CLOSE = "\n```"


def split(text: str, limit: int, units: Units = "characters") -> list[str]:
    """Pieces of at most `limit` units (at least 40), none of them blank; nothing but white space is lost between them.

    A code fence that a cut goes through is closed before it and opened again behind it. "utf-16": Telegram counts so.
    """
    pieces: list[str] = []
    rest, opened = text.strip(), ""
    while rest:
        piece = opened + rest
        if size(piece, units) <= limit:
            pieces.append(piece)
            break
        room = limit - size(opened, units) - len(CLOSE)
        end = _cut(rest, room, units)
        piece, rest = opened + rest[:end].rstrip(), rest[end:]
        opened = _open_fence(piece, limit // 2, units)
        pieces.append(piece + CLOSE if opened else piece)
        rest = rest.lstrip("\n" if opened else None)
    return [piece for piece in pieces if piece.strip()]


def size(text: str, units: Units) -> int:
    """Length as the platform counts it."""
    return len(text) if units == "characters" else len(text) + sum(char > "\uffff" for char in text)


def _cut(text: str, room: int, units: Units) -> int:
    """Where to cut: the last good place in the second half of what fits, the best kind first; else in mid-word."""
    end = min(len(text), room)
    while size(text[:end], units) > room:
        end -= max(1, (size(text[:end], units) - room) // 2)
    for kind in _CUTS:
        places = [match.end() for match in kind.finditer(text, 0, end)]
        if places and places[-1] >= end // 2:
            return places[-1]
    return max(1, end)


def _open_fence(piece: str, longest: int, units: Units) -> str:
    """The line that opened a fence which `piece` does not close, with its line break; "" when all are closed."""
    fences = _FENCE.findall(piece)
    return f"{fences[-1]}\n" if len(fences) % 2 and size(fences[-1], units) < longest else ""
