"""The contract of a platform: a bot hears (serve) and speaks (the calls of core.delivery)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from core.delivery import MaybeSent, NotSent, Platform, Refused, RetryAfter, SendError, Unservable

if TYPE_CHECKING:
    from core.chat import Chat

__all__ = ["Bot", "Line", "MaybeSent", "NotSent", "Platform", "Refused", "RetryAfter", "SendError", "Unservable"]


class Line:
    """Whether the platform is heard. What is over within half a minute is no trouble."""

    PATIENCE = 30.0

    def __init__(self) -> None:
        self._why, self._since = "", 0.0

    def up(self) -> None:
        self._why = ""

    def down(self, why: str) -> None:
        if not self._why:
            self._since = time.monotonic()
        self._why = why

    @property
    def trouble(self) -> str:
        """ "" or what it is, one line."""
        return self._why if time.monotonic() - self._since >= self.PATIENCE else ""


class Bot(Platform, Protocol):
    line: Line
    alone: bool
    """Is it an account somewhere, which one process at a time serves? The others on the journal wait to take over."""

    async def serve(self, chat: Chat) -> None:
        """Hear until cancelled: hand each message to `chat.receive`, and acknowledge to the platform after it returns.

        `send` must work as long as this runs. Returns when the platform is at its end (the console's input);
        raises Unservable where a restart cannot help; anything else raised starts it again with back-off.
        """
        ...
