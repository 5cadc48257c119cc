"""The terminal: as a script with piped input, and as a person with a terminal of its own."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bots.console import AGAIN, SILENCE, UNHEARD, ConsoleBot
from core.messages import Author, Channel, Message, Reply
from core.settings import QueueLimits
from tests.bots.house import House, until
from tests.bots.process import PATIENCE, command, environment, palaver


async def test_one_line_out_for_each_line_in(tmp_path: Path) -> None:
    said = "hello\n\n  \n🦄\n<|endoftext|>\n/reset\r\ntwo  words\nthe last has no end"
    code, output, errors = await palaver(tmp_path, "chat", said=said)
    assert code == 0, errors
    lines = output.split("\n")
    assert lines[:4] == ["Hello", "", "", ""] and lines[5:] == [AGAIN, "Two words", "The last has no end", ""]


@pytest.mark.parametrize(("said", "lines"), [("", []), ("\n", [""]), ("/quit\nhello\n", []), ("a\n/quit\nb", ["A"])])
async def test_short_scripts(tmp_path: Path, said: str, lines: list[str]) -> None:
    code, output, errors = await palaver(tmp_path, "chat", said=said)
    assert (code, output.splitlines(), errors) == (0, lines, "")


async def test_bytes_that_are_no_text_are_a_line_too(tmp_path: Path) -> None:
    (tmp_path / "said").write_bytes(b"\xff\xfe\x00\x1b[31m\nhello\n" + b"word " * 20_000 + b"\nend\n")
    with (tmp_path / "said").open("rb") as said:  # a plain file, which no event loop can wait for
        process = await asyncio.create_subprocess_exec(
            *command("chat"), cwd=tmp_path, env=environment(), stdin=said, stdout=subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    lines = output.decode().splitlines()
    assert len(lines) == 4 and lines[1] == "Hello" and lines[2].startswith("Word word") and lines[3] == "End"


async def test_input_without_end_of_line_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "said").write_bytes(b"x" * 2**24 + b" the end\nhello\n" + b"y" * 2**24)
    script = """
import asyncio, tracemalloc
from bots.console import read_lines

async def main():
    tracemalloc.start()
    print([line[-7:] async for line in read_lines()], tracemalloc.get_traced_memory()[1] < 2**20)

