"""The serving benchmark: what it asks, what it makes of the answers, and one real turn of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import sys
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from benchmarks.serve import __main__ as serve
from benchmarks.serve import checkpoints, machine, peers, report, workloads
from benchmarks.serve.palaver import Palaver
from benchmarks.serve.peers import Absent, Asked, Batcher, refuse_unusual
from benchmarks.serve.workloads import Script, Talk, crowd, single, thousand
from core.engine.base import Completion, Failed, ModelInfo, QueueFull, SamplingParams
from core.engine.weights import load
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = Script(vocab=500, eos=499, end=498, window=256, keep=0.5)


async def child(*turn: object) -> Any:
    """What a peer's child says to the end; it would end with its input."""
    command = sys.executable, "-m", "benchmarks.serve.child", *map(str, turn)
    child = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=PIPE, stdout=PIPE)
    assert child.stdin and child.stdout
    async with asyncio.timeout(120):
        output = await child.stdout.read()
        await child.wait()
    return json.loads(output.splitlines()[-1])


class Parrot:
    """Notes what it is asked; says sevens, `cut` fewer than it should."""

    caches = True

    def __init__(self, cut: int = 0) -> None:
        self.asked: list[tuple[list[int], str]] = []
        self.cut = cut
        self.there = self.highest = 0

    def convert(self) -> None: ...

    async def open(self) -> str:
        return "parrot"

    async def expect(self, channels: int, tokens: int) -> None: ...

    async def reply(self, prompt: Sequence[int], session: str, candidates: int, tokens: int) -> list[list[int]]:
        self.asked.append((list(prompt), session))
        self.there += 1
        self.highest = max(self.highest, self.there)
        await asyncio.sleep(0.001)
        self.there -= 1
        return [[7] * (tokens - self.cut)] * candidates

    def prepare(self, session: str, ids: Sequence[int]) -> None: ...

    async def aclose(self) -> None: ...


class Doubler(Batcher):
    """Replies with how many stood in its batch."""

    limit = 4

    def load(self) -> str:
        return "doubler"

    def run(self, batch: list[Asked]) -> list[list[list[int]]]:
        return [[[len(batch)] * asked.tokens] for asked in batch]


async def test_one_user_grows_then_slides_and_the_prefix_stays() -> None:
    parrot = Parrot()
    found = await single(parrot, SCRIPT, turns=12)
    prompts = [prompt for prompt, _ in parrot.asked]
    assert len(prompts[0]) == 13 and len(prompts[1]) == 13 + 17 + 13
    assert prompts[1][: len(prompts[0])] == prompts[0] and prompts[0][-1] == SCRIPT.end
    assert max(map(len, prompts)) <= 256
    assert not any(SCRIPT.eos in prompt for prompt in prompts)
    new = [new for _, new in found["asked"]]
    assert new[1:9] == [14] * 8  # the reply's end, the message and its end
    assert new[9:] == [163, 14, 14]
    assert len({session for _, session in parrot.asked}) == 1


async def test_messages_and_replies_of_other_lengths() -> None:
    parrot = Parrot()
    found = await single(parrot, replace(SCRIPT, message=30, reply=5), turns=3)
    assert [len(prompt) for prompt, _ in parrot.asked] == [31, 31 + 6 + 31, 31 + 6 + 31 + 6 + 31]
    assert [new for _, new in found["asked"]] == [31, 32, 32]


async def test_every_peer_gets_the_same_questions() -> None:
    one, other = Parrot(), Parrot()
    await single(one, SCRIPT, turns=3)
    await single(other, SCRIPT, turns=3)
    assert one.asked == other.asked


async def test_a_short_reply_stops_the_run() -> None:
    with pytest.raises(RuntimeError, match="asked for 1 of 16"):
        await Talk(SCRIPT, 1).say(Parrot(cut=1))


async def test_a_crowd_keeps_sixteen_in_flight_and_starts_anew() -> None:
    parrot = Parrot()
    found = await crowd(parrot, SCRIPT, 0.3)
    assert parrot.highest == 16
    assert found["replies"] > 32 and found["replies_per_s"] > 0
    assert len({session for _, session in parrot.asked}) > 32, "nobody started anew"


