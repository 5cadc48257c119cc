"""The journal's tables. Times are seconds since 1970 by our own clock, but for leases; each text stands in one place.

messages  waiting → answered | shed | expired | cancelled | failed        heard (no question, in no history)
replies   pending → sending → sent | abandoned
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
)

metadata = MetaData()
Row = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up by itself only in INTEGER PRIMARY KEY

messages = Table(
    "messages",
    metadata,
    Column("id", Row, primary_key=True, autoincrement=True),
    Column("platform", String(32), nullable=False),
    Column("account", String(64), nullable=False),
    Column("channel", String(128), nullable=False),
    Column("platform_id", String(128), nullable=False),
    Column("server", String(64), nullable=False),
    Column("author", String(64), nullable=False),
    Column("author_name", Text, nullable=False),
    Column("author_is_bot", Boolean, nullable=False),
    Column("text", Text, nullable=False),
    Column("sent_at", Double, nullable=False),
    Column("received_at", Double, nullable=False),
    Column("deadline", Double, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("turn", BigInteger),
    Column("deleted", Boolean, nullable=False, default=False),
    Column("note", Text, nullable=False, default=""),
    UniqueConstraint("platform", "account", "channel", "platform_id", name="messages_once"),
)
Index("messages_history", messages.c.platform, messages.c.channel, messages.c.turn)
Index("messages_author", messages.c.platform, messages.c.author)
# Spelled out: with a parameter SQLite would read the whole table, not the index of these few.
waiting = messages.c.state == literal_column("'waiting'")
Index("messages_waiting", messages.c.id, sqlite_where=waiting, postgresql_where=waiting)

replies = Table(
    "replies",
    metadata,
    Column("id", Row, primary_key=True, autoincrement=True),
    Column("message", Row, ForeignKey("messages.id", ondelete="CASCADE"), nullable=False),
    Column("part", Integer, nullable=False),
    Column("notice", Boolean, nullable=False),
    Column("text", Text, nullable=False),
    Column("spoken", Text, nullable=False),
    Column("nonce", String(32), nullable=False, unique=True),
    Column("seed", BigInteger),
    Column("logprob", Double),
    Column("state", String(16), nullable=False),
    Column("tries", Integer, nullable=False, default=0),
    Column("created_at", Double, nullable=False),
    Column("first_try_at", Double),
    Column("platform_id", String(128), nullable=False, default=""),
    Column("note", Text, nullable=False, default=""),
    UniqueConstraint("message", "part", name="replies_once"),
)
unsettled = replies.c.state.in_((literal_column("'pending'"), literal_column("'sending'")))
Index("replies_due", replies.c.id, sqlite_where=unsettled, postgresql_where=unsettled)

channels = Table(
    "channels",
    metadata,
    Column("platform", String(32), primary_key=True),
    Column("channel", String(128), primary_key=True),
    Column("next_turn", BigInteger, nullable=False, default=0),
    Column("history_after", BigInteger, nullable=False, default=0),
)

watermarks = Table(
    "watermarks",
    metadata,
    Column("platform", String(32), primary_key=True),
    Column("channel", String(128), primary_key=True),
    Column("last_id", String(128), nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("owner", String(256), nullable=False),
    Column("until", Double, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", Row, primary_key=True, autoincrement=True),
    Column("platform", String(32), nullable=False),
    Column("at", Double, nullable=False),
)
