"""The judge sees each broken promise: ledgers and a journal made by hand, one thing wrong in each."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from core.journal.journal import open_journal
from core.messages import Author, Channel, Message
from tests.fakes.discord_server import Sent as OnDiscord
from tests.fakes.telegram_server import Sent as OnTelegram
from tests.faults.judge import doubled, judge
from tests.faults.town import Place, Town


class Made(Town):
    """A town without a process: what it would have done is written down."""

    def answer(self, place: Place, number: int, text: str = "") -> None:
        asked = self.asked[place][number]
        said, at = text or asked.text.capitalize(), time.monotonic()
        if place.platform == "discord":
            self.discord.ledger.append(OnDiscord(at, place.id, said, asked.id, None, f"9{at}", {}))
        else:
            self.telegram.ledger.append(OnTelegram(at, int(place.id), None, said, int(asked.id), 1, {}))

    async def store(self) -> None:
        journal = await open_journal(f"sqlite:///{self.folder / 'palaver.db'}")
        for place, asked in self.asked.items():
            for question in asked:
                where = Channel(place.platform, place.id)
                message = Message(where, question.id, Author("u", "u"), question.text, datetime.now(UTC))
                for request in (await journal.receive(message, deadline=60)).asked:
                    for reply in await journal.answer(request, ["."], spoken="."):
                        await journal.sent(reply, "1")
        await journal.aclose()

    def sql(self, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(self.folder / "palaver.db")) as database, database:
            database.execute(statement)


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Made]:
    """Two questions in each of two places, all answered well."""
    async with Made(tmp_path, seed=1, private=2, rooms=2) as made:
        made.log.touch()
        for place in (made.places[0], made.places[5]):
            for number in (0, 1):
                made.say(place)
                made.answer(place, number)
        await made.store()
        assert [place.platform for place in made.asked if made.asked[place]] == ["telegram", "discord"]
        yield made


async def test_a_town_where_all_is_well(town: Made) -> None:
    assert judge(town) == [] and not doubled(town).total() and town.owed() == []


async def test_a_second_reply(town: Made) -> None:
    telegram, discord = town.places[0], town.places[5]
    town.answer(discord, 1)
    town.answer(telegram, 1)
    assert [line.split(": ")[1] for line in judge(town)] == [
        f"{town.asked[telegram][1].id} doubled without doubt",
        f"{town.asked[discord][1].id} has 2 replies",
    ]
    assert doubled(town) == {"telegram": 1, "discord": 1}


async def test_a_second_reply_on_telegram_after_a_kill(town: Made) -> None:
    town.killed.append(time.monotonic())
    town.answer(town.places[0], 1)
    assert judge(town) == []


async def test_replies_out_of_order(town: Made) -> None:
    town.discord.ledger.reverse()
    assert "replies out of order" in str(judge(town))


async def test_a_lost_message_and_one_left_waiting(town: Made) -> None:
    town.say(town.places[5])
    town.sql("UPDATE messages SET state = 'waiting' WHERE platform = 'telegram' AND turn = 0")
    assert {line.split(" is ")[1] for line in judge(town)} == {"lost", "left waiting"}


async def test_an_answer_nobody_sees_and_a_reply_left_behind(town: Made) -> None:
    town.discord.ledger.pop()
    town.sql("UPDATE replies SET state = 'sending' WHERE id = 1")
    assert [line.split(" and ")[-1] for line in judge(town)] == ["a reply is left sending", "nobody sees it"]


async def test_a_foreign_canary_and_a_wrong_answer(town: Made) -> None:
    town.discord.ledger[0] = replace(town.discord.ledger[0], text=f"{town.places[0].canary} says number 0")
    found = str(judge(town))
    assert f"{town.places[0].canary} was said here" in found and "is no answer to" in found


async def test_turns_out_of_order(town: Made) -> None:
    town.sql("UPDATE messages SET turn = 1 - turn WHERE platform = 'discord'")
    assert "turns out of order" in str(judge(town))


async def test_a_token_in_the_log_and_in_the_journal(town: Made) -> None:
    town.log.write_text(f"GET /bot{town.telegram.token}/getMe\n")
    town.sql(f"UPDATE messages SET note = '{town.discord.token}'")
    assert judge(town) == ["Telegram's token stands in the log", "Discord's token stands in the journal"]
