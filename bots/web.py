"""The page: a chat in the browser over one WebSocket, and beside it /metrics, /livez and /readyz.

A browser is known by an unguessable cookie; its conversation is the channel web:<hash of it>, shared by its tabs. The
page keeps what has no answer and says it again after a reconnect: message ids are the page's, so a message said twice
is stored once. Frames are JSON objects:

from the page  {"id", "text"}  say      {"hello": true}  send the history      {"reset": true}  start anew
to the page    {"history": [{"role", "id", "text"}]}  what was answered; an answer has its question's id
               {"stored": {"id", "text", "heard"}}  on disk (to every tab); heard is false where nothing can be answered
               {"later": id}  not stored, say it again      {"typing": id, "note"}      {"reply": {"to", "text"}}
               {"closed": id, "note"}  no reply will come, or it has come; the note says why, where there is none
               {"forgotten": true}  started anew (to every tab)      {"error": text}  the frame was no good
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import re
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aiohttp import WSCloseCode, WSMsgType, web
from pydantic import Field, field_validator
from yarl import URL

from bots.base import Line
from core import metrics
from core.delivery import NotAccepted, Unservable
from core.logs import announce
from core.messages import Author, Channel, Message, MessageState, Reply, Turn
from core.settings import Group
from core.text import MAX_CHARS, clean

if TYPE_CHECKING:
    from core.chat import Chat

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Said here, not guessed: the machine's own table of types may be wrong, and browsers take it at its word."""
COOKIE = "palaver"
A_YEAR = 365 * 24 * 3600
HISTORY = 200
LONGEST_FRAME = 32 * 1024
"""2,000 characters fit in however JSON spells them."""
MOST_TABS, MOST_TABS_EACH = 1000, 20
"""In all, and of one browser."""
MOST_UNSENT, SENT_WITHIN = 256, 20.0
"""Frames that wait for a tab, and seconds that one may take."""
IDLE = 15.0
"""Seconds until a connection without a request is closed: each holds a descriptor."""
BURST, PER_SECOND = 20, 2.0
HEARTBEAT = 20.0
CLOSED = {
    "shed": "Too much was waiting. Perhaps say it again?",
    "expired": "No answer in time. Perhaps say it again?",
    "failed": "No answer was found. Perhaps say it in other words?",
    "cancelled": "There was nothing to answer.",
}
"""Why a message has no reply."""
PROBES = ("/metrics", "/livez", "/readyz")
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_KEY = re.compile(r"[A-Za-z0-9_-]{32}")
_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")


class WebSettings(Group):
    web_enabled: bool = Field(True, description="serve the chat page, /metrics and /readyz", examples=["false"])
    web_host: str = Field(
        "127.0.0.1", min_length=1, description="where the page listens; 0.0.0.0 is everywhere", examples=["127.0.0.1"]
    )
    web_port: int = Field(8080, ge=0, le=65_535, description="the page's port, 0 takes a free one", examples=[8081])
    web_origin: str = Field(
        "", description="how browsers reach the page, behind a reverse proxy", examples=["https://chat.example.com"]
    )

    @field_validator("web_host")
    @classmethod
    def _a_host(cls, value: str) -> str:
        with contextlib.suppress(ValueError):
            if re.fullmatch(r"[\w.-]*[^\W\d][\w.-]*", value) or ip_address(value):
                return value
        raise ValueError("must be an address or a name alone: no http://, no brackets, and the port is WEB_PORT's")

    @field_validator("web_origin")
    @classmethod
    def _an_origin(cls, value: str) -> str:
        if value and not re.fullmatch(r"https?://[^/\s?#@]+/?", value):
            raise ValueError("must be http:// or https:// and a host, without a path")
        # as browsers name it: xn--…, and no port that goes without saying
        return str(URL(value).origin()) if value else ""


def open_web(settings: WebSettings) -> WebBot:
    return WebBot(settings)


