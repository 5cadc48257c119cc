"""The benchmark's rounds with a child that is played, and what it says to wrong input before anything is measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks import journal
from benchmarks.serve import __main__ as serve
from benchmarks.serve import checkpoints, machine
from core.engine.hub import EMBEDDED
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]
TWO = ("--peers", "palaver-int8", "llama.cpp-f32")

Play = Callable[[str, int], dict[str, Any]]
Run = Callable[..., str | int | None]


def measured(ms: float) -> dict[str, Any]:
    return {"A": {"mean_ms": ms, "asked": [(13, 13)]}, "how": "", "load_s": 1.0, "first_reply_s": 1.0, "peak_mb": 1.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run main() in the folders work and out; the code it ends with. `play` answers for the child of turn 1, 2, …"""
    monkeypatch.setattr(machine, "bandwidth", lambda *_: {"read_gb_s": 9})

    def run(*options: object, play: Play | None = None) -> str | int | None:
        turns: dict[str, int] = {}

        def ask(name: str, folder: Path, wanted: object, *turn: object) -> dict[str, Any]:
            assert play, "it was measured"
            if not turn:
                return {"seconds": 0.0}
            turns[name] = turns.get(name, 0) + 1
            return play(name, turns[name])

        folders = ("--work", tmp_path / "work", "--out", tmp_path / "out")
        monkeypatch.setattr(serve, "ask", ask)
        monkeypatch.setattr(machine, "products", lambda *_: dict.fromkeys(("float32", "bfloat16", "int8"), 9))
        monkeypatch.setattr(sys, "argv", ["serve", "--shape", "tiny", *map(str, (*folders, *options))])
        with pytest.raises(SystemExit) as stop:
            serve.main()
        return stop.value.code

    return run


def test_a_peer_that_fails_in_a_later_round_is_marked(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = iter((20.0, 30.0, 10.0, 5.0))
    monkeypatch.setattr(machine, "bandwidth", lambda *_: {"read_gb_s": next(rates)})

    def play(name: str, turn: int) -> dict[str, Any]:
        return {"absent": "it failed: no luck"} if name == "llama.cpp-f32" and turn == 2 else measured(10)

    assert run(*TWO, "--rounds", 2, play=play) == 0
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert found["limits"]["read_gb_s"] == 30, "the highest before any turn"
    table = capsys.readouterr().out.partition("| | A mean ms")[2]
    assert "| palaver-int8 | 10.0 |" in table and "| llama.cpp-f32 (left out) | 10.0 (1.0 ×) |" in table
    assert "\nin brackets: against palaver-int8\nleft out: llama.cpp-f32: in round 2 it failed: no luck\n" in table


def test_threads_are_as_suits_the_peer_and_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "cores", lambda: 7)
    large = {"n_embd": 1024, "n_layer": 4, "n_head": 4, "n_positions": 256, "vocab_size": 50_257}
    (tmp_path / "config.json").write_text(json.dumps(large | {"eos_token_id": 0}))
    for name, tiny in (("palaver-int8", 1), ("ctranslate2-int8", 1), ("llama.cpp-f32", 7), ("transformers-static", 7)):
        for folder, said, count in ((EMBEDDED, 0, tiny), (tmp_path, 0, 7), (EMBEDDED, 3, 3)):
            assert serve.threads(name, folder, Namespace(threads=said)) == count


