"""Calls of Discord's REST API through discord.py: their limits, and how each of them can end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import discord
from discord.http import Route, json_or_text

from bots.base import Line
from core.backoff import Quota
from core.delivery import MaybeSent, NotSent, Refused, RetryAfter

log = logging.getLogger(__name__)

CALL_SECONDS = 60.0
CALLS, FREE = 40, 15
"""Calls a second, and so many that what may be left out leaves to others. Discord takes 50, and shuts out who has ten
thousand refused in ten minutes. https://discord.com/developers/docs/topics/rate-limits#global-rate-limit"""
TOGETHER = 5
"""So many leave at once, and no more until it is their time: of a second's all at once some are late on new
connections, and arrive with the next second's."""
SHUT_OUT = 20.0
"""Seconds without a call when what stands before Discord refuses all of ours and does not say for how long."""
BLOCKED = 40333
"""The code of a 403 in JSON that Cloudflare says, not Discord."""


class GlobalLimit(discord.RateLimited):
    """Every call must wait, not this route's alone."""


class Client(discord.Client):
    """discord.py's client, and what Discord allows all of its calls together (times are the event loop's)."""

    quiet_until = 0.0
    """It wants none at all until then."""
    on_session: Callable[[bool], Awaitable[None]] | None = None

    def __init__(self, line: Line, **options: Any) -> None:
        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(self._leave)
        super().__init__(http_trace=trace, **options)
        self.line = line
        self._calls, self._leaving = Quota(CALLS, 1.05), Quota(TOGETHER, TOGETHER / CALLS)

    async def turn(self) -> None:
        """Wait until a call may go out, first come, first served."""
        await asyncio.sleep(self._calls.take(asyncio.get_running_loop().time()))

    async def _leave(self, session: object, context: object, request: aiohttp.TraceRequestStartParams) -> None:
        """Just before a call goes out, whatever it waited for since its turn: a commit, its route's limit, a second
        try. It waits again, should too many have come together. What answers an interaction is not limited."""
        path = str(request.url).removeprefix(Route.BASE)
        if path == str(request.url) or path.startswith(("/interactions/", "/webhooks/")):
            return
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._leaving.take(loop.time()))
        if (left := self.quiet_until - loop.time()) > 0:
            raise GlobalLimit(left)

    def sign(self) -> bool:
        """May one go out now that can be left out? It has its place then."""
        now = asyncio.get_running_loop().time()
        free = now >= self.quiet_until and self._calls.free(now, FREE + 1)
        if free:
            self._calls.take(now)
        return free

    def be_quiet(self, seconds: float) -> None:
        """Discord refuses all calls."""
        now = asyncio.get_running_loop().time()
        if now >= self.quiet_until:
            log.warning("Discord takes no calls for %.1f s", seconds)
        self.quiet_until = max(self.quiet_until, now + seconds)

    async def on_connect(self) -> None:
        """A session has begun."""
        self.line.up()

    async def on_resumed(self) -> None:
        self.line.up()

    async def before_identify_hook(self, shard_id: int | None, *, initial: bool = False) -> None:
        """IDENTIFY goes out next."""
        await super().before_identify_hook(shard_id, initial=initial)
        if self.on_session:
            await self.on_session(initial)


class Rejected(Refused):
    """Discord's own no."""

    def __init__(self, error: discord.HTTPException) -> None:
        super().__init__(f"Discord answered {error.status}: {' '.join(error.text.split())[:200]}")
        self.code = error.code


async def read_answer(response: aiohttp.ClientResponse) -> Any:
    """What discord.py reads answers with (see `open_discord`), where a 429 asks for a sane wait, a yes is JSON and a
    no is Discord's own: what stands before it may say 401, 403 or 404 for a while, and nothing is final then.

    discord.py shuts a gate for all calls while it sleeps through a global limit, and a call that is cancelled in that
    sleep leaves it shut for ever: so a global limit is raised here, and `call` keeps it.
    """
    data = await json_or_text(response)
    if response.status == 429:
        limit = data if isinstance(data, dict) else {}  # Discord's own word is JSON, Cloudflare's ban is a page
        wait = RetryAfter(limit.get("retry_after") if limit else response.headers.get("Retry-After", SHUT_OUT)).seconds
        if not limit or limit.get("global"):
            raise GlobalLimit(wait)
        limit["retry_after"] = wait
    if response.status >= 500 and response.method == "GET" and response.url.path.endswith("/messages"):
        raise aiohttp.ClientPayloadError("the history is out of reach")  # who waits for it lets others go first
    no = 400 <= response.status < 500 and response.status != 429
    if (response.status < 300 and data and isinstance(data, str)) or (no and not _is_error(data)):
        raise aiohttp.ClientPayloadError(f"an answer {response.status} that is not Discord's")
    return data


def _is_error(data: Any) -> bool:
    return isinstance(data, dict) and "message" in data and data.get("code", BLOCKED) != BLOCKED


async def call(client: Client, route: Route, **arguments: Any) -> Any:
    """One REST call, which has had its turn, through discord.py, which keeps Discord's limits for each route. Raises a
    SendError."""
    if (left := client.quiet_until - asyncio.get_running_loop().time()) > 0:
        raise RetryAfter(left)
    try:
        async with asyncio.timeout(CALL_SECONDS):
            return await client.http.request(route, **arguments)
    except GlobalLimit as error:
        client.be_quiet(error.retry_after)
        raise RetryAfter(error.retry_after) from None
    except discord.RateLimited as error:
        raise RetryAfter(error.retry_after) from None
    except discord.HTTPException as error:
        if error.status == 429:  # not Discord's API: what stands before it shuts us out
            raise RetryAfter(error.response.headers.get("Retry-After")) from None
        if error.status >= 500:
            raise MaybeSent(f"Discord answered {error.status}") from None
        if error.status == 401:
            raise NotSent("Discord does not take the token any more") from None
        raise Rejected(error) from None
    except (aiohttp.ClientConnectorError, aiohttp.ClientConnectorDNSError) as error:
        raise NotSent(f"no connection to Discord ({type(error).__name__})") from None
    except (ValueError, aiohttp.ClientPayloadError):
        raise MaybeSent("Discord's answer cannot be read") from None
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise MaybeSent(f"the connection broke ({type(error).__name__})") from None
