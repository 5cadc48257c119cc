"""The journal's contract, on SQLite and on PostgreSQL; what the simulation needs of it also on plain lists."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from sqlalchemy import Engine, event, select

from core.journal.database import SQLite
from core.journal.journal import Journal, JournalBusy, JournalError, open_journal
from core.journal.schema import messages, replies
from core.messages import Author, Channel, Kind, Message, Reply, Request

HERE = Channel("test", "here")
THERE = Channel("test", "there")
in_memory_too = pytest.mark.parametrize("url", ["sqlite", "postgresql", "memory"], indirect=True)


def message(id: str, text: str = "", channel: Channel = HERE, kind: Kind = "ask", author: str = "u1") -> Message:
    return Message(channel, id, Author(author, "Ann"), text or f"text {id}", datetime.now(UTC), kind, "guild")


async def ask(journal: Journal, id: str, channel: Channel = HERE, text: str = "", author: str = "u1") -> Request:
    (request,) = (await journal.receive(message(id, text, channel, author=author), deadline=60)).asked
    return request


async def answered(journal: Journal, id: str, channel: Channel = HERE, author: str = "u1") -> list[Reply]:
    return await journal.answer(await ask(journal, id, channel, author=author), [f"Re {id}."], spoken=f"re {id} .")


async def spoken(journal: Journal, channel: Channel = HERE, before: int | None = None) -> list[tuple[int, str]]:
    return [(turn.index, turn.text) for turn in await journal.history(channel, before=before)]


async def states(journal: Journal) -> dict[str, int]:
    return (await journal.counts())["messages"]


@in_memory_too
async def test_a_message_is_stored_once_however_often_it_comes(journal: Journal) -> None:
    first = await journal.receive(message("1"), message("2"), message("1"), deadline=60)
    again = await journal.receive(message("2"), message("3"), deadline=60)
    assert [r.message.id for r in first.asked] == ["1", "2"]
    assert [r.message.id for r in again.asked] == ["3"]
    assert [r.row for r in (*first.asked, *again.asked)] == sorted(r.row for r in (*first.asked, *again.asked))


async def test_ids_are_a_channels_own_and_an_accounts_own(journal: Journal) -> None:
    other = replace(message("1"), account="second bot")
    received = await journal.receive(message("1"), message("1", channel=THERE), other, deadline=60)
    assert len(received.asked) == 3


async def test_messages_without_an_account_are_adopted(journal: Journal) -> None:
    mine = replace(message("1"), account="7")
    await journal.receive(message("1"), message("2"), message("1", channel=THERE), mine, deadline=60)
    await journal.adopt("another platform", "9")
    for _ in range(2):
        await journal.adopt("test", "7")
    again = [replace(message(id, channel=place), account="7") for id, place in (("1", HERE), ("2", HERE), ("1", THERE))]
    assert not (await journal.receive(*again, deadline=60)).asked
    edit = replace(message("2", text="two"), account="7", kind="edit")
    assert [r.message.text for r in (await journal.receive(edit, deadline=60)).changed] == ["two"]
    [other] = (await journal.receive(replace(mine, account="8"), deadline=60)).asked
    assert other.message.account == "8"


@in_memory_too
async def test_what_comes_back_is_what_was_stored(journal: Journal) -> None:
    stored = await ask(journal, "1", text="¿qué? 'quoted' \\ 🙂")
    (owed,) = await journal.backlog(60)
    assert replace(owed, message=stored.message, deadline=stored.deadline) == stored
    assert owed.message == stored.message and abs(owed.deadline - stored.deadline) < timedelta(milliseconds=1)
    assert timedelta(seconds=55) < owed.deadline - datetime.now(UTC) < timedelta(seconds=61)


async def test_text_no_database_can_hold_is_held(journal: Journal) -> None:
    request = await ask(journal, "1", text="a\0b\ud800c")
    (reply,) = await journal.answer(request, ["x\0y\udfff"], spoken="x\0")
    assert request.message.text == "ab?c" and reply.text == "xy?"
    assert await spoken(journal) == [(0, "ab?c"), (1, "x")]


async def test_ids_no_database_can_hold_are_held(journal: Journal) -> None:
    bad = "\ud800\0" + "9" * 300
    strange = replace(message(bad, channel=Channel("test", bad), author=bad), server=bad, account=bad)
    await journal.refail(strange, note=bad)
    await journal.receive(strange, strange, deadline=60)
    assert await states(journal) == {"failed": 1}
    nobody = "9\udcff\0"  # as a shell passes on what is no UTF-8
    assert [line async for line in journal.export(Channel("test", nobody))] == []
    assert await journal.forget("test", nobody) == 0


@in_memory_too
async def test_an_answer_is_given_once(journal: Journal) -> None:
    request = await ask(journal, "1")
    replies = await journal.answer(request, ["One.", "Two."], spoken="one . two .", seed=2**62, logprob=-3.5)
    assert [(r.part, r.text, r.to, r.state) for r in replies] == [
        (0, "One.", "1", "pending"),
        (1, "Two.", "1", "pending"),
    ]
    assert await journal.answer(request, ["Again."], spoken="again .") == []
    assert await journal.close(request, "expired") is None
    assert await states(journal) == {"answered": 1}
    assert await journal.close(await ask(journal, "2"), "expired") == []


@in_memory_too
async def test_nonces_fit_discord_and_never_repeat(journal: Journal) -> None:
    nonces = {(await answered(journal, str(id)))[0].nonce for id in range(20)}
    assert len(nonces) == 20 and all(re.fullmatch(r"[\w-]{20}", nonce) for nonce in nonces)


@in_memory_too
async def test_history_is_every_turn_once_in_order_of_this_channel_only(journal: Journal) -> None:
    for id in ("1", "2", "3"):
        await answered(journal, id)
    await answered(journal, "1", THERE)
    waiting = await ask(journal, "4")
    expected = [(0, "text 1"), (1, "re 1 ."), (2, "text 2"), (3, "re 2 ."), (4, "text 3"), (5, "re 3 .")]
    assert await spoken(journal, before=waiting.row) == expected
    assert [t.index for t in await journal.history(HERE, limit=3)] == [3, 4, 5]
    assert [t.id for t in await journal.history(HERE, limit=2)] == ["3", "3"]
    assert await spoken(journal, THERE) == [(0, "text 1"), (1, "re 1 .")]


@in_memory_too
async def test_an_answer_in_parts_is_one_turn(journal: Journal) -> None:
    for id in ("1", "2"):
        await journal.answer(await ask(journal, id), ["One.", "Two."], spoken=f"re {id} .")
    assert await spoken(journal) == [(0, "text 1"), (1, "re 1 ."), (2, "text 2"), (3, "re 2 .")]
    assert [turn.index for turn in await journal.history(HERE, limit=2)] == [2, 3]


@in_memory_too
async def test_an_answer_whose_first_part_arrived_is_a_turn(journal: Journal) -> None:
    for id, lost in (("1", 0), ("2", 1)):
        said = await journal.answer(await ask(journal, id), ["One.", "Two."], spoken=f"re {id} .")
        await journal.abandon(said[lost], "blocked")
    assert await spoken(journal) == [(2, "text 2"), (3, "re 2 .")]


@in_memory_too
async def test_what_was_heard_shed_or_never_delivered_is_no_history(journal: Journal) -> None:
    await journal.receive(message("1", kind="heard"), deadline=60)
    (notice,) = await journal.close(await ask(journal, "2"), "shed", "per_channel", "Busy.") or []
    (lost,) = await answered(journal, "3")
    await journal.abandon(lost, "blocked")
    assert await spoken(journal) == [] and notice.text == "Busy." and notice.to == "2"
    assert await states(journal) == {"answered": 1, "heard": 1, "shed": 1}


@in_memory_too
async def test_reset_hides_what_was_and_indices_go_on(journal: Journal) -> None:
    await answered(journal, "1")
    await journal.reset(HERE)
    assert await spoken(journal) == []
    await answered(journal, "2")
    assert await spoken(journal) == [(2, "text 2"), (3, "re 2 .")]
    waiting, (sent,) = await ask(journal, "3"), await answered(journal, "4")
    elsewhere = await ask(journal, "5", Channel("test", "elsewhere"))
    assert await journal.begin_send(sent)
    await journal.reset(HERE)
    (late,) = await journal.answer(waiting, ["Late."], spoken="late .")
    assert await journal.begin_send(late) is None, "who hears that all is forgotten hears no more of it"
    assert await journal.begin_send(sent) is None, "nor once more"
    (other,) = await journal.answer(elsewhere, ["Here."], spoken="here .")
    assert await journal.begin_send(other) and [reply.id for reply in await journal.due()][-1:] == [other.id]
    assert await spoken(journal) == [], "what was asked before the reset is not said after it"
    await journal.reset(THERE)
    await answered(journal, "1", THERE)
    assert await spoken(journal, THERE) == [(0, "text 1"), (1, "re 1 .")]


@in_memory_too
async def test_an_edit_changes_a_waiting_question_and_the_history(journal: Journal) -> None:
    request = await ask(journal, "1")
    received = await journal.receive(message("1", "better", kind="edit"), deadline=60)
    (changed,) = received.changed
    assert (changed.row, changed.message.text, received.asked) == (request.row, "better", ())
    assert (await journal.receive(message("1", "better", kind="edit"), deadline=60)).changed == (), "nothing changed"
    assert await journal.answer(request, ["late"], spoken="late") == [], "the answer to the old text"
    assert await journal.question(request.row) == changed
    assert await journal.answer(changed, ["Re."], spoken="re")
    assert await journal.question(request.row) is None
    assert (await journal.receive(message("1", "best", kind="edit"), deadline=60)).changed == ()
    assert [text for _, text in await spoken(journal)] == ["best", "re"]


@in_memory_too
async def test_a_delete_takes_back_a_waiting_question_and_a_turn(journal: Journal) -> None:
    waiting = await ask(journal, "1")
    assert (await journal.receive(message("1", kind="delete"), deadline=60)).cancelled == (waiting.row,)
    await answered(journal, "2")
    assert (await journal.receive(message("2", kind="delete"), deadline=60)).cancelled == ()
    assert await spoken(journal) == [] and await states(journal) == {"cancelled": 1, "answered": 1}
    assert (await journal.receive(message("1"), deadline=60)).asked == (), "it does not come back to life"


async def test_of_what_was_deleted_nothing_is_kept(journal: Journal) -> None:
    (reply,) = await answered(journal, "1")
    await journal.sent(reply, "77")
    await journal.receive(message("1", kind="delete"), message("1", "better", kind="edit"), deadline=60)
    kept = select(messages.c.text, messages.c.author_name, replies.c.spoken, replies.c.text).join(
        replies, replies.c.message == messages.c.id
    )
    assert [tuple(row) for row in await journal._read(kept)] == [("", "", "", "")]


async def test_of_what_was_deleted_while_its_answer_was_on_its_way_nothing_is_kept_either(journal: Journal) -> None:
    for id in ("1", "2"):
        (reply,) = await answered(journal, id)
        await journal.begin_send(reply)
        await journal.receive(message(id, kind="delete"), deadline=60)
        await (journal.sent(reply, "77") if id == "1" else journal.abandon(reply, "no"))
    (reply,) = await answered(journal, "3")
    await journal.begin_send(reply)
    await journal.receive(message("3", kind="delete"), deadline=60)
    await journal.pending(reply)
    assert await journal.begin_send(reply) is None, "it did not arrive, and shall not"
    kept = select(replies.c.state, replies.c.text).order_by(replies.c.id)
    assert [tuple(row) for row in await journal._read(kept)] == [("sent", ""), ("abandoned", ""), ("abandoned", "")]


async def test_an_answer_that_was_deleted_is_in_no_history(journal: Journal) -> None:
    for id in ("1", "2"):
        (reply,) = await answered(journal, id)
        await journal.sent(reply, f"re {id}")
    await journal.receive(message("re 1", kind="delete"), message("re 2", channel=THERE, kind="delete"), deadline=60)
    assert [turn.id for turn in await journal.history(HERE)] == ["2", "2"]
    kept = select(replies.c.text, replies.c.spoken).order_by(replies.c.id)
    assert [tuple(row) for row in await journal._read(kept)] == [("", ""), ("Re 2.", "re 2 .")]


@in_memory_too
async def test_what_was_deleted_is_answered_no_more(journal: Journal) -> None:
    (waits,), (begun,) = await answered(journal, "1"), await answered(journal, "2")
    await journal.begin_send(begun)
    await journal.receive(message("1", kind="delete"), message("2", kind="delete"), deadline=60)
    assert [(reply.id, reply.text) for reply in await journal.due()] == [(begun.id, "Re 2.")], "it may have arrived"
    assert await journal.begin_send(waits) is None and (await journal.counts())["replies"]["abandoned"] == 1


@in_memory_too
async def test_edits_and_deletes_of_what_we_never_saw_are_dropped(journal: Journal) -> None:
    received = await journal.receive(message("8", kind="edit"), message("9", kind="delete"), deadline=60)
    assert not received.changed and not received.cancelled and await states(journal) == {}


@in_memory_too
async def test_an_edit_in_the_batch_of_its_message(journal: Journal) -> None:
    received = await journal.receive(message("1"), message("1", "new", kind="edit"), message("2"), deadline=60)
    assert [r.message.id for r in received.asked] == ["1", "2"] and received.changed[0].message.text == "new"


async def test_events_nobody_could_read_are_recorded(journal: Journal) -> None:
    await journal.refail(message("1", "raw"), note="no field x")
    await journal.refail(message("1", "raw"), note="no field x")
    await journal.refail(message("2", "raw"), note="long ago", state="expired")
    assert await states(journal) == {"failed": 1, "expired": 1}


@in_memory_too
async def test_what_waited_when_a_stop_came_behind_a_reset_is_not_owed(journal: Journal) -> None:
    await ask(journal, "1")
    await ask(journal, "1", THERE)
    await journal.reset(HERE)
    await ask(journal, "2")
    assert await journal.backlog(60, platforms=["another"]) == [] and (await states(journal))["waiting"] == 3
    assert [(r.message.channel, r.message.id) for r in await journal.backlog(60)] == [(THERE, "1"), (HERE, "2")]
    assert await states(journal) == {"cancelled": 1, "waiting": 2}


async def test_the_backlog_is_in_order_and_of_what_is_late_only_the_newest(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    def counted() -> float:
        labels = {"platform": "test", "state": "expired"}
        return REGISTRY.get_sample_value("palaver_messages_finished_total", labels) or 0.0

    await journal.receive(message("1"), message("2"), message("1", channel=THERE), deadline=-1)
    await ask(journal, "3", Channel("test", "elsewhere"))
    before = counted()
    owed = await journal.backlog(60)
    assert counted() == before + 1
    assert [(str(r.message.channel), r.message.id, r.attempts) for r in owed] == [
        ("test:here", "2", 1),
        ("test:there", "1", 1),
        ("test:elsewhere", "3", 0),
    ]
    assert await states(journal) == {"expired": 1, "waiting": 3}
    assert caplog.messages == ["too old at the start: 1 expired"]
    assert all(r.deadline > datetime.now(UTC) for r in owed)


@in_memory_too
async def test_the_backlog_of_some_platforms_leaves_the_others_alone(journal: Journal) -> None:
    await journal.receive(message("1"), message("2"), message("3", channel=Channel("other", "one")), deadline=-1)
    assert [str(r.message.channel) for r in await journal.backlog(60, platforms=["other", "third"])] == ["other:one"]
    assert await journal.backlog(60, platforms=[]) == []
    assert await states(journal) == {"waiting": 3}


@in_memory_too
async def test_a_question_that_never_gets_done_comes_in_the_end_to_be_closed(journal: Journal) -> None:
    await journal.receive(message("1"), deadline=-1)
    assert [(await journal.backlog(60, max_attempts=1))[0].deadline > datetime.now(UTC) for _ in range(2)] == [True] * 2
    await journal.receive(message("2", channel=THERE), deadline=-1)
    tried = [[r.attempts for r in await journal.backlog(-1, 3)][-1] for _ in range(5)]
    assert tried == [1, 2, 3, 3, 3] and await states(journal) == {"waiting": 2}


@in_memory_too
async def test_attempts_are_counted(journal: Journal) -> None:
    request = await ask(journal, "1")
    assert [await journal.attempt(request) for _ in range(3)] == [1, 2, 3]


async def test_a_delivery_step_by_step(journal: Journal) -> None:
    (reply,) = await answered(journal, "1")
    assert await journal.due() == [reply]
    trying = await journal.begin_send(reply)
    assert trying and (trying.state, trying.tries) == ("sending", 1)
    assert await journal.due() == [trying]
    await journal.pending(trying)
    again = await journal.begin_send((await journal.due())[0])
    assert again and again.tries == 2 and again.nonce == reply.nonce
    await journal.sent(again, "77")
    assert await journal.due() == [] and (await journal.counts())["replies"] == {"sent": 1}
    assert (await journal.state(HERE, "1"), await journal.state(HERE, "2")) == ("answered", None)


@in_memory_too
async def test_a_reset_that_comes_again_is_obeyed_once(journal: Journal) -> None:
    asked = message("2", "/reset", kind="heard")
    await answered(journal, "1")
    assert await journal.reset(HERE, asked)
    await answered(journal, "3")
    assert not await journal.reset(HERE, asked) and not await journal.reset(HERE, asked)
    assert [turn.id for turn in await journal.history(HERE)] == ["3", "3"]
    assert await journal.reset(HERE) and await journal.history(HERE) == []


@in_memory_too
async def test_what_is_settled_stays_settled(journal: Journal) -> None:
    """Another process may have taken the platform over and sent it."""
    (sent,), (given_up,) = await answered(journal, "1"), await answered(journal, "2")
    await journal.sent(sent, "77")
    await journal.abandon(given_up, "too late")
    for reply in (sent, given_up):
        assert await journal.begin_send(reply) is None
        await journal.pending(reply)
    assert await journal.due() == [] and (await journal.counts())["replies"] == {"abandoned": 1, "sent": 1}


@in_memory_too
async def test_what_is_given_up_takes_the_later_parts_with_it_unless_it_may_have_arrived(journal: Journal) -> None:
    first, second = [await journal.answer(await ask(journal, id), list("abc"), spoken="a b c") for id in ("1", "2")]
    await journal.sent(first[0], "77")
    await journal.abandon(first[1], "blocked")
    await journal.abandon(second[0], "in doubt", alone=True)
    assert [reply.id for reply in await journal.due()] == [reply.id for reply in second[1:]]
    assert (await journal.counts())["replies"] == {"abandoned": 3, "pending": 2, "sent": 1}


@in_memory_too
async def test_what_is_due_in_one_channel(journal: Journal) -> None:
    there = Channel("test", "other")
    for number in range(3):
        await answered(journal, f"here {number}")
        await answered(journal, f"there {number}", there)
    assert [reply.to for reply in await journal.due(there)] == ["there 0", "there 1", "there 2"]
    assert [reply.to for reply in await journal.due(there, 2)] == ["there 0", "there 1"]


async def test_an_export_holds_every_message_and_what_became_of_it(journal: Journal) -> None:
    (reply,) = await answered(journal, "1")
    begun = await journal.begin_send(reply)
    assert begun
    await journal.sent(begun, "77")
    await journal.reset(HERE)
    await ask(journal, "2")
    await answered(journal, "1", THERE)
    lines = [line async for line in journal.export(HERE)]
    assert [(line["id"], line["state"], line["text"]) for line in lines] == [
        ("1", "answered", "text 1"),
        ("2", "waiting", "text 2"),
    ]
    assert lines[0]["replies"] == [{"text": "Re 1.", "state": "sent", "id": "77", "seed": None}]


def steps_of(journal: Journal) -> Callable[[], int]:
    """How many SQLite has taken since the last time, by the hundred."""
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    def since() -> int:
        nonlocal steps
        taken, steps = steps, 0
        return taken

    for database in (journal._readers, journal._writer._database):
        assert isinstance(database, SQLite)
        event.listen(database._engine, "connect", lambda connection, _: connection.set_progress_handler(count, 100))
        database._engine.dispose()
    return since


async def test_a_long_channel_costs_its_length_to_export_and_nothing_to_look_one_up_in(tmp_path: Path) -> None:
    journal = await open_journal(f"sqlite:///{tmp_path / 'journal.db'}")
    steps = steps_of(journal)
    costs = []
    for channel, length in ((HERE, 1000), (THERE, 4000)):
        await journal.receive(*(message(str(n), channel=channel) for n in range(length)), deadline=60)
        steps()
        lines = [line["id"] async for line in journal.export(channel)]
        assert lines == [str(n) for n in range(length)]
        costs.append(steps())
    assert costs[1] < 6 * costs[0]
    assert await journal.state(THERE, "3999") == "waiting"
    assert steps() < 10
    await journal.aclose()


async def test_nothing_on_a_messages_path_costs_more_with_years_of_history(tmp_path: Path) -> None:
    file = tmp_path / "journal.db"
    journal = await open_journal(f"sqlite:///{file}")
    (reply,) = await answered(journal, "old")
    await journal.sent(reply, "77")
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as years:
        for table in ("messages", "replies"):
            own = {"id": "n", "message": "n", "turn": "n", "platform_id": "'m' || n", "nonce": "'n' || n"}
            values = [own.get(row[1], row[1]) for row in years.execute(f"PRAGMA table_info({table})")]
            numbers = "WITH RECURSIVE of(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM of WHERE n < 5000)"
            copies = f"SELECT {', '.join(values)} FROM of, (SELECT * FROM {table} WHERE id = 1)"
            years.execute(f"{numbers} INSERT INTO {table} {copies}")
        years.execute("UPDATE channels SET next_turn = 5001")
    steps = steps_of(journal)
    for times in range(2):
        request = await ask(journal, f"new {times}")
        assert len(await journal.history(HERE, before=request.row, limit=4)) == (0 if times else 4)
        assert await journal.question(request.row)
        assert len(await journal.backlog(60, platforms=["test"])) == 1
        (reply,) = await journal.answer(request, ["Yes."], spoken="yes .")
        assert await journal.due() == await journal.due(HERE, 20) == [reply]
        if begun := await journal.begin_send(reply):
            await journal.sent(begun, "78")
        await journal.receive(message("78", kind="delete"), message(f"new {times}", kind="delete"), deadline=60)
        await journal.reset(HERE)
        assert steps() < 60, "of 5,000 messages it cannot have looked at many"
    await journal.aclose()


async def test_an_export_of_very_many_holds_each_once(journal: Journal) -> None:
    await journal.receive(*(message(str(id)) for id in range(450)), deadline=60)
    assert [line["id"] async for line in journal.export(HERE)] == [str(id) for id in range(450)]


async def test_watermarks_are_kept_per_channel(journal: Journal) -> None:
    await journal.receive(marks={HERE: "5"}, deadline=60)
    await journal.receive(message("9"), marks={HERE: "9", Channel("other", "here"): "1"}, deadline=60)
    assert await journal.watermarks("test") == {"here": "9"}
    await journal.receive(marks={HERE: "", Channel("other", "here"): "2"}, deadline=60)
    assert (await journal.watermarks("test"), await journal.watermarks("other")) == ({}, {"here": "2"})


async def test_a_lease_has_one_owner_until_it_ends(journal: Journal) -> None:
    assert await journal.lease("poller", "me", 30) and await journal.lease("poller", "me", 30)
    assert not await journal.lease("poller", "you", 30)
    await journal.release("poller", "you")
    assert not await journal.lease("poller", "you", 30)
    await journal.release("poller", "me")
    assert await journal.lease("poller", "you", -1) and await journal.lease("poller", "me", 30)


async def test_a_lease_from_the_future_is_void(journal: Journal) -> None:
    assert await journal.lease("poller", "a clock a day ahead", 86_400)
    assert await journal.lease("poller", "me", 30)


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_wall_clock_that_is_set_ends_no_lease(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    assert await journal.lease("poller", "me", 30)
    then = time.time() + 3600 * hours
    monkeypatch.setattr(time, "time", lambda: then)
    assert not await journal.lease("poller", "you", 30) and await journal.lease("poller", "me", 30)


async def test_sessions_of_a_day_are_counted(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [await journal.identified("discord") for _ in range(3)] == [1, 2, 3]
    assert await journal.identified("discord", new=False) == 3
    assert await journal.identified("other") == 1
    tomorrow = time.time() + 86_401
    monkeypatch.setattr(time, "time", lambda: tomorrow)
    assert await journal.identified("discord") == 1


async def test_a_channel_that_moves_takes_everything_along(journal: Journal) -> None:
    await answered(journal, "1")
    waiting = await ask(journal, "2")
    new = Channel("test", "-100")
    await journal.rekey(HERE, new)
    assert await spoken(journal, HERE) == [] and await spoken(journal, new) == [(0, "text 1"), (1, "re 1 .")]
    (owed,) = await journal.backlog(60)
    assert (owed.row, owed.message.channel) == (waiting.row, new)
    assert [reply.channel for reply in await journal.due()] == [new]
    await journal.rekey(HERE, new)


async def test_what_was_asked_before_its_channel_moved_is_answered_where_it_is_now(journal: Journal) -> None:
    await answered(journal, "1")
    under_way = await ask(journal, "2")
    new = Channel("test", "-100")
    await journal.rekey(HERE, new)
    (reply,) = await journal.answer(under_way, ["re 2"], spoken="re 2 .")
    assert reply.channel == new
    assert await spoken(journal, new) == [(0, "text 1"), (1, "re 1 ."), (2, "text 2"), (3, "re 2 .")]


async def test_a_channel_that_moves_onto_one_that_talked_already(journal: Journal) -> None:
    await answered(journal, "1")
    await answered(journal, "1", THERE)
    await answered(journal, "2")
    await journal.rekey(HERE, THERE)
    await journal.rekey(HERE, THERE)
    turns = [(turn.index, turn.id) for turn in await journal.history(THERE)]
    assert turns == [(2, "2"), (3, "2"), (4, "1"), (5, "1")], "ids that both have stay where they are"
    await answered(journal, "3", THERE)
    assert (await spoken(journal, THERE))[-1][1] == "re 3 ."


async def test_a_long_channel_moves_in_statements_that_are_short(journal: Journal) -> None:
    """PostgreSQL ends one that takes longer than 15 s, and the platform would tell of the move for ever."""
    await journal.receive(*(message(str(id)) for id in range(1200)), deadline=60)
    touched = []

    def note(connection: object, cursor: Any, statement: str, *rest: object) -> None:
        if statement.startswith("UPDATE messages"):
            touched.append(cursor.rowcount)

    event.listen(Engine, "after_cursor_execute", note)
    try:
        await journal.rekey(HERE, THERE)
    finally:
        event.remove(Engine, "after_cursor_execute", note)
    assert touched == [500, 500, 200] and len([line async for line in journal.export(THERE)]) == 1200


async def test_a_question_that_moved_while_it_was_answered_keeps_its_history(journal: Journal) -> None:
    await answered(journal, "1")
    asked = await ask(journal, "2")
    await journal.rekey(HERE, THERE)
    assert [turn.text for turn in await journal.history(HERE, before=asked.row)] == ["text 1", "re 1 ."]
    assert await journal.history(HERE) == []


async def test_a_channel_that_moves_stays_reset(journal: Journal) -> None:
    await answered(journal, "1")
    await journal.reset(HERE)
    await answered(journal, "2")
    await answered(journal, "9", THERE)
    await journal.rekey(HERE, THERE)
    assert [text for _, text in await spoken(journal, THERE)] == ["text 2", "re 2 .", "text 9", "re 9 ."]


async def test_a_person_can_be_forgotten(journal: Journal) -> None:
    await answered(journal, "1", author="u1")
    await answered(journal, "2", author="u2")
    elsewhere = Channel("another platform", "one")
    await answered(journal, "3", elsewhere, author="u1")  # somebody else, with the same number
    assert await journal.forget("test", "u1") == 1
    assert [text for _, text in await spoken(journal)] == ["text 2", "re 2 ."]
    assert [text for _, text in await spoken(journal, elsewhere)] == ["text 3", "re 3 ."]
    assert (await journal.counts())["replies"] == {"pending": 2}


async def test_who_said_very_much_is_forgotten_while_others_write(journal: Journal) -> None:
    await journal.receive(*(message(str(id)) for id in range(1200)), deadline=60)
    forgetting = asyncio.create_task(journal.forget("test", "u1"))
    await asyncio.sleep(0)  # now it has asked for its first commit
    await ask(journal, "new", author="u2")
    assert not forgetting.done()
    assert await forgetting == 1200 and await states(journal) == {"waiting": 1}


async def test_many_writers_share_commits_and_keep_their_order(journal: Journal) -> None:
    async def talk(channel: Channel) -> None:
        for id in range(10):
            await answered(journal, str(id), channel)

    places = [Channel("test", f"c{i}") for i in range(20)]
    await asyncio.gather(*map(talk, places))
    for place in places:
        assert [text for _, text in await spoken(journal, place)][::2] == [f"text {id}" for id in range(10)]


async def test_one_bad_write_harms_no_other(journal: Journal) -> None:
    def bad(connection: object) -> None:
        raise KeyError("bad")

    good = [asyncio.create_task(ask(journal, str(id))) for id in range(5)]
    with pytest.raises(KeyError):
        await journal._writer.do(bad)
    assert len({request.row for request in await asyncio.gather(*good)}) == 5


async def test_what_no_column_can_hold_is_cut_or_fails_alone(journal: Journal) -> None:
    (reply,) = await answered(journal, "1")
    bad = "\ud800\0" + "9" * 300
    await journal.sent(reply, bad)
    await journal.receive(marks={HERE: bad}, deadline=60)
    good = asyncio.create_task(ask(journal, "2"))
    bad_write = journal.receive(replace(message("3"), channel=Channel("x" * 99 + "\ud800", "here")), deadline=60)
    (error,) = await asyncio.gather(bad_write, return_exceptions=True)
    assert isinstance(error, Exception)
    assert not isinstance(error, JournalBusy), "it would be tried for ever, with all who write beside it"
    assert (await good).row


async def test_many_at_once_are_no_more_than_a_statement_holds(journal: Journal) -> None:
    await journal.refail(*(message(str(id)) for id in range(3000)), note="unreadable")
    marks = {Channel("test", str(id)): str(id) for id in range(12_000)}
    await journal.receive(marks=marks, deadline=60)
    assert await states(journal) == {"failed": 3000} and len(await journal.watermarks("test")) == 12_000


async def test_a_caller_that_gives_up_harms_no_other(journal: Journal) -> None:
    tasks = [asyncio.create_task(ask(journal, str(id))) for id in range(9)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(request, Request) for request in done[1::2])
    assert (await ask(journal, "after")).row


async def test_what_is_asked_while_it_closes_is_refused(url: str) -> None:
    journal = await open_journal(url)
    slow = asyncio.create_task(journal._writer.do(lambda connection: time.sleep(0.2)))
    closing = asyncio.create_task(journal.aclose())
    await asyncio.sleep(0.1)
    with pytest.raises(JournalError):
        await asyncio.wait_for(ask(journal, "1"), 10)
    await asyncio.gather(slow, closing)


async def test_what_returned_is_there_after_opening_again(journal: Journal, url: str) -> None:
    (reply,) = await answered(journal, "1")
    await ask(journal, "2")
    second = await open_journal(url)
    assert [t.text for t in await second.history(HERE)] == ["text 1", "re 1 ."]
    assert [r.message.id for r in await second.backlog(60)] == ["2"]
    assert [r.nonce for r in await second.due()] == [reply.nonce]
    await second.aclose()


async def test_a_long_history_is_read_by_its_end(journal: Journal) -> None:
    await journal.receive(*(message(str(id)) for id in range(600)), deadline=60)
    requests = await journal.backlog(60)
    await asyncio.gather(*(journal.answer(request, ["x"], spoken="x") for request in requests))
    turns = await journal.history(HERE, limit=4)
    assert [turn.index for turn in turns] == [1196, 1197, 1198, 1199]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=50), min_size=1, max_size=5))
async def test_any_text_goes_in_and_comes_out_the_same_from_both(url: str, texts: list[str]) -> None:
    journal = await open_journal(url)
    try:
        place = Channel("test", datetime.now(UTC).isoformat())
        asked = (
            await journal.receive(*(message(str(i), t or "x", place) for i, t in enumerate(texts)), deadline=60)
        ).asked
        for request in asked:
            assert await journal.answer(request, [request.message.text], spoken=request.message.text)
        turns = await journal.history(place)
        assert [turn.text for turn in turns[::2]] == [turn.text for turn in turns[1::2]]
        assert [turn.text for turn in turns[::2]] == [request.message.text for request in asked]
    finally:
        await journal.aclose()
