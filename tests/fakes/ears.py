"""A chat that only listens: what a bot hands over, and how it takes a no. No journal, no answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import cast

from core.chat import NO_MARKS, Chat
from core.delivery import NotAccepted
from core.messages import Channel, Message, MessageState


class Ears:
    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.failed: list[tuple[Message, str]] = []
        self.expired: list[tuple[Message, str]] = []
        self.resets: list[Channel] = []
        self.order: list[str] = []
        """Texts and resets as they came."""
        self.adopted: list[tuple[str, str]] = []
        self.moves: list[tuple[Channel, Channel]] = []
        self.refuse = 0
        """So many calls more raise NotAccepted; -1 is all."""
        self.full = False
        """Messages are refused, marks alone are not."""
        self.poison = ""
        """A text that cannot be stored."""
        self.room = asyncio.Event()
        self.room.set()
        self.calls = 0
        self.marks: dict[str, str] = {}
        self.sessions = 0

    @property
    def chat(self) -> Chat:
        return cast(Chat, self)

    @property
    def voice(self) -> Ears:
        return self

    def hears(self, text: str) -> bool:
        return bool(text) and text.isascii()

    @property
    def texts(self) -> list[str]:
        return [message.text for message in self.heard]

    def _asked(self) -> None:
        self.calls += 1
        if self.refuse:
            self.refuse -= 1
            raise NotAccepted("the disk is full")

    async def receive(self, *messages: Message, marks: Mapping[Channel, str] = NO_MARKS) -> None:
        self._asked()
        if messages and self.full:
            raise NotAccepted("the disk is full")
        if self.poison and any(self.poison in message.text for message in messages):
            raise ValueError("cannot be stored")
        moved = self.marks | {channel.id: id for channel, id in marks.items()}
        self.marks = {channel: id for channel, id in moved.items() if id}
        for message in messages:
            seen = any((m.channel, m.id, m.kind) == (message.channel, message.id, message.kind) for m in self.heard)
            if message.kind == "edit" or not seen:
                self.heard.append(message)
                self.order.append(message.text)

    async def refail(self, *messages: Message, note: str, state: MessageState = "failed") -> None:
        self._asked()
        (self.expired if state == "expired" else self.failed).extend((message, note) for message in messages)

    async def reset(self, channel: Channel, asked: Message | None = None) -> bool:
        self._asked()
        self.resets.append(channel)
        self.order.append("reset")
        return True

    async def rekey(self, old: Channel, new: Channel) -> None:
        self._asked()
        self.moves.append((old, new))

    async def paused(self) -> None:
        await self.room.wait()

    async def watermarks(self, platform: str) -> dict[str, str]:
        self._asked()
        return dict(self.marks)

    async def adopt(self, platform: str, account: str) -> None:
        self.adopted.append((platform, account))

    async def identified(self, platform: str, new: bool = True) -> int:
        self.sessions += new
        return self.sessions