asyncio.run(main())
"""
    with (tmp_path / "said").open("rb") as said:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script), env=environment(), stdin=said, stdout=subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert output.decode() == "['the end', 'hello', 'yyyyyyy'] True\n"


async def test_each_script_is_a_conversation_of_its_own(tmp_path: Path) -> None:
    bots = ConsoleBot(), ConsoleBot()
    assert bots[0].channel != bots[1].channel
    outputs = [await palaver(tmp_path, "chat", said="hello\nhow are you?\n") for _ in range(2)]
    assert outputs[0] == outputs[1] and outputs[0][1] == "Hello\nHow are you?\n"


async def test_a_reader_that_leaves_ends_it(tmp_path: Path) -> None:
    said = "hello\n" * 50
    pipeline = f"{' '.join(command('chat'))} | head -1; exit ${{PIPESTATUS[0]}}"
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", pipeline), cwd=tmp_path, env=environment(), stdin=-1, stdout=-1, stderr=-1
    )
    output, errors = await asyncio.wait_for(process.communicate(said.encode()), PATIENCE)
    assert (process.returncode, output, errors) == (0, b"Hello\n", b"")


async def test_a_welcome_that_cannot_be_written_ends_it(tmp_path: Path) -> None:
    mine, theirs = pty.openpty()
    full = os.open("/dev/full", os.O_WRONLY)
    process = await asyncio.create_subprocess_exec(
        *command("chat"), cwd=tmp_path, env=environment(), stdin=theirs, stdout=full, stderr=-1
    )
    try:
        _, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
        for end in (mine, theirs, full):
            os.close(end)
    assert process.returncode == 1 and b"standard output cannot be written: No space left on device" in errors


class Terminal:
    """Both ends of a pseudo terminal and the program between them."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.mine, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command("chat"), cwd=folder, env=environment(**settings), stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.mine, text.encode())

    async def shows(self, text: str) -> None:
        """Read until `text` stands there, then forget what was read."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE):
            while text not in self.seen:
                try:
                    self.seen += (await loop.run_in_executor(None, os.read, self.mine, 4096)).decode()
                except OSError as end:  # the other side is closed
                    raise AssertionError(f"{text!r} is not in {self.seen!r}") from end
        self.seen = self.seen.partition(text)[2]

    async def ends(self) -> int:
        return await asyncio.wait_for(asyncio.to_thread(self.process.wait), PATIENCE)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(**settings: str) -> Terminal:
        opened.append(Terminal(tmp_path, **settings))
        return opened[-1]

    yield start
    for each in opened:
        each.process.kill()
        each.process.wait()
        os.close(each.mine)


async def test_a_person_talks(terminal: Callable[[], Terminal]) -> None:
    window = terminal()
    await window.shows("/quit ends.\r\n> ")
    window.type("hello\n")
    await window.shows("…")
    await window.shows("Hello\r\n> ")
    window.type("good\x1b[D\x1b[3~\x1bOA evening\n")  # arrows and the like are not said
    await window.shows("Good evening\r\n> ")
    window.type("🦄\n")
    await window.shows(UNHEARD)
    window.type("/reset\n")
    await window.shows(AGAIN)
    window.type("/quit\n")
    assert await window.ends() == 0


@pytest.mark.parametrize("end", ["\x04", signal.SIGINT, signal.SIGTERM])
async def test_a_person_leaves(terminal: Callable[[], Terminal], end: str | signal.Signals) -> None:
    window = terminal()
    await window.shows("> ")
    if isinstance(end, str):
        window.type(end)
    else:
        window.process.send_signal(end)
    assert await window.ends() == 0


async def test_a_person_sees_that_a_model_loads(terminal: Callable[..., Terminal]) -> None:
    window = terminal(ENGINE="process", MODEL="./nowhere")
    await window.shows("loading ./nowhere …")
    assert await window.ends() == 78


async def test_a_person_is_remembered_and_a_script_is_not() -> None:
    house, bot = House(), ConsoleBot()
    bot.at_terminal, bot.channel = True, Channel("console", "local")
    async with house.serve(Silent(bot)) as chat:
        assert await bot._answer(chat, "my name is Mira") == "You said my name is Mira"
    async with house.serve(Silent(bot)) as chat:
        await bot._answer(chat, "who am I?")
    assert house.engine.prompts[-1] == ["my name is Mira", "you said my name is Mira", "who am I ?"]


async def test_what_was_owed_is_shown_to_the_person_alone(capsys: pytest.CaptureFixture[str]) -> None:
    person, script = ConsoleBot(), ConsoleBot()
    reply = Reply(1, person.channel, "lost", "Here you are.", "nonce")
    assert await person.send(reply) == await script.send(reply) == "1"
    assert capsys.readouterr().out.count("Here you are.") == 1


async def test_an_answer_that_never_comes_is_a_line_too() -> None:
    house, bot = House(), ConsoleBot(patience=0.2)
    house.engine.gate.clear()
    async with house.serve(Silent(bot)) as chat:
        assert await bot._answer(chat, "hello") == SILENCE


async def test_what_another_process_on_the_journal_answered_is_a_line_too() -> None:
    house, other, bots = House(), House(), [ConsoleBot(), ConsoleBot()]
    other.disk = house.disk
    house.engine.gate.clear()
    async with house.serve(Silent(bots[0])) as chat:
        asked = asyncio.create_task(bots[0]._answer(chat, "hello"))
        await until(lambda: house.engine.prompts)
        async with other.serve(Silent(bots[1])):
            await until(lambda: house.disk.rows[0].state == "answered")
            house.engine.gate.set()
            assert await asked == "You said hello"


async def test_a_question_that_expires_is_a_line_at_once() -> None:
    house, bot = House(QueueLimits(deadline=0.5)), ConsoleBot()
    house.engine.gate.clear()
    async with house.serve(Silent(bot)) as chat:
        first = asyncio.create_task(bot._answer(chat, "hello"))
        await until(lambda: house.engine.prompts)
        async with asyncio.timeout(20):
            assert await bot._answer(chat, "are you there?") == SILENCE
        first.cancel()


async def test_a_journal_that_takes_nothing_is_said() -> None:
    house, bot = House(), ConsoleBot()
    async with house.serve(Silent(bot)) as chat:
        house.journal._refuse = 1.0
        assert await bot._answer(chat, "hello") == "(the disk is full)"


async def test_control_characters_of_a_reply_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bot = ConsoleBot()
    await bot.send(Reply(1, bot.channel, "lost", "red \x1b[31m\x07\nand a line", "nonce"))
    assert "red [31m and a line" in capsys.readouterr().out


@pytest.mark.parametrize(("term", "shown"), [("xterm", "\r\x1b[K…\r\x1b[Khello\n> "), ("dumb", "hello\n> ")])
async def test_a_terminal_that_takes_nothing_away_gets_no_signs_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], term: str, shown: str
) -> None:
    monkeypatch.setenv("TERM", term)
    bot = ConsoleBot()
    bot.at_terminal = True
    await bot.typing(bot.channel)
    await bot.send(Reply(1, bot.channel, "lost", "hello", "nonce"))
    assert capsys.readouterr().out == shown


class Silent(ConsoleBot):
    """The bot without its input: the test says what is said."""

    def __init__(self, bot: ConsoleBot) -> None:
        self.__dict__ = bot.__dict__

    async def serve(self, chat: object) -> None:
        await asyncio.Event().wait()


async def test_a_message_of_another_script_is_not_ours() -> None:
    house, bot = House(), ConsoleBot()
    async with house.serve(Silent(bot)) as chat:
        other = Channel("console", "another")
        await chat.receive(Message(other, "1", Author("you", "you"), "hello", datetime.now(UTC)))
        await until(lambda: house.disk.replies and house.disk.replies[0].reply.state == "sent")
