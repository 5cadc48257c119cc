"""Long polling: fetch, commit, and only then ask for more, which is how Telegram is told. One poller per token.

https://core.telegram.org/bots/api#getupdates
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from bots.base import Line
from bots.telegram_api import Rejected, TelegramApi, Unreadable, wait_after
from bots.telegram_updates import WANTED
from bots.telegram_webhook import parse
from core.backoff import backoff
from core.delivery import MaybeSent, NotAccepted, SendError

if TYPE_CHECKING:
    from core.chat import Chat

log = logging.getLogger(__name__)

HOLD = 25
"""Seconds that Telegram holds a poll with nothing to say."""
HELD = 2.0
"""Seconds after which an answer to a poll is what was said meanwhile: what had waited would have come at once."""
BATCH = 100
CONFLICT_PAUSE = (2.0, 6.0)
TWO_POLLERS = (
    "somebody else polls with this bot's token; stop the other instance, or give each its own token from @BotFather"
)


class Poller:
    def __init__(
        self, api: TelegramApi, chat: Chat, take: Callable[[list[Any], bool], Awaitable[None]], line: Line
    ) -> None:
        """`take` returns when the updates are in the journal, and raises NotAccepted when they are not. It is told
        whether they were missed."""
        self._api, self._chat, self._take, self._line = api, chat, take, line

    async def run(self) -> None:
        """Until cancelled. An offset confirms and is then forgotten: after a quiet week the ids go on at random,
        perhaps below it.

        `careful`: so many updates are fetched one by one, to get at one that spoils its batch. An answer that is no
        JSON counts as the update's fault, and not the wire's, when it comes twice the same.
        `missed`: from a start or an outage on, until a poll that is not full, or had to wait for something to be said.
        """
        offset, failures, careful, spoilt, missed = None, 0, 0, b"", True
        while True:
            await self._chat.paused()
            limit, asked_at = 1 if careful else BATCH, asyncio.get_running_loop().time()
            try:
                updates = await self._fetch(offset, limit)
            except Unreadable as error:
                poison = parse(error.payload) if careful and error.payload == spoilt else None
                if poison is None:
                    careful, spoilt = BATCH, error.payload
                    self._line.down(str(error))
                    await wait_after(error, failures)
                    failures += 1
                    continue
                updates = [poison]
            except (Rejected, SendError) as error:
                self._line.down(str(error))
                await self._mend(error, failures)
                failures += 1
                continue
            self._line.up()
            if failures:
                log.info("Telegram: polling goes on")
                missed = True
            failures, careful, spoilt = 0, max(0, careful - 1), b""
            missed = missed and asyncio.get_running_loop().time() - asked_at < HELD
            await self._take_surely(updates, missed)
            missed = missed and len(updates) == limit
            offset = max(map(_number, updates)) + 1 if updates else None

    async def _fetch(self, offset: int | None, limit: int) -> list[Any]:
        """The next updates, oldest first; those below `offset` are confirmed. [] after HOLD seconds of silence."""
        began = asyncio.get_running_loop().time()
        given = {} if offset is None else {"offset": offset}
        updates = await self._api.call(
            "getUpdates", wait=float(HOLD), timeout=HOLD, limit=limit, allowed_updates=WANTED, **given
        )
        if not isinstance(updates, list) or (updates and max(map(_number, updates)) < 0):
            raise MaybeSent("Telegram's updates are no updates")
        if not updates and asyncio.get_running_loop().time() - began < 0.2:
            await asyncio.sleep(0.2)  # a server that holds no poll
        return sorted(updates, key=_number)  # the ids say in which order people wrote

    async def _take_surely(self, updates: list[Any], missed: bool) -> None:
        tries = 0
        while updates:
            try:
                await self._take(updates, missed)
                break
            except NotAccepted as error:
                if not tries:
                    log.warning("%d updates are not confirmed until the journal takes them: %s", len(updates), error)
                await asyncio.sleep(backoff(tries, 5.0))
                tries += 1

    async def _mend(self, error: Rejected | SendError, failures: int) -> None:
        """After a failed poll: what can be done about it, and a pause."""
        if not (isinstance(error, Rejected) and error.code == 409):
            return await wait_after(error, failures)
        said = error.description.lower()
        if "webhook" in said and "terminated" not in said:
            log.warning("Telegram: a webhook was set; it is removed, because TELEGRAM_WEBHOOK_URL is not set")
            await self._api.insist("deleteWebhook", drop_pending_updates=False)
            return None
        if not failures:
            log.warning("Telegram: %s", TWO_POLLERS)
        return await asyncio.sleep(random.uniform(*CONFLICT_PAUSE))


def _number(update: Any) -> int:
    """The update's id, -1 when it has none."""
    id = update.get("update_id") if isinstance(update, dict) else None
    return id if isinstance(id, int) else -1
