"""Discord through discord.py: hears direct messages, mentions and replies; answers as replies that ping nobody.

Events are taken from the gateway as raw JSON, in its order, and handed to chat in batches: one commit for a burst.
What was said while we were away is read from each channel's watermark on (Discord replays only a short while), and a
send carries a stored nonce, so that Discord itself drops a second copy; later, the history tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import urllib.request
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import aiohttp
import discord
import yarl
from discord import app_commands
from discord.backoff import ExponentialBackoff
from discord.gateway import DiscordWebSocket, ReconnectWebSocket
from discord.http import Route
from pydantic import Field, SecretStr, field_validator

from bots import discord_events as events
from bots.base import Line
from bots.discord_api import Client, Rejected, call, read_answer
from bots.discord_hearing import SESSIONS_A_DAY, Hearing
from bots.splitting import split
from core.backoff import backoff
from core.delivery import NotAccepted, NotSent, RetryAfter, Unservable
from core.messages import Channel, MessageState, Reply
from core.settings import Group
from core.text import clean

if TYPE_CHECKING:
    from core.chat import Chat

log = logging.getLogger(__name__)

EXAMPLE = "MTIzNDU2Nzg5MDEyMzQ1Njc4.GaBcDe.the-rest-of-it"
MAX_TEXT = 2000
SUPPRESS_EMBEDS = 1 << 2
SESSION_PAUSE = 90.0
CONFIRM_SECONDS = 60.0
"""From asking for a session, or for the last one again, until it is confirmed."""
NO_REPLYING = (160002, 160009)
"""What Discord says of replies in a channel where we may not read the history."""
LOOK_BACK = 10
"""Pages of 100 messages that are searched for a reply in doubt."""
RESET_SECONDS = 60.0
"""Until what was said before a /reset is stored."""
FORGOTTEN = "Forgotten. We start fresh."
NOT_NOW = "That did not work just now, please try again."


class DiscordSettings(Group):
    discord_token: SecretStr | None = Field(None, description="the bot's token; starts Discord", examples=[EXAMPLE])
    discord_message_content: bool = Field(
        False,
        description="ask for the Message Content intent: replies to the bot without a ping are understood too",
        examples=["true"],
    )
    discord_api_base: str = Field(
        "https://discord.com/api/v10",
        description="another server that speaks Discord's REST API",
        examples=["http://127.0.0.1:8090/api/v10"],
    )
    discord_gateway_url: str = Field(
        "wss://gateway.discord.gg/",
        description="another server that speaks Discord's gateway",
        examples=["ws://127.0.0.1:8090/gateway"],
    )

    @field_validator("discord_token")
    @classmethod
    def _like_a_token(cls, token: SecretStr | None) -> SecretStr | None:
        text = token.get_secret_value().strip() if token else ""
        blank = len(text) < 8 or any(char.isspace() for char in text) or text == EXAMPLE
        if token and (blank or text.lower().startswith(("your", "<", "xxx"))):
            raise ValueError("looks like a placeholder; paste the token from the developer portal, under Bot")
        return SecretStr(text) if token else None

    @field_validator("discord_api_base", "discord_gateway_url")
    @classmethod
    def _an_address(cls, address: str) -> str:
        if address.startswith(("http://", "https://", "ws://", "wss://")) and yarl.URL(address).host:
            return address
        raise ValueError("must be an address with http(s):// or ws(s)://")


class Backoff(ExponentialBackoff[Any]):
    """discord.py's own waits up to 17 minutes: half a minute after an outage, people shall be answered again."""

    def __init__(self) -> None:
        super().__init__()
        self._max = 5  # 2^5 seconds


class Gateway(DiscordWebSocket):
    """One connection. A session that is never confirmed would be deaf for ever: its heartbeats are answered as ever."""

    _confirmed: asyncio.Future[Any] | None = None
    _confirm_by = 0.0

    @classmethod
    async def from_client(cls, client: discord.Client, *, gateway: yarl.URL | None = None, **how: Any) -> Gateway:
        """discord.py asks only the address that the last session came with: that may be gone where Discord is not."""
        if isinstance(client, Client):
            client.line.down("no session on Discord's gateway")
        try:
            return await super().from_client(client, gateway=gateway, **how)
        except (OSError, aiohttp.ClientError):
            if gateway is None:
                raise
            return await super().from_client(client, **how)

    async def identify(self) -> None:
        await super().identify()
        self._expect("READY")

    async def resume(self) -> None:
        await super().resume()
        self._expect("RESUMED")

    def _expect(self, event: str) -> None:
        self._confirmed = self.wait_for(event, lambda _: True)
        self._confirm_by = self.loop.time() + CONFIRM_SECONDS

    async def poll_event(self) -> None:
        waits = self._confirmed is not None and not self._confirmed.done()
        try:
            async with asyncio.timeout_at(self._confirm_by if waits else None):
                await super().poll_event()
        except TimeoutError:
            log.warning("Discord does not confirm the session, connecting anew")
            await self.close()
            raise ReconnectWebSocket(self.shard_id, resume=False) from None
        except ReconnectWebSocket:
            if waits:  # else it is what happens every few hours
                log.warning("Discord ended a session before it began (code %s)", self.socket.close_code)
            raise


