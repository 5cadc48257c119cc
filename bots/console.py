"""The terminal, and the smallest bot: copy it to start a new platform.

A person at a terminal has one conversation that goes on after a restart. Piped input is a script: a conversation of its
own, one line out for every line in, then the end.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from bots.base import Line
from core.delivery import NotAccepted, Unservable
from core.messages import Author, Channel, Message, MessageState, Reply
from core.text import MAX_CHARS, clean

if TYPE_CHECKING:
    from core.chat import Chat

WELCOME = "This is a bot; it makes things up. /reset starts anew, /quit ends."
AGAIN = "That is forgotten. Hello again!"
UNHEARD = "(I can only read words.)"
SILENCE = "(No answer came.)"
KEYS = re.compile(r"\x1b(\[[0-9;]*[A-Za-z~]|O[A-Z])")
"""Arrows and their like, as a terminal sends them (ECMA-48, section 5.4): nobody said that."""


class ConsoleBot:
    name = "console"
    alone = False

    def __init__(self, patience: float = 75.0) -> None:
        """`patience`: seconds to wait for an answer, a little more than the queue's deadline."""
        self.at_terminal = sys.stdin is not None and sys.stdin.isatty()
        self._erase = "" if os.environ.get("TERM") == "dumb" else "\r\x1b[K"
        """What takes a line away; in an editor's terminal nothing does."""
        self.channel = Channel(self.name, "local" if self.at_terminal else secrets.token_hex(8))
        self.line = Line()
        self._patience = patience
        self._asked: dict[str, asyncio.Future[str]] = {}

    async def serve(self, chat: Chat) -> None:
        """Returns at the end of the input or at /quit. Raises Unservable when nothing can be shown."""
        try:
            self._show(f"{WELCOME}\n> " if self.at_terminal else "")
            async for line in read_lines():
                if line == "/quit":
                    break
                said = await self._answer(chat, line)
                self._show(f"{self._erase}{said}\n> " if self.at_terminal else f"{said}\n")
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):  # else nobody reads on: `palaver chat | head -1`
                raise Unservable(f"standard output cannot be written: {error.strerror}") from None

    async def _answer(self, chat: Chat, text: str) -> str:
        if text == "/reset":
            await chat.reset(self.channel)
            return AGAIN
        if not text:
            return ""
        now = datetime.now(UTC)
        message = Message(self.channel, secrets.token_hex(8), Author("you", "you"), text, now)
        reply = self._asked[message.id] = asyncio.get_running_loop().create_future()
        try:
            await chat.receive(message)
            if not chat.voice.hears(text):
                return UNHEARD if self.at_terminal else ""
            said = await asyncio.wait_for(reply, self._patience)
            return said or await self._found(chat, message.id)
        except TimeoutError:
            return SILENCE
        except NotAccepted as error:
            return f"({error})"
        finally:
            del self._asked[message.id]

    async def _found(self, chat: Chat, id: str) -> str:
        """What another process on the journal answered."""
        answers = (turn.text for turn in await chat.history(self.channel) if (turn.role, turn.id) == ("assistant", id))
        return " ".join(clean(next(answers, SILENCE)).split())

    # -- what the courier calls ----------------------------------------------------------------------------------

    async def turn(self, channel: Channel) -> None: ...

    async def send(self, reply: Reply) -> str:
        text = " ".join(clean(reply.text).split())
        waiting = self._asked.get(reply.to)
        if waiting and not waiting.done():
            waiting.set_result(text)
        elif reply.channel == self.channel:  # owed since before a restart
            self._show(f"{self._erase}{text}\n> ")
        return str(reply.id)  # a script that is gone reads nothing

    async def find_sent(self, reply: Reply) -> str | None:
        return None

    async def typing(self, channel: Channel, note: str = "", to: str = "") -> None:
        if self.at_terminal and self._erase and channel == self.channel:
            self._show(f"{self._erase}{note or '…'}")

    async def closed(self, channel: Channel, id: str, state: MessageState) -> None:
        waiting = self._asked.get(id)
        if waiting and not waiting.done():
            waiting.set_result("")

    def split(self, text: str) -> list[str]:
        return [text]

    def _show(self, text: str) -> None:
        print(text, end="", flush=True)


async def read_lines() -> AsyncIterator[str]:
    """Standard input's lines, of long ones the end, without white space around them; the loop runs on meanwhile."""
    rest, more = b"", sys.stdin is not None
    while more:
        await _readable(0)
        more = bool(chunk := os.read(0, 65_536))
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[-4 * MAX_CHARS :]
        for line in lines if more or not rest else [rest]:
            yield clean(KEYS.sub("", line.decode("utf-8", "replace"))).strip()[-MAX_CHARS:]


async def _readable(descriptor: int) -> None:
    """Returns when reading would not block."""
    ready, loop = asyncio.Event(), asyncio.get_running_loop()
    try:
        loop.add_reader(descriptor, ready.set)
    except PermissionError:  # a plain file is always readable
        return
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
