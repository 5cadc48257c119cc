"""One fake Telegram, one bot that serves, one chat that listens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

from pydantic import SecretStr

from bots.telegram import TelegramBot, TelegramSettings, open_telegram
from core.messages import Channel, Reply
from tests.fakes.ears import Ears
from tests.fakes.telegram_server import TelegramServer

ANN, BOB, GROUP = 7, 8, -1001234567890


def settings(server: TelegramServer, **more: Any) -> TelegramSettings:
    return TelegramSettings(
        telegram_token=SecretStr(more.pop("token", server.token)), telegram_api_base=server.base, **more
    )


@contextlib.asynccontextmanager
async def serving(server: TelegramServer, ears: Ears, **more: Any) -> AsyncIterator[TelegramBot]:
    """A bot that serves until the block ends; what ends it before that ends the block and is raised."""
    bot, block = open_telegram(settings(server, **more)), asyncio.current_task()
    assert block is not None
    task = asyncio.create_task(bot.serve(ears.chat))
    task.add_done_callback(lambda ended: None if ended.cancelled() else block.cancel())
    try:
        yield bot
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(true: Callable[[], object], timeout: float = 60.0) -> None:
    async with asyncio.timeout(timeout):
        while not true():
            await asyncio.sleep(0.01)


def reply(chat: int | str, text: str = "hello", to: str = "1") -> Reply:
    return Reply(1, Channel("telegram", str(chat)), to, text, "n" * 20, created_at=datetime.now(UTC))