async def test_who_waits_is_answered_together() -> None:
    peer = Doubler("", ROOT, 1)
    assert await peer.open() == "doubler"
    replies = await asyncio.gather(*(peer.reply([1], "", 1, 2) for _ in range(6)))
    await peer.aclose()
    assert all(1 <= reply[0][0] <= 4 and len(reply[0]) == 2 for reply in replies)


async def test_batches_of_equal_lengths_begin_with_the_oldest() -> None:
    class Noting(Doubler):
        equal = True
        lengths: ClassVar[list[list[int]]] = []

        def run(self, batch: list[Asked]) -> list[list[list[int]]]:
            self.lengths.append([len(asked.prompt) for asked in batch])
            return super().run(batch)

    loop, peer = asyncio.get_running_loop(), Noting("", ROOT, 1)
    asked = [Asked([0] * length, "", 1, 1, loop.create_future()) for length in (3, 5, 3, 5, 5, 5, 5, 3, 3)]
    asked[0].future.cancel()  # whoever gives up is not computed
    assert peer.step(asked[:7]) and peer.lengths == [[5, 5, 5, 5]]
    assert peer.step(asked[7:]) and not peer.step([])
    assert peer.lengths[1:] == [[3, 3, 3], [5]]
    asked[0].future = loop.create_future()
    asked[0].future.cancel()
    assert not peer.step(asked[:1]) and len(peer.lengths) == 3


class Line(Parrot):
    """Answers one after the other, some 500 a second, late or not."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = asyncio.Lock()

    async def reply(self, prompt: Sequence[int], session: str, candidates: int, tokens: int) -> list[list[int]]:
        async with self.alone:
            await asyncio.sleep(0.002)
        return [[7] * tokens] * candidates


async def test_a_thousand_never_count_more_than_was_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bursts this short are over before two seconds are: no load fails, and all are too high."""
    found = await thousand(Line(), SCRIPT, 0.03)
    assert found["at_least"] and len(found["levels"]) == 12 and found["levels"][-1]["rate"] > 1500
    assert 100 < found["replies_per_s"] <= 500
    monkeypatch.setattr(workloads, "GOAL", 0.03)
    found = await thousand(Line(), SCRIPT, 0.05)
    assert not found["at_least"] and 6 <= len(found["levels"]) < 12


async def test_who_is_not_answered_stays_among_the_thousand() -> None:
    class Deaf(Parrot):
        async def reply(self, *_: object) -> list[list[int]]:
            raise Failed("deaf")

    awake = [Talk(SCRIPT, 1)]
    with pytest.raises(Failed):
        await workloads._one(Deaf(), awake, [], random.Random(1))
    assert len(awake) == 1 and not awake[0].turns, "what it asked has no reply and may not stand in the next prompt"
    with pytest.raises(QueueFull):
        await workloads._one(Deaf(), [], [], random.Random(1))


async def test_palaver_goes_on_behind_an_end_of_text() -> None:
    """As all others do, for whom it is an id like any other."""

    class Ending:
        info = ModelInfo("", 256, 10, 9, "", "")
        said: ClassVar[list[list[list[int]]]] = [[[1] * 4, [2]], [[]], [[3]]]

        async def generate(self, prompt: Sequence[int], params: SamplingParams, *, session: str) -> list[Completion]:
            asked.append((list(prompt), params.max_tokens, params.n))
            return [Completion(ids, 0.0, "stop", 0) for ids in self.said.pop(0)]

    asked: list[tuple[list[int], int, int]] = []
    peer = Palaver("float32", ROOT, 1)
    peer._engine = Ending()  # type: ignore[assignment]
    assert await peer.reply([5], "", 2, 4) == [[1] * 4, [2, 9, 9, 3]]
    assert asked == [([5], 4, 2), ([5, 2, 9], 2, 1), ([5, 2, 9, 9], 1, 1)]


