"""The invariants, from the platforms' ledgers and the journal's file: a list of what is broken, [] when they hold."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from pathlib import Path

from tests.faults.town import Place, Seen, Town

FINAL = {"answered", "shed", "expired", "cancelled", "failed", "heard"}
DELIVERED = {"sent", "abandoned"}


class Ledger:
    """What the journal says, after the process has ended."""

    def __init__(self, file: Path) -> None:
        with contextlib.closing(sqlite3.connect(file)) as database:
            self.whole = database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            rows = database.execute("SELECT platform, channel, platform_id, state, turn FROM messages ORDER BY id")
            self.rows = rows.fetchall()
            self.replies = database.execute("SELECT state, count(*) FROM replies GROUP BY state").fetchall()

    @property
    def states(self) -> Counter[str]:
        return Counter(row[3] for row in self.rows)


def judge(town: Town, echo: bool = True) -> list[str]:
    """`echo`: each reply must repeat its question."""
    file = town.folder / "palaver.db"
    ledger = Ledger(file)
    broken = [] if ledger.whole else ["the journal is corrupt"]
    broken += [f"a reply is left {state}" for state, _ in ledger.replies if state not in DELIVERED]
    for place in town.places:
        broken += _place(town, place, ledger, echo)
    text = town.log.read_bytes()
    bytes_ = b"".join(path.read_bytes() for path in town.folder.glob("palaver.db*") if path.is_file())
    for name, secret in (("Telegram", town.telegram.token), ("Discord", town.discord.token)):
        if secret.encode() in text:
            broken.append(f"{name}'s token stands in the log")
        if secret.encode() in bytes_:
            broken.append(f"{name}'s token stands in the journal")
    return broken + [f"in the log: {line}" for line in unhandled(town.log)]


def unhandled(log: Path) -> list[str]:
    """Lines that tell of an exception nobody expected."""
    signs = ("Traceback", "never retrieved", "CRITICAL", "never awaited", " ERROR ")
    return [line for line in log.read_text(errors="replace").splitlines() if any(sign in line for sign in signs)]


def doubled(town: Town) -> Counter[str]:
    """Second visible copies by platform."""
    copies = Counter[str]()
    for place in town.places:
        copies[place.platform] += sum(count - 1 for count in Counter(seen.to for seen in town.seen(place)).values())
    return copies


def _place(town: Town, place: Place, ledger: Ledger, echo: bool) -> list[str]:
    asked, seen = town.asked[place], town.seen(place)
    where = f"{place.platform}:{place.id}"
    rows = [row for row in ledger.rows if row[:2] == (place.platform, place.id)]
    states = {row[2]: row[3] for row in rows}
    broken = [f"{where}: {id} is stored {n} times" for id, n in Counter(row[2] for row in rows).items() if n > 1]
    broken += [f"{where}: {question.id} is lost" for question in asked if question.id not in states]
    broken += [f"{where}: {id} is left {state}" for id, state in states.items() if state not in FINAL]
    copies = Counter(one.to for one in seen)
    for question in asked:
        answers, state = copies[question.id], states.get(question.id)
        if state == "answered" and not answers:
            broken.append(f"{where}: {question.id} is answered and nobody sees it")
        if answers > 1 and place.platform == "discord":
            broken.append(f"{where}: {question.id} has {answers} replies")
    order = [question.id for question in asked]
    broken += [f"{where}: a reply to {one.to or 'nothing'}" for one in seen if one.to not in order]
    places = [order.index(one.to) for one in seen if one.to in order]
    if places != sorted(places):
        broken.append(f"{where}: replies out of order, {places}")
    if place.platform == "telegram":
        broken += [f"{where}: {id} doubled without doubt" for id in _doubled_without_doubt(town, place, seen)]
    turns = [row[4] for row in rows if row[4] is not None]
    if turns != sorted(set(turns)):
        broken.append(f"{where}: turns out of order, {turns}")
    texts = {question.id: question.text for question in asked}
    for one in seen:
        said = one.text.lower().rstrip(".")
        foreign = [other.canary for other in town.places if other is not place and other.canary in said]
        if foreign:
            broken.append(f"{where}: {foreign[0]} was said here")
        if echo and states.get(one.to) == "answered" and said != texts.get(one.to):
            broken.append(f"{where}: {one.text!r} is no answer to {texts.get(one.to)!r}")
    return broken


def _doubled_without_doubt(town: Town, place: Place, seen: list[Seen]) -> list[str]:
    """A second copy is forgiven only where the process was killed, or the wire cut, after the first had left: what a
    dead process wrote to its socket arrives a moment after its death."""
    chat = int(place.id.partition(":")[0])
    found, earlier = [], dict[str, Seen]()
    for one in seen:
        first = earlier.get(one.to)
        if first is not None:
            cut = any(where == chat and first.at - 0.5 <= at <= one.at for at, where in town.telegram.broken)
            if not cut and not any(first.at - 1.0 <= at <= one.at for at in town.killed):
                found.append(one.to)
        earlier[one.to] = one
    return found
