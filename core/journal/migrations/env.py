"""Alembic's side of core.journal: each revision in one transaction with its number, on a connection we are given."""

from __future__ import annotations

from alembic import context

from core.journal.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,  # SQLite can, once BEGIN is said by us; Alembic does not trust it by default
    transaction_per_migration=False,
)
context.run_migrations()
