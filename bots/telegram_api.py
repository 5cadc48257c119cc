"""The wire to Telegram: one call at a time out, its answer or one of four clear failures back; and how often to call.

python-telegram-bot's Bot makes the requests. Its typed methods are not used: they read answers and updates into
objects and raise where one field is strange, long after a message was sent. Nothing here retries, and no error
carries an URL, because the token stands in it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any
from urllib.parse import urlsplit

import httpx
from telegram import Bot
from telegram.error import TelegramError
from telegram.request import HTTPXRequest

from core.backoff import Quota, backoff
from core.delivery import MaybeSent, NotSent, RetryAfter, SendError, Unservable

log = logging.getLogger(__name__)

for _name, _level in (("httpx", logging.WARNING), ("telegram", logging.INFO)):
    logging.getLogger(_name).setLevel(_level)  # below it they log URLs, and PTB what people write

LOOPBACK = ("127.0.0.1", "::1", "localhost")
READ_TIMEOUT = 20.0
SENDS = 256
"""Calls at once; more wait for a place."""
UNKNOWN_TOKEN = "TELEGRAM_TOKEN: Telegram does not know this token; get one from @BotFather"
_NEVER_LEFT = (
    httpx.ConnectError,  # DNS and TLS failures too
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
    RuntimeError,  # the client was closed before
)


class Rejected(TelegramError):
    """Telegram answered no. `code` as in HTTP; the description is Telegram's, in one line."""

    def __init__(self, code: int, description: str, parameters: dict[str, Any]) -> None:
        super().__init__(f"{code} {description}".strip())
        self.code, self.description, self.parameters = code, description, parameters

    @property
    def retry_after(self) -> Any:
        """As Telegram said it, for `RetryAfter`; None where it named none."""
        return self.parameters.get("retry_after")

    @property
    def moved_to(self) -> int | None:
        """The supergroup that this group became."""
        chat = self.parameters.get("migrate_to_chat_id")
        return chat if isinstance(chat, int) and chat else None


class Unreadable(TelegramError):
    """Telegram said yes, in bytes that are no JSON."""

    def __init__(self, payload: bytes) -> None:
        super().__init__("an answer that is no JSON")
        self.payload = payload