def test_nobody_measured_writes_nothing(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny.json").write_text("earlier")
    assert run(*TWO, play=lambda name, turn: {"absent": "broken"}) == 1
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["earlier"]
    said = capsys.readouterr().err
    assert said.startswith("nobody was measured\nleft out: palaver-int8: in round 1 broken\nleft out: llama")


def test_interrupted_it_writes_the_turns_so_far(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def play(name: str, turn: int) -> dict[str, Any]:
        if turn == 3:
            raise KeyboardInterrupt
        return measured(10 * turn)

    assert run(*TWO, "--rounds", 5, play=play) == 130
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert [len(rounds) for rounds in found["runs"].values()] == [2, 2]
    assert "written, of the turns that were through: " in capsys.readouterr().out


def test_interrupted_before_anything_was_measured(run: Run, tmp_path: Path) -> None:
    def play(name: str, turn: int) -> dict[str, Any]:
        raise KeyboardInterrupt

    assert run(*TWO, play=play) == 130
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--workloads", ""), "name letters out of ABCDE"),
        (("--workloads", "AX"), "name letters out of ABCDE"),
        (("--rounds", 0), "--rounds 0: it must be 1 or more"),
        (("--rounds", -1), "it must be 1 or more"),
        (("--threads", -1), "it must be 0 or more"),
        (("--keep", 1.5), "--keep 1.5: it must be from 0 to 1"),
        (("--keep", "nan"), "it must be from 0 to 1"),
        (("--pause", -1), "it must be 0 or more"),
        (("--pause", "nan"), "it must be 0 or more"),
        (("--seconds", 0), "it must be above 0"),
        (("--seconds", "inf"), "it must be above 0"),
        (("--limit", 0), "it must be above 0"),
        (("--lengths", 0, 16), "--lengths 0 16: each must be 1 or more"),
        (("--lengths", 30, 90), "has 256 positions: name a model with 334 or more, or shorter --lengths"),
        (("--shape", "small", "--lengths", 200, 300), "small has 1024 positions: name a model with 1304 or more"),
        (("--name", "../x"), "--name ../x: it must be a file's name"),
        (("--model", "{}/nowhere"), "nowhere/config.json cannot be read"),
        (("--model", "{}/file"), "file/config.json cannot be read"),
        (("--model", "{}/empty"), "empty/config.json cannot be read"),
        (("--model", "{}/endless"), "eos_token_id None is not one id in the vocabulary"),
        (("--model", "{}/short"), "short has 75 positions: name a model with 76 or more"),
        (("--model", "{}/own"), "an output layer of its own"),
        (("--work", "{}/file/x"), "name another folder with --work or --out"),
    ],
)
def test_wrong_input_is_told_in_a_line_and_leaves_nothing(
    run: Run, tmp_path: Path, options: tuple[str, object], said: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, changes in (("endless", {"eos_token_id": None}), ("short", {"n_positions": 75})):
        make_checkpoint(tmp_path / name, **changes)
    make_checkpoint(tmp_path / "own", head="own")
    code = run(*(str(option).format(tmp_path) for option in options))
    assert isinstance(code, str) and said in code and "\n" not in code
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tokenizer", "{}/nowhere"), "nowhere has no tokenizer"),
        (("--tokenizer", "{}/file"), "file has no tokenizer"),
        (
            ("--tokenizer", str(EMBEDDED), "--model", "{}/plain"),
            "has 4095 ids, the model 384: put the tokenizer it was trained with",
        ),
        (("--out", "{}/file"), "name another folder with --work or --out"),
        (("--name", "x" * 300), "name another folder with --work or --out"),
    ],
)
def test_what_cannot_be_said_or_written_is_found_out_before(
    run: Run, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    (tmp_path / "file").touch()
    make_checkpoint(tmp_path / "plain")
    code = run(*(option.format(tmp_path) for option in options))
    assert isinstance(code, str) and said in code and "\n" not in code
    assert all(list(folder.iterdir()) for folder in (tmp_path / "work").iterdir())


def test_the_reason_is_the_exception() -> None:
    trace = ["Traceback (most recent call last):", '  File "x", line 1, in y', "ValueError: too warm"]
    assert serve.reason(["hello", *trace, "", *trace[:2], "OSError: too cold", "~~ end ~~"], 1) == "OSError: too cold"
    assert serve.reason(["a warning"], -9) == "killed by SIGKILL"
    assert serve.reason(["a line"], 2) == "a line"
    assert serve.reason([], 2) == "exit code 2"


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """It waits for a message that comes in an hour; its engine is a process of its own."""
    folder = checkpoints.make("tiny", None, tmp_path)
    turn = ("palaver-float32", str(folder), "A", "1", "1", "0.5", "3600", "12", "16")
    parent = "import subprocess, sys; subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE).wait()"
    command = sys.executable, "-c", parent, sys.executable, "-m", "benchmarks.serve.child", *turn
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as started:
        family = until(lambda: tree if len(tree := [*descendants(started.pid)]) == 2 else [])
        started.terminate()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))


def descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            yield child
            yield from descendants(child)


def until(there: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := there()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_the_journals_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(journal, "MESSAGES", 100)
    monkeypatch.setattr(sys, "argv", ["journal"])
    journal.main()
    assert "messages/s" in capsys.readouterr().out and not list(tmp_path.iterdir()), "nothing is left behind"
    for url, code in (("nonsense", "DATABASE_URL: is no database address"), ("--help", "0")):
        monkeypatch.setattr(sys, "argv", ["journal", url])
        with pytest.raises(SystemExit) as stop:
            journal.main()
        assert str(stop.value.code).startswith(code) and "\n" not in str(stop.value.code)
