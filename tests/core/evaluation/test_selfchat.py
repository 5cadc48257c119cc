"""Self-chats and recall with an engine that says what it is told to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from core.engine.base import Completion, ModelInfo, SamplingParams
from core.evaluation.recall import recall
from core.evaluation.report import evaluate, first_replies
from core.evaluation.selfchat import Talker, health, read_openers, self_chats
from core.tokenizer import Tokenizer
from core.training.tiny import train_tokenizer
from core.voice import Voice


class Scripted:
    """An engine whose reply is a function of the prompt's text and the seed."""

    ended = ""

    def __init__(self, tokenizer: Tokenizer, say: Callable[[str, int], str]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.asked: list[tuple[list[int], int]] = []
        self.info = ModelInfo("scripted", 256, len(tokenizer), tokenizer.eos_id, "", "scripted")

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, session: str = "", deadline: float | None = None
    ) -> list[Completion]:
        assert len(prompt) + params.max_tokens <= 256
        spaced = (self.tokenizer.decode([id]) if id != self.tokenizer.eos_id else " " for id in prompt)
        text = self.say("".join(spaced), params.seed or 0)
        self.asked.append((list(prompt), params.n))
        return [Completion(self.tokenizer.encode(text), 0.0, "stop", 0)] * params.n

    def prepare(self, session: str, ids: Sequence[int]) -> None: ...

    async def ready(self) -> str:
        return ""

    async def forget(self, session: str) -> None: ...

    async def aclose(self) -> None: ...


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["hello there , how are you ?"] * 5, folder)
    return Tokenizer.load(folder)


def talker(tokenizer: Tokenizer, say: Callable[[str, int], str]) -> Talker:
    return Talker(Voice(Scripted(tokenizer, say), tokenizer, SamplingParams(), 128))


async def test_a_lively_talk_is_healthy(tokenizer: Tokenizer) -> None:
    talks = await self_chats(talker(tokenizer, lambda _, seed: f"reply number {seed} ."), 3)
    assert [len(talk) for talk in talks] == [31] * 3
    found = health(talks)
    assert (found.replies, found.silent, found.repeated, found.said_before) == (90, 0, 0, 0)
    assert found.length == 4
    assert found.length_slope == pytest.approx(0)


async def test_a_broken_record_is_noticed(tokenizer: Tokenizer) -> None:
    found = health(await self_chats(talker(tokenizer, lambda *_: "i know ."), 2, turns=10))
    assert found.repeated == 16  # the first of each side repeats nothing
    assert found.said_before >= found.repeated


async def test_an_empty_reply_ends_the_talk(tokenizer: Tokenizer) -> None:
    talks = await self_chats(talker(tokenizer, lambda _, seed: "" if seed % 1000 >= 3 else f"yes {seed}"), 2, turns=10)
    assert [len(talk) for talk in talks] == [5, 5]
    assert health(talks).silent == 2
    engine = talker(tokenizer, lambda _, seed: "" if seed % 1000 >= 3 else f"yes {seed}").voice
    assert "| talks that fell silent | 2 of 2 |" in [line async for line in evaluate(engine, chats=2, cases=1)]


async def test_a_row_is_there_as_soon_as_it_is_measured(tokenizer: Tokenizer) -> None:
    told: list[str] = []
    voice = talker(tokenizer, lambda prompt, _: prompt).voice
    async for line in evaluate(voice, chats=1, cases=3, tell=told.append):
        if line.startswith("| name"):
            break
    assert line.startswith("| name, in Palaver's corpus | 100.0% (3 of 3) | ")
    assert told == ["recall of a name, in Palaver's corpus"]


async def test_recall_counts_what_was_said(tokenizer: Tokenizer) -> None:
    everything = await recall(talker(tokenizer, lambda prompt, _: prompt), "name", 1, 20, held_out=True)
    assert everything.share == 1
    nothing = await recall(talker(tokenizer, lambda *_: "who knows ?"), "like", 1, 20, held_out=False)
    assert nothing.right == 0
    assert len(nothing.wrong) == nothing.asked == 20


async def test_settings_of_the_bots_are_settings_here(tokenizer: Tokenizer) -> None:
    """Candidates, what stays of a window and the spelling reach the model as in a bot; the page says so."""
    prompts, page = {}, ""
    for keep, n, spaced in ((1.0, 1, True), (0.2, 1, True), (0.2, 3, True), (0.2, 3, False)):
        engine = Scripted(tokenizer, lambda _, seed: f"Well, that is number {seed}.")
        voice = Voice(engine, tokenizer, SamplingParams(n=n), 128, keep, spaced)
        page = "\n".join([line async for line in evaluate(voice, chats=1, cases=1)])
        assert {asked for _, asked in engine.asked} == {n}
        prompts[keep, spaced] = [prompt for prompt, _ in engine.asked]
    assert page.startswith("Model scripted: scripted. Sampling: temperature 0.4,")
    assert "n 3" in page and "keep 0.2" in page and "as people spell" in page
    assert sum(map(len, prompts[0.2, True])) < sum(map(len, prompts[1.0, True]))  # a window that moves on further
    assert any(" ," in tokenizer.decode(prompt) for prompt in prompts[0.2, True])
    assert not any(" ," in tokenizer.decode(prompt) for prompt in prompts[0.2, False])


async def test_recall_without_the_models_spelling(tokenizer: Tokenizer) -> None:
    engine = Scripted(tokenizer, lambda prompt, _: prompt)
    voice = Voice(engine, tokenizer, SamplingParams(), 128, spaced=False)
    assert (await recall(Talker(voice), "name", 1, 20, held_out=False)).share == 1


async def test_openers_are_said_as_a_stranger_says_them(tokenizer: Tokenizer) -> None:
    for spaced, said in ((True, "It is number 0."), (False, "it is number 0 .")):
        engine = Scripted(tokenizer, lambda _, seed: f"it is number {seed} .")
        replies = await first_replies(Voice(engine, tokenizer, SamplingParams(), 128, spaced=spaced))
        assert replies[0] == (read_openers()[0], said) and len(replies) == 200


def test_there_are_200_openers(tmp_path: Path) -> None:
    assert len(set(read_openers())) == 200
