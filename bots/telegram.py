"""Telegram: private chats, and in groups whoever mentions the bot or replies to it. Long polling, or a webhook.

Whatever arrives is in the journal before Telegram is told: the next offset, or the webhook's 200, comes after the
commit. No offset is ever stored, because a poll without one starts at the oldest update that is not confirmed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import secrets
from collections import Counter, OrderedDict
from collections.abc import Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from bots.base import Line, MaybeSent, NotSent, Refused, RetryAfter, SendError, Unservable
from bots.splitting import split
from bots.telegram_api import LOOPBACK, Pace, Rejected, TelegramApi, Unreadable
from bots.telegram_polling import Poller
from bots.telegram_updates import (
    COMMANDS,
    MAX_TEXT,
    PLATFORM,
    WANTED,
    Command,
    Me,
    Moved,
    edited_soon,
    failed,
    read,
    target,
)
from bots.telegram_webhook import Webhook, listening
from core.delivery import NotAccepted
from core.messages import Channel, Message, MessageState, Reply
from core.settings import Group
from core.text import clean

if TYPE_CHECKING:
    from core.chat import Chat

log = logging.getLogger(__name__)

OFFICIAL = "https://api.telegram.org/bot"
GREETING = (
    "Hello! I am a chat bot: write me anything, and I make up an answer. /reset makes me forget our conversation."
)
GREETING_GROUP = (
    "Hello! I am a chat bot: mention me, or reply to what I said, and I make up an answer. "
    "/reset makes me forget our conversation."
)
UNHEARD = "I can only read words. Could you write it out, in a new message?"
FORGOTTEN = "Forgotten. We start fresh."
NOT_NOW = "That did not work just now, please try again."
CONFIRMATIONS = 3
"""Of commands, and hints, on their way to one chat at a time; they stand in the line that its replies wait in."""
AGAIN, CONFIRMED_WITHIN = 2.0, 60.0
"""Seconds until a confirmation that certainly did not arrive is tried again, and for which it is."""


class TelegramSettings(Group):
    telegram_api_base: str = Field(
        OFFICIAL,
        description="where the Bot API is; the token follows directly",
        examples=["http://127.0.0.1:8081/bot"],
    )
    telegram_token: SecretStr | None = Field(
        None,
        description="the bot's token from @BotFather; starts Telegram",
        examples=["123456789:AAF...35-characters"],
    )
    telegram_webhook_url: str = Field(
        "",
        description="the public address Telegram shall post updates to; empty: long polling",
        examples=["https://bot.example.org/telegram"],
    )
    telegram_webhook_secret: SecretStr | None = Field(
        None,
        description="what Telegram shows with every update; drawn at each start when empty",
        examples=["a-long-random-word"],
    )
    telegram_webhook_host: str = Field(
        "127.0.0.1", description="where the webhook listens, behind your TLS proxy", examples=["0.0.0.0"]
    )
    telegram_webhook_port: int = Field(8443, ge=0, le=65535, description="its port", examples=[8443])

    @field_validator("telegram_api_base")
    @classmethod
    def _base(cls, value: str) -> str:
        url = _address(value.rstrip("/"))
        return url if urlsplit(url).path else f"{url}/bot"

    @field_validator("telegram_token")
    @classmethod
    def _token(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        token = value.get_secret_value().strip() if value else ""
        if not token:
            return None
        official = info.data.get("telegram_api_base", OFFICIAL) == OFFICIAL
        number, _, key = token.partition(":")
        if not re.fullmatch(r"\d{1,18}:[A-Za-z0-9_-]+", token) or (official and (len(number) < 6 or len(key) < 30)):
            raise ValueError("is no token; @BotFather gives one like a number, a colon and 35 characters")
        if official and len(set(key)) < 8:
            raise ValueError("is a placeholder; put in the token that @BotFather gave you")
        return SecretStr(token)

    @field_validator("telegram_webhook_url")
    @classmethod
    def _webhook_url(cls, value: str, info: ValidationInfo) -> str:
        url = urlsplit(_address(value)) if value else None
        if url and url.scheme != "https" and info.data.get("telegram_api_base", OFFICIAL) == OFFICIAL:
            raise ValueError("must start with https://, Telegram posts to nothing else")
        return value

    @field_validator("telegram_webhook_secret")
    @classmethod
    def _webhook_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not re.fullmatch(r"[A-Za-z0-9_-]{1,256}", value.get_secret_value()):
            raise ValueError("must be 1 to 256 letters, digits, _ or -")
        return value


def _address(value: str) -> str:
    with contextlib.suppress(ValueError):  # a port that is none
        url = urlsplit(value)
        if url.scheme in ("http", "https") and url.hostname and url.port != 0:
            return value
    raise ValueError("must be an address that starts with http:// or https://")


def open_telegram(settings: TelegramSettings) -> TelegramBot:
    return TelegramBot(settings)


class TelegramBot:
    name = PLATFORM
    alone = True
    watch = 60.0
    """Seconds between two looks at whether Telegram still knows our webhook."""

    def __init__(self, settings: TelegramSettings) -> None:
        if settings.telegram_token is None:
            raise Unservable("TELEGRAM_TOKEN: is not set; get one from @BotFather")
        token = settings.telegram_token.get_secret_value()
        self._settings = settings
        self._api = TelegramApi(token, settings.telegram_api_base)
        self._pace, self._signs = Pace(), Pace()  # what must be said, and what may be left out
        self._me = Me(int(token.partition(":")[0]), "")
        self._chat: Chat | None = None
        self._moved: dict[int, int] = {}
        self._obeyed: OrderedDict[tuple[Channel, str], None] = OrderedDict()
        self._confirming: Counter[Channel] = Counter()
        self._hinted: set[Channel] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.line = Line()

    # -- hearing -------------------------------------------------------------------------------------------------

    async def serve(self, chat: Chat) -> None:
        """Until cancelled. Raises Unservable when Telegram does not know the token or takes no webhook."""
        self._chat = chat
        self.line.down("Telegram does not answer")
        await self._api.open()
        try:
            await self._introduce()
            await chat.adopt(PLATFORM, str(self._me.id))
            if self._settings.telegram_webhook_url:
                await self._listen(chat)
            else:
                await Poller(self._api, chat, self.take, self.line).run()
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._api.aclose()

    async def take(self, updates: list[Any], missed: bool = False) -> None:
        """All of them in the journal, in their order, when it returns; polling and webhook both end here. `missed`:
        they waited at Telegram while we were away.

        Raises NotAccepted when they are not: do not acknowledge, give the same ones again.
        """
        assert self._chat is not None
        heard: list[Message] = []
        for update in updates:
            try:
                found = self._read(update)
            except Exception as error:  # whatever it is, the next update must not suffer
                await self._refail(failed(update, self._me), f"{type(error).__name__}: {error}")
                continue
            for what in found:
                if isinstance(what, Message):
                    heard.append(replace(what, missed=missed))
                else:
                    await self._receive(heard)
                    heard = []
                    await self._obey(what)
        await self._receive(heard)

    def _read(self, update: Any) -> list[Message | Command | Moved]:
        """What an update means for us. An edited message is read as a new one, too: it may address us only now, and
        what did before is stored already. Of media alone nothing is stored."""
        what = read(update, self._me)
        found = [what] if what else []
        if isinstance(what, Message) and what.kind == "edit" and edited_soon(update["edited_message"]):
            anew = read({"message": update["edited_message"]}, self._me)
            found += [anew] if isinstance(anew, Message) else []
        for each in found:
            if isinstance(each, Message) and each.kind == "ask":
                self._hint(each, isinstance(update.get("message", {}).get("text"), str))
        return [each for each in found if not (isinstance(each, Message) and each.kind == "ask" and not each.text)]

    def _hint(self, asked: Message, worded: bool) -> None:
        """A private chat in which there is nothing to answer is told so, once; a group that calls the bot by its name
        alone, how it is talked to."""
        assert self._chat is not None
        if asked.channel in self._hinted or self._chat.voice.hears(asked.text):
            return
        if not asked.server or (worded and not asked.text):
            self._hinted.add(asked.channel)
            self._tell(asked, GREETING_GROUP if asked.server else UNHEARD)

    async def _receive(self, messages: list[Message]) -> None:
        """One commit for all; what the journal cannot store whatever happens is recorded alone."""
        assert self._chat is not None
        if not messages:
            return None
        try:
            await self._chat.receive(*messages)
            return None
        except NotAccepted:
            raise
        except Exception as error:
            if len(messages) == 1:
                log.exception("%s: a message cannot be stored", messages[0].channel)
                shown = messages[0].text[:500].encode("unicode_escape").decode()
                return await self._refail(replace(messages[0], text=shown), type(error).__name__)
        for message in messages:
            await self._receive([message])
        return None

    async def _refail(self, message: Message, note: str) -> None:
        assert self._chat is not None
        log.warning("%s: an update that cannot be read is recorded as failed: %s", message.channel, note[:200])
        try:
            await self._chat.refail(message, note=note[:200])
        except NotAccepted:
            raise
        except Exception:
            log.exception("%s: nor can it be recorded", message.channel)

    async def _obey(self, what: Command | Moved) -> None:
        assert self._chat is not None
        if isinstance(what, Moved):
            await self._follow(what.old, what.new)
            return
        channel, id = what.message.channel, what.message.id
        if (channel, id) in self._obeyed:  # the same update again
            return
        said = GREETING_GROUP if what.message.server else GREETING
        if what.name == "reset":
            said = await self._reset(what.message)
        self._obeyed[channel, id] = None
        if len(self._obeyed) > 1000:
            self._obeyed.popitem(last=False)
        if said:
            self._tell(what.message, said)

    async def _reset(self, asked: Message) -> str:
        """What to say; "" when this very command was obeyed before we died."""
        assert self._chat is not None
        channel = asked.channel
        try:
            return FORGOTTEN if await self._chat.reset(channel, asked) else ""
        except NotAccepted:
            raise
        except Exception:
            log.exception("%s: not reset", channel)
            return NOT_NOW

    def _tell(self, asked: Message, said: str) -> None:
        if self._confirming[asked.channel] < CONFIRMATIONS:
            self._confirming[asked.channel] += 1
            self._start(self._confirm(asked, said))

    async def _confirm(self, asked: Message, said: str) -> None:
        """Said directly, for a while until it arrives: whoever does not see it can ask again."""
        channel, loop = asked.channel, asyncio.get_running_loop()
        end = loop.time() + CONFIRMED_WITHIN
        try:
            while True:
                try:
                    await self.turn(channel)
                    await self._say(channel, said, asked.id)
                    return
                except (NotSent, RetryAfter) as error:
                    wait = max(AGAIN, error.seconds) if isinstance(error, RetryAfter) else AGAIN
                    if loop.time() + wait > end:
                        raise
                    await asyncio.sleep(wait)
        except SendError as error:
            log.warning("%s: not told %r: %s", channel, said, error)
        finally:
            self._confirming -= Counter([channel])

    async def _follow(self, old: Channel, new: Channel) -> None:
        """The conversation goes on under the supergroup's id."""
        assert self._chat is not None
        if self._moved.get(int(old.id)) == int(new.id):
            return
        await self._chat.rekey(old, new)
        self._moved[int(old.id)] = int(new.id)
        log.info("%s became the supergroup %s", old, new)

    async def _introduce(self) -> None:
        """Learn who we are; show the commands."""
        me = await self._api.insist("getMe")
        self._me = Me(me["id"], me.get("username", ""))
        how = "a webhook" if self._settings.telegram_webhook_url else "long polling"
        log.info("Telegram: @%s, over %s", self._me.username, how)
        if me.get("can_read_all_group_messages") is False:
            log.info("Telegram: privacy mode is on; in groups mentions and replies reach the bot, nothing else does")
        with contextlib.suppress(Rejected, Unreadable, SendError):  # a menu is not worth a failed start
            menu = [{"command": name, "description": text} for name, text in COMMANDS.items() if name != "start"]
            await self._api.call("setMyCommands", commands=menu)

    # -- webhook -------------------------------------------------------------------------------------------------

    async def _listen(self, chat: Chat) -> None:
        settings = self._settings
        given = settings.telegram_webhook_secret
        secret = given.get_secret_value() if given else secrets.token_urlsafe(32)
        path = urlsplit(settings.telegram_webhook_url).path or "/"
        webhook = Webhook(secret, self.take, chat.paused)
        host, port = settings.telegram_webhook_host, settings.telegram_webhook_port
        async with contextlib.AsyncExitStack() as stack:
            try:
                port = await stack.enter_async_context(listening(webhook, host, port, path))
            except OSError as error:
                taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
                setting, mend = ("PORT", "name a free port") if taken else ("HOST", "name an address of this machine")
                why = f"cannot listen on {host}:{port} ({error.strerror or error})"
                raise Unservable(f"TELEGRAM_WEBHOOK_{setting}: {why}: {mend}") from None
            if host not in LOOPBACK:
                log.info("Telegram: the webhook listens on %s:%d without TLS; put a proxy before it", host, port)
            while True:
                await self._set_webhook(secret)
                self.line.up()
                await self._webhook_gone()
                log.warning("Telegram: somebody took our webhook away; it is set again")

    async def _set_webhook(self, secret: str) -> None:
        url = self._settings.telegram_webhook_url
        more = {"secret_token": secret, "allowed_updates": WANTED, "drop_pending_updates": False}
        try:
            await self._api.insist("setWebhook", url=url, **more)
        except Rejected as error:
            if "resolve" in error.description:  # a new name takes a while to get round
                raise ConnectionError(f"TELEGRAM_WEBHOOK_URL: {error.description}") from None
            raise Unservable(f"TELEGRAM_WEBHOOK_URL: Telegram does not take it: {error.description}") from None

    async def _webhook_gone(self) -> None:
        """Returns when Telegram posts to another address, or none: whoever polls with the token takes ours away. What
        it says of its own failures is in the log, once each."""
        told: object = None
        while True:
            await asyncio.sleep(self.watch)
            info: Any = None
            with contextlib.suppress(Rejected, Unreadable, SendError):  # then the next time
                info = await self._api.call("getWebhookInfo")
            if not isinstance(info, dict) or "url" not in info:
                continue
            if info["url"] != self._settings.telegram_webhook_url:
                return
            if info.get("last_error_date") not in (None, told):
                told = info["last_error_date"]
                log.warning(
                    "Telegram could not post an update: %s", clean(str(info.get("last_error_message", "")))[:200]
                )

    # -- speaking ------------------------------------------------------------------------------------------------

    def split(self, text: str) -> list[str]:
        """In pieces of 4096 UTF-16 units at most."""
        return split(clean(text), MAX_TEXT, units="utf-16")

    async def turn(self, channel: Channel) -> None:
        await self._pace.turn(self._place(channel)[0])

    async def send(self, reply: Reply) -> str:
        """The message's number. Raises NotSent | MaybeSent | Refused | RetryAfter."""
        return await self._say(reply.channel, reply.text, reply.to)

    async def find_sent(self, reply: Reply) -> str | None:
        """Nobody can tell: Telegram has no key for a send, and bots cannot read the history."""
        return None

    async def typing(self, channel: Channel, note: str = "", to: str = "") -> None:
        chat, thread = self._place(channel)
        if not (self._pace.held(chat) or self._signs.held(chat)):
            await self._call_in(chat, "sendChatAction", action="typing", **thread)

    async def closed(self, channel: Channel, id: str, state: MessageState) -> None: ...

    async def _say(self, channel: Channel, text: str, to: str = "") -> str:
        """Plain text without previews; as a reply where the message still stands."""
        chat, thread = self._place(channel)
        number = target(to, chat)
        reply = {"message_id": number, "allow_sending_without_reply": True}
        result = await self._call_in(
            chat,
            "sendMessage",
            text=text.encode("utf-8", "ignore").decode(),
            link_preview_options={"is_disabled": True},
            **({"reply_parameters": reply} if number is not None else {}),
            **thread,
        )
        return str(result.get("message_id", "")) if isinstance(result, dict) else ""

    async def _call_in(self, chat: int, method: str, **parameters: Any) -> Any:
        """A call about one chat, failures as the courier wants them; follows a group that moved."""
        try:
            return await self._api.call(method, chat_id=chat, **parameters)
        except Unreadable:
            raise MaybeSent("Telegram's answer is no JSON") from None
        except Rejected as error:
            if error.moved_to is not None:
                return await self._call_moved(chat, error.moved_to, method, parameters)
            if error.code == 400 and "reply_parameters" in parameters and "repl" in error.description.lower():
                del parameters["reply_parameters"]  # what it answers is gone; the answer is not
                return await self._call_in(chat, method, **parameters)
            raise self._ending(chat, error, self._pace if method == "sendMessage" else self._signs) from None

    async def _call_moved(self, old: int, new: int, method: str, parameters: dict[str, Any]) -> Any:
        if self._chat is None or old in self._moved.values():
            raise NotSent("the group is moving")
        try:
            await self._follow(Channel(PLATFORM, str(old)), Channel(PLATFORM, str(new)))
        except NotAccepted as error:
            raise NotSent(f"the group moved, and the journal cannot take it: {error}") from None
        parameters.pop("reply_parameters", None)  # the supergroup counts its messages anew
        return await self._call_in(new, method, **parameters)

    def _ending(self, chat: int, error: Rejected, pace: Pace) -> SendError:
        """What Telegram's no means for a send, and for the next ones at its `pace`."""
        if error.code == 429:
            wait = RetryAfter(error.retry_after, str(error))
            pace.hold(chat, wait.seconds)
            return wait
        if error.code >= 500 or error.code == 408:
            return MaybeSent(str(error))
        if error.code in (401, 409) or error.code < 400:  # about the bot or the way there, not about this message
            return NotSent(str(error))
        return Refused(str(error))

    def _place(self, channel: Channel) -> tuple[int, dict[str, int]]:
        """Chat and, in a topic, its thread, as parameters."""
        chat, _, thread = channel.id.partition(":")
        try:
            number = int(chat)
            return self._moved.get(number, number), {"message_thread_id": int(thread)} if thread else {}
        except ValueError:
            raise Refused(f"{channel} is no chat of Telegram's") from None

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