def test_a_copy_is_of_the_very_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (make_checkpoint(tmp_path / name / "small", seed=seed) for seed, name in enumerate("ab"))
    work = tmp_path / "work"
    for file in (*one.iterdir(), *other.iterdir()):
        os.utime(file, (1e9, 1e9))  # the sizes are the same too

    def copied(model: Path) -> torch.Tensor:
        return load(checkpoints.make("medium", model, work)).tensors["wpe.weight"]

    assert torch.equal(copied(one), load(one).tensors["wpe.weight"])
    assert torch.equal(copied(other), load(other).tensors["wpe.weight"]), "two of a name"
    before = checkpoints.make("medium", one, work)
    assert not {path.name for path in work.iterdir()} & {"tiny", *checkpoints.SHAPES}, "a shape's place"
    monkeypatch.chdir(one)
    assert checkpoints.make("medium", Path(), work) == before and before.name.startswith("small-")
    make_checkpoint(one, seed=2)
    assert torch.equal(copied(one), load(one).tensors["wpe.weight"]), "it was changed"


@pytest.mark.parametrize("shape", ["inner", "relu", "erf", "scaled", "unscaled"])
def test_what_makes_a_model_unusual_is_copied(tmp_path: Path, shape: str) -> None:
    source = make_checkpoint(tmp_path / "model", shape)
    copy = checkpoints.make("tiny", source, tmp_path / "work")
    found = load(copy).config
    assert replace(found, eos_id=256) == load(source).config and found.eos_id != 256


def test_a_format_without_a_place_for_it_is_refused(tmp_path: Path) -> None:
    every = "activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"
    refuse_unusual(make_checkpoint(tmp_path / "inner", "inner"), *every)
    refuse_unusual(make_checkpoint(tmp_path / "relu", "relu"), *every[1:])
    for shape, name in (("relu", every[0]), ("scaled", every[1]), ("unscaled", every[2]), ("scaled", every[3])):
        folder = make_checkpoint(tmp_path / name, shape)
        with pytest.raises(Absent, match=f"no place for {name}"):
            refuse_unusual(folder, name)


@pytest.mark.parametrize(("name", "library"), [("llama.cpp-f32", "llama_cpp"), ("ctranslate2-float32", "ctranslate2")])
async def test_other_formats_are_written(tmp_path: Path, name: str, library: str) -> None:
    """With a hidden layer of 100 and not of 192 numbers, and over what a broken-off conversion left. Who is not
    installed says so."""
    if not importlib.util.find_spec(library):
        assert library in (await child(name, make_checkpoint(tmp_path / "inner", "inner")))["absent"]
        return
    assert "no place for" in (await child(name, make_checkpoint(tmp_path / "scaled", "scaled")))["absent"]
    folder = checkpoints.make("tiny", make_checkpoint(tmp_path / "inner", "inner"), tmp_path / "work")
    (folder / "ctranslate2-float32").mkdir()
    for left in ("model.bin", "vocabulary.json"):
        (folder / "ctranslate2-float32" / left).write_text("[")
    assert (await child(name, folder))["seconds"] > 0
    assert len((await child(name, folder, "A", "1", "1", "0.5", "0", "12", "16"))["A"]["asked"]) == 12