def _tell_calmly(record: logging.LogRecord) -> bool:
    """discord.py tells each reconnect as an error with a traceback: it is a line, with the reason."""
    if record.exc_info and record.exc_info[1] and "reconnect" in str(record.msg):
        record.msg = f"{record.getMessage()}: {type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        record.args, record.exc_info = None, None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
    return True


def open_discord(settings: DiscordSettings) -> DiscordBot:
    """The bot for these settings. The addresses hold for the whole process: discord.py keeps them on classes."""
    assert settings.discord_token is not None
    Route.BASE = settings.discord_api_base.rstrip("/")
    discord.VoiceClient.warn_nacl = discord.VoiceClient.warn_dave = False  # nobody here speaks aloud
    discord.http.json_or_text = read_answer
    discord.client.ExponentialBackoff = Backoff  # type: ignore[assignment,attr-defined]
    discord.client.DiscordWebSocket = Gateway  # type: ignore[misc]
    logging.getLogger("discord.client").addFilter(_tell_calmly)  # the same one is added once
    DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL(settings.discord_gateway_url)
    return DiscordBot(settings.discord_token.get_secret_value(), settings.discord_message_content)


def proxy() -> str | None:
    """The environment's for Discord's address, which discord.py does not look for. Raises Unservable."""
    address, known = yarl.URL(Route.BASE), urllib.request.getproxies()
    kind = address.scheme if address.scheme in known else "all"
    if kind not in known or urllib.request.proxy_bypass(address.host or ""):
        return None
    if not known[kind].startswith(("http://", "https://")):
        raise Unservable(f"{kind.upper()}_PROXY: Discord is reached through proxies of HTTP alone: http://…")
    return known[kind]


