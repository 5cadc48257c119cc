"""The nouns that cross every border: Channel, Author, Message, Turn, Reply. No imports of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

Kind = Literal["ask", "heard", "edit", "delete"]
"""ask: wants an answer; heard: kept, and in no history; edit and delete: about the earlier message with the same id."""

ReplyState = Literal["pending", "sending", "sent", "abandoned"]
MessageState = Literal["waiting", "answered", "shed", "expired", "cancelled", "failed", "heard"]


@dataclass(frozen=True, slots=True)
class Channel:
    """One conversation: a chat, a text channel, a thread or a topic, each on its own."""

    platform: str
    id: str

    def __str__(self) -> str:
        return f"{self.platform}:{self.id}"

    @property
    def chat(self) -> Channel:
        """The whole chat that a topic is in, spelt "chat:topic"; else the channel itself."""
        return Channel(self.platform, self.id.partition(":")[0])

    @classmethod
    def parse(cls, text: str) -> Channel:
        """Read what `str` wrote. ValueError when there is no "platform:id" in it."""
        platform, colon, id = text.partition(":")
        if not (platform and colon and id):
            raise ValueError(f"a channel is written platform:id, for example discord:123, not {text!r}")
        return cls(platform, id)


@dataclass(frozen=True, slots=True)
class Author:
    id: str
    name: str
    is_bot: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """What a bot heard. `id` is the platform's and unique within the channel, in the platform's own spelling."""

    channel: Channel
    id: str
    author: Author
    text: str
    sent_at: datetime
    """Aware, by the platform's clock."""
    kind: Kind = "ask"
    server: str = ""
    """The Discord server or Telegram group it was said in; "" in a direct message. For caps and lists."""
    account: str = ""
    """Whose message ids these are, where each of our accounts has its own (Telegram); else ""."""
    missed: bool = False
    """Said while we were away, and read now: it gives way where more waits in a channel than is answered."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One line of the history. `text` is as the person typed it, or as the model spelled it (see core.text)."""

    role: Literal["user", "assistant"]
    author: str
    text: str
    index: int
    """Position in the channel, from 0. A reset does not begin anew, and what is deleted leaves a gap."""
    id: str = ""
    """The platform id of the message said, or of the one answered."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One platform message to be sent. A long answer is several, `part` 0, 1, …, delivered in order."""

    id: int
    channel: Channel
    to: str
    """The platform id of the message it answers."""
    text: str
    nonce: str
    """20 characters of base64url, random, drawn once and stored: the same on every attempt."""
    part: int = 0
    state: ReplyState = "pending"
    tries: int = 0
    message: int = 0
    """The journal's row of the message it answers; the parts of one answer share it."""
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class Request:
    """A message in the journal that waits for its answer."""

    row: int
    message: Message
    deadline: datetime
    """Aware, by our own clock, counted from receipt: platforms' clocks and ours disagree."""
    attempts: int = 0
    ends: float = float("inf")
    """The deadline by the clock that nobody sets (`time.monotonic`); the queue's side of it."""
