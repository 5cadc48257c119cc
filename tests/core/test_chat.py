"""The one path of a message, scene by scene on virtual time. Whole schedules with crashes: tests/simulation."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from prometheus_client import REGISTRY

from core.chat import BUSY, LONGEST, SORRY
from core.courier import LAST
from core.delivery import NotAccepted
from core.engine.base import EngineClosed, Failed, QueueFull
from core.messages import Channel, Message
from core.settings import QueueLimits
from tests.simulation.house import House, late, play


def test_a_question_is_answered_with_its_history() -> None:
    async def scene(house: House) -> None:
        await house.say("one")
        await asyncio.sleep(2)
        await house.say("two")
        await asyncio.sleep(2)
        assert house.platform.texts() == ["re one", "re two"]
        assert house.engine.prompts == [["one"], ["one", "re one", "two"]]
        assert house.states() == ["answered"] * 2

    play(scene)


def test_a_burst_in_one_channel_is_answered_in_order_each_with_what_went_before() -> None:
    async def scene(house: House) -> None:
        await house.say("one", "two", "three")
        await asyncio.sleep(5)
        assert house.platform.texts() == ["re one", "re two", "re three"]
        assert house.engine.prompts[2] == ["one", "re one", "two", "re two", "three"]

    play(scene)


def test_channels_do_not_wait_for_each_other_and_do_not_mix() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 5
        for channel in "abc":
            await house.say(f"in {channel}", channel=channel)
        await asyncio.sleep(6)
        assert sorted(house.platform.texts()) == ["re in a", "re in b", "re in c"]
        assert all(len(prompt) == 1 for prompt in house.engine.prompts)

    play(scene)


def test_what_says_nothing_gets_no_answer() -> None:
    async def scene(house: House) -> None:
        await house.say("  \n ")
        await asyncio.sleep(5)
        assert (house.states(), house.platform.texts()) == (["heard"], [])

    play(scene)


def test_a_long_message_is_kept_whole_and_of_a_longer_one_the_end() -> None:
    async def scene(house: House) -> None:
        whole = "so " * 1300 + "why?"
        await house.say(whole, "x" * 9000 + " end")
        await asyncio.sleep(2)
        kept = [row.message.text for row in house.disk.rows]
        assert kept[0] == whole and len(kept[1]) == LONGEST and kept[1].endswith(" end")
        assert [prompt[-1][-4:] for prompt in house.engine.prompts] == ["why?", " end"]

    play(scene)


def test_the_same_message_twice_is_answered_once() -> None:
    async def scene(house: House) -> None:
        message = house.message("hi")
        await house.chat.receive(message, message)
        await house.chat.receive(message)
        await asyncio.sleep(2)
        assert house.platform.texts() == ["re hi"]

    play(scene)


def test_a_channel_of_a_platform_that_no_bot_has_is_refused() -> None:
    """Its replies would have nobody to send them."""

    async def scene(house: House) -> None:
        message = replace(house.message("hi"), channel=Channel("discrod", "1"))
        with pytest.raises(ValueError, match=r"discrod:1: no bot is called discrod \(there is test\)"):
            await house.chat.receive(message)
        assert house.states() == []

    play(scene)


def test_what_the_journal_does_not_take_is_not_accepted() -> None:
    async def scene(house: House) -> None:
        house.refusing = True
        before = REGISTRY.get_sample_value("palaver_messages_refused_total") or 0.0
        with pytest.raises(NotAccepted):
            await house.say("hi")
        assert REGISTRY.get_sample_value("palaver_messages_refused_total") == before + 1
        house.refusing = False
        await asyncio.sleep(5)
        assert house.states() == [] and house.platform.texts() == []

    play(scene)


def test_a_journal_that_fails_while_answering_delays_and_loses_nothing() -> None:
    async def scene(house: House) -> None:
        await house.say("hi")
        house.refusing = True
        await asyncio.sleep(20)
        assert house.platform.texts() == []
        house.refusing = False
        await asyncio.sleep(20)
        assert (house.states(), house.platform.texts()) == (["answered"], ["re hi"])

    play(scene)


def test_an_edit_before_the_answer_changes_the_question_waiting_or_under_way() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 2
        first, second = house.message("one"), house.message("two")
        await house.chat.receive(first, second)
        await asyncio.sleep(1)
        await house.chat.receive(house.message("uno", id=first.id, kind="edit"))
        await house.chat.receive(house.message("due", id=second.id, kind="edit"))
        await asyncio.sleep(10)
        assert house.platform.texts() == ["re uno", "re due"]

    play(scene)


def test_an_edit_that_leaves_the_text_as_it_was_leaves_its_answer_under_way() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 2
        said = house.message("one")
        await house.chat.receive(said)
        await asyncio.sleep(1)
        await house.chat.receive(replace(said, kind="edit"))
        await asyncio.sleep(5)
        assert (house.engine.prompts, house.platform.texts()) == ([["one"]], ["re one"])

    play(scene)


def test_what_an_edit_leaves_nothing_to_answer_of_is_not_answered() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds, house.chat.voice.spaced = 2, True
        first, second = house.message("one"), house.message("two")
        await house.chat.receive(first, second)
        await asyncio.sleep(1)
        for said in (first, second):
            await house.chat.receive(house.message("?", id=said.id, kind="edit"))
        await asyncio.sleep(10)
        assert (house.states(), house.platform.texts()) == (["cancelled"] * 2, [])

    play(scene)


@pytest.mark.parametrize("later", [2, 4])
def test_an_edit_that_is_heard_of_after_its_answer_ended_keeps_its_place(later: float) -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 2
        first = house.message("one")
        await house.chat.receive(first, house.message("two"))
        await asyncio.sleep(1)
        house.journal.receive = late(house.journal.receive, later)  # stored before the first answer
        await house.chat.receive(house.message("uno", id=first.id, kind="edit"))
        await asyncio.sleep(10)
        assert house.platform.texts() == ["re uno", "re two"]
        assert house.engine.prompts[-1] == ["uno", "re uno", "two"]

    play(scene)


def test_an_edit_that_is_heard_of_after_its_answer_ended_has_no_more_time() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 2
        first = house.message("one")
        await house.chat.receive(first)
        await asyncio.sleep(1)
        house.journal.receive = late(house.journal.receive, 30)
        edit = asyncio.create_task(house.chat.receive(house.message("uno", id=first.id, kind="edit")))
        await asyncio.sleep(1.5)
        house.engine.script = [EngineClosed("gone")] * 1000
        await asyncio.sleep(15)
        assert (house.states(), house.platform.texts()) == (["expired"], [])
        await edit

    play(scene, limits=QueueLimits(deadline=10))


def test_an_edit_while_a_failure_is_counted_is_answered() -> None:
    async def scene(house: House) -> None:
        house.engine.script = [Failed("NaN")]
        house.journal.attempt = late(house.journal.attempt, 5)
        first = house.message("one")
        await house.chat.receive(first)
        await asyncio.sleep(2)
        await house.chat.receive(house.message("uno", id=first.id, kind="edit"))
        await asyncio.sleep(10)
        assert (house.states(), house.platform.texts()) == (["answered"], ["re uno"])

    play(scene)


def test_an_apology_that_an_edit_interrupts_goes_out() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 1
        house.engine.script = [Failed("NaN")] * 3
        house.journal.receive, house.journal.close = (
            late(call, 2) for call in (house.journal.receive, house.journal.close)
        )
        said = house.message("one")
        await house.chat.receive(said)
        await asyncio.sleep(2.9)
        await house.chat.receive(house.message("uno", id=said.id, kind="edit"))  # stored just before it failed
        await asyncio.sleep(10)
        assert (house.states(), house.platform.texts()) == (["failed"], [SORRY])

    play(scene)


def test_a_delete_before_the_answer_cancels_it_waiting_or_under_way() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 2
        first, second, third = (house.message(text) for text in ("one", "two", "three"))
        await house.chat.receive(first, second, third)
        await asyncio.sleep(1)
        await house.chat.receive(house.message("", id=second.id, kind="delete"))
        await house.chat.receive(house.message("", id=first.id, kind="delete"))
        await asyncio.sleep(10)
        assert house.states() == ["cancelled", "cancelled", "answered"]
        assert house.platform.texts() == ["re three"]

    play(scene)


def test_reset_starts_the_history_anew_and_drops_the_cache() -> None:
    async def scene(house: House) -> None:
        await house.say("one")
        await asyncio.sleep(2)
        await house.chat.reset(house.message("").channel)
        await house.say("two")
        await asyncio.sleep(2)
        assert house.engine.prompts[-1] == ["two"] and house.engine.forgotten == ["test:a"]

    play(scene)


def test_what_waits_when_its_channel_is_reset_is_not_answered_any_more() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 1
        await house.say("one", "two", "three")
        await house.say("other", channel="b")
        await asyncio.sleep(0.5)
        await house.chat.reset(house.message("").channel)
        await house.say("four")
        await asyncio.sleep(5)
        assert sorted(house.platform.texts()) == ["re four", "re other"], "nor is what was under way"
        assert house.states() == ["answered", "cancelled", "cancelled", "answered", "answered"]

    play(scene)


def test_a_reset_that_comes_again_is_obeyed_once() -> None:
    async def scene(house: House) -> None:
        asked = house.message("/reset", kind="heard")
        await house.say("one", "two")
        await asyncio.sleep(2)
        assert await house.chat.reset(asked.channel, asked)
        await house.say("three")
        await asyncio.sleep(2)
        assert not await house.chat.reset(asked.channel, asked)
        await house.say("four")
        await asyncio.sleep(2)
        assert house.engine.prompts[-2:] == [["three"], ["three", "re three", "four"]]
        assert house.engine.forgotten == ["test:a"]

    play(scene)


def test_what_waits_in_other_channels_stays_when_one_moves() -> None:
    async def scene(house: House) -> None:
        await house.say("one", channel="b")
        await asyncio.sleep(2)
        house.engine.seconds = 5
        await house.say("busy")
        await house.say("two", channel="b")
        await asyncio.sleep(1)
        await house.chat.rekey(house.message("").channel, Channel("test", "moved"))
        await asyncio.sleep(20)
        assert house.engine.prompts[-1] == ["one", "re one", "two"]
        assert house.states() == ["answered"] * 3

    play(scene, limits=QueueLimits(running=1))


@pytest.mark.parametrize(("running", "most"), [(0, 3), (2, 2), (5, 5)])
def test_as_many_answers_are_under_way_as_the_engine_runs_or_as_is_said(running: int, most: int) -> None:
    async def scene(house: House) -> None:
        await house.kill()
        house.engine.info = replace(house.engine.info, at_once=3)
        house.build()
        await house.open()
        house.engine.seconds = 5
        for channel in "abcdefgh":
            await house.say("hello", channel=channel)
        await asyncio.sleep(1)
        assert len(house.engine.prompts) == most
        await asyncio.sleep(30)
        assert house.states() == ["answered"] * 8

    play(scene, limits=QueueLimits(running=running))


def test_what_waits_goes_with_a_channel_that_moves() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 1
        await house.say("one", "two", "three")
        await asyncio.sleep(0.5)
        await house.chat.rekey(house.message("").channel, Channel("test", "moved"))
        await asyncio.sleep(10)
        assert house.states() == ["answered"] * 3
        assert house.engine.prompts[-1] == ["one", "re one", "two", "re two", "three"]

    play(scene)


def test_what_is_said_where_a_channel_moved_waits_for_its_answer_which_keeps_its_memory() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 1
        await house.say("zero")
        await asyncio.sleep(2)
        house.engine.script = [Failed("NaN")]
        await house.say("one")
        await asyncio.sleep(0.5)
        await house.chat.rekey(house.message("").channel, Channel("test", "moved"))
        await house.say("two", channel="moved")
        await asyncio.sleep(10)
        assert house.platform.texts() == ["re zero", "re one", "re two"]
        assert house.engine.prompts[2:] == [["zero", "re zero", "one"], ["zero", "re zero", "one", "re one", "two"]]

    play(scene)


def test_reset_does_not_wait_for_an_engine_that_is_away() -> None:
    async def scene(house: House) -> None:
        async def forget(session: str) -> None:
            await asyncio.Event().wait()

        house.engine.forget = forget  # type: ignore[method-assign]
        await house.say("one")
        await asyncio.sleep(2)
        async with asyncio.timeout(1):
            await house.chat.reset(house.message("").channel)
        await house.say("two")
        await asyncio.sleep(2)
        assert house.engine.prompts[-1] == ["two"]

    play(scene)


def test_who_is_cancelled_while_a_message_is_stored_leaves_it_to_be_answered() -> None:
    async def scene(house: House) -> None:
        receive, stored = house.chat.journal.receive, asyncio.Event()

        async def slowly(*messages: Message, **more: Any) -> Any:
            found = await receive(*messages, **more)
            stored.set()
            await asyncio.sleep(1)
            return found

        house.chat.journal.receive = slowly  # type: ignore[method-assign]
        message = house.message("one")
        hearing = asyncio.create_task(house.chat.receive(message))
        await stored.wait()
        hearing.cancel()
        await asyncio.sleep(5)
        await house.chat.receive(message)  # the platform gives it again
        await asyncio.sleep(5)
        assert house.states() == ["answered"] and house.platform.texts() == ["re one"]

    play(scene)


def test_too_many_are_shed_with_one_polite_line_a_minute() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 1
        await house.say("one")
        await asyncio.sleep(0.5)
        await house.say("two", "three", "four")
        await asyncio.sleep(10)
        assert house.states() == ["answered", "answered", "shed", "shed"]
        assert house.platform.texts().count(BUSY) == 1
        assert [t for t in house.platform.texts() if t != BUSY] == ["re one", "re two"]
        for told in (1, 1, 2):
            await house.say("more")
            await asyncio.sleep(0.5)
            await house.say("and more", "too many")
            await asyncio.sleep(25)
            assert (house.states()[-1], house.platform.texts().count(BUSY)) == ("shed", told)

    play(scene, limits=QueueLimits(per_channel=1))


def test_of_what_was_missed_the_newest_is_answered_and_nobody_is_told() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 1
        await house.chat.receive(*(replace(house.message(str(n)), missed=True) for n in range(5)))
        await house.chat.receive(replace(house.message("5"), missed=True))  # "3" is under way
        await house.chat.receive(house.message("6"), house.message("7"), house.message("8"))
        await asyncio.sleep(10)
        assert house.states() == [*["shed"] * 3, "answered", *["shed"] * 2, *["answered"] * 2, "shed"]
        assert [text for text in house.platform.texts() if text != BUSY] == ["re 3", "re 6", "re 7"]
        assert house.platform.texts().count(BUSY) == 1, "to whom is here"

    play(scene, limits=QueueLimits(per_channel=2))


def test_pollers_pause_above_80_percent_and_go_on_below_50() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 1
        for number in range(10):
            await house.say("hi", channel=str(number))
        paused = asyncio.create_task(house.chat.paused())
        await asyncio.sleep(2.5)
        assert not paused.done()
        await asyncio.sleep(4)
        assert paused.done()

    play(scene, limits=QueueLimits(total=10, running=1))


def test_a_full_or_restarting_engine_is_waited_for() -> None:
    async def scene(house: House) -> None:
        house.engine.script = [QueueFull("full"), EngineClosed("restarting"), EngineClosed("restarting")]
        await house.say("hi")
        await asyncio.sleep(20)
        assert (house.states(), house.platform.texts()) == (["answered"], ["re hi"])

    play(scene)


def test_a_request_that_fails_three_times_ends_with_an_apology_and_others_go_on() -> None:
    async def scene(house: House) -> None:
        house.engine.script = [Failed("NaN")] * 3
        await house.say("poison")
        await asyncio.sleep(5)
        await house.say("fine")
        await asyncio.sleep(5)
        assert house.states() == ["failed", "answered"]
        assert house.platform.texts() == [SORRY, "re fine"]
        assert len(set(house.engine.seeds)) == 4, "each attempt draws anew"
        assert house.engine.prompts[-1] == ["fine"], "an apology is no part of the history"

    play(scene)


def test_late_answers_expire_silently_waiting_or_under_way() -> None:
    async def scene(house: House) -> None:
        house.engine.script = [EngineClosed("gone")] * 1000
        await house.say("one", "two")
        await asyncio.sleep(15)
        assert (house.states(), house.platform.texts()) == (["expired", "expired"], [])

    play(scene, limits=QueueLimits(deadline=10))


def test_what_expires_together_is_closed_together() -> None:
    async def scene(house: House) -> None:
        house.engine.script = [EngineClosed("gone")] * 10_000
        await house.chat.receive(*(house.message("one", channel=str(n)) for n in range(200)))
        await asyncio.sleep(11.5)
        assert house.states() == ["expired"] * 200

    play(scene, limits=QueueLimits(deadline=10, running=1))


def test_what_another_process_has_closed_is_not_counted_here() -> None:
    def expired() -> float:
        return (
            REGISTRY.get_sample_value("palaver_messages_finished_total", {"platform": "test", "state": "expired"})
            or 0.0
        )

    async def scene(house: House) -> None:
        house.engine.script, before = [EngineClosed("gone")] * 10_000, expired()
        await house.say("one", "two")
        await asyncio.sleep(5)
        house.disk.rows[1].state = "cancelled"
        await asyncio.sleep(10)
        assert house.states() == ["expired", "cancelled"] and expired() == before + 1

    play(scene, limits=QueueLimits(deadline=10))


def test_the_log_counts_what_expires_and_is_not_flooded(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(house: House) -> None:
        house.engine.script = [EngineClosed("gone")] * 10_000
        for _ in range(20):
            await house.say("one", "two", channel="b")
            await house.say("one")
            await asyncio.sleep(1)
        await asyncio.sleep(30)
        assert house.states() == ["expired"] * 60

    play(scene, limits=QueueLimits(deadline=5, per_channel=100, per_user=100))
    lines = [record.getMessage() for record in caplog.records]
    assert 3 <= len(lines) <= 5, "one in ten seconds, and none for each message"
    assert (
        sum(int(re.findall(r"5 s: (\d+), of test:b \d+, test:a \d+ \(the engine: gone\)$", line)[0]) for line in lines)
        == 60
    )


def test_typing_shows_while_an_answer_is_made_and_no_longer() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 9
        await house.say("hi")
        await asyncio.sleep(30)
        assert [round(at) for at, _ in house.platform.typed] == [0, 4, 8]

    play(scene)


def test_who_waits_for_seconds_sees_typing_and_the_place_in_line() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 6
        for channel in "abcd":
            await house.say("hi", channel=channel)
        await asyncio.sleep(4)
        assert {channel.id for _, channel in house.platform.typed} == set("abcd")
        assert [note.split(" in line, about ")[0] for note in house.platform.told] == [
            "You are first",
            "You are second",
            "You are third",
        ]
        await asyncio.sleep(30)
        assert house.platform.texts() == ["re hi"] * 4, "a place in line is no message"

    play(scene, limits=QueueLimits(running=1))


def test_drain_finishes_what_is_under_way_and_leaves_the_rest_for_the_next_start() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 2
        await house.say("one", "two")
        await asyncio.sleep(1)
        await house.chat.drain(10)
        assert house.platform.texts() == ["re one"] and house.states() == ["answered", "waiting"]
        await house.chat.receive(house.message("three"))
        await house.kill()
        house.build()
        await house.open()
        await asyncio.sleep(10)
        assert house.platform.texts() == ["re one", "re two", "re three"]

    play(scene)


def test_a_drain_takes_no_longer_than_it_may() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds, house.platform.way = 8, 100
        await house.say("one")
        began = house.loop.time()
        await house.chat.drain(10)
        assert house.loop.time() - began < 10 + LAST + 1
        assert [sent.reply.state for sent in house.disk.replies] == ["sending"]

    play(scene)


@pytest.mark.parametrize("wrong", [timedelta(), timedelta(days=-1)])
def test_what_a_start_takes_up_expires_when_it_is_due_and_by_no_wrong_clock_later(wrong: timedelta) -> None:
    async def scene(house: House) -> None:
        house.engine.script = [EngineClosed("gone")] * 10_000
        await house.say("one")
        await asyncio.sleep(40)
        await house.kill()
        house.build()
        house.chat._now = lambda: house.loop.wall() + wrong
        await house.open()
        await asyncio.sleep(65 if wrong else 25)
        assert house.states() == ["expired"]

    play(scene)


def test_after_a_long_night_the_newest_question_is_answered() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 1000
        await house.say("one", "two", "three")
        await house.kill()
        await asyncio.sleep(3600)
        house.engine.seconds = 1
        house.build()
        await house.open()
        await asyncio.sleep(10)
        assert house.states() == ["expired", "expired", "answered"]
        assert house.platform.texts() == ["re three"]

    play(scene)


def test_what_no_start_could_answer_ends_with_an_apology() -> None:
    async def scene(house: House) -> None:
        house.engine.seconds = 1000
        await house.say("one")
        for _ in range(4):  # the first time it has not been tried yet
            assert house.states() == ["waiting"]
            await house.kill()
            await asyncio.sleep(3600)
            house.build()
            await house.open()
        await asyncio.sleep(10)
        assert (house.states(), house.platform.texts()) == (["failed"], [SORRY])

    play(scene)