class WebBot:
    name = "web"
    alone = False

    def __init__(self, settings: WebSettings) -> None:
        self.readiness: Callable[[], Awaitable[str]] | None = None
        """What /readyz asks: "" or what is missing. Until it is set, nothing is ready."""
        self.address = ""
        """Where it serves, for example http://127.0.0.1:8080; "" while it does not."""
        self.line = Line()
        self._settings = settings
        self._local = _is_loopback(settings.web_host)
        self._names = _hosts(settings.web_origin)
        self._tabs: dict[Channel, set[Tab]] = defaultdict(set)
        self._refused = False

    async def serve(self, chat: Chat) -> None:
        app = web.Application(middlewares=[self._checked])
        app.router.add_get("/ws", partial(self._talk, chat))
        app.router.add_post("/cookie", self._give_cookie)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/livez", self._live)
        app.router.add_get("/readyz", self._ready)
        for path in PAGE.iterdir():
            app.router.add_get("/" if path.name == "index.html" else f"/{path.name}", _file(path))
        app.on_response_prepare.append(_secure)
        app.on_shutdown.append(self._hang_up)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0, keepalive_timeout=IDLE)
        await runner.setup()
        try:
            await self._listen(runner)
            await asyncio.Event().wait()
        finally:
            self.address = ""
            await runner.cleanup()

    async def turn(self, channel: Channel) -> None: ...

    async def send(self, reply: Reply) -> str:
        """To the open tabs; with none, it stands in the journal and the page shows it when it comes back."""
        self._push(reply.channel, {"reply": {"to": reply.to, "text": clean(reply.text)}})
        return str(reply.id)

    async def find_sent(self, reply: Reply) -> str | None:
        return str(reply.id)  # the page reads the journal

    async def typing(self, channel: Channel, note: str = "", to: str = "") -> None:
        self._push(channel, {"typing": to, "note": note})

    async def closed(self, channel: Channel, id: str, state: MessageState) -> None:
        self._push(channel, {"closed": id, "note": CLOSED.get(state, "")})

    def split(self, text: str) -> list[str]:
        return [text]

    # -- the server ----------------------------------------------------------------------------------------------

    async def _listen(self, runner: web.AppRunner) -> None:
        host, port = self._settings.web_host, self._settings.web_port
        try:
            await web.TCPSite(runner, host, port).start()
        except socket.gaierror:
            raise Unservable("WEB_HOST: no such host; set an address, for example WEB_HOST=127.0.0.1") from None
        except OSError as error:
            raise Unservable(_mend(error, port)) from None
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{runner.addresses[0][1]}"
        announce(log, f"Palaver talks at {self.address}")
        if not self._local:
            log.warning("WEB_HOST=%s: whoever reaches this machine may chat and read /metrics", host)

    @web.middleware
    async def _checked(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """On loopback, or where it is set how browsers come, only known names: a foreign name that leads here is an
        attack (DNS rebinding). Probes come to an open house by whatever address they have."""
        probe = request.path in PROBES and not self._local
        known = request.host.lower() in self._names or _is_loopback(_host(f"//{request.host}"))
        if (self._local or self._settings.web_origin) and not known and not probe:
            raise web.HTTPMisdirectedRequest(
                text="Unknown host name. Set WEB_ORIGIN to how browsers reach the page; a proxy must pass Host on.\n"
            )
        return await handler(request)

    def _refuse_others(self, request: web.Request) -> None:
        """Pages of others must not talk as this browser; what is no browser sends no Origin."""
        origin = request.headers.get("Origin", "").lower()
        same = origin in (f"http://{request.host.lower()}", f"https://{request.host.lower()}")
        if self._settings.web_origin:  # its name by another scheme is another page
            same = origin == self._settings.web_origin or (same and _is_loopback(_host(origin)))
        if origin and not same:
            if not self._refused:
                log.warning("a page at %s was refused: if that is this one, set WEB_ORIGIN to it", origin[:100])
            self._refused = True  # once is enough for who sets up a proxy, and a hostile page asks for ever
            raise web.HTTPForbidden(text="This page is not ours. Behind a proxy, set WEB_ORIGIN.\n")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _live(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.Request) -> web.Response:
        try:
            missing = await asyncio.wait_for(self.readiness(), 5.0) if self.readiness else "starting"
        except TimeoutError:
            missing = "no answer within 5 s"
        return web.Response(text=f"{missing or 'ready'}\n", status=503 if missing else 200)

    async def _hang_up(self, _: web.Application) -> None:
        tabs = [tab for tabs in self._tabs.values() for tab in tabs]
        await asyncio.gather(*(tab.close(WSCloseCode.GOING_AWAY) for tab in tabs), return_exceptions=True)

    # -- the conversation ----------------------------------------------------------------------------------------

    async def _give_cookie(self, request: web.Request) -> web.Response:
        """The page asks for it before it connects, one tab after the other: two first tabs are one person.

        It does not come with the page: a link from elsewhere opens the page without a strict cookie.
        """
        self._refuse_others(request)
        response = web.Response(status=204)
        _known(request, response)
        return response

    async def _talk(self, chat: Chat, request: web.Request) -> web.WebSocketResponse:
        """One tab, as long as it is open."""
        self._refuse_others(request)
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT, max_msg_size=LONGEST_FRAME)
        channel = _known(request, socket)
        full = "Too many people are here." if sum(map(len, self._tabs.values())) >= MOST_TABS else ""
        if len(self._tabs.get(channel, ())) >= MOST_TABS_EACH:
            full = "Too many pages of this browser are open; close some."
        await socket.prepare(request)
        if full:  # a page sees nothing of a socket that is refused
            await socket.send_json({"full": full})
            await socket.close(code=WSCloseCode.TRY_AGAIN_LATER)
            return socket
        tab = Tab(socket, request.transport)
        self._tabs[channel].add(tab)
        writer = asyncio.create_task(tab.write())
        try:
            async for frame in socket:
                await tab.pace()
                if writer.done():
                    break  # who cannot be answered is not heard
                said = _read(frame.data) if frame.type is WSMsgType.TEXT else {}
                await self._hear(chat, channel, tab, said)
        except ConnectionError:
            pass  # a ping of one who is gone
        finally:
            writer.cancel()
            self._tabs[channel].discard(tab)
            if not self._tabs[channel]:
                del self._tabs[channel]
        return socket

    async def _hear(self, chat: Chat, channel: Channel, tab: Tab, said: dict[str, Any]) -> None:
        id, text = said.get("id"), said.get("text")
        try:
            if said.get("hello"):
                if tab.owed_history:
                    return  # it comes, and behind it what has been said since it was read
                with tab.held():  # what is said meanwhile comes after the history
                    turns = await chat.history(channel, limit=HISTORY)
                    tab.tell({"history": [{"role": t.role, "id": t.id, "text": _shown(t)} for t in turns]})
            elif said.get("reset"):
                await chat.reset(channel)
                self._push(channel, {"forgotten": True})
            elif isinstance(id, str) and isinstance(text, str) and _ID.fullmatch(id):
                text = clean(text[:MAX_CHARS])
                author = Author(channel.id, "guest")
                new = await chat.receive(Message(channel, id, author, text, datetime.now(UTC)))
                heard = chat.voice.hears(text)
                state = await chat.state(channel, id) if heard and not new else "waiting"
                if state == "waiting":
                    self._push(channel, {"stored": {"id": id, "text": text, "heard": heard}})
                else:
                    tab.push({"closed": id, "note": CLOSED.get(state or "", "")})
            else:
                tab.push({"error": "I do not understand this."})
        except NotAccepted as error:
            log.warning("%s: not stored: %s", channel, error)
            tab.push({"later": id} if id else {"error": "Not now, please try again."})

    def _push(self, channel: Channel, frame: dict[str, Any]) -> None:
        for tab in self._tabs.get(channel, ()):
            tab.push(frame)


