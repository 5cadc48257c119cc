"""The serving benchmark: what it asks, what it makes of the answers, and one real turn of the engine."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve import checkpoints, machine, report
from benchmarks.serve.peers import Asked, Batcher
from benchmarks.serve.workloads import REPLY, USER, Script, Talk, crowd, single

ROOT = Path(__file__).parents[2]
SCRIPT = Script(vocab=500, eos=499, end=498, window=256, stride=4)


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
    assert len(prompts[0]) == USER + 1 and len(prompts[1]) == 2 * (USER + 1) + REPLY + 1
    assert prompts[1][: len(prompts[0])] == prompts[0] and prompts[0][-1] == SCRIPT.end
    assert max(map(len, prompts)) <= 256
    assert not any(SCRIPT.eos in prompt for prompt in prompts)
    new = [new for _, new in found["asked"]]
    assert new[1:9] == [14] * 8  # the reply's end, the message and its end
    assert new[9:] == [223, 14, 223]
    assert len({session for _, session in parrot.asked}) == 1


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
    limits = report.roofline(runs, config, fast)
    # 16 readings of 494 MB at 32 GB/s, 73,728 bytes of keys and values per token of 101 to 115
    assert limits["float32"]["A mean ms"] == pytest.approx(16 * 494.0 / 32 + 15 * 108 * 0.0737 / 32, rel=0.02)
    assert limits["int8"]["A mean ms"] < limits["bfloat16"]["A mean ms"] < limits["float32"]["A mean ms"]
    shown = report.markdown(table, limits, "palaver-int8")
    assert "| palaver-int8 | 11.0 ±9 % |" in shown
    assert "| other | 22.0 (2.0 ×) | 22.0 (2.0 ×) | 3.00 (3.0 ×) | 1.00 (1.0 ×) |" in shown, "one round has no spread"


def test_the_machine_is_described_and_measured() -> None:
    assert {"processor", "cores", "instructions", "torch"} <= set(machine.describe())


async def test_the_embedded_model_takes_a_turn(tmp_path: Path) -> None:
    """The whole way: a checkpoint is made, a child loads it through the bots' port and answers."""
    folder = checkpoints.make("tiny", None, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] != config["bos_token_id"] == 4095, "it would learn from what it reads to end"

    async def child(*turn: str) -> Any:
        command = sys.executable, "-m", "benchmarks.serve.child", "palaver-float32", str(folder), *turn
        child = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
        async with asyncio.timeout(120):
            output, _ = await child.communicate()
        return json.loads(output.splitlines()[-1])

    files = sorted(folder.iterdir())
    assert (await child())["seconds"] >= 0 and sorted(folder.iterdir()) == files, "it loads the checkpoint as it is"
    found = await child("AC", "1", "1", "4", "0")
    assert "float32" in found["how"] and found["A"]["mean_ms"] > 0
    assert len(found["A"]["asked"]) == 12 and len(found["C"]["asked"]) == 6
    assert max(length for length, _ in found["C"]["asked"]) <= 240