class DiscordBot:
    name = events.PLATFORM
    alone = True

    guild_ready_timeout = 2.0
    heartbeat_timeout = 60.0
    """Seconds of silence after which the gateway counts as gone; where nobody speaks, Discord answers every 41 s."""

    def __init__(self, token: str, message_content: bool = False) -> None:
        self._token = token
        self._message_content = message_content
        self._client: Client | None = None
        self._logged_in = asyncio.Event()
        self.line = Line()

    # -- hearing -------------------------------------------------------------------------------------------------

    async def serve(self, chat: Chat) -> None:
        """Raises Unservable for a token or an intent that Discord refuses, ConnectionError when it is out of reach,
        RetryAfter when it says for how long."""
        self.line.down("not logged in on Discord")
        client = self._build(chat)
        hearing = self._hearing = Hearing(client, chat)
        await hearing.open()
        if await hearing.sessions() >= SESSIONS_A_DAY:
            await asyncio.sleep(SESSION_PAUSE)
        work = [asyncio.create_task(hearing.run()), asyncio.create_task(self._connect(client))]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            raise ConnectionError("the client ended")
        except discord.LoginFailure:
            raise Unservable(
                "DISCORD_TOKEN: Discord does not know this token; reset it in the developer portal, under Bot"
            ) from None
        except discord.PrivilegedIntentsRequired:
            raise Unservable(
                "DISCORD_MESSAGE_CONTENT: the intent is off; switch on Message Content Intent in the developer portal, "
                "under Bot, or set DISCORD_MESSAGE_CONTENT=false"
            ) from None
        except discord.ConnectionClosed as error:
            if error.code in (4004, 4010, 4011, 4012, 4013):
                what = {4004: "DISCORD_TOKEN: Discord does not take this token; reset it in the developer portal"}
                raise Unservable(
                    what.get(error.code, f"Discord closed the gateway for good, code {error.code}")
                ) from None
            raise
        except discord.RateLimited as error:
            raise RetryAfter(error.retry_after, "Discord takes no calls") from None
        except (discord.HTTPException, aiohttp.ClientError, OSError) as error:
            said = " ".join(str(error).split())[:200]
            raise ConnectionError(f"Discord is out of reach: {said or type(error).__name__}") from None
        finally:
            self._logged_in.clear()
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            with contextlib.suppress(Exception):
                await client.close()
            self._client = None

    def _build(self, chat: Chat) -> Client:
        """Raises Unservable for a proxy that it cannot take."""
        intents = discord.Intents.none()
        intents.guilds = intents.guild_messages = intents.dm_messages = True
        intents.message_content = self._message_content
        client = Client(
            self.line,
            intents=intents,
            max_messages=None,
            chunk_guilds_at_startup=False,
            member_cache_flags=discord.MemberCacheFlags.none(),
            allowed_mentions=discord.AllowedMentions.none(),
            guild_ready_timeout=self.guild_ready_timeout,
            heartbeat_timeout=self.heartbeat_timeout,
            max_ratelimit_timeout=30.0,
            proxy=proxy(),
        )
        tree = app_commands.CommandTree(client)

        @tree.command(name="reset", description="Forget what was said in this channel and start fresh")
        async def reset(interaction: discord.Interaction) -> None:
            done = "not done"
            try:
                await interaction.response.defer(ephemeral=True)  # Discord waits three seconds
                try:
                    async with asyncio.timeout(RESET_SECONDS):  # the history may be out of reach
                        await self._hearing.reset(Channel(self.name, str(interaction.channel_id)))
                    done, said = "done", FORGOTTEN
                except (NotAccepted, TimeoutError):
                    said = NOT_NOW
                await interaction.followup.send(said, ephemeral=True)
            except (discord.DiscordException, aiohttp.ClientError, OSError) as error:
                log.warning("/reset in channel %s, %s, could not be answered: %s", interaction.channel_id, done, error)

        @tree.error
        async def failed(interaction: discord.Interaction, error: app_commands.AppCommandError) -> None:
            log.warning("a command on Discord could not be obeyed: %s", error)

        self._tree = tree
        return client

    async def _connect(self, client: Client) -> None:
        await client.login(self._token)
        self._client = client
        self._logged_in.set()
        offering = asyncio.create_task(self._offer_commands())
        try:
            await client.connect()
        except AttributeError:  # discord.py's, which asks for the last session where there was none yet
            if client.ws:
                raise
            raise ConnectionError("the gateway takes no connection") from None
        finally:
            offering.cancel()

    async def _offer_commands(self) -> None:
        tries = 0
        while True:
            try:
                await self._tree.sync()
                return
            except (discord.DiscordException, aiohttp.ClientError, OSError, KeyError) as error:
                log.warning("/reset could not be offered on Discord, trying again: %s", error)
            await asyncio.sleep(backoff(tries, 600.0, first=5.0))
            tries += 1

    # -- speaking ------------------------------------------------------------------------------------------------

    def split(self, text: str) -> list[str]:
        """In pieces of 2,000 characters at most."""
        return split(clean(text), MAX_TEXT)

    async def turn(self, channel: Channel) -> None:
        """Discord's limit for all calls together; discord.py keeps those for each route."""
        with contextlib.suppress(TimeoutError):  # a start takes up what is owed before it is logged in
            await asyncio.wait_for(self._logged_in.wait(), 5.0)
        if self._client:
            await self._client.turn()

    async def send(self, reply: Reply) -> str:
        """The message's id. Raises NotSent | MaybeSent | Refused | RetryAfter."""
        body = {
            "content": reply.text,
            "nonce": reply.nonce,
            "enforce_nonce": True,
            "allowed_mentions": {"parse": [], "replied_user": False},
            "flags": SUPPRESS_EMBEDS,
            "message_reference": {"message_id": reply.to, "fail_if_not_exists": False},
        }
        route = Route("POST", "/channels/{channel_id}/messages", channel_id=int(reply.channel.id))
        try:
            sent = await self._call(route, json=body)
        except Rejected as error:
            gone = "message_reference" in str(error) or "REPLIES" in str(error).upper()
            if not gone and error.code not in NO_REPLYING:
                raise
            del body["message_reference"]  # what it answers cannot be named; the answer is the same
            sent = await self._call(route, json=body)
        return str(sent["id"])

    async def find_sent(self, reply: Reply) -> str | None:
        """Our message in the channel that replies to the question with this text; "" when there is none, None when too
        much was said there since or nothing at all is shown. It replies to nothing when the question was gone by then.
        """
        first = last = str(int(reply.to) - 1)  # with the question: where not even that is shown, nobody can tell
        begun = reply.created_at - timedelta(minutes=1)  # two clocks
        for _ in range(LOOK_BACK):
            await self.turn(reply.channel)
            page = await self._after(reply.channel.id, last)
            me = str(self._me)  # known from the login on, which a first page waits for
            for event in page:
                to = events.answers(event, me)
                alone = to is None and events.is_by(event, me) and events.sent_at(event["id"]) > begun
                known = (to == reply.to or alone) and event.get("content") == reply.text
                if known or event.get("nonce") == reply.nonce:
                    return str(event["id"])
            if len(page) < 100 or int(page[-1]["id"]) <= int(last):
                return "" if page or last != first else None
            last = str(page[-1]["id"])
        return None

    async def typing(self, channel: Channel, note: str = "", to: str = "") -> None:
        if self._client and self._client.sign():
            await self._call(Route("POST", "/channels/{channel_id}/typing", channel_id=int(channel.id)))

    async def closed(self, channel: Channel, id: str, state: MessageState) -> None: ...

    @property
    def _me(self) -> int:
        return self._client.user.id if self._client and self._client.user else 0

    async def _after(self, channel: str, id: str) -> list[dict[str, Any]]:
        """Up to 100 messages behind `id`, oldest first."""
        route = Route("GET", "/channels/{channel_id}/messages", channel_id=int(channel))
        found = await self._call(route, params={"after": id, "limit": 100})
        return sorted(found, key=lambda event: int(event["id"]))

    async def _call(self, route: Route, **arguments: Any) -> Any:
        """One REST call, which has had its turn; failures as the courier wants them."""
        if self._client is None:
            raise NotSent("not logged in yet")
        return await call(self._client, route, **arguments)
