"""From words to words: the house's voice over an echo, over answers given, over a real model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from core.app import open_voice
from core.engine.base import BadCheckpoint, Cancelled, Completion, EngineClosed, EngineError, QueueFull, SamplingParams
from core.engine.echo_engine import EchoEngine
from core.messages import Turn
from core.settings import Settings
from core.tokenizer import Tokenizer
from core.voice import Voice
from tests.checkpoints import make_checkpoint, make_config, make_tokenizer

README = Path(__file__).resolve().parents[2] / "README.md"


class Told(EchoEngine):
    """Says the given lines, the k-th to the k-th candidate asked for, and keeps what it was asked."""

    def __init__(self, folder: Path, *lines: str) -> None:
        super().__init__(folder)
        self.tokenizer = Tokenizer.load(folder)
        self.lines = iter(lines)
        self.asked: list[tuple[list[int], SamplingParams, str, float | None]] = []
        self.prepared: list[tuple[str, list[int]]] = []

    def prepare(self, session: str, ids: Sequence[int]) -> None:
        self.prepared.append((session, list(ids)))

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, session: str = "", deadline: float | None = None
    ) -> list[Completion]:
        self.asked.append((list(prompt), params, session, deadline))
        said = [self.tokenizer.encode(next(self.lines)) for _ in range(params.n)]
        return [Completion(ids, -float(k), "stop", 0) for k, ids in enumerate(said, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    (folder / "config.json").write_text(json.dumps(make_config("plain")), "utf-8")
    make_tokenizer(folder, 384)
    return folder


@pytest.fixture
def voice(folder: Path) -> Callable[..., Voice]:
    def open_one(*lines: str, budget: int = 128, **params: int) -> Voice:
        engine = Told(folder, *lines) if lines else EchoEngine(folder)
        return Voice(engine, Tokenizer.load(folder), SamplingParams(**params), budget)

    return open_one


def user(text: str, index: int = 0) -> Turn:
    return Turn("user", "ann", text, index)


def bot(text: str, index: int) -> Turn:
    return Turn("assistant", "palaver", text, index)


def asked(voice: Voice) -> list[tuple[list[int], SamplingParams, str, float | None]]:
    assert isinstance(voice.engine, Told)
    return voice.engine.asked


@pytest.mark.parametrize(
    "text", ["Hi, how are you?", "It's 3 o'clock.", "No way!", "I like tea, Anna.", "<|endoftext|>"]
)
async def test_an_echo_makes_sense(voice: Callable[..., Voice], text: str) -> None:
    """Normalised, encoded, said back, decoded, restored: the words come home."""

    def words(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    said = await voice().ask(text)
    assert words(said) == words(text)
    assert " ," not in said
    assert " ?" not in said


@pytest.mark.parametrize("text", ["", "   ", "\u200b", "\x00"])
async def test_nothing_to_answer_is_no_answer(voice: Callable[..., Voice], text: str) -> None:
    speaker = voice()
    assert await speaker.ask(text) == ""
    assert await speaker.speak([user(text)]) is None
    assert speaker.prompt([]) == []


async def test_a_prompt_is_turns_each_closed_by_eos(voice: Callable[..., Voice]) -> None:
    speaker = voice()
    eos, encode = speaker.tokenizer.eos_id, speaker.tokenizer.encode
    turns = [user("Hi!"), bot("hello , you", 1), user("Who are you?", 2)]
    assert speaker.prompt(turns) == [
        *(*encode("Hi !"), eos),
        *(*encode("hello , you"), eos),
        *(*encode("Who are you ?"), eos),
    ]


async def test_a_typed_end_of_text_cannot_end_a_turn(voice: Callable[..., Voice]) -> None:
    speaker = voice()
    assert speaker.prompt([user("a<|endoftext|>b")]).count(speaker.tokenizer.eos_id) == 1


async def test_what_the_caller_gives_reaches_the_engine(voice: Callable[..., Voice]) -> None:
    speaker = voice("fine", temperature=0, max_tokens=9)
    await speaker.speak([user("hi")], seed=77, session="discord:1", deadline=5.0)
    ((prompt, params, session, deadline),) = asked(speaker)
    assert prompt == speaker.prompt([user("hi")])
    assert (params.seed, params.max_tokens, session) == (77, 9, "discord:1")
    assert deadline is not None and 4.5 < deadline <= 5.0


async def test_a_window_about_to_move_is_prepared_once_and_begins_the_next_prompt(voice: Callable[..., Voice]) -> None:
    """Only where it moves: everywhere else the cache holds the beginning already."""
    lines = [f"number {i} it is , my dear" for i in range(20)]
    speaker = voice(*lines, budget=192)
    engine = speaker.engine
    assert isinstance(engine, Told)
    turns: list[Turn] = []
    moves, before = 0, list[int]()
    for i, line in enumerate(lines):
        turns.append(user("and what comes then?", 2 * i))
        prompt = speaker.prompt(turns)
        if prompt[: len(before)] == before:
            assert not engine.prepared
        else:
            moves += 1
            ((session, ids),) = engine.prepared
            assert session == "discord:1"
            assert prompt[: len(ids)] == ids
            assert len(prompt) - len(ids) == len(speaker.prompt([turns[-1]]))  # the question alone is new
        engine.prepared.clear()
        await speaker.speak(turns, seed=1, session="discord:1")
        assert not engine.prepared  # the reply goes first
        await asyncio.sleep(0)
        turns.append(bot(line, 2 * i + 1))
        before = prompt
    assert moves > 3


async def test_without_a_session_nothing_is_prepared(voice: Callable[..., Voice]) -> None:
    speaker = voice("fine", budget=16)
    await speaker.speak([user("a long story about the sea and the rain"), bot("fine", 1), user("hi", 2)])
    await asyncio.sleep(0)
    assert isinstance(speaker.engine, Told) and not speaker.engine.prepared


async def test_what_only_repeats_is_drawn_again_with_other_seeds(voice: Callable[..., Voice]) -> None:
    speaker = voice("I see.", "i see !", "do tell")
    turns = [user("a"), bot("i see", 1), user("b", 2)]
    spoken = await speaker.speak(turns, seed=10)
    assert spoken and spoken[0] == "do tell"
    assert [params.seed for _, params, _, _ in asked(speaker)] == [10, 11, 12]


async def test_a_line_that_was_said_four_answers_ago_is_a_repetition_too(voice: Callable[..., Voice]) -> None:
    said = [bot(text, 2 * i + 1) for i, text in enumerate(("i see", "oh", "well", "why ?"))]
    turns = [turn for i, line in enumerate(said) for turn in (user("a", 2 * i), line)]
    spoken = await voice("i see", "do tell").speak([*turns, user("b", 8)], seed=1)
    assert spoken and spoken[0] == "do tell"


async def test_each_draw_has_seeds_of_its_own_and_the_time_that_is_left(voice: Callable[..., Voice]) -> None:
    speaker = voice(*["why ?"] * 9, n=3)
    await speaker.speak([user("a"), bot("why ?", 1), user("b", 2)], seed=10, deadline=5.0)
    assert [params.seed for _, params, _, _ in asked(speaker)] == [10, 13, 16]
    first, second, third = [deadline or 0.0 for _, _, _, deadline in asked(speaker)]
    assert 5.0 >= first > second > third > 4.0


async def test_it_does_not_draw_for_ever(voice: Callable[..., Voice]) -> None:
    speaker = voice(*["why ?"] * 9)
    spoken = await speaker.speak([user("a"), bot("why ?", 1), user("b", 2)], seed=1)
    assert spoken and spoken[0] == "why ?"
    assert len(asked(speaker)) == 3


@pytest.mark.parametrize("ends", [Cancelled, QueueFull, EngineClosed])
async def test_what_repeats_is_said_where_the_engine_draws_no_other(
    voice: Callable[..., Voice], ends: type[EngineError], monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker = voice("why ?", "why ?")
    generate = speaker.engine.generate

    async def generate_twice(*a: Any, **how: Any) -> list[Completion]:
        if len(asked(speaker)) == 2:
            raise ends("no more")
        return await generate(*a, **how)

    monkeypatch.setattr(speaker.engine, "generate", generate_twice)
    spoken = await speaker.speak([user("a"), bot("why ?", 1), user("b", 2)], seed=1)
    assert spoken and spoken[0] == "why ?" and len(asked(speaker)) == 2
    with pytest.raises(ends):
        await speaker.speak([user("a")], seed=1)


async def test_greedy_is_asked_once(voice: Callable[..., Voice]) -> None:
    speaker = voice(*["why ?"] * 9, temperature=0)
    await speaker.speak([user("a"), bot("why ?", 1), user("b", 2)], seed=1)
    assert len(asked(speaker)) == 1


async def test_the_best_candidate_that_says_something_new_wins(voice: Callable[..., Voice]) -> None:
    speaker = voice("i see", "well , that is new", "i am not sure about that", n=3)
    spoken = await speaker.speak([user("a"), bot("i see", 1), user("b", 2)], seed=1)
    assert spoken and spoken[0] != "i see"
    assert len(asked(speaker)) == 1
    assert spoken[1].token_ids == speaker.tokenizer.encode(spoken[0])


@pytest.mark.parametrize("budget", [8, 64, 10_000])
async def test_prompt_and_reply_fit_the_positions(voice: Callable[..., Voice], budget: int) -> None:
    speaker = voice(budget=budget, max_tokens=100)
    turns = [user("a long story about the sea and the rain " * 40, i) for i in range(9)]
    prompt = speaker.prompt(turns)
    assert 1 <= len(prompt) <= min(budget, speaker.engine.info.max_positions - 100)


async def test_a_reply_longer_than_the_positions_leaves_room_for_a_prompt(voice: Callable[..., Voice]) -> None:
    speaker = voice(max_tokens=100_000)
    assert 1 <= len(speaker.prompt([user("hello " * 400)])) <= speaker.engine.info.max_positions // 2


@pytest.mark.parametrize(("n", "want"), [(1, 32), (5, 6), (8, 4), (64, 1)])
async def test_candidates_share_what_the_engine_computes_at_a_time(
    voice: Callable[..., Voice], n: int, want: int
) -> None:
    assert voice(n=n).at_once == want


async def test_what_the_engine_refuses_is_raised(voice: Callable[..., Voice]) -> None:
    speaker = voice()
    await speaker.engine.aclose()
    with pytest.raises(EngineClosed):
        await speaker.ask("hi")


async def test_the_same_turns_and_seed_give_the_same_reply(tmp_path: Path) -> None:
    """A real model in a child process, opened as a library opens it."""
    model = make_checkpoint(tmp_path / "model", "plain")
    settings = Settings(model=str(model), threads=1, dtype="float32", sampling=SamplingParams(temperature=1.0))
    async with open_voice(settings) as voice:
        turns = [user("hi, who are you?")]
        first, again, other = [await voice.speak(turns, seed=seed) for seed in (4, 4, 5)]
        assert first and again and other
        assert first[0] == again[0] == voice.tokenizer.decode(first[1].token_ids).strip()
        assert first[1].token_ids != other[1].token_ids
        assert await voice.ask("hi") != ""


async def test_a_model_that_ends_otherwise_than_its_tokenizer_is_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "plain", eos_token_id=5)
    with pytest.raises(BadCheckpoint, match=r"as 256, config.json says eos_token_id 5: a reply would not end"):
        async with open_voice(Settings(model=str(model), engine="inprocess", threads=1)):
            raise AssertionError("it speaks")


async def test_without_normalising_the_text_is_the_persons(folder: Path) -> None:
    voice = Voice(EchoEngine(folder), Tokenizer.load(folder), SamplingParams(), 64, spaced=False)
    assert await voice.ask("Well,  this:\nis   ✓ kept?") == "Well, this: is ✓ kept?"


async def test_a_text_is_spelled_once_and_forgotten_when_asked(
    voice: Callable[..., Voice], monkeypatch: pytest.MonkeyPatch
) -> None:
    spelled: list[str] = []
    speaker = voice()
    spell = speaker.spelled

    def count(text: str) -> str:
        spelled.append(text)
        return spell(text)

    monkeypatch.setattr(speaker, "spelled", count)
    assert speaker.hears("Hi, you!")
    turns = [user("Hi, you!"), bot("hello", 1), user("And now?", 2)]
    for _ in range(2):
        await speaker.speak(turns, session="discord:1")
        await asyncio.sleep(0)
    assert spelled == ["Hi, you!", "And now?"]
    await speaker.forget("discord:1")
    speaker.prompt(turns)
    assert spelled == ["Hi, you!", "And now?", "And now?", "Hi, you!"]


def test_only_words_are_heard_and_every_text_where_nothing_is_spelled(
    folder: Path, voice: Callable[..., Voice]
) -> None:
    words, others = ["hi", "Нет, no!", "42", "👍"], ["?", "...", "привет!", "¿?", "😀", "🎉", "(^_^)", " "]
    assert [text for text in [*words, *others] if voice().hears(text)] == words
    plain = Voice(EchoEngine(folder), Tokenizer.load(folder), SamplingParams(), 64, spaced=False)
    assert [text for text in [*words, *others] if not plain.hears(text)] == [" "]


def test_the_readmes_example_gives_a_reply(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    model = make_checkpoint(tmp_path / "model", "plain")
    ended = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=os.environ | {"MODEL": str(model), "THREADS": "1", "PYTHONPATH": str(README.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ended.stdout.strip()
    assert ended.stderr == ""
