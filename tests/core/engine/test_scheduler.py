"""Scheduler and KV cache, without a model: a counting machine draws the tokens."""

from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.engine.base import Cancelled, Completion, EngineError, Failed, QueueFull, SamplingParams
from core.engine.guesses import MOST_CONTEXTS, PROBE, Phrases
from core.engine.kv_cache import ROUND, KVCache, common_prefix
from core.engine.scheduler import GUESS, PIECE, Drawn, Scheduler
from core.engine.sequence import Request, Sequence, Span

EOS = 9


def make_scheduler(total: int = 4 * ROUND, **options: Any) -> Scheduler:
    limits: dict[str, Any] = {"max_running": 8, "token_budget": 64, "max_waiting": 100, "guess": GUESS} | options
    model: dict[str, Any] = {"max_positions": 2 * ROUND, "eos_id": EOS}
    return Scheduler(KVCache(total), draw_seed=lambda: 5, guesses=Phrases(), **model, **limits)


class Client:
    """Asks, and remembers how it ended."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.ends: dict[int, list[Completion] | EngineError] = {}

    def ask(self, prompt: list[int], session: str = "", deadline: float | None = None, **params: Any) -> Request:
        number = len(self.ends)
        self.ends[number] = []

        def deliver(end: list[Completion] | EngineError) -> None:
            assert self.ends[number] == [], "delivered twice"
            self.ends[number] = end

        request = Request(prompt, SamplingParams(**({"max_tokens": 5} | params)), session, deadline, deliver)
        self.scheduler.add(request)
        return request

    def end(self, number: int = -1) -> Any:
        return list(self.ends.values())[number]


def next_token(tokens: list[int], seed: int = 0) -> int:
    """A stand-in for a model: depends on all that stands before."""
    return random.Random(f"{seed} {tokens}").randrange(EOS + 1)


def draw(span: Span, bad: frozenset[int]) -> Drawn | None:
    """As the runner: token after token while the guess is right and the numbers are good."""
    tokens, drawn = list(span.sequence.tokens), Drawn()
    for guessed in (*span.guess, None):
        if bad & set(tokens):
            break
        drawn.append((next_token(tokens), -1.0))
        tokens.append(drawn[-1][0])
        if tokens[-1] != guessed:
            break
    return drawn or None


def step(scheduler: Scheduler, bad: frozenset[int] = frozenset()) -> list[Span]:
    """Run what is scheduled; prompts that hold an id of `bad` have bad numbers."""
    kept = list(scheduler.cache.idle)
    spans = scheduler.schedule()
    if ahead := [s for s in spans if s.sequence.max_new == 0]:
        assert ahead == spans and len(spans) == 1 and not scheduler.waiting, "somebody waits for a preparation"
        assert {*scheduler.cache.idle, ahead[0].sequence.slot} >= {*kept}, "a preparation drove something out"
        assert ahead[0].count <= PIECE
    for span in spans:
        assert span.sequence.slot
        assert len(span.sequence.slot.tokens) == span.start
        span.sequence.slot.copy_from = None  # the runner has copied it
    scheduler.update(spans, [draw(span, bad) for span in spans if span.is_last])
    scheduler.check_integrity()
    return spans


def finish(scheduler: Scheduler) -> None:
    for _ in range(10_000):
        if not step(scheduler):
            return
    raise AssertionError("it never ends")


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens and (token := next_token(tokens)) != EOS:
        tokens.append(token)
    return tokens[len(prompt) :]


def test_decode_rows_come_first_and_prompts_are_cut() -> None:
    scheduler = make_scheduler(token_budget=20)
    client = Client(scheduler)
    client.ask([1, 2, 4], max_tokens=100)
    step(scheduler)
    client.ask([1] * 50)
    client.ask([2] * 30)
    shapes = [[(s.start, s.count) for s in step(scheduler)] for _ in range(3)]
    assert shapes == [[(3, 1), (0, 19)], [(4, 1), (19, 19)], [(5, 1), (38, 12), (0, 7)]]


def test_first_come_first_served() -> None:
    scheduler = make_scheduler(max_running=1)
    client = Client(scheduler)
    for i in range(5):
        client.ask([i + 1, 2])
    order = []
    while spans := step(scheduler):
        order.append(spans[0].sequence.prompt_len and spans[0].sequence.request.prompt[0])
    assert order == sorted(order)


def test_a_big_request_is_not_overtaken_for_want_of_room() -> None:
    scheduler = make_scheduler(total=2 * ROUND)
    client = Client(scheduler)
    client.ask([1], max_tokens=20)
    step(scheduler)
    client.ask([2] * 200)
    client.ask([3])
    assert {s.sequence.request.prompt[0] for s in step(scheduler)} == {1}
    finish(scheduler)
    assert all(client.ends.values())


def test_idle_slots_leave_in_order_of_last_use() -> None:
    scheduler = make_scheduler(total=3 * ROUND)
    client = Client(scheduler)
    for session in ("a", "b", "c", "a", "d"):
        client.ask([1, 2, 3], session)
        finish(scheduler)
    assert [slot.session for slot in scheduler.cache.idle] == ["c", "a", "d"]


def test_spare_candidates_leave_before_other_sessions() -> None:
    scheduler = make_scheduler(total=5 * ROUND)
    client = Client(scheduler)
    client.ask([1, 2, 4], "a")
    finish(scheduler)
    client.ask([1, 2, 4], "b", n=4)
    finish(scheduler)
    assert [slot.session for slot in scheduler.cache.idle] == ["a", "b", "b", "b", "b"]
    client.ask([1, 2, 4], "c", n=3)
    finish(scheduler)
    assert [slot.session for slot in scheduler.cache.idle] == ["a", "b", "c", "c", "c"]


def test_another_sessions_cache_is_never_used() -> None:
    scheduler = make_scheduler()
    client = Client(scheduler)
    client.ask([1, 2, 3, 4], "a")
    finish(scheduler)
    client.ask([1, 2, 3, 4], "b")
    finish(scheduler)
    client.ask([1, 2, 3, 4])
    finish(scheduler)
    assert [end[0].cached_tokens for end in client.ends.values() if isinstance(end, list)] == [0, 0, 0]


def test_a_forgotten_session_leaves_nothing_even_while_it_runs() -> None:
    scheduler = make_scheduler()
    client = Client(scheduler)
    client.ask([1, 2, 4], "a", max_tokens=50)
    step(scheduler)
    assert scheduler.running
    scheduler.cache.forget("a")
    finish(scheduler)
    assert client.end()
    assert scheduler.cache.used == 0


@pytest.mark.parametrize("forgotten", [False, True])
def test_of_a_reply_under_way_nothing_is_learnt_once_it_is_forgotten(forgotten: bool) -> None:
    scheduler, learnt = make_scheduler(), list[list[int]]()
    scheduler.guesses.learn = lambda ids: learnt.append(list(ids))  # type: ignore[method-assign]
    client = Client(scheduler)
    client.ask([1, 2, 4], "a", max_tokens=50)
    step(scheduler)
    if forgotten:
        scheduler.forget("a")
    finish(scheduler)
    assert client.end() and bool(learnt) != forgotten


def test_bad_numbers_cost_the_session_its_cache_and_one_retry() -> None:
    scheduler = make_scheduler()
    client = Client(scheduler)
    client.ask([1, 2, 3], "a")
    finish(scheduler)
    client.ask([1, 2, 3, 6], "a")
    client.ask([1, 2, 3, 7], "b")
    step(scheduler, bad=frozenset([6]))
    assert all(slot.session != "a" for slot in scheduler.cache.idle)
    finish(scheduler)
    assert client.end(1)[0].token_ids == expected([1, 2, 3, 6], 5)
    client.ask([8, 8], "a", n=3)
    for _ in range(4):
        step(scheduler, bad=frozenset([8]))
    assert isinstance(client.end(), Failed)
    assert not scheduler.running


def test_bad_numbers_cost_the_session_what_another_of_its_prompts_has_left() -> None:
    scheduler = make_scheduler()
    client = Client(scheduler)
    client.ask([1, 2, 3], "a", max_tokens=1)
    client.ask([4, 5, 6], "a")
    step(scheduler)
    assert any(slot.session == "a" for slot in scheduler.cache.idle)
    step(scheduler, bad=frozenset([6]))
    assert all(slot.session != "a" for slot in scheduler.cache.idle)


def test_who_is_computed_again_waits_for_nobody() -> None:
    scheduler = make_scheduler(max_running=1)
    client = Client(scheduler)
    first = client.ask([1, 2, 3])
    client.ask([4, 5])
    step(scheduler, bad=frozenset([3]))
    [span] = step(scheduler)
    assert span.sequence.request is first


def test_deadlines_and_full_queues() -> None:
    scheduler = make_scheduler(max_running=1, max_waiting=2)
    client = Client(scheduler)
    client.ask([1], max_tokens=100)
    step(scheduler)
    client.ask([2], deadline=10.0)
    client.ask([3])
    client.ask([4])
    assert isinstance(client.end(), QueueFull)
    scheduler.expire(9.9)
    assert client.end(1) == []
    scheduler.expire(10.0)
    assert isinstance(client.end(1), Cancelled)
    scheduler.check_integrity()


def test_what_is_to_come_is_prepared_in_pieces_when_nobody_waits() -> None:
    scheduler = make_scheduler()
    client = Client(scheduler)
    client.ask([1, 2, 3], "a")
    finish(scheduler)
    ahead = [4] * 40
    scheduler.prepare("a", ahead)
    client.ask([7], "b", max_tokens=2)
    assert [s.sequence.request.session for s in step(scheduler)] == ["b"]
    while scheduler.running:
        step(scheduler)
    assert [(s.start, s.count) for s in step(scheduler)] == [(0, 16)]
    client.ask([8], "c", max_tokens=1)  # who comes goes first, and what was computed is not lost
    assert [s.sequence.request.session for s in step(scheduler)] == ["c"]
    assert [(s.start, s.count) for _ in range(2) for s in step(scheduler)] == [(16, 16), (32, 8)]
    assert step(scheduler) == []
    client.ask([*ahead, 5], "a")
    finish(scheduler)
    assert client.end()[0].cached_tokens == 40
    assert client.end()[0].token_ids == expected([*ahead, 5], 5)


def test_a_half_prepared_turn_is_used_as_far_as_it_goes() -> None:
    scheduler = make_scheduler()
    client = Client(scheduler)
    client.ask([1, 2, 3], "a")
    finish(scheduler)
    scheduler.prepare("a", [4] * 40)
    step(scheduler)
    client.ask([*[4] * 40, 5], "a")
    finish(scheduler)
    assert client.end()[0].cached_tokens == 16
    assert not scheduler.preparing


def test_a_wrong_guess_leaves_the_old_cache_in_place() -> None:
    scheduler = make_scheduler()
    client = Client(scheduler)
    client.ask([1] * 20, "a")
    finish(scheduler)
    said = client.end()[0].token_ids
    scheduler.prepare("a", [4] * 40)
    finish(scheduler)
    client.ask([*[1] * 20, *said, 5], "a")
    finish(scheduler)
    assert client.end()[0].cached_tokens == 20 + len(said) - 1


def test_nothing_is_prepared_without_free_room_or_for_whom_nothing_is_kept() -> None:
    scheduler = make_scheduler(total=2 * ROUND)
    client = Client(scheduler)
    for session in ("a", "b"):
        client.ask([1, 2, 3], session)
        finish(scheduler)
    for session in ("a", "c"):
        scheduler.prepare(session, [4] * 40)
        assert step(scheduler) == []
    assert [slot.session for slot in scheduler.cache.idle] == ["a", "b"]
    client.ask([1, 2, 3], "a")
    scheduler.prepare("a", [4] * 40)
    scheduler.forget("a")
    scheduler.forget("b")
    finish(scheduler)
    scheduler.prepare("a", [4] * 40)  # a hint that comes too late
    finish(scheduler)
    assert scheduler.cache.used == 0


def test_a_preparation_that_raises_is_dropped() -> None:
    scheduler = make_scheduler()
    client = Client(scheduler)
    client.ask([1, 2, 3], "a")
    finish(scheduler)
    scheduler.prepare("a", [4] * 40)
    [span] = scheduler.schedule()
    scheduler.give_up(span.sequence.request, Failed("the model raised"))
    scheduler.check_integrity()
    assert step(scheduler) == []
    assert [slot.tokens[:3] for slot in scheduler.cache.idle] == [[1, 2, 3]]


def test_common_prefix() -> None:
    assert [common_prefix(a, [1, 2, 3]) for a in ([], [1], [1, 2, 3, 4], [1, 9, 3], [2])] == [0, 1, 3, 1, 0]


class Traffic(RuleBasedStateMachine):
    """Requests come and go in any order; the books stay right and every answer is what the prompt alone decides."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(total=5 * ROUND, max_running=4, token_budget=24, max_waiting=6)
        self.client = Client(self.scheduler)
        self.asked: list[tuple[Request, list[int], int, bool]] = []
        self.bad: frozenset[int] = frozenset()

    @rule(
        prompt=st.lists(st.integers(0, 8), min_size=1, max_size=30),
        long=st.booleans(),
        session=st.sampled_from(["", "a", "b", "c"]),
        max_tokens=st.integers(1, 40),
        n=st.integers(1, 3),
    )
    def ask(self, prompt: list[int], long: bool, session: str, max_tokens: int, n: int) -> None:
        prompt = prompt * 6 if long else prompt
        request = self.client.ask(prompt, session, max_tokens=max_tokens, n=n)
        self.asked.append((request, prompt, max_tokens, False))

    @rule(count=st.integers(1, 12))
    def run(self, count: int) -> None:
        for _ in range(count):
            step(self.scheduler, self.bad)

    @rule(data=st.data())
    @precondition(lambda self: self.asked)
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.asked))[0]
        self.scheduler.give_up(request, Cancelled("by the test"))

    @rule(session=st.sampled_from(["a", "b", "c"]))
    def forget(self, session: str) -> None:
        self.scheduler.forget(session)
        assert session not in self.scheduler.preparing
        assert all(s.session != session for s in (*self.scheduler.cache.idle, *self.scheduler.cache.running))

    @rule(ids=st.lists(st.integers(0, 8), max_size=60), session=st.sampled_from(["a", "b", "c"]))
    def prepare(self, ids: list[int], session: str) -> None:
        self.scheduler.prepare(session, ids)

    @rule()
    def drop_idle(self) -> None:
        self.scheduler.cache.drop_idle()

    @rule(bad=st.frozensets(st.integers(0, 8), max_size=2))
    def spoil(self, bad: frozenset[int]) -> None:
        self.bad = bad

    @invariant()
    def books_are_right(self) -> None:
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        self.bad = frozenset()
        finish(self.scheduler)
        assert not self.scheduler.preparing
        assert not self.scheduler.running and not self.scheduler.waiting and not self.scheduler.cache.running
        for (_, prompt, max_tokens, _), end in zip(self.asked, self.client.ends.values(), strict=True):
            assert end != []
            if isinstance(end, list):
                want = expected(prompt, min(max_tokens, 2 * ROUND - len(prompt)))
                assert [c.token_ids for c in end] == [want] * len(end)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_was_said_before_is_guessed_and_saves_steps() -> None:
    plain, guessing = make_scheduler(guess=0), make_scheduler()
    steps = []
    for scheduler in (plain, guessing):
        client, count = Client(scheduler), 0
        for _ in range(3):
            client.ask([2, 8], "a", max_tokens=24)
            while step(scheduler):
                count += 1
        assert [end[0].token_ids for end in client.ends.values() if isinstance(end, list)] == [expected([2, 8], 24)] * 3
        steps.append(count)
    length = len(expected([2, 8], 24))
    assert length > 8
    assert steps[1] <= steps[0] - length  # two of three replies took a third of their steps or less


