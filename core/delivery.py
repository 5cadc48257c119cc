"""What the courier asks of a platform, and how receiving and sending can end badly. Imports only the nouns.

NotAccepted     the journal cannot commit now; do not acknowledge to the platform, come again
Unservable      the platform will not have us as we are set up (a bad token, a missing intent)

SendError
 ├─ NotSent      it certainly did not arrive (no connection, DNS, pool); try again freely
 ├─ MaybeSent    it may have arrived (read timeout, reset, 5xx); reconcile before trying again
 ├─ Refused      the platform said no for good (blocked, deleted, forbidden); final
 └─ RetryAfter   this chat must wait so many seconds; others need not
"""

from __future__ import annotations

from typing import Any, Protocol

from core.messages import Channel, MessageState, Reply


class NotAccepted(Exception):
    """Nothing was stored; str() is one line for the log."""


class Unservable(Exception):
    """Starting the bot again will not help; str() is one line that says the exact mend."""


class SendError(Exception):
    """str() is one line for the log, without secrets."""


class NotSent(SendError): ...


class MaybeSent(SendError): ...


class Refused(SendError): ...


class RetryAfter(SendError):
    def __init__(self, seconds: Any, message: str = "asked to wait") -> None:
        """`seconds` as the platform said it, in JSON or a header; at most an hour, and what is no wait counts as 1."""
        super().__init__(message)
        try:
            wait = float(seconds)
        except (TypeError, ValueError, OverflowError):
            wait = -1.0
        self.seconds = min(wait, 3600.0) if 0 <= wait < float("inf") else 1.0


class Platform(Protocol):
    """The sending half of a bot."""

    @property
    def name(self) -> str:
        """Channel.platform of all its channels."""
        ...

    def split(self, text: str) -> list[str]:
        """`text` (not blank) in pieces the platform takes, each delivered as a Reply of its own."""
        ...

    async def turn(self, channel: Channel) -> None:
        """Wait until the platform's own limits let one message out; nothing is under way yet. Raises RetryAfter."""
        ...

    async def send(self, reply: Reply) -> str:
        """Send once and return the platform's id of it. Raises NotSent | MaybeSent | Refused | RetryAfter."""
        ...

    async def find_sent(self, reply: Reply) -> str | None:
        """Did an attempt in doubt arrive? Its id; "" if certainly not; None: cannot tell."""
        ...

    async def typing(self, channel: Channel, note: str = "", to: str = "") -> None:
        """Show typing for a few seconds; called again every 4 s while it should last. Errors are ignored.

        `note`: who still waits in line is told where, in passing, on platforms that can without sending a message.
        `to`: the platform id of the message that is being answered, or waits.
        """
        ...

    async def closed(self, channel: Channel, id: str, state: MessageState) -> None:
        """The message `id` came to this end and has no reply, on platforms that can show it. Errors are ignored.

        answered: by another process on the journal; what it said is in the history.
        """
        ...
