"""The contract of a platform: a bot hears (serve) and speaks (send, find_sent, typing, split; see core.delivery)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from core.delivery import MaybeSent, NotSent, Platform, Refused, RetryAfter, SendError

if TYPE_CHECKING:
    from core.chat import Chat

__all__ = ["Bot", "MaybeSent", "NotSent", "Platform", "Refused", "RetryAfter", "SendError", "Unservable"]


class Bot(Platform, Protocol):
    async def serve(self, chat: Chat) -> None:
        """Hear until cancelled: hand each message to `chat.receive`, and acknowledge to the platform after it returns.

        Raises when the platform cannot be served; the app starts it again with back-off. SystemExit-like
        conditions a restart cannot mend (a bad token, a missing intent) raise Unservable.
        """
        ...


class Unservable(Exception):
    """A restart will not help; str() is one line that says the exact mend."""
