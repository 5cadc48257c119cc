"""What `palaver bench` measures, with an engine whose delays are known."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence

import pytest

from core.engine.base import Completion, EngineClosed, ModelInfo, QueueFull, SamplingParams
from core.engine.hub import EMBEDDED
from core.evaluation import load
from core.tokenizer import Tokenizer
from core.voice import Voice


class Slow:
    """Answers `lanes` requests at once, each in `seconds`; refuses when more than `most` are there."""

    ended = ""

    def __init__(self, tokenizer: Tokenizer, seconds: float, lanes: int, most: int = 1000) -> None:
        self.info = ModelInfo("slow", 256, len(tokenizer), tokenizer.eos_id, "", "slow")
        self.said = tokenizer.encode("yes , of course")
        self.seconds, self.most = seconds, most
        self.gate = asyncio.Semaphore(lanes)
        self.there = self.highest = 0

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, session: str = "", deadline: float | None = None
    ) -> list[Completion]:
        if self.there >= self.most:
            raise QueueFull("full")
        self.there += 1
        self.highest = max(self.highest, self.there)
        try:
            async with self.gate:
                await asyncio.sleep(self.seconds)
        finally:
            self.there -= 1
        return [Completion(self.said, random.random(), "stop", 0)]

    def prepare(self, session: str, ids: Sequence[int]) -> None: ...

    async def ready(self) -> str:
        return ""

    async def forget(self, session: str) -> None: ...

    async def aclose(self) -> None: ...


def slow_voice(seconds: float, lanes: int, most: int = 1000) -> tuple[Voice, Slow]:
    tokenizer = Tokenizer.load(EMBEDDED)
    engine = Slow(tokenizer, seconds, lanes, most)
    return Voice(engine, tokenizer, SamplingParams(temperature=0), 128), engine


def test_percentiles_are_values_that_were_there() -> None:
    assert load.percentile([3, 1, 2], 0.5) == 2
    assert load.percentile(range(1, 101), 0.95) == 95
    assert load.percentile(range(1, 21), 0.95) == 19
    assert load.percentile([1, 2], 0.5) == 1
    assert load.percentile([7], 0.95) == load.percentile([7], 0) == 7
    assert load.percentile([], 0.5) != load.percentile([], 0.5)  # nan


async def test_a_talk_goes_on_and_keeps_its_turns_in_order() -> None:
    voice, _ = slow_voice(0, 1)
    talk = load.Talk(voice, 1, age=40)
    await talk.say(random.Random(1))
    assert len(talk.turns) == talk.voice.window.reach + 1
    assert [turn.index for turn in talk.turns] == list(range(15, 82))
    assert [turn.role for turn in talk.turns[-2:]] == ["user", "assistant"]
    assert talk.words == [4]


async def test_so_many_are_in_flight_and_no_more() -> None:
    voice, engine = slow_voice(0.01, 4)
    talks = [load.Talk(voice, number) for number in range(8)]
    found = await load.closed_loop(talks[:4], 0.2, random.Random(1))
    assert engine.highest == 4
    assert all(talk.words for talk in talks[:4]) and not any(talk.words for talk in talks[4:])
    assert found.replies == sum(len(talk.words) for talk in talks) >= 4
    assert found.p50 >= 0.01


async def test_messages_come_whether_or_not_the_last_was_answered() -> None:
    """One lane of 50 ms takes 20 a second; 60 a second pile up, which a closed loop would never show."""
    voice, engine = slow_voice(0.05, 1)
    talks = [load.Talk(voice, number) for number in range(64)]
    found = await load.open_loop(talks, 60, 0.5, 32, random.Random(1))
    assert engine.highest > 4
    assert found and found.p95 > 4 * 0.05


async def test_when_all_wait_somebody_new_writes() -> None:
    """At 200 a second, with 50 served, soon nobody is left who waits for nothing."""
    voice, _ = slow_voice(0.02, 1)
    talks = [load.Talk(voice, 1 + number) for number in range(4)]
    found = await load.open_loop(talks, 200, 0.3, 32, random.Random(1))
    assert len(talks) > 20 and len({talk.number for talk in talks}) == len(talks)
    assert found and 0.3 < found.p95 < float("inf")


async def test_a_level_runs_on_until_enough_came_or_is_left_out() -> None:
    voice, _ = slow_voice(0, 4)
    talks = [load.Talk(voice, number) for number in range(8)]
    found = [await load.open_loop(talks, 60, 0.08, 32, random.Random(seed)) for seed in range(10)]
    assert all(level is None or level.replies >= load.FEWEST for level in found)
    assert None in found and any(found)
    assert await load.open_loop(talks, 0.1, 0.05, 32, random.Random(1)) is None


async def test_where_too_few_came_nothing_is_said_of_its_speed() -> None:
    voice, _ = slow_voice(0.3, 16)
    found = await load.measure(voice, 0.2, 32, lambda _: None)
    assert found.levels == [] and found.channels == 0
    text = load.as_text(found, "slow", "slow", 1.0, 0)
    assert "too slow" not in text and "Measure for longer." in text


async def test_no_more_is_promised_than_was_served() -> None:
    """In levels this short, far too much load is not late yet: one lane of 20 ms serves 50 a second, no more."""
    voice, _ = slow_voice(0.02, 1)
    found = await load.measure(voice, 2, 32, lambda _: None)
    assert max(rate for rate, _ in found.levels) > 60
    assert found.most_per_second <= 50


async def test_nothing_is_said_of_an_engine_that_went(monkeypatch: pytest.MonkeyPatch) -> None:
    voice, engine = slow_voice(0.001, 4)

    async def gone() -> str:
        return "the engine at http://there does not answer"

    monkeypatch.setattr(engine, "ready", gone)
    with pytest.raises(EngineClosed, match="does not answer: these figures would not be its own"):
        await load.measure(voice, 0.5, 32, lambda _: None)


async def test_what_is_refused_or_given_up_counts_as_late() -> None:
    voice, _ = slow_voice(0.2, 1, most=1)
    talks = [load.Talk(voice, number) for number in range(64)]
    found = await load.open_loop(talks, 100, 0.1, 32, random.Random(1))
    assert found and found.p95 == float("inf")

    async def never() -> None:
        await asyncio.Event().wait()

    given_up = await load.poisson(never, 100, 0.05, random.Random(1), patience=0.01)
    assert given_up and set(given_up) == {float("inf")}


async def test_a_mistake_of_ours_is_not_counted_as_late() -> None:
    async def broken() -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        await load.poisson(broken, 100, 0.1, random.Random(1))


async def test_all_is_measured_and_told() -> None:
    voice, _ = slow_voice(0.01, 2)
    told: list[str] = []
    found = await load.measure(voice, 2, 32, told.append)
    assert told[:4] == ["the first reply", "1 in flight", "4 in flight", "16 in flight"]
    assert len(told) == 9 and len(found.levels) == 5
    assert found.words == 4
    assert 0 < found.most_per_second <= max(rate for rate, _ in found.levels)
    assert found.channels == int(found.most_per_second * 30)
    text = load.as_text(found, "slow", "slow", 1.0, 10**9)
    assert f"serves about {found.channels} active channels" in text
    assert f"16 in flight{found.in_flight[16].replies:23}" in text
    assert "each writes 2 messages a minute" in text


async def test_a_hopeless_machine_is_told_so() -> None:
    voice, _ = slow_voice(0.01, 2)
    found = await load.measure(voice, 1, 32, lambda _: None)
    hopeless = load.Load(found.first_reply, found.single, found.words, found.in_flight, found.levels, 0.0)
    assert "too slow" in load.as_text(hopeless, "slow", "slow", 1.0, 0)


def test_what_never_came_is_null_for_programs() -> None:
    never, nothing = load.Delays(0, 0.0, float("inf"), float("inf")), load.Delays(0, 0.0, float("nan"), float("nan"))
    said = load.as_dict(load.Load(0.1, nothing, 0.0, {16: nothing}, [(2.0, never)], 0.0), "slow", "slow", 1.0, 0)
    assert json.dumps(said, allow_nan=False)
    assert said["in_flight"] == {"16": {"replies": 0, "per_second": 0.0, "p50": None, "p95": None}}
    assert said["levels"] == [[2.0, {"replies": 0, "per_second": 0.0, "p50": None, "p95": None}]]


def test_memory_is_that_of_the_family() -> None:
    assert 10**7 < load.resident_bytes("VmRSS") <= load.resident_bytes() + 10**6 < 10**11