@pytest.mark.parametrize("forgotten", [False, True])
def test_what_a_forgotten_session_said_is_not_guessed(forgotten: bool) -> None:
    scheduler = make_scheduler()
    client = Client(scheduler)
    client.ask([2, 8], "a", max_tokens=24)
    finish(scheduler)
    if forgotten:
        scheduler.forget("a")
    client.ask([2, 8], "b", max_tokens=24)
    guessed = False
    while spans := step(scheduler):
        guessed |= any(span.guess for span in spans)
    assert guessed != forgotten


def test_two_at_once_do_not_guess() -> None:
    scheduler = make_scheduler()
    client = Client(scheduler)
    for _ in range(2):
        for _ in range(2):
            client.ask([2, 8], max_tokens=24)
        while spans := step(scheduler):
            assert not any(span.guess for span in spans)


def said(*tokens: int) -> Sequence:
    return Sequence(Request(tokens, SamplingParams(), "", None, lambda _: None), 0, 9)


def test_bad_guesses_are_given_up_and_tried_again_now_and_then() -> None:
    phrases = Phrases(price=0.4)
    phrases.learn([1, 2, 3, 4, 5])
    assert phrases.after(said(0, 1, 2, 3), 3) == [4, 5]
    assert phrases.after(said(0, 1, 2, 3), 1) == [4]
    assert phrases.after(said(2, 3), 3) == phrases.after(said(3, 2, 1), 3) == []
    for _ in range(30):
        phrases.count(0, 2)
    assert sum(bool(phrases.after(said(1, 2, 3), 3)) for _ in range(10 * PROBE)) == 10
    for _ in range(30):
        phrases.count(1, 2)
    assert phrases.after(said(1, 2, 3), 3) == [4, 5]