def test_medians_ratios_and_limits() -> None:
    def run(ms: float, rate: float) -> dict[str, object]:
        a = {"mean_ms": ms, "growing_ms": ms, "sliding_ms": None, "asked": [(100, 14)]}
        b = {"replies_per_s": rate, "p95_ms": 1.0, "asked": [(100, 14)]}
        return {"A": a, "B": b, "how": "", "load_s": 1.0, "first_reply_s": 1.0, "peak_mb": 1.0}

    runs = {"palaver-int8": [run(10, 8), run(12, 10), run(11, 9)], "other": [run(22, 3)]}
    table = report.summary(runs, "palaver-int8")
    assert table["palaver-int8"]["A mean ms"] == {"median": 11, "spread": pytest.approx(2 / 11), "ratio": 1}
    assert table["other"]["A mean ms"]["ratio"] == 2
    assert table["other"]["B replies/s"]["ratio"] == 3
    assert "A sliding p50 ms" not in table["other"]
    config = {"n_embd": 768, "n_layer": 12, "vocab_size": 50_257}
    fast = {"read_gb_s": 32.0, "float32": 137.0, "bfloat16": 366.0, "int8": 541.0}
    twice = report.roofline(runs, config, fast, 32)
    limits = report.roofline(runs, config, fast, 16)
    # 16 readings of 494 MB at 32 GB/s, 73,728 bytes of keys and values per token of 101 to 115
    assert limits["float32"]["A mean ms"] == pytest.approx(16 * 494.0 / 32 + 15 * 108 * 0.0737 / 32, rel=0.02)
    assert twice["float32"]["A mean ms"] == pytest.approx(2 * limits["float32"]["A mean ms"], rel=0.02)
    assert limits["int8"]["A mean ms"] < limits["bfloat16"]["A mean ms"] < limits["float32"]["A mean ms"]
    slow = dict.fromkeys(fast, 1e9) | {"read_gb_s": 1.0}  # nothing but reading
    small = {"n_embd": 10, "n_layer": 2, "vocab_size": 100, "n_inner": 20}
    for reply in (16, 32):
        read = reply * (2 * 10 * (4 * 10 + 2 * 20) + 100 * 10) / 1e9
        keys = sum(range(101, 100 + reply)) * 2 * 2 * 10 / 1e9
        for precision, size in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
            for together in (1, 16):
                seconds = machine.least_seconds(small, slow, precision, [(100, 14)], reply, together)
                assert seconds == pytest.approx(size * (read / together + keys))
    shown = report.markdown(table, limits, "palaver-int8", {"other": "broke", "third": "not there"})
    assert "| palaver-int8 | 11.0 ±9 % |" in shown
    assert "| other (left out) | 22.0 (2.0 ×) | 22.0 (2.0 ×) | 3.00 (3.0 ×) | 1.00 (1.0 ×) |" in shown, (
        "one round has no spread"
    )


def test_no_limit_found_is_said_and_drawn_as_it_is(tmp_path: Path) -> None:
    def run(at_least: bool, p95: float) -> dict[str, Any]:
        return {"E": {"replies_per_s": 5.0, "at_least": at_least, "levels": [{"rate": 5.0, "p95_s": p95}]}}

    table = report.summary({"one": [run(False, 1), run(True, 1)], "other": [run(False, 1)]}, "other")
    shown = report.markdown(table, {}, "other", {})
    assert "| one | at least 5.00 (1.0 ×) |" in shown and "| other | 5.00 |" in shown
    for p95, names in ((float("inf"), ["x.json"]), (1.0, ["x.json", "x-load.png"])):
        result = {"summary": {}, "runs": {"one": [run(False, p95)], "deaf": [run(False, float("inf"))]}}
        assert [path.name for path in report.write(tmp_path, "x", result)] == names


def test_on_cuda_those_for_cpus_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {"DEVICE": "cuda"})  # peers change it, each for its own process
    made = []
    for name in peers.PEERS:
        with contextlib.suppress(peers.Absent):
            peers.make(name, tmp_path, 1)
            made.append(name)
    assert all(name.startswith(("palaver-", "transformers-")) for name in made)
    assert {"palaver-bfloat16", "palaver-bfloat16-torch", "transformers-continuous"} <= set(made)
    assert not any("int8" in name for name in made)


def test_a_gpu_that_is_not_here_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda: this machine, or this build of torch, has none"):
        serve.main()


def test_the_machine_is_described_and_measured() -> None:
    assert {"processor", "cores", "instructions", "torch"} <= set(machine.describe("cpu"))


async def test_the_embedded_model_takes_a_turn(tmp_path: Path) -> None:
    """The whole way: a checkpoint is made, a child loads it through the bots' port and answers."""
    folder = checkpoints.make("tiny", None, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] != config["bos_token_id"] == 4095, "it would learn from what it reads to end"

    name, files = "palaver-float32", sorted(folder.iterdir())
    assert (await child(name, folder))["seconds"] >= 0
    assert sorted(folder.iterdir()) == files, "it loads the checkpoint as it is"
    found = await child(name, folder, "AC", "1", "1", "0.5", "0", "12", "16")
    assert "float32" in found["how"] and found["A"]["mean_ms"] > 0
    assert len(found["A"]["asked"]) == 12 and len(found["C"]["asked"]) == 16
    assert max(length for length, _ in found["C"]["asked"]) <= 240
