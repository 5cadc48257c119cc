"""Reads the conversations in core/training/corpus/*.txt.

    # Title
    > what the person says | another way to say it
    < what the bot replies | another reply
        > a follow-up, four spaces deeper, up to three levels
        < its replies

`[a/b/]` is a choice, `{food}` a slot that keeps one value within a dialogue, `{food2}` a second, different value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from core.training.slots import SLOTS

FOLDER = Path(__file__).parent / "corpus"
SLOT = re.compile(r"\{([a-z_]+)(2?)\}")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ODD = re.compile(r"[^A-Za-z0-9()\[\]:,.!?'\"{}/_ ]|[\[\]/](?![^\[\]]*\])(?!\])")
MAX_DEPTH = 3


class CorpusError(ValueError):
    """Every mistake found, one per line: file, line number, what is wrong."""


@dataclass(slots=True)
class Exchange:
    """What a person may say, what the bot may reply, and what may come next."""

    person: list[str]
    bot: list[str]
    follow_ups: list[Exchange] = field(default_factory=list)
    where: str = ""

    def walk(self) -> Iterator[Exchange]:
        yield self
        for follow_up in self.follow_ups:
            yield from follow_up.walk()


@dataclass(slots=True)
class Topic:
    title: str
    exchanges: list[Exchange]

    def walk(self) -> Iterator[Exchange]:
        for exchange in self.exchanges:
            yield from exchange.walk()


def read_corpus(folder: Path = FOLDER) -> list[Topic]:
    """Every topic, by file name. CorpusError names each mistake."""
    mistakes: list[str] = []
    topics = [_read_topic(file, mistakes) for file in sorted(folder.glob("*.txt"))]
    if not topics:
        mistakes.append(f"{folder}: no .txt files")
    if mistakes:
        raise CorpusError("\n".join(mistakes))
    return topics


def _read_topic(file: Path, mistakes: list[str]) -> Topic:
    lines = file.read_text(encoding="utf-8").splitlines()
    topic = Topic(lines[0].removeprefix("# ") if lines else "", [])
    if not lines or not lines[0].startswith("# "):
        mistakes.append(f"{file.name}:1: the first line is the title, '# Title'")
    open_at: list[Exchange] = []  # the exchange under way at each depth
    asked: tuple[int, list[str]] | None = None
    for number, line in enumerate(lines[1:], start=2):
        where = f"{file.name}:{number}"
        body = line.lstrip(" ")
        depth, odd = divmod(len(line) - len(body), 4)
        if not body or body.startswith("#"):
            continue
        texts = [part.strip() for part in body[2:].split("|")]
        mistakes += [f"{where}: {wrong}" for text in texts if (wrong := _wrong(text))]
        if odd or depth > MAX_DEPTH or body[:2] not in ("> ", "< "):
            mistakes.append(f"{where}: lines start with '> ' or '< ', indented by 0, 4, 8 or 12 spaces")
        elif body[0] == ">":
            if asked or depth > len(open_at):
                mistakes.append(f"{where}: a '>' stands where a '<' or less indentation was due")
            asked = depth, texts
        elif asked is None or asked[0] != depth:
            mistakes.append(f"{where}: a '<' answers the '>' right above it, equally indented")
        else:
            exchange = Exchange(asked[1], texts, where=where)
            siblings = open_at[depth - 1].follow_ups if depth and depth <= len(open_at) else topic.exchanges
            siblings.append(exchange)
            open_at[depth:] = [exchange]
            asked = None
    if asked:
        mistakes.append(f"{file.name}: the last '>' has no '<'")
    return topic


def _wrong(text: str) -> str:
    bare = _CHOICE.sub(lambda m: m.group(1).replace("/", ""), text)
    unknown = [name for name, _ in SLOT.findall(text) if name not in SLOTS]
    if unknown:
        return f"unknown slot {{{unknown[0]}}}"
    odd = re.search(r"[^A-Za-z0-9():,.!?'\" ]", SLOT.sub("", bare))
    if odd:
        return f"{odd.group()!r} does not belong in a text"
    return "" if text else "an empty alternative"


def choose(text: str, pick: Iterator[int] | None = None, *, index: int = 0) -> list[str]:
    """Every reading of the `[a/b]` choices in `text`."""
    match = _CHOICE.search(text)
    if not match:
        return [" ".join(text.split())]
    head, tail = text[: match.start()], text[match.end() :]
    return [whole for part in match.group(1).split("/") for whole in choose(head + part + tail)]