class _Request(HTTPXRequest):
    """Answers that say no become Rejected here, where the status and all parameters are still known."""

    async def do_request(self, *args: Any, **kwargs: Any) -> tuple[int, bytes]:
        code, payload = await super().do_request(*args, **kwargs)
        if not 200 <= code < 300:
            raise _rejected(code, payload)
        return code, payload

    @staticmethod
    def parse_json_payload(payload: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(payload)
        except (ValueError, RecursionError):
            raise Unreadable(payload) from None
        if not isinstance(answer, dict):
            raise Unreadable(payload)
        if "result" not in answer:
            raise _rejected(502, payload)
        return answer


def _rejected(code: int, payload: bytes) -> Rejected:
    try:
        answer = json.loads(payload)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or "ok" not in answer:
        # Some proxy's page, and no word about the token or a message. It may show the address, and with it the token.
        return Rejected(429 if code == 429 else 502, f"HTTP {code}, and not in Telegram's words", {})
    parameters, said = answer.get("parameters"), answer.get("error_code")
    return Rejected(
        said if isinstance(said, int) and 300 <= said < 600 else code,
        " ".join(str(answer.get("description", ""))[:200].split()),
        parameters if isinstance(parameters, dict) else {},
    )


class TelegramApi:
    def __init__(self, token: str, base: str) -> None:
        """`base` as in TELEGRAM_API_BASE: the token follows it directly."""
        self._token = token
        # a proxy named in the environment leads out, not to this machine
        direct = {"trust_env": urlsplit(base).hostname not in LOOPBACK}
        self._requests = [
            _Request(size, READ_TIMEOUT, 20.0, 10.0, 30.0, httpx_kwargs=direct)  # read, write, connect, pool
            for size in (2, SENDS)  # polling has its own, so that no crowd of sends keeps it waiting
        ]
        self._bot = Bot(token, base, request=self._requests[1], get_updates_request=self._requests[0])
        self._under_way: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Again after `aclose`."""
        for client in self._requests:
            await client.initialize()

    async def aclose(self) -> None:
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=1.0)  # what nobody waits for any more ends in a moment
        for request in self._under_way:
            request.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        for client in self._requests:
            await client.shutdown()

    async def call(self, method: str, *, wait: float = 0.0, **parameters: Any) -> Any:
        """The JSON result of a Bot API method; `wait`: seconds that Telegram itself may take.

        Raises Rejected (no), Unreadable (yes, but what?), NotSent (it never left), MaybeSent (nobody knows).
        """
        spelt = re.sub(r"(?=[A-Z])", "_", method)  # get_Updates: PTB warns where it has a method of its own
        # A task of its own, not cancelled with its caller: httpx's pool loses a place with some requests that are, and
        # typing is cancelled with every reply. With all of SENDS lost, nothing would ever be sent again.
        request = asyncio.create_task(
            self._bot.do_api_request(spelt, api_kwargs=parameters, read_timeout=READ_TIMEOUT + wait)
        )
        self._under_way.add(request)
        request.add_done_callback(self._over)
        try:
            async with asyncio.timeout(60.0 + wait):  # httpx's are per byte: one that drips would hold us for ever
                return await (request if wait else asyncio.shield(request))  # a poll is cancelled with the client only
        except TimeoutError:
            request.cancel()
            raise MaybeSent("no whole answer from Telegram in time") from None
        except Rejected as error:
            raise Rejected(error.code, error.description.replace(self._token, "[token]"), error.parameters) from None
        except Unreadable:
            raise
        except TelegramError as error:
            cause = error.__cause__
            kind = type(cause or error).__name__
            if isinstance(cause, _NEVER_LEFT):
                raise NotSent(f"Telegram cannot be reached ({kind})") from None
            raise MaybeSent(f"no answer from Telegram ({kind})") from None

    def _over(self, request: asyncio.Task[Any]) -> None:
        self._under_way.discard(request)
        if not request.cancelled():
            request.exception()  # looked at, should nobody wait for it any more

    async def insist(self, method: str, **parameters: Any) -> Any:
        """`call`, whenever Telegram can be reached. Raises Unservable, and Rejected for a no that stays."""
        failures = 0
        while True:
            try:
                return await self.call(method, **parameters)
            except (Rejected, Unreadable, SendError) as error:
                if isinstance(error, Rejected) and error.code in (400, 403):
                    raise
                if isinstance(error, Rejected) and error.code == 404:
                    raise Unservable(f"{UNKNOWN_TOKEN}, or mend TELEGRAM_API_BASE") from None
                await wait_after(error, failures)
                failures += 1


async def wait_after(error: Exception, failures: int) -> None:
    """Log the first of a row of failures, and wait as long as is fit. Raises Unservable when no time will mend it."""
    if isinstance(error, Rejected) and error.code == 401:
        raise Unservable(UNKNOWN_TOKEN) from None
    if not failures:
        log.warning("Telegram: %s; trying again", error)
    if isinstance(error, Rejected) and error.code == 429:
        await asyncio.sleep(RetryAfter(error.retry_after).seconds)
    else:
        await asyncio.sleep(backoff(failures))


class Pace:
    """Telegram's limits, each a hair wider for the way there: 30 messages a second in all, 20 a minute to a group, one
    a second to a chat, a few more in a burst. https://core.telegram.org/bots/faq#my-bot-is-hitting-limits-how-do-i-avoid-this
    """

    MANY = 10_000

    def __init__(self) -> None:
        self._all = Quota(30, 1.05)
        self._chats: dict[int, list[Quota]] = {}
        self._held: dict[int, float] = {}

    async def turn(self, chat: int) -> None:
        """Wait until `chat` may be sent one message. Raises RetryAfter while Telegram has told it to wait."""
        loop = asyncio.get_running_loop()
        self._refuse_held(chat)
        for quota in (*self._quotas(chat), self._all):
            if wait := quota.take(loop.time()):
                await asyncio.sleep(wait)
                self._refuse_held(chat)  # another of its topics may have been told meanwhile

    def _refuse_held(self, chat: int) -> None:
        if (held := self.held(chat)) > 0:
            raise RetryAfter(held, "Telegram asked this chat to wait")

    def hold(self, chat: int, seconds: float) -> None:
        """Telegram told `chat` to wait; others need not."""
        now = asyncio.get_running_loop().time()
        self._held = {chat: until for chat, until in self._held.items() if until > now}
        self._held[chat] = now + seconds

    def held(self, chat: int) -> float:
        """Seconds that `chat` must still wait."""
        until = self._held.get(chat)
        return 0.0 if until is None else max(0.0, until - asyncio.get_running_loop().time())

    def _quotas(self, chat: int) -> list[Quota]:
        if chat not in self._chats:
            if len(self._chats) >= self.MANY:
                now = asyncio.get_running_loop().time()
                self._chats = {c: ws for c, ws in self._chats.items() if not all(w.idle(now) for w in ws)}
            self._chats[chat] = [Quota(3, 3.1)] + ([Quota(20, 60.5)] if chat < 0 else [])
        return self._chats[chat]
