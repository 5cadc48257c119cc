"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Row = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "messages",
        sa.Column("id", Row, primary_key=True, autoincrement=True),
        sa.Column("platform", sa.String(32), nullable=False),
        sa.Column("account", sa.String(64), nullable=False),
        sa.Column("channel", sa.String(128), nullable=False),
        sa.Column("platform_id", sa.String(128), nullable=False),
        sa.Column("server", sa.String(64), nullable=False),
        sa.Column("author", sa.String(64), nullable=False),
        sa.Column("author_name", sa.Text, nullable=False),
        sa.Column("author_is_bot", sa.Boolean, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("sent_at", sa.Double, nullable=False),
        sa.Column("received_at", sa.Double, nullable=False),
        sa.Column("deadline", sa.Double, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("turn", sa.BigInteger),
        sa.Column("deleted", sa.Boolean, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.UniqueConstraint("platform", "account", "channel", "platform_id", name="messages_once"),
        sqlite_autoincrement=True,
    )
    op.create_index("messages_history", "messages", ["platform", "channel", "turn"])
    op.create_index("messages_author", "messages", ["platform", "author"])
    waiting = sa.text("state = 'waiting'")
    op.create_index("messages_waiting", "messages", ["id"], sqlite_where=waiting, postgresql_where=waiting)
    op.create_table(
        "replies",
        sa.Column("id", Row, primary_key=True, autoincrement=True),
        sa.Column("message", Row, sa.ForeignKey("messages.id", ondelete="CASCADE"), nullable=False),
        sa.Column("part", sa.Integer, nullable=False),
        sa.Column("notice", sa.Boolean, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("spoken", sa.Text, nullable=False),
        sa.Column("nonce", sa.String(32), nullable=False, unique=True),
        sa.Column("seed", sa.BigInteger),
        sa.Column("logprob", sa.Double),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("first_try_at", sa.Double),
        sa.Column("platform_id", sa.String(128), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.UniqueConstraint("message", "part", name="replies_once"),
        sqlite_autoincrement=True,
    )
    due = sa.text("state IN ('pending', 'sending')")
    op.create_index("replies_due", "replies", ["id"], sqlite_where=due, postgresql_where=due)
    op.create_table(
        "channels",
        sa.Column("platform", sa.String(32), primary_key=True),
        sa.Column("channel", sa.String(128), primary_key=True),
        sa.Column("next_turn", sa.BigInteger, nullable=False),
        sa.Column("history_after", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "watermarks",
        sa.Column("platform", sa.String(32), primary_key=True),
        sa.Column("channel", sa.String(128), primary_key=True),
        sa.Column("last_id", sa.String(128), nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("owner", sa.String(256), nullable=False),
        sa.Column("until", sa.Double, nullable=False),
    )
    op.create_table(
        "sessions",
        sa.Column("id", Row, primary_key=True, autoincrement=True),
        sa.Column("platform", sa.String(32), nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