def test_phrases_take_bounded_room_and_the_newest_stay() -> None:
    phrases = Phrases()
    phrases.learn(range(MOST_CONTEXTS + 100))
    assert phrases.after(said(0, 1, 2), 1) == []
    assert phrases.after(said(MOST_CONTEXTS, MOST_CONTEXTS + 1, MOST_CONTEXTS + 2), 1) == [MOST_CONTEXTS + 3]
    phrases.clear()
    assert phrases.after(said(MOST_CONTEXTS, MOST_CONTEXTS + 1, MOST_CONTEXTS + 2), 1) == []


def test_a_conversation_grows_in_its_place() -> None:
    cache, prompt = KVCache(6 * ROUND), [1] * (3 * ROUND)
    slot = cache.acquire("s", prompt[:ROUND], ROUND)
    assert slot and slot.capacity == ROUND
    slot.tokens = prompt[:ROUND]
    cache.release(slot, keep=True)
    other = cache.acquire("t", [2], ROUND)
    assert other
    cache.release(other, keep=True)
    grown = cache.acquire("s", prompt, 2 * ROUND + 1)
    assert grown is slot and grown.copy_from is None and grown.tokens == prompt[:ROUND]
    assert (grown.capacity, cache.used, cache.busy) == (3 * ROUND, 4 * ROUND, 3 * ROUND)
    cache.release(grown, keep=True)
    assert cache.acquire("s", prompt, 7 * ROUND) is None
    cache.check_integrity()
    assert list(cache.idle) == [other, slot] and slot.capacity == 3 * ROUND
    grown = cache.acquire("s", [1, 5], 6 * ROUND)
    assert grown is slot and grown.capacity == 6 * ROUND and grown.tokens == [1] and not cache.idle
    cache.check_integrity()


@pytest.mark.parametrize("session", ["", "s"])
@pytest.mark.parametrize("running", [1, 2, 8])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_candidates_prefill_their_prompt_once(n: int, tokens: int, running: int, session: str) -> None:
    """Also where the first is through when the others start, if its session keeps what it computed."""
    scheduler = make_scheduler(total=20 * ROUND, max_running=running)
    client = Client(scheduler)
    client.ask([1] * 40, session, n=n, max_tokens=tokens)
    rows = 0
    while spans := step(scheduler):
        rows += sum(s.count for s in spans)
    alone = n if not session and (running == 1 or tokens == 1) else 1
    assert rows <= alone * 40 + n * tokens
