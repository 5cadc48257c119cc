"""Deliveries, scene by scene on virtual time."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from core.chat import BUSY
from core.delivery import MaybeSent, NotSent, Refused, RetryAfter
from core.messages import Channel
from core.settings import DeliveryRules, QueueLimits
from tests.simulation.house import House, late, play

A, B = Channel("test", "a"), Channel("test", "b")


def replies(house: House) -> list[str]:
    return [sent.reply.state for sent in house.disk.replies]


def test_what_was_not_sent_is_tried_again() -> None:
    async def scene(house: House) -> None:
        house.platform.script[A] = [NotSent("no route")] * 3
        await house.say("hi")
        await asyncio.sleep(30)
        assert (house.platform.texts(), replies(house)) == (["re hi"], ["sent"])
        assert house.disk.replies[0].reply.tries == 4

    play(scene)


@pytest.mark.parametrize(("found", "copies"), [("s1", 1), ("", 2), (None, 2)])
def test_an_attempt_in_doubt_is_looked_up_before_it_is_repeated(found: str | None, copies: int) -> None:
    async def scene(house: House) -> None:
        house.platform.script[A] = [MaybeSent("reset")]
        house.platform.arrives_anyway, house.platform.found = True, found
        await house.say("hi")
        await asyncio.sleep(30)
        assert (house.platform.texts(), replies(house)) == (["re hi"] * copies, ["sent"])

    play(scene)


@pytest.mark.parametrize(
    ("found", "sent", "state"),
    [(None, [], "abandoned"), ("", ["re hi"], "sent")],
    ids=["nobody can tell", "it did not arrive"],
)
def test_by_setting_an_attempt_in_doubt_is_abandoned(found: str | None, sent: list[str], state: str) -> None:
    async def scene(house: House) -> None:
        house.platform.script[A], house.platform.found = [MaybeSent("reset")], found
        await house.say("hi")
        await asyncio.sleep(30)
        assert (house.platform.texts(), replies(house)) == (sent, [state])

    play(scene, rules=DeliveryRules(in_doubt="abandon"))


def test_where_it_may_not_be_looked_up_an_attempt_stays_in_doubt() -> None:
    async def scene(house: House) -> None:
        house.platform.script[A], house.platform.found = [MaybeSent("reset")], ""
        house.platform.lookups = [Refused("may not read")]
        await house.say("hi")
        await asyncio.sleep(30)
        assert (house.platform.texts(), replies(house)) == ([], ["abandoned"])

    play(scene, rules=DeliveryRules(in_doubt="abandon"))


def test_a_look_up_that_fails_or_must_wait_is_repeated_until_something_is_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scene(house: House) -> None:
        house.platform.script[A], house.platform.arrives_anyway, house.platform.found = [MaybeSent("reset")], True, "s1"
        house.platform.lookups = [NotSent("no route"), MaybeSent("500"), RetryAfter(100)]
        await house.say("hi")
        await asyncio.sleep(99)
        assert replies(house) == ["sending"], "the platform wants no calls"
        await asyncio.sleep(10)
        assert (house.platform.texts(), replies(house)) == (["re hi"], ["sent"])

    play(scene)
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "a bug would be told"


def test_what_another_process_has_settled_is_not_sent_and_the_next_goes_out() -> None:
    async def scene(house: House) -> None:
        house.platform.limit, house.platform.wait = 3, 10.0
        await house.say("x", "y")  # two parts each
        await asyncio.sleep(5)
        await house.journal.sent((await house.journal.due())[0], "another's")
        await asyncio.sleep(60)
        assert (house.platform.texts(), replies(house)) == (["x", "re ", "y"], ["sent"] * 4)

    play(scene)


def test_what_was_certainly_not_sent_is_not_in_doubt_after_a_death() -> None:
    async def scene(house: House) -> None:
        house.platform.script[A] = [RetryAfter(100)]
        await house.say("hi")
        await asyncio.sleep(50)
        await house.kill()
        house.build()
        await house.open()
        await asyncio.sleep(10)
        assert (house.platform.texts(), replies(house)) == (["re hi"], ["sent"])

    play(scene, rules=DeliveryRules(in_doubt="abandon"))


@pytest.mark.parametrize("call", ["turn", "send"])
def test_what_is_cancelled_in_a_bot_is_tried_again_and_silences_no_channel(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(house: House) -> None:
        calls, works = [1], getattr(house.platform, call)

        async def cancelled_once(*args: object) -> object:
            if calls:
                raise asyncio.CancelledError(calls.pop())
            return await works(*args)

        monkeypatch.setattr(house.platform, call, cancelled_once)
        await house.say("one", "two")
        await asyncio.sleep(30)
        assert (house.platform.texts(), replies(house)) == (["re one", "re two"], ["sent"] * 2)

    play(scene)


def test_a_stop_waits_for_what_is_on_its_way_and_begins_nothing_more() -> None:
    async def scene(house: House) -> None:
        house.platform.way = 3.0
        await house.say("one", "two")
        await asyncio.sleep(1)
        assert replies(house) == ["sending", "pending"]
        assert not await house.courier.drain(1.0)
        await house.courier.aclose()
        assert (house.platform.texts(), replies(house)) == (["re one"], ["sent", "pending"])

    play(scene)


def test_a_stop_waits_for_ever_for_nothing() -> None:
    async def scene(house: House) -> None:
        house.platform.way = 1000.0
        await house.say("one")
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        assert not await house.courier.drain(1.0)
        await house.courier.aclose()
        assert asyncio.get_running_loop().time() - began < 10
        assert (house.platform.texts(), replies(house)) == ([], ["sending"])

    play(scene)


def test_what_waits_for_its_turn_is_not_in_doubt_when_stopped() -> None:
    async def scene(house: House) -> None:
        house.platform.wait = 100.0
        await house.say("one")
        await asyncio.sleep(50)
        assert not await house.courier.drain(1.0)
        await house.courier.aclose()
        assert (house.platform.texts(), replies(house)) == ([], ["pending"])

    play(scene)


def test_one_chat_that_must_wait_delays_no_other_and_keeps_its_order() -> None:
    async def scene(house: House) -> None:
        house.platform.script[A] = [RetryAfter(35)]
        await house.say("one", "two")
        await house.say("other", channel="b")
        await asyncio.sleep(30)
        assert house.platform.texts() == ["re other"]
        await asyncio.sleep(10)
        assert house.platform.texts() == ["re other", "re one", "re two"]

    play(scene)


def test_what_piles_up_while_a_chat_must_wait_is_left_in_the_journal_and_comes_in_order() -> None:
    async def scene(house: House) -> None:
        house.courier.in_memory = 3
        house.platform.script[A] = [RetryAfter(100)]
        texts = [f"number {number}" for number in range(40)]
        for text in texts:
            await house.say(text)
            await asyncio.sleep(2)
            assert len(house.courier._lines[A]) <= 3 and len(house.courier._ends) <= 3
        await house.say("other", channel="b")
        await asyncio.sleep(60)
        assert [text for text in house.platform.texts() if text != "re other"] == [f"re {text}" for text in texts]
        assert replies(house) == ["sent"] * 41
        assert not house.courier._lines and not house.courier._ends and not house.courier._behind

    play(scene, limits=QueueLimits(per_channel=100))


def test_what_a_chat_cannot_take_is_shed_and_nobody_waits_there_for_long() -> None:
    async def scene(house: House) -> None:
        house.platform.wait, house.courier.in_memory = 3.0, 4
        for number in range(100):
            await house.say(str(number))
            await asyncio.sleep(0.5)
        await asyncio.sleep(65)
        texts = house.platform.texts()
        assert [text for text in texts if text != BUSY] == [f"re {n}" for n in range(100) if f"re {n}" in texts]
        assert len(texts) == len(house.disk.replies) < 40 and BUSY in texts
        await house.say("next")
        await asyncio.sleep(5)
        assert house.platform.texts()[-1] == "re next" and house.courier.unsent(A) == 0

    play(scene)


def test_topics_share_what_their_chat_can_take() -> None:
    async def scene(house: House) -> None:
        one_at_a_time = asyncio.Lock()

        async def turn(channel: Channel) -> None:
            async with one_at_a_time:
                await asyncio.sleep(3.0)

        house.platform.turn = turn  # type: ignore[method-assign]
        for number in range(100):
            await house.say(str(number), channel=f"-1:{number % 10}" if number % 10 else "-1")
            await asyncio.sleep(0.5)
        await asyncio.sleep(65)
        texts = house.platform.texts()
        assert len(texts) == len(house.disk.replies) < 40 and 1 <= texts.count(BUSY) <= 2
        assert house.courier.unsent(Channel("test", "-1:5")) == 0

    play(scene)


@pytest.mark.parametrize(("piled_up", "meanwhile"), [(3, 1), (4, 1), (5, 2), (3, 3)])
def test_what_is_answered_while_the_journal_is_read_is_neither_lost_nor_doubled(piled_up: int, meanwhile: int) -> None:
    async def scene(house: House) -> None:
        house.courier.in_memory = 2
        house.platform.script[A] = [RetryAfter(30)]
        due = house.journal.due

        async def slow(*which: object) -> object:
            found = await due(*which)
            await asyncio.sleep(5)
            return found

        house.journal.due = slow
        texts = [f"number {number}" for number in range(piled_up + meanwhile)]
        await house.say(*texts[:piled_up])
        await asyncio.sleep(32)
        for text in texts[piled_up:]:
            await house.say(text)
            await asyncio.sleep(1)
        await asyncio.sleep(60)
        assert house.platform.texts() == [f"re {text}" for text in texts]
        assert replies(house) == ["sent"] * len(texts) and not house.courier._ends

    play(scene)


def test_what_the_journal_gave_before_it_is_handed_over_stands_in_line_once() -> None:
    async def scene(house: House) -> None:
        house.courier.in_memory, house.platform.way = 3, 2.0
        house.platform.script[A] = [RetryAfter(10)]
        await house.say("one", "two", "three", "four")  # the fourth waits in the journal
        await asyncio.sleep(10)
        house.journal.answer = late(house.journal.answer, 10)  # stored before the line is read on, heard of after
        await house.say("five")
        await asyncio.sleep(30)
        await house.say("six")
        await asyncio.sleep(30)
        assert house.platform.texts() == [f"re {text}" for text in ("one", "two", "three", "four", "five", "six")]
        assert replies(house) == ["sent"] * 6 and not house.courier._ends

    play(scene)


@pytest.mark.parametrize("in_memory", [1, 2, 20])
@pytest.mark.parametrize("thawed", [False, True])
def test_what_piled_up_moves_with_its_chat(in_memory: int, thawed: bool) -> None:
    async def scene(house: House) -> None:
        house.courier.in_memory = in_memory
        house.platform.script[A] = [RetryAfter(30)]
        await house.say(*(f"number {number}" for number in range(6)))
        await asyncio.sleep(30.5 if thawed else 10)
        await house.say("late")  # its answer is under way when its chat moves
        await asyncio.sleep(0.05)
        await house.chat.rekey(A, B)
        await house.say("more", channel="b")
        await asyncio.sleep(60)
        numbered = [f"re number {number}" for number in range(6)]
        assert [text for text in house.platform.texts() if text in numbered] == numbered
        assert {*house.platform.texts()} == {*numbered, "re late", "re more"} and len(house.platform.texts()) == 8
        assert replies(house) == ["sent"] * 8
        assert not house.courier._lines and not house.courier._ends and not house.courier._behind

    play(scene)


def test_what_piled_up_is_delivered_in_order_after_a_restart() -> None:
    async def scene(house: House) -> None:
        house.platform.script[A] = [RetryAfter(500)]
        await house.say(*(f"number {number}" for number in range(20)))
        await asyncio.sleep(20)
        await house.kill()
        house.build()
        house.courier.in_memory = 3
        house.platform.script.clear()
        await house.open()
        await house.say("more")
        await asyncio.sleep(60)
        assert house.platform.texts() == [*(f"re number {number}" for number in range(20)), "re more"]

    play(scene)


def test_a_refused_part_takes_the_later_parts_with_it_and_nothing_else() -> None:
    async def scene(house: House) -> None:
        house.platform.limit = 3
        house.platform.script[A] = [Refused("blocked")]
        await house.say("x")  # "re x" is two parts
        await asyncio.sleep(5)
        await house.say("y")
        await asyncio.sleep(5)
        assert replies(house) == ["abandoned", "abandoned", "sent", "sent"]
        assert house.engine.prompts[-1] == ["y"], "what nobody read was not said"

    play(scene)


def test_a_death_after_a_part_was_refused_leaves_no_tail_to_the_next_start() -> None:
    async def scene(house: House) -> None:
        house.platform.limit = 3
        house.platform.script[A] = [Refused("blocked")]
        house.journal.abandon = late(house.journal.abandon, 100)
        await house.say("x")
        await asyncio.sleep(5)
        await house.kill()
        house.build()
        await house.open()
        await asyncio.sleep(5)
        assert (house.platform.texts(), replies(house)) == ([], ["abandoned"] * 2)

    play(scene)


def test_a_part_given_up_in_doubt_may_have_arrived_and_the_later_ones_follow() -> None:
    async def scene(house: House) -> None:
        house.platform.limit = 3
        house.platform.script[A], house.platform.arrives_anyway = [MaybeSent("reset")], True
        await house.say("x")
        await asyncio.sleep(5)
        assert (house.platform.texts(), replies(house)) == (["re ", "x"], ["abandoned", "sent"])

    play(scene, rules=DeliveryRules(in_doubt="abandon"))


def test_a_refused_message_takes_none_with_it_that_stands_behind_it() -> None:
    async def scene(house: House) -> None:
        house.platform.limit = 3
        house.platform.script[A] = [RetryAfter(5), Refused("blocked")]
        await house.say("x", "y")
        await asyncio.sleep(30)
        assert replies(house) == ["abandoned", "abandoned", "sent", "sent"], "the parts of one message"

    play(scene)


def test_a_reply_nobody_waits_for_any_more_is_given_up() -> None:
    async def scene(house: House) -> None:
        house.platform.script[A] = [NotSent("down")] * 10_000
        await house.say("hi")
        await asyncio.sleep(200)
        assert (replies(house), house.platform.texts()) == (["abandoned"], [])

    play(scene, rules=DeliveryRules(patience=60))


def test_what_is_too_late_when_a_platform_is_back_is_given_up() -> None:
    async def scene(house: House) -> None:
        for number in range(100):  # each waits for the others before it may try again
            house.platform.script[Channel("test", str(number))] = [NotSent("down")] * 10_000
            await house.say("hi", channel=str(number))
        await asyncio.sleep(90)
        house.platform.script.clear()
        await asyncio.sleep(900)
        assert (replies(house), house.platform.texts()) == (["abandoned"] * 100, [])

    play(scene, rules=DeliveryRules(patience=60))


def test_a_restart_makes_no_reply_younger() -> None:
    async def scene(house: House) -> None:
        house.platform.script[A] = [NotSent("down")] * 10_000
        await house.say("hi")
        await asyncio.sleep(40)
        await house.kill()
        house.build()
        await house.open()
        await asyncio.sleep(55)
        assert (replies(house), house.platform.texts()) == (["abandoned"], [])

    play(scene, rules=DeliveryRules(patience=60))


def test_a_bug_in_a_bot_does_not_silence_the_channel() -> None:
    async def scene(house: House) -> None:
        house.platform.script[A] = [KeyError("bug"), ValueError("bug")]
        house.platform.found = ""
        await house.say("hi")
        await asyncio.sleep(30)
        assert (house.platform.texts(), replies(house)) == (["re hi"], ["sent"])

    play(scene)


def test_a_bug_after_the_send_does_not_double_it() -> None:
    async def scene(house: House) -> None:
        house.platform.script[A], house.platform.arrives_anyway, house.platform.found = [KeyError("bug")], True, "s1"
        await house.say("hi")
        await asyncio.sleep(30)
        assert (house.platform.texts(), replies(house)) == (["re hi"], ["sent"])

    play(scene)


def test_a_platform_that_is_down_is_asked_by_few() -> None:
    async def scene(house: House) -> None:
        for number in range(50):
            house.platform.script[Channel("test", str(number))] = [NotSent("down")] * 100
            await house.say("hi", channel=str(number))
        await asyncio.sleep(60)
        attempts = sum(sent.reply.tries for sent in house.disk.replies)
        assert attempts < 250, "fifty channels, a minute: the circuit is open"
        house.platform.script.clear()
        await asyncio.sleep(40)
        assert replies(house) == ["sent"] * 50

    play(scene)


def test_a_platform_that_is_down_is_looked_at_by_few() -> None:
    async def scene(house: House) -> None:
        house.platform.arrives_anyway, house.platform.found = True, "s1"
        house.platform.lookups = [NotSent("down")] * 1000
        for number in range(50):
            house.platform.script[Channel("test", str(number))] = [MaybeSent("reset")]
            await house.say("hi", channel=str(number))
        await asyncio.sleep(60)
        assert len(house.platform.lookups) > 800, "fifty channels, a minute: the circuit is open"
        house.platform.lookups.clear()
        await asyncio.sleep(40)
        assert replies(house) == ["sent"] * 50 and house.platform.texts() == ["re hi"] * 50

    play(scene)


def test_chats_that_always_fail_delay_no_other() -> None:
    async def scene(house: House) -> None:
        for number in range(8):
            house.platform.script[Channel("test", str(number))] = [MaybeSent("500")] * 1000
            await house.say("hi", channel=str(number))
        for number in range(8):
            await asyncio.sleep(100)
            await house.say(f"calm {number}")
            await asyncio.sleep(1)
            assert house.platform.texts()[-1] == f"re calm {number}"

    play(scene)


@pytest.mark.parametrize("seconds", [float("nan"), -3, float("inf"), 10**400, None, "soon", "", "-3", "nan", [5]])
def test_a_wait_that_is_no_number_is_a_second(seconds: object) -> None:
    assert RetryAfter(seconds).seconds == 1


@pytest.mark.parametrize(("seconds", "wait"), [(2.5, 2.5), ("2.5", 2.5), ("0", 0), (3e7, 3600), ("31536000", 3600)])
def test_a_wait_is_kept_and_a_wait_of_a_year_is_an_hour(seconds: object, wait: float) -> None:
    assert RetryAfter(seconds).seconds == wait


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_jumps_neither_hurries_nor_delays(days: int) -> None:
    async def scene(house: House) -> None:
        house.platform.script[A] = [NotSent("down")] * 3
        await house.say("hi")
        await asyncio.sleep(0.2)
        true = house.loop.wall
        house.journal._now = house.courier._now = house.chat._now = lambda: true() + timedelta(days=days)
        await asyncio.sleep(30)
        await house.say("more")
        await asyncio.sleep(30)
        assert replies(house) == ["sent", "sent"]

    play(scene)
