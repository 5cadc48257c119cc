"""Telegram's webhook: its own small server that says 200 only when the update is in the journal.

Telegram forgets what was answered 2xx and repeats everything else for 24 hours, one update in flight for each chat, so
the order holds. https://core.telegram.org/bots/api#setwebhook
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from core.delivery import NotAccepted

log = logging.getLogger(__name__)

MAX_BODY = 2**20
BODY_TIMEOUT = 20.0
IDLE = 15.0
"""Seconds until a connection without a request is closed: each holds a descriptor."""
COME_AGAIN = 5
"""Seconds, in Retry-After, when the house is full or the journal cannot commit."""

Take = Callable[[list[Any]], Awaitable[None]]


class Webhook:
    def __init__(self, secret: str, take: Take, paused: Callable[[], Awaitable[None]]) -> None:
        """`take` returns when the updates are in the journal; `paused` when there is room for more."""
        self._secret, self._take, self._paused = secret.encode(), take, paused

    async def receive(self, request: web.Request) -> web.Response:
        given = request.headers.get("X-Telegram-Bot-Api-Secret-Token", "")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._secret):
            return web.Response(status=403)
        if (request.content_length or 0) > MAX_BODY:
            return web.Response(status=413)
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                body = await request.read()  # raises 413 when it grows beyond
        except TimeoutError:
            return web.Response(status=408)
        except web.RequestPayloadError:  # not in the encoding that it says
            return web.Response(status=400)
        try:
            async with asyncio.timeout(0.01):
                await self._paused()
        except TimeoutError:
            return _later()
        update = parse(body)
        if update is None:
            return web.Response(status=400)
        try:
            await self._take([update])
        except NotAccepted as error:
            log.warning("an update is not acknowledged, Telegram will repeat it: %s", error)
            return _later()
        return web.Response()


def parse(body: bytes) -> dict[str, Any] | None:
    """The update; one that cannot be read but shows its number is {"update_id": n, "unreadable": text}."""
    try:
        update = json.loads(body)
    except (ValueError, RecursionError):
        number = re.search(rb'"update_id"\s*:\s*(\d{1,18})', body)
        return {"update_id": int(number[1]), "unreadable": body[:2000].decode("utf-8", "replace")} if number else None
    return update if isinstance(update, dict) else None


@contextlib.asynccontextmanager
async def listening(webhook: Webhook, host: str, port: int, path: str) -> AsyncIterator[int]:
    """Serve until the block ends; the port."""
    app = web.Application(client_max_size=MAX_BODY)
    app.router.add_post(path, webhook.receive)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0, keepalive_timeout=IDLE)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def _later() -> web.Response:
    return web.Response(status=503, headers={"Retry-After": str(COME_AGAIN)})
