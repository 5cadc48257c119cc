"""A Discord on loopback for one bot: gateway and REST, people who type, a ledger of every send, faults on request.

    async with DiscordServer() as server:
        general = server.channel("general")
        said = server.say(general, "ann", "hi", mention=True)
        await server.until(1)                    # one message of the bot is visible
        assert server.ledger[0].text == "..."

By hand: `python -m tests.fakes.discord_server --port 8090`. Over HTTP: POST /_fake/say, /_fake/faults, /_fake/gateway
and GET /_fake/ledger, so that the bot and its test may be different processes.

What it does is from discord.com/developers/docs (gateway, message, rate limits).
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import time
import zlib
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Self

from aiohttp import WSMsgType, web

TOKEN = "MTAwMDAwMDAwMDAwMDAwMDAwMA.GaFake.a-token-of-nobody-at-all-0123456789"
EPOCH_MS = 1_420_070_400_000
BUFFER = 200
"""Events that a RESUME can bring back."""
MESSAGE_CONTENT = 1 << 15
Json = dict[str, Any]
Kind = Literal["delay", "flood", "flood_global", "error", "reset_before", "reset_after", "garbage", "page"]


@dataclass
class Fault:
    """What happens instead of, before or after a REST call. `times` -1 is for ever; `channel` "" is every channel."""

    kind: Kind
    method: str = "POST"
    path: str = "/messages"
    """The end of the path it happens to."""
    channel: str = ""
    times: int = 1
    value: Any = None
    """delay: seconds; flood: retry_after; error: [status, code, text]; page: status."""


@dataclass
class Sent:
    """One message of the bot that people see."""

    at: float
    channel: str
    text: str
    reply_to: str | None
    nonce: str | None
    id: str
    body: Json = field(repr=False)


@dataclass(eq=False)
class Session:
    id: str
    intents: int
    seq: int = 0
    buffer: list[Json] = field(default_factory=list)
    socket: Socket | None = None
    last: asyncio.Task[None] | None = None
    """The event on its way: the next one waits for it."""


@dataclass(eq=False)
class Socket:
    """One connection of the gateway, compressed as the client asked for."""

    ws: web.WebSocketResponse
    deflate: Any
    silent: bool = False

    async def send(self, payload: Json) -> None:
        if self.silent or self.ws.closed:
            return
        text = json.dumps(payload)
        if self.deflate is None:
            await self.ws.send_str(text)
        else:
            await self.ws.send_bytes(self.deflate.compress(text.encode()) + self.deflate.flush(zlib.Z_SYNC_FLUSH))


class DiscordServer:
    def __init__(self, token: str = TOKEN, seed: int = 0, port: int = 0, granted: int = 0) -> None:
        """`granted`: privileged intents that the portal has switched on."""
        self.token, self.port, self.rng, self.granted = token, port, random.Random(seed), granted
        self._last_id = 0
        self.guild = self._id()
        self.me = self._user("Palaver", bot=True)
        self.role = self._id()
        """The bot's own."""
        self.users: dict[str, Json] = {}
        self.channels: dict[str, Json] = {}
        self.messages: dict[str, list[Json]] = {}
        self.ledger: list[Sent] = []
        self.typing: list[tuple[float, str]] = []
        self.calls: list[tuple[str, str, Json]] = []
        self.limited: list[float] = []
        """When each call came that counts for the fifty a second."""
        self.commands: list[Json] = []
        self.said_to_commands: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.chaos: dict[Kind, float] = {}
        """Fault kind -> probability, for every message sent, drawn from the seed."""
        self.no_history: dict[str, int] = {}
        """Channel -> the code of the no to a reply there: the bot lacks Read Message History."""
        self.duplicates = 0.0
        self.deaf_to_after = False
        """A server that always tells the whole history."""
        self.nonce_seconds = 120.0
        self.identifies = self.resumes = 0
        self.refuse_sessions = 0
        """So many IDENTIFYs and RESUMEs more are answered with "invalid session"."""
        self.heartbeat_seconds = 1.0
        """Discord's are 41.25."""
        self.resume_gateway = ""
        """Where sessions are resumed, if it is elsewhere."""
        self.unconfirmed = 0
        """So many IDENTIFYs and RESUMEs more are taken and never heard of again."""
        self.closes_sessions = 0
        """So many IDENTIFYs and RESUMEs more end their connection with 4000, an error that nobody knows."""
        self.joined = "2024-01-01T00:00:00+00:00"
        """When the bot was invited."""
        self._away = False
        self._sessions: dict[str, Session] = {}
        self._sockets: set[Socket] = set()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- life ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**24)
        api = "/api/v10"
        app.add_routes(
            [
                web.get("/gateway", self._gateway),
                web.get("/gateway/", self._gateway),
                web.post("/_fake/say", self._http_say),
                web.post("/_fake/faults", self._http_faults),
                web.post("/_fake/gateway", self._http_gateway),
                web.get("/_fake/ledger", self._http_ledger),
                web.route("*", api + "/{path:.*}", self._rest),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for socket in list(self._sockets):
            await socket.ws.close(code=1001)
        await self._runner.cleanup()

    @property
    def base(self) -> str:
        """DISCORD_API_BASE."""
        return f"http://127.0.0.1:{self.port}/api/v10"

    @property
    def gateway(self) -> str:
        """DISCORD_GATEWAY_URL."""
        return f"ws://127.0.0.1:{self.port}/gateway"

    @property
    def connected(self) -> bool:
        return any(session.socket for session in self._sessions.values())

    async def until(self, sends: int = 0, timeout: float = 60.0, connected: bool = False, typed: int = 0) -> None:
        """Wait for so many visible messages, or for a bot at the gateway. TimeoutError says what there was."""

        def enough() -> bool:
            return len(self.ledger) >= sends and len(self.typing) >= typed and (self.connected or not connected)

        try:
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(enough)
        except TimeoutError:
            raise TimeoutError(f"after {timeout} s: {len(self.ledger)} of {sends} sends {self.ledger[-3:]}") from None

    # -- people --------------------------------------------------------------------------------------------------

    def channel(self, name: str, thread_of: str = "") -> str:
        """A text channel of the server, or a thread; the same name is the same channel. Returns its id."""
        for channel in self.channels.values():
            if channel.get("name") == name:
                return str(channel["id"])
        made: Json = {
            "id": self._id(),
            "name": name,
            "type": 11 if thread_of else 0,
            "guild_id": self.guild,
            "position": 0,
        }
        made |= {"permission_overwrites": [], "last_message_id": None, "topic": None, "nsfw": False}
        if thread_of:
            now = datetime.now(UTC).isoformat()
            made |= {"parent_id": thread_of, "owner_id": self.me["id"], "message_count": 0, "member_count": 1}
            made["thread_metadata"] = {
                "archived": False,
                "auto_archive_duration": 1440,
                "archive_timestamp": now,
                "locked": False,
            }
        return self._add(made)

    def direct(self, user: str) -> str:
        """The direct messages with `user`."""
        person = self.user(user)
        for channel in self.channels.values():
            if channel["type"] == 1 and channel["recipients"][0]["id"] == person["id"]:
                return str(channel["id"])
        return self._add({"id": self._id(), "type": 1, "recipients": [person], "last_message_id": None})

    def user(self, name: str, bot: bool = False) -> Json:
        if name not in self.users:
            self.users[name] = self._user(name, bot)
        return self.users[name]

    def say(
        self,
        channel: str,
        user: str,
        text: str,
        *,
        mention: bool = False,
        reply_to: str = "",
        bot: bool = False,
        **fields: Any,
    ) -> str:
        """Someone types; returns the message's id. `fields` go into the message as they are."""
        content = f"<@{self.me['id']}> {text}" if mention else text
        message = self._message(channel, self.user(user, bot), content)
        message["mentions"] = [self.me] if mention or f"<@{self.me['id']}>" in content else []
        if reply_to:
            earlier = self.find(channel, reply_to)
            message |= {"type": 19, "message_reference": {"message_id": reply_to, "channel_id": channel}}
            message["referenced_message"] = earlier
        message |= fields
        self._publish("MESSAGE_CREATE", message)
        return str(message["id"])

    def edit(self, channel: str, id: str, text: str) -> None:
        message = self.find(channel, id)
        assert message is not None
        message |= {"content": text, "edited_timestamp": datetime.now(UTC).isoformat()}
        message["mentions"] = [self.me] if f"<@{self.me['id']}>" in text else []
        self._publish("MESSAGE_UPDATE", message)

    def delete(self, channel: str, id: str) -> None:
        self.messages[channel] = [m for m in self.messages[channel] if m["id"] != id]
        self._publish("MESSAGE_DELETE", {"id": id, "channel_id": channel, **self._where(channel)})

    async def command(self, channel: str, user: str, name: str, timeout: float = 30.0) -> str:
        """Someone uses a slash command; returns what the bot said to them alone."""
        command = next((command for command in self.commands if command["name"] == name), {"id": self._id()})
        before = len(self.said_to_commands)
        interaction: Json = {
            "id": self._id(),
            "application_id": self.me["id"],
            "type": 2,
            "token": secrets.token_hex(8),
            "version": 1,
            "channel_id": channel,
            "channel": self.channels[channel],
            "data": {"id": command["id"], "name": name, "type": 1},
            "attachment_size_limit": 1000,
            "entitlements": [],
            "authorizing_integration_owners": {},
            "context": 0,
            "locale": "en-US",
            "app_permissions": "0",
        }
        if self.channels[channel]["type"] == 1:
            interaction["user"] = self.user(user)
        else:
            interaction |= {"guild_id": self.guild, "member": self._member(self.user(user), permissions="0")}
        self._publish("INTERACTION_CREATE", interaction, stored=False)
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: len(self.said_to_commands) > before)
        return self.said_to_commands[-1][1]

    def find(self, channel: str, id: str) -> Json | None:
        return next((m for m in self.messages.get(channel, ()) if m["id"] == id), None)

    def publish_raw(self, name: str, data: Any) -> None:
        """An event as it is, however broken."""
        self._send_all(name, data)

    # -- trouble at the gateway ------------------------------------------------------------------------------------

    async def drop(self, code: int = 4000) -> None:
        """Close every connection; 1006 breaks it off without a word."""
        for socket in list(self._sockets):
            if code == 1006 and socket.ws._req is not None and socket.ws._req.transport is not None:
                socket.ws._req.transport.abort()
            else:
                await socket.ws.close(code=code)

    async def ask_to_reconnect(self) -> None:
        for socket in list(self._sockets):
            await socket.send({"op": 7, "d": None, "s": None, "t": None})

    async def invalidate(self, resumable: bool = False) -> None:
        if not resumable:
            self._sessions.clear()
        for socket in list(self._sockets):
            await socket.send({"op": 9, "d": resumable, "s": None, "t": None})

    def outage(self) -> None:
        """The server is unavailable: people talk on, the bot is told nothing, also in a new session."""
        self._send_all("GUILD_DELETE", {"id": self.guild, "unavailable": True})
        self._away = True

    def outage_ends(self) -> None:
        self._away = False
        self._send_all("GUILD_CREATE", self._guild())

    def go_silent(self) -> None:
        """Half open: what is sent never arrives, nobody is told."""
        for socket in self._sockets:
            socket.silent = True

    # -- gateway -----------------------------------------------------------------------------------------------------

    async def _gateway(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(max_msg_size=2**20)
        await ws.prepare(request)
        deflate = zlib.compressobj() if request.query.get("compress") == "zlib-stream" else None
        socket = Socket(ws, deflate)
        self._sockets.add(socket)
        session: Session | None = None
        try:
            interval = int(1000 * self.heartbeat_seconds)
            await socket.send({"op": 10, "d": {"heartbeat_interval": interval}, "s": None, "t": None})
            async for frame in ws:
                if frame.type is not WSMsgType.TEXT:
                    continue
                received = json.loads(frame.data)
                op, data = received["op"], received.get("d")
                if op == 1:
                    await socket.send({"op": 11, "d": None, "s": None, "t": None})
                elif op in (2, 6) and self.unconfirmed:
                    self.unconfirmed -= 1
                elif op in (2, 6) and self.closes_sessions:
                    self.closes_sessions -= 1
                    await ws.close(code=4000)
                elif op in (2, 6) and self.refuse_sessions:
                    self.refuse_sessions -= 1
                    await socket.send({"op": 9, "d": False, "s": None, "t": None})
                elif op == 2:
                    session = await self._identify(socket, data)
                elif op == 6:
                    session = await self._resume(socket, data)
        finally:
            self._sockets.discard(socket)
            if session is not None and session.socket is socket:
                session.socket = None
            await self._notify()
        return ws

    async def _identify(self, socket: Socket, data: Json) -> Session | None:
        self.identifies += 1
        if data.get("token") != self.token:
            await socket.ws.close(code=4004)
            return None
        if data["intents"] & MESSAGE_CONTENT and not self.granted & MESSAGE_CONTENT:
            await socket.ws.close(code=4014)
            return None
        session = Session(secrets.token_hex(8), data["intents"], socket=socket)
        ready: Json = {
            "v": 10,
            "user": self.me,
            "session_id": session.id,
            "resume_gateway_url": self.resume_gateway or self.gateway,
            "guilds": [{"id": self.guild, "unavailable": True}],
            "private_channels": [],
            "relationships": [],
            "application": {"id": self.me["id"], "flags": 0},
        }
        await self._send(session, "READY", ready)
        if not self._away:
            await self._send(session, "GUILD_CREATE", self._guild())
        self._sessions[session.id] = session
        await self._notify()
        return session

    async def _resume(self, socket: Socket, data: Json) -> Session | None:
        session = self._sessions.get(data["session_id"])
        if session is None or (session.buffer and data["seq"] < session.buffer[0]["s"] - 1):
            await socket.send({"op": 9, "d": False, "s": None, "t": None})
            return None
        self.resumes += 1
        session.socket = socket
        for payload in [payload for payload in session.buffer if payload["s"] > data["seq"]]:
            await socket.send(payload)
        await self._send(session, "RESUMED", {})
        await self._notify()
        return session

    async def _send(self, session: Session, name: str, data: Any) -> None:
        session.seq += 1
        payload = {"op": 0, "t": name, "s": session.seq, "d": data}
        session.buffer = [*session.buffer, payload][-BUFFER:]
        if session.socket is not None:
            await session.socket.send(json.loads(json.dumps(payload)))

    def _send_all(self, name: str, data: Any) -> None:
        if self._away and data.get("guild_id"):
            return
        frozen = json.loads(json.dumps(data))
        for session in self._sessions.values():
            for _ in range(1 + (self.rng.random() < self.duplicates)):
                self._queue(session, name, self._as_seen(session, name, frozen))

    def _queue(self, session: Session, name: str, data: Any) -> None:
        """One task per event would reorder them: each waits for the one before."""
        before = session.last

        async def send() -> None:
            if before is not None:
                await asyncio.wait({before})
            await self._send(session, name, data)

        task = session.last = asyncio.create_task(send())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _as_seen(self, session: Session, name: str, data: Any) -> Any:
        """Without the Message Content intent, text is shown only where the bot is meant."""
        if not name.startswith("MESSAGE_") or session.intents & MESSAGE_CONTENT or not data.get("guild_id"):
            return data
        author, mentioned = (data.get("author") or {}).get("id"), data.get("mentions") or ()
        if author == self.me["id"] or any(user["id"] == self.me["id"] for user in mentioned) or "content" not in data:
            return data
        return {**data, "content": ""}

    def _publish(self, name: str, data: Json, stored: bool = True) -> None:
        if name == "MESSAGE_CREATE":
            self.messages.setdefault(data["channel_id"], []).append(data)
            self.channels[data["channel_id"]]["last_message_id"] = data["id"]
        if stored and name in ("MESSAGE_CREATE", "MESSAGE_UPDATE"):
            data = {**data, **self._where(data["channel_id"])}
        self._send_all(name, data)

    # -- REST --------------------------------------------------------------------------------------------------------

    async def _rest(self, request: web.Request) -> web.StreamResponse:
        path, method = "/" + request.match_info["path"], request.method
        body = await request.json() if request.can_read_body and request.content_type == "application/json" else {}
        self.calls.append((method, path, body))
        if not path.startswith(("/interactions/", "/webhooks/")):
            self.limited.append(asyncio.get_running_loop().time())
        channel = path.split("/")[2] if path.startswith("/channels/") else ""
        fault = self._fault(method, path, channel)
        if fault is not None:
            if fault.kind == "delay":
                await asyncio.sleep(float(fault.value))
            elif fault.kind in ("flood", "flood_global"):
                return self._flood(fault)
            elif fault.kind == "error":
                status, code, text = fault.value
                return _json({"code": code, "message": text}, status)
            elif fault.kind == "garbage":
                return web.Response(text="<html>", content_type="text/html", status=502)
            elif fault.kind == "page":  # what a proxy says when it is not asked nicely
                return web.Response(text="<html>", content_type="text/html", status=fault.value or 200)
            elif fault.kind == "reset_before":
                return _reset(request)
        if method != "GET" and path.startswith("/interactions/"):
            answer = await self._callback(path, body)
        elif method == "POST" and path.startswith("/webhooks/"):
            answer = await self._followup(path, body)
        elif request.headers.get("Authorization") != f"Bot {self.token}":
            answer = _json({"message": "401: Unauthorized", "code": 0}, 401)
        else:
            answer = await self._answer(request, method, path, channel, body)
        if fault is not None and fault.kind == "reset_after":
            return _reset(request)
        return answer

    async def _answer(self, request: web.Request, method: str, path: str, channel: str, body: Any) -> web.Response:
        if path == "/users/@me":
            return _json(self.me)
        if path in ("/oauth2/applications/@me", "/applications/@me"):
            application = {"id": self.me["id"], "name": "Palaver", "description": "", "icon": None, "bot_public": True}
            owner = self._user("owner")
            return _json(
                {**application, "bot_require_code_grant": False, "owner": owner, "verify_key": "0", "flags": 0}
            )
        if path == "/gateway":
            return _json({"url": self.gateway})
        if path == "/gateway/bot":
            limit = {"total": 1000, "remaining": 1000, "reset_after": 0, "max_concurrency": 1}
            return _json({"url": self.gateway, "shards": 1, "session_start_limit": limit})
        if method == "PUT" and path.endswith("/commands"):
            base = {"application_id": self.me["id"], "version": "1", "default_member_permissions": None}
            self.commands = [{**base, **command, "id": self._id()} for command in body]
            await self._notify()
            return _json(self.commands)
        if channel and channel not in self.channels:
            return _json({"message": "Unknown Channel", "code": 10003}, 404)
        if method == "GET" and path == f"/channels/{channel}":
            return _json(self.channels[channel])
        if method == "POST" and path.endswith("/typing"):
            self.typing.append((time.monotonic(), channel))
            await self._notify()
            return web.Response(status=204)
        if method == "POST" and path.endswith("/messages"):
            return await self._create(channel, body)
        if method == "GET" and path.endswith("/messages"):
            after, most = int(request.query.get("after", 0)), int(request.query.get("limit", 50))
            messages = () if channel in self.no_history else self.messages.get(channel, ())
            found = [m for m in messages if int(m["id"]) > after][:most]
            if self.deaf_to_after:
                found = self.messages.get(channel, [])
            return _json(found[::-1])
        return _json({"message": "404: Not Found", "code": 0}, 404)

    async def _create(self, channel: str, body: Json) -> web.Response:
        text = str(body.get("content") or "")
        if not text.strip():
            return _json({"message": "Cannot send an empty message", "code": 50006}, 400)
        if len(text) > 2000:
            return _json(_invalid("content", "Must be 2000 or fewer in length."), 400)
        if len(str(body.get("nonce") or "")) > 25:
            return _json(_invalid("nonce", "Must be 25 or fewer in length."), 400)
        nonce, reference = body.get("nonce"), body.get("message_reference")
        if nonce and body.get("enforce_nonce"):
            for sent in self.ledger:
                if sent.nonce == nonce and sent.channel == channel and time.monotonic() - sent.at < self.nonce_seconds:
                    known = self.find(channel, sent.id)
                    if known is not None:
                        return _json(known)
        if reference and channel in self.no_history:
            what = "Cannot reply without permission to read message history"
            return _json({"message": what, "code": self.no_history[channel]}, 403)
        earlier = self.find(channel, str(reference["message_id"])) if reference else None
        if reference and earlier is None and reference.get("fail_if_not_exists", True):
            return _json(_invalid("message_reference", "Unknown message"), 400)
        message = self._message(channel, self.me, text)
        if reference and earlier is not None:
            message |= {
                "type": 19,
                "message_reference": {**reference, "channel_id": channel},
                "referenced_message": earlier,
            }
        self.ledger.append(
            Sent(
                time.monotonic(),
                channel,
                text,
                str(reference["message_id"]) if reference else None,
                nonce,
                message["id"],
                body,
            )
        )
        self._publish("MESSAGE_CREATE", message)
        await self._notify()
        return _json({**message, "nonce": nonce})

    async def _callback(self, path: str, body: Json) -> web.Response:
        if body["type"] != 5:  # "thinking", and a followup tells
            self.said_to_commands.append((path.split("/")[2], str((body.get("data") or {}).get("content", ""))))
            await self._notify()
        interaction = {"id": path.split("/")[2], "type": 2, "response_message_id": None}
        return _json({"interaction": interaction, "resource": {"type": body["type"]}})

    async def _followup(self, path: str, body: Json) -> web.Response:
        self.said_to_commands.append((path.split("/")[3], str(body["content"])))
        await self._notify()
        return _json(self._message("0", self.me, body["content"]))

    def _fault(self, method: str, path: str, channel: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and path.endswith(fault.path) and fault.channel in ("", channel):
                fault.times -= 1
                return fault
        if method == "POST" and path.endswith("/messages"):
            for kind, share in self.chaos.items():
                if self.rng.random() < share:
                    value: Any = {"delay": 0.2, "error": [502, 0, "bad gateway"]}.get(kind, 0.3)
                    return Fault(kind, value=value)
        return None

    def _flood(self, fault: Fault) -> web.Response:
        scope = "global" if fault.kind == "flood_global" else "shared"
        body = {"message": "You are being rate limited.", "retry_after": fault.value, "global": scope == "global"}
        headers = {"Via": "1.1 fake", "X-RateLimit-Scope": scope, "Retry-After": str(fault.value)}
        if scope == "global":
            headers["X-RateLimit-Global"] = "true"
        return _json(body, 429, headers)

    # -- shapes --------------------------------------------------------------------------------------------------------

    def _id(self) -> str:
        """A snowflake, later than every other."""
        self._last_id = max(self._last_id + 1, (int(time.time() * 1000) - EPOCH_MS) << 22)
        return str(self._last_id)

    def _user(self, name: str, bot: bool = False) -> Json:
        blank = {"discriminator": "0", "avatar": None, "public_flags": 0, "flags": 0}
        return {"id": self._id(), "username": name.lower(), "global_name": name, "bot": bot, **blank}

    def _member(self, user: Json, **fields: Any) -> Json:
        joined = "2024-01-01T00:00:00+00:00"
        return {"user": user, "roles": [], "joined_at": joined, "deaf": False, "mute": False, "flags": 0, **fields}

    def _message(self, channel: str, author: Json, content: str) -> Json:
        return {
            "id": self._id(),
            "channel_id": channel,
            "author": author,
            "content": content,
            "timestamp": datetime.now(UTC).isoformat(),
            "edited_timestamp": None,
            "tts": False,
            "mention_everyone": "@everyone" in content,
            "mentions": [],
            "mention_roles": [],
            "attachments": [],
            "embeds": [],
            "pinned": False,
            "type": 0,
            "components": [],
        }

    def _where(self, channel: str) -> Json:
        """What only gateway events carry."""
        if self.channels[channel]["type"] == 1:
            return {}
        return {"guild_id": self.guild}

    def _guild(self) -> Json:
        mine = [channel for channel in self.channels.values() if channel["type"] != 1]
        return {
            "id": self.guild,
            "name": "A Server",
            "owner_id": self.me["id"],
            "joined_at": self.joined,
            "channels": [channel for channel in mine if channel["type"] == 0],
            "threads": [c for c in mine if c["type"] == 11 and not c["thread_metadata"]["archived"]],
            "members": [self._member(self.me)],
            "roles": [
                {"id": self.guild, "name": "@everyone", "permissions": "0", "position": 0, "color": 0},
                {
                    "id": self.role,
                    "name": "Palaver",
                    "permissions": "0",
                    "position": 1,
                    "color": 0,
                    "tags": {"bot_id": self.me["id"]},
                },
            ],
            "member_count": 3,
            "large": False,
            "unavailable": False,
            "emojis": [],
            "stickers": [],
            "features": [],
            "presences": [],
            "voice_states": [],
            "stage_instances": [],
            "guild_scheduled_events": [],
            "soundboard_sounds": [],
            "verification_level": 0,
            "default_message_notifications": 0,
            "explicit_content_filter": 0,
            "mfa_level": 0,
            "nsfw_level": 0,
            "premium_tier": 0,
            "preferred_locale": "en-US",
            "system_channel_flags": 0,
            "afk_timeout": 300,
        }

    def _add(self, channel: Json) -> str:
        self.channels[channel["id"]] = channel
        self.messages[channel["id"]] = []
        if channel["type"] != 1:
            self._send_all("THREAD_CREATE" if channel["type"] == 11 else "CHANNEL_CREATE", channel)
        return str(channel["id"])

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # -- from another process ------------------------------------------------------------------------------------------

    async def _http_say(self, request: web.Request) -> web.Response:
        """{channel (a name; "@ann" is a direct message), user, text, mention, reply_to} -> {id}."""
        asked = await request.json()
        name = asked.pop("channel")
        channel = self.direct(name[1:]) if name.startswith("@") else self.channel(name)
        user, text = asked.pop("user"), asked.pop("text")
        return _json({"id": self.say(channel, user, text, **asked), "channel": channel})

    async def _http_faults(self, request: web.Request) -> web.Response:
        """{faults: [...], chaos: {kind: probability}, duplicates: probability}."""
        asked = await request.json()
        self.faults += [Fault(**fault) for fault in asked.get("faults", ())]
        self.chaos = asked.get("chaos", self.chaos)
        self.duplicates = asked.get("duplicates", self.duplicates)
        return _json({})

    async def _http_gateway(self, request: web.Request) -> web.Response:
        """{do: drop | reconnect | invalidate | silence}."""
        what = (await request.json())["do"]
        if what == "drop":
            await self.drop()
        elif what == "reconnect":
            await self.ask_to_reconnect()
        elif what == "invalidate":
            await self.invalidate()
        else:
            self.go_silent()
        return _json({})

    async def _http_ledger(self, request: web.Request) -> web.Response:
        return _json({"ledger": [asdict(sent) for sent in self.ledger], "identifies": self.identifies})


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Content-Type exactly application/json: discord.py reads nothing else as JSON."""
    limits = {"X-RateLimit-Limit": "1000", "X-RateLimit-Remaining": "999", "X-RateLimit-Reset-After": "1"}
    limits |= {"X-RateLimit-Bucket": "fake", "Content-Type": "application/json", **(headers or {})}
    return web.Response(body=json.dumps(body).encode(), status=status, headers=limits)


def _invalid(name: str, text: str) -> Json:
    errors = {name: {"_errors": [{"code": "INVALID", "message": text}]}}
    return {"code": 50035, "message": "Invalid Form Body", "errors": errors}


def _reset(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _by_hand(port: int) -> None:
    """A prompt: `general ann: hi @bot` is said in #general, `@ann: hi` in ann's direct messages."""
    async with DiscordServer(port=port) as server:
        print(f"DISCORD_TOKEN={server.token}\nDISCORD_API_BASE={server.base}\nDISCORD_GATEWAY_URL={server.gateway}\n")
        print("CHANNEL NAME: TEXT (write @bot to mention it) | @NAME: TEXT (direct) | /reset CHANNEL | :quit")
        server.channel("general")

        async def show() -> None:
            seen = 0
            while True:
                await server.until(seen + 1, timeout=10**9)
                for sent in server.ledger[seen:]:
                    print(f"\n[{server.channels[sent.channel].get('name', 'direct')}] Palaver: {sent.text}")
                seen = len(server.ledger)

        showing = asyncio.create_task(show())
        while True:
            try:
                line = await asyncio.to_thread(input, "> ")
            except EOFError:
                break
            where, _, text = line.partition(":")
            if line == ":quit":
                break
            if line.startswith("/"):
                name, _, place = line[1:].partition(" ")
                channel = server.channel(place or "general")
                print(await server.command(channel, "ann", name) if server.commands else "no command is offered yet")
            elif where.startswith("@") and text:
                server.say(server.direct(where[1:]), where[1:], text.strip())
            elif text and " " in where.strip():
                place, name = where.split(maxsplit=1)
                said = text.strip().replace("@bot", f"<@{server.me['id']}>")
                server.say(server.channel(place), name, said)
            elif line.strip():
                print("  write: general ann: hi @bot")
        showing.cancel()


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="A Discord of your own, to try the bot against.")
    parser.add_argument("--port", type=int, default=8090)
    asyncio.run(_by_hand(parser.parse_args().port))
