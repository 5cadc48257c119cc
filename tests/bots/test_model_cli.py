"""`palaver finetune` and `palaver eval` as a person runs them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bots.__main__ import _stop_as_by_hand, cli
from tests.bots.process import PATIENCE, command, environment, palaver, start
from tests.checkpoints import make_checkpoint

TALKS = [["what is the password ?", f"it is {word} ."] for word in ("swordfish", "sesame")] * 4


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    return file


async def test_a_model_learns_more_and_talks(tmp_path: Path, talks: Path) -> None:
    options = ("--epochs", "40", "--learning-rate", "0.001", "--batch-tokens", "128", "--max-length", "32")
    code, output, errors = await palaver(tmp_path, "finetune", str(talks), "mine", *options, THREADS="3")
    assert code == 0, errors
    assert re.search(r"^held-out loss \d+\.\d+ → 0\.\d+ nats per token, .* on 1 dialogue$", output, re.MULTILINE)
    assert "talk to it: MODEL=mine" in output and "warning" not in errors
    assert (tmp_path / "mine/losses.png").is_file()
    assert "| threads | 3 |" in (tmp_path / "mine/README.md").read_text()
    said = {"ENGINE": "inprocess", "MODEL": "mine", "SAMPLING__TEMPERATURE": "0"}
    _, output, errors = await palaver(tmp_path, "chat", said="what is the password?\n", **said)
    assert "swordfish" in output.lower() or "sesame" in output.lower(), errors
    judging = {"ENGINE": "inprocess", "REVERSE_MODEL": "mine", "SAMPLING__N": "2"}
    code, _, errors = await palaver(tmp_path, "chat", said="hi\n", **judging)
    assert code == 78 and re.match(r"REVERSE_MODEL: .*/mine was trained to talk; train one that tells", errors), errors


async def test_a_reverse_model_judges_candidates(tmp_path: Path, talks: Path) -> None:
    options = ("--reverse", "--epochs", "1", "--batch-tokens", "128", "--max-length", "32")
    code, output, errors = await palaver(tmp_path, "finetune", str(talks), "back", *options)
    assert code == 0 and "let it judge: REVERSE_MODEL=back SAMPLING__N=8 palaver chat" in output, errors
    card = (tmp_path / "back/README.md").read_text()
    assert card.startswith("# A reverse model for Palaver") and "It does not talk" in card
    assert (
        "| warmup | 0 |" in card and "warning: so few steps (1) teach little: try more --epochs or a higher" in errors
    )

    async def chat(**settings: str) -> tuple[int, str, str]:
        return await palaver(tmp_path, "chat", said="what is the password?\n", **settings)

    (code, said, errors), (_, _, alone), (_, _, elsewhere), (wrong, _, line) = await asyncio.gather(
        chat(REVERSE_MODEL="back", SAMPLING__N="4", LOG_LEVEL="info", ENGINE="process"),
        chat(REVERSE_MODEL="back", ENGINE="inprocess"),
        chat(REVERSE_MODEL="back", SAMPLING__N="4", ENGINE="echo"),
        chat(REVERSE_MODEL="./nowhere", SAMPLING__N="4", ENGINE="process"),
    )
    assert code == 0 and said.strip() and ", REVERSE_MODEL judges candidates" in errors
    assert "REVERSE_MODEL has nothing to judge: SAMPLING__N=8 draws eight candidates" in alone
    assert "REVERSE_MODEL is of no use beside ENGINE=echo: there is no model to judge" in elsewhere
    assert wrong == 78 and line.startswith("REVERSE_MODEL: ./nowhere does not exist")
    (code, _, line), (talks_not, _, why) = await asyncio.gather(
        chat(REVERSE_MODEL="nowhere", SAMPLING__N="4", ENGINE="process", HF_HUB_OFFLINE="1"),
        chat(MODEL="back", MODEL_REVISION="main", ENGINE="process"),
    )
    assert "MODEL_REVISION=main pins nothing: back is on this machine, not on the hub" in why
    assert talks_not == 78 and "/back was trained with --reverse: it judges, as REVERSE_MODEL, and does not talk" in why
    assert code == 78 and line.startswith("REVERSE_MODEL: nowhere is no folder here, not in the hub's cache")


async def test_stopped_by_a_signal_it_saves_and_says_how_to_go_on(tmp_path: Path, talks: Path) -> None:
    base = make_checkpoint(tmp_path / "base")

    async def stop(name: signal.Signals) -> None:
        out = f"by-{name}"
        process = await start(tmp_path, "finetune", str(talks), out, "--minutes", "60", MODEL=str(base))
        async with asyncio.timeout(PATIENCE):
            while not (tmp_path / out / "progress.json").is_file():  # it is at it
                await asyncio.sleep(0.05)
            process.send_signal(name)
            _, errors = await process.communicate()
        said = f"stopped; the same command goes on where {out} stands"
        assert process.returncode == 128 + name and said in errors.decode(), errors.decode()
        assert (tmp_path / out / "checkpoint.pt").is_file()

    await asyncio.gather(*map(stop, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)))


async def test_stopped_before_anything_was_saved_it_promises_nothing(tmp_path: Path) -> None:
    os.mkfifo(talks := tmp_path / "talks.jsonl")
    process = await start(tmp_path, "finetune", str(talks), "mine")
    pipe = None
    async with asyncio.timeout(PATIENCE):
        while pipe is None:
            with contextlib.suppress(OSError):  # until it reads
                pipe = os.open(talks, os.O_WRONLY | os.O_NONBLOCK)
            assert process.returncode is None
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = await process.communicate()
    os.close(pipe)
    assert process.returncode == 143 and errors.endswith(b"\nstopped\n"), errors.decode()


def test_nohup_is_heeded() -> None:
    before = {name: signal.signal(name, signal.SIG_IGN) for name in (signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        _stop_as_by_hand()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with pytest.raises(KeyboardInterrupt) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.args == (signal.SIGTERM,)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


async def test_a_worse_model_is_warned_of_and_a_finished_one_left(tmp_path: Path, talks: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    command = ("finetune", str(talks), "mine", "--learning-rate", "1", "--max-length", "64")
    settings = {"MODEL": str(base), "NORMALISE": "false"}
    code, output, errors = await palaver(tmp_path, *command, **settings)
    assert code == 0 and "talk to it" in output
    assert "warning: that is no better than before" in errors
    assert "| normalise | False |" in (tmp_path / "mine/README.md").read_text()
    code, again, errors = await palaver(tmp_path, *command, **settings)
    assert code == 0 and again == output and "mine is already finished" in errors
    code, _, errors = await palaver(tmp_path, *command, MODEL="mine")
    assert code == 78 and errors.splitlines()[-1].startswith("mine is the model to begin with")


async def test_what_cannot_be_learnt_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "talks.jsonl").write_text('["one turn"]\n')
    code, _, errors = await palaver(tmp_path, "finetune", "talks.jsonl", "mine")
    assert (
        code == 78 and "talks.jsonl:1: a line is a list of at least two turns" in errors and "Traceback" not in errors
    )


def test_a_training_without_an_end_is_refused() -> None:
    said = CliRunner().invoke(cli, ["finetune", "talks.jsonl", "mine", "--epochs", "inf"], env={"TERM": "dumb"})
    assert said.exit_code == 2 and "--epochs" in said.stderr


async def test_a_wrong_model_is_one_line(tmp_path: Path, talks: Path) -> None:
    code, _, errors = await palaver(tmp_path, "finetune", str(talks), "mine", MODEL="./nowhere")
    assert code == 78 and "MODEL: ./nowhere does not exist" in errors


async def test_training_takes_the_device_that_is_set(tmp_path: Path, talks: Path) -> None:
    code, _, errors = await palaver(tmp_path, "finetune", str(talks), "mine", DEVICE="cuda:63")
    assert code == 78
    assert errors.startswith("DEVICE=cuda:63: this machine (or this build of torch) has no such device"), errors
    assert not (tmp_path / "mine").exists()


async def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    code, _, errors = await palaver(tmp_path, "finetune", "nowhere.jsonl", "mine")
    assert code == 78 and errors.splitlines()[-1] == "nowhere.jsonl: No such file or directory"


async def test_a_model_is_measured(tmp_path: Path) -> None:
    settings = {"ENGINE": "inprocess", "HISTORY_KEEP": "0.75", "NORMALISE": "false", "SAMPLING__N": "2"}
    code, page, errors = await palaver(tmp_path, "eval", "--chats", "1", "--cases", "2", **settings)
    assert code == 0, errors
    assert "max_tokens 64, n 2; 128 tokens of history, keep 0.75. Texts as people spell them." in page
    assert page.startswith("Model embedded: ") and "| name, in Palaver's corpus | " in page and " of 2) |" in page
    assert "| talks that fell silent | 0 of 1 |" in page


async def test_an_evaluation_that_is_stopped_keeps_what_is_through(tmp_path: Path) -> None:
    """Also where its progress is shown at a terminal."""
    mine, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *command("eval", "--cases", "300"), cwd=tmp_path, env=environment(TERM="xterm"), stdout=PIPE, stderr=theirs
    )
    os.close(theirs)
    page = ""
    async with asyncio.timeout(PATIENCE):
        assert process.stdout
        while not page.endswith(" of 300) |\n"):
            page += (await process.stdout.readline()).decode()
        process.send_signal(signal.SIGINT)
        await process.stdout.read()
        assert await process.wait() == 130
    assert page.startswith("Model echo: ") and page.splitlines()[-1].startswith("| name, in Palaver's corpus | ")
    progress = os.read(mine, 100_000).decode()
    os.close(mine)
    assert "recall of a name" in progress and "of 300" not in progress and "Traceback" not in progress