class Tab:
    """One open page. Frames wait in a line of their own: a slow reader delays nobody, a dead one is let go."""

    def __init__(self, socket: web.WebSocketResponse, transport: asyncio.Transport | None) -> None:
        self.owed_history = False
        """One waits to be sent: the largest frame, of which nobody needs two."""
        self._socket, self._transport = socket, transport
        self._line: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._held: list[dict[str, Any]] | None = None
        self._due = 0.0

    def push(self, frame: dict[str, Any]) -> None:
        if self._held is None:
            self.tell(frame)
        else:
            self._held.append(frame)

    def tell(self, frame: dict[str, Any]) -> None:
        """Past what is held."""
        if self._line.qsize() >= MOST_UNSENT:
            self._drop()
            return
        self._line.put_nowait(frame)
        self.owed_history |= "history" in frame

    @contextlib.contextmanager
    def held(self) -> Any:
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            for frame in held:
                self.tell(frame)

    async def write(self) -> None:
        """Until nothing can be sent any more."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            while True:
                frame = await self._line.get()
                async with asyncio.timeout(SENT_WITHIN):
                    await self._socket.send_json(frame)
                if "history" in frame:
                    self.owed_history = False
        self._drop()

    def _drop(self) -> None:
        """Who reads nothing reads no goodbye either. The page comes back and reads the history."""
        if self._transport is not None:
            self._transport.abort()

    async def pace(self) -> None:
        """A leaky bucket: BURST frames at once, then PER_SECOND; who is faster waits, and loses nothing."""
        now = time.monotonic()
        self._due = max(self._due, now - BURST / PER_SECOND) + 1 / PER_SECOND
        await asyncio.sleep(max(0.0, self._due - now))

    async def close(self, code: int) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(self._socket.close(code=code), 1.0)


def _known(request: web.Request, response: web.StreamResponse) -> Channel:
    """Whose request it is, by the cookie that the answer sets, if need be anew."""
    key = request.cookies.get(COOKIE, "")
    key = key if _KEY.fullmatch(key) else secrets.token_urlsafe(24)
    secure = request.headers.get("Origin", "").lower().startswith("https:")  # as browsers see it, whatever a proxy says
    response.set_cookie(COOKIE, key, max_age=A_YEAR, path="/", httponly=True, samesite="Strict", secure=secure or None)
    # hashed: channels stand in logs and exports, and the key must not
    return Channel("web", hashlib.sha256(key.encode()).hexdigest()[:24])


def _read(frame: str) -> dict[str, Any]:
    try:
        said = json.loads(frame)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _shown(turn: Turn) -> str:
    """What people said was cleaned when it was heard, and is a hundred times as much."""
    return clean(turn.text) if turn.role == "assistant" else turn.text


def _file(path: Path) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    headers = {"Cache-Control": "no-cache", "Content-Type": f"{KINDS[path.suffix]}; charset=utf-8"}

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.FileResponse(path, headers=headers)

    return answer


async def _secure(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(SECURITY)


def _hosts(origin: str) -> list[str]:
    """What a proxy passes on as Host: some name the port that goes without saying."""
    url = URL(origin)
    return [url.raw_authority, f"{url.host_subcomponent}:{url.port}"] if origin else []


def _host(url: str) -> str:
    """The name or address in it; "" where it is no URL."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


def _mend(error: OSError, port: int) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            free = port + 1 if port < 65_535 else 8080
            return f"WEB_PORT: port {port} is taken; set another, for example WEB_PORT={free}"
        case errno.EACCES:
            return f"WEB_PORT: port {port} needs rights; set one above 1023, for example WEB_PORT=8080"
        case _:
            return "WEB_HOST: not an address of this machine; for example WEB_HOST=127.0.0.1"
