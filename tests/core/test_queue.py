"""First come first served in a channel, round-robin between channels, everything bounded."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.messages import Author, Channel, Message, Request
from core.queue import RequestQueue
from core.settings import QueueLimits

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def request(row: int, channel: str = "a", user: str = "u", server: str = "s", text: str = "hi") -> Request:
    message = Message(Channel("test", channel), str(row), Author(user, user), text, NOW, server=server)
    return Request(row, message, NOW + timedelta(seconds=60))


async def taken(queue: RequestQueue) -> Request:
    return await asyncio.wait_for(queue.take(), 1)


async def test_one_channel_is_answered_in_order_one_at_a_time() -> None:
    queue = RequestQueue(QueueLimits())
    for row in (1, 2, 3):
        queue.put(request(row))
    first = await taken(queue)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(queue.take(), 0.01)
    queue.done(first)
    second = await taken(queue)
    assert (first.row, second.row, len(queue)) == (1, 2, 1)


async def test_a_busy_channel_waits_for_its_turn() -> None:
    queue = RequestQueue(QueueLimits())
    for row in range(10):
        queue.put(request(row, "loud"))
    queue.put(request(10, "calm"))
    order = []
    for _ in range(4):
        got = await taken(queue)
        order.append(got.message.channel.id)
        queue.done(got)
    assert order == ["loud", "calm", "loud", "loud"]


async def test_what_was_stored_first_goes_first_whoever_woke_first() -> None:
    queue = RequestQueue(QueueLimits())
    for row in (2, 1, 3):
        queue.put(request(row))
    assert [r.row for r in queue] == [1, 2, 3]


@pytest.mark.parametrize("bound", ["total", "per_channel", "per_user", "per_server"])
async def test_every_bound_is_named(bound: str) -> None:
    queue = RequestQueue(QueueLimits(**{bound: 2}))
    for row in (1, 2):
        assert queue.full(request(row)) == ""
        queue.put(request(row))
    assert queue.full(request(3)) == bound
    assert queue.full(request(3, channel="b", user="v", server="t")) == ("total" if bound == "total" else "")


async def test_direct_messages_share_no_server() -> None:
    queue = RequestQueue(QueueLimits(per_server=1))
    queue.put(request(1, "a", "u", server=""))
    assert queue.full(request(2, "b", "v", server="")) == ""


async def test_edit_and_delete_reach_what_waits() -> None:
    queue = RequestQueue(QueueLimits())
    queue.put(request(1))
    queue.put(request(2))
    assert queue.replace(request(2, text="edited")) and not queue.replace(request(9))
    assert queue.remove(1) and not queue.remove(1)
    assert (await taken(queue)).message.text == "edited"


async def test_who_is_next_in_the_round() -> None:
    queue = RequestQueue(QueueLimits())
    for row, channel in ((1, "a"), (2, "a"), (3, "b"), (4, "c")):
        queue.put(request(row, channel))
    assert [waiting.row for waiting in queue.next(2)] == [1, 3]
    queue.done(await taken(queue))
    assert [waiting.row for waiting in queue.next(9)] == [3, 4, 2]


async def test_a_channel_that_moves_waits_for_the_answer_under_way() -> None:
    queue = RequestQueue(QueueLimits())
    for row, channel in ((1, "old"), (2, "old"), (3, "new")):
        queue.put(request(row, channel))
    first = await taken(queue)
    queue.move(first.message.channel, Channel("test", "new"))
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(queue.take(), 0.01)
    queue.done(first)
    second = await taken(queue)
    assert (second.row, second.message.channel.id, [r.row for r in queue]) == (2, "new", [3])


@given(st.lists(st.tuples(st.sampled_from("ptdrxm"), st.integers(0, 3), st.integers(1, 40)), max_size=80))
def test_the_books_always_agree(steps: list[tuple[str, int, int]]) -> None:
    async def run() -> None:
        queue, held, rows = RequestQueue(QueueLimits()), [], set[int]()
        for step, channel, row in steps:
            if step == "p" and row not in rows:
                rows.add(row)
                queue.put(request(row, str(channel)))
            elif step == "t" and queue._turns:
                held.append(await queue.take())
            elif step == "d" and held:
                queue.done(held.pop(0))
            elif step == "r":
                queue.remove(row)
            elif step == "m" and row % 4 != channel:
                queue.move(Channel("test", str(channel)), Channel("test", str(row % 4)))
            elif step == "x":
                queue.take_out(lambda r, bound=row: r.row < bound)  # type: ignore[misc]
            queue.check_integrity()

    asyncio.run(run())
