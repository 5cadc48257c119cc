"""One engine behind HTTP, on a Unix socket or TCP: `palaver engine`, and the child of core.engine.process.

POST /generate, POST /prepare, POST /forget   see core.engine.wire; 4xx with one line for anything malformed
GET /info, GET /tokenizer                     what a client must know of the model; its tokenizer's files
GET /livez, GET /readyz, GET /metrics         200 while the process runs; 503 and why while it cannot answer

A client that hangs up cancels its request. The engine needs no network beyond this address and no secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import stat
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from core.engine import wire
from core.engine.base import BadCheckpoint, Completion, Engine, EngineClosed, EngineError, Failed, OtherModel
from core.engine.hub import resolve, resolve_reverse
from core.engine.machine import spin_briefly
from core.engine.process import local_options
from core.logs import Complaints, announce

if TYPE_CHECKING:
    from core.settings import Settings

log = logging.getLogger(__name__)

BODY_LIMIT = 1 << 20
BACKLOG = 1024
IDLE = 30.0
"""Seconds until a connection without a request, or with half of one, is closed: each holds a descriptor. Our clients
close theirs sooner."""
LOOK_EVERY = 1.0
"""Seconds between two looks whether the engine lives."""
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class _UnderWay:
    """A request, and how many wait for its answer: it was sent again where its wire may have died."""

    answer: asyncio.Task[list[Completion]]
    waiting: int = 0


class Server:
    """The routes over one engine. `why` is the line for those who ask before it is there, or while it ends; `replicas`
    says how many like it answer at the same address."""

    def __init__(self, replicas: Callable[[], Awaitable[int]] | None = None) -> None:
        self.engine: Engine | None = None
        self.why, self._replicas = "the model is loading", replicas
        self._files: dict[str, str] = {}
        self._model = ""
        self.running: dict[object, _UnderWay] = {}
        self.counts: Counter[str] = Counter()

    def open(self, engine: Engine) -> Server:
        """Answer with this engine. Its tokenizer's files are as they are now, whatever becomes of its folder."""
        self.engine, self.why, self._files = engine, "", wire.tokenizer_files(Path(engine.info.path))
        self._model = wire.fingerprint(self._files)
        return self

    def application(self) -> web.Application:
        app = web.Application(client_max_size=BODY_LIMIT, middlewares=[self._in_json])
        app.add_routes(
            [
                web.post("/generate", self.generate),
                web.post("/prepare", self.prepare),
                web.post("/forget", self.forget),
                web.get("/info", self.info),
                web.get("/tokenizer", self.tokenizer),
                web.get("/livez", self.livez),
                web.get("/readyz", self.readyz),
                web.get("/metrics", self.metrics),
            ]
        )
        return app

    @contextlib.asynccontextmanager
    async def listening(self, sock: socket.socket, grace: float = 0.0) -> AsyncIterator[None]:
        """Serve on `sock` inside the block; at its end, requests under way have `grace` seconds."""
        runner = web.AppRunner(
            self.application(),
            handle_signals=False,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=grace,
            keepalive_timeout=IDLE,
        )
        await runner.setup()
        try:
            await web.SockSite(runner, sock, backlog=BACKLOG).start()
            yield
        finally:
            await runner.cleanup()

    async def generate(self, request: web.Request) -> web.Response:
        engine = self._open(request)
        prompt, params, session, deadline = wire.load_request(await _body(request), engine.info.vocab_size)

        async def answer() -> list[Completion]:
            completions = await engine.generate(prompt, params, session=session, deadline=deadline)
            self.counts["requests"] += 1
            self.counts["prompt_tokens"] += len(prompt)
            self.counts["reply_tokens"] += sum(len(completion.token_ids) for completion in completions)
            return completions

        key = request.headers.get(wire.REQUEST) or object()
        if key not in self.running:
            self.running[key] = _UnderWay(asyncio.create_task(answer()))
        this = self.running[key]
        this.waiting += 1
        try:
            completions = await asyncio.shield(this.answer)
        finally:
            this.waiting -= 1
            if not this.waiting:
                del self.running[key]
                this.answer.cancel()
        return web.json_response(wire.dump_completions(completions))

    async def prepare(self, request: web.Request) -> web.Response:
        engine = self._open(request)
        ids, _, session, _ = wire.load_request(await _body(request), engine.info.vocab_size)
        engine.prepare(session, ids)
        return web.json_response({})

    async def forget(self, request: web.Request) -> web.Response:
        engine = self._open(request)
        await engine.forget(wire.load_session(wire.load_object(await _body(request), "session")))
        return web.json_response({})

    async def info(self, request: web.Request) -> web.Response:
        engine = self._open(request)
        at_once = engine.info.at_once * (await self._replicas() if self._replicas else 1)
        return web.json_response(asdict(engine.info) | {"fingerprint": self._model, "at_once": at_once})

    async def tokenizer(self, request: web.Request) -> web.Response:
        self._open(request)
        return web.json_response(self._files)

    async def livez(self, request: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def readyz(self, request: web.Request) -> web.Response:
        try:
            why = await self._open(request).ready()
        except EngineError as error:
            why = str(error)
        return web.Response(text=f"{why or 'ready'}\n", status=503 if why else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        lines = ["# TYPE palaver_engine_requests_running gauge", f"palaver_engine_requests_running {len(self.running)}"]
        for name in sorted({"requests", "prompt_tokens", "reply_tokens", *self.counts}):
            total = f"palaver_engine_{name}_total"
            lines += [f"# TYPE {total} counter", f"{total} {self.counts[name]}"]
        return web.Response(text="\n".join([*lines, ""]))

    def _open(self, request: web.Request) -> Engine:
        if request.method == "POST" and request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType  # so that no page in a browser on this machine can post here,
        if "Origin" in request.headers:
            raise web.HTTPForbidden  # not even one whose own name was made to lead here (DNS rebinding)
        if self.engine is None or self.why:
            raise EngineClosed(self.why)
        model = request.headers.get(wire.MODEL)
        if model is not None and model != self._model:
            raise OtherModel(f"the engine has another model now: {self.engine.info.name}")
        return self.engine

    @web.middleware
    async def _in_json(self, request: web.Request, handler: Answer) -> web.StreamResponse:
        """Whatever raises leaves as one JSON object with one line in it."""
        try:
            return await handler(request)
        except EngineError as error:
            refusal, status = wire.dump_error(error), wire.STATUS.get(type(error), 500)
        except web.HTTPException as error:
            refusal, status = {"error": wire.BAD_REQUEST, "message": error.reason}, error.status
        except ValueError as error:
            refusal, status = {"error": wire.BAD_REQUEST, "message": str(error)}, 400
        except web.RequestPayloadError as error:
            refusal, status = {"error": wire.BAD_REQUEST, "message": wire.one_line(error)}, 400
        except Exception as error:
            log.exception("a request failed")
            refusal, status = wire.dump_error(Failed(wire.one_line(error))), 500
        self.counts[f"refused_{refusal['error'].lower()}"] += 1
        return web.json_response(refusal, status=status)


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(IDLE):
            return await request.read()
    except TimeoutError:
        if request.transport:
            request.transport.abort()  # no answer: to a client of ours, whose wire stands still, that says "ask again"
        raise web.HTTPRequestTimeout from None


@contextlib.contextmanager
def bound(address: str) -> Iterator[socket.socket]:
    """A socket at HOST:PORT, or at unix:PATH where only this user may open it; gone when the block ends.

    Raises EngineClosed, one line.
    """
    try:
        sock = _bind_unix(Path(address.removeprefix("unix:"))) if address.startswith("unix:") else _bind_tcp(address)
    except OSError as error:
        raise EngineClosed(f"cannot listen at {address}: {error.strerror or error}") from error
    try:
        with sock:
            yield sock
    finally:
        if address.startswith("unix:"):
            Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def _bind_tcp(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 65536):
        raise EngineClosed(f"{address} is no address: name HOST:PORT, for example 127.0.0.1:8100, or unix:PATH")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=BACKLOG)


def _bind_unix(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        sock.setblocking(False)
        refused = sock.connect_ex(str(path)) == errno.ECONNREFUSED
        sock.close()
        if not refused:  # it may also be one whom only another user may ask, or that has no room now
            raise EngineClosed(f"another process listens at {path}")
        path.unlink()  # of a process that is gone
        sock = socket.socket(socket.AF_UNIX)
    others = os.umask(0o177)  # from the first moment on, nobody else can open it
    try:
        sock.bind(str(path))
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(others)
    return sock


async def open_local(
    kind: str, model: str, revision: str, device: str, dtype: str, threads: int, reverse: str = ""
) -> Engine:
    """The engine in this process: an echo with the model's tokenizer where `kind` says so, else torch, with the model
    `reverse` to judge candidates.

    Raises BadCheckpoint, also where torch is not installed, or HubAway.
    """
    if kind == "echo":
        from core.engine.echo_engine import EchoEngine

        return EchoEngine(await asyncio.to_thread(resolve, model, revision or None))
    spin_briefly()
    gc.disable()  # what is imported is no garbage; it would be looked through again and again
    try:
        from core.engine.torch_engine import open_torch_engine
    except ModuleNotFoundError as error:
        raise BadCheckpoint(f"ENGINE: {error.name} is not installed: pip install 'palaver[engine]'") from error
    finally:
        gc.enable()
    folder = await asyncio.to_thread(resolve, model, revision or None)  # nobody need wait for it, as for torch's thread
    judge = await asyncio.to_thread(resolve_reverse, reverse)
    engine = await open_torch_engine(folder, device=device, dtype=dtype, threads=threads, reverse=judge)
    engine.info = replace(engine.info, name=Path(model).name)
    return engine


async def serve_engine(settings: Settings, address: str) -> int:
    """`palaver engine`: serve until SIGTERM or Ctrl-C, then let requests under way finish. The exit code.

    Prints a line when it begins to load and one when it is ready. Raises EngineError, one line; EngineClosed also when
    the engine dies, for only a new process helps.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(Complaints(loop))
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, _stop, stopping)
    server = Server()
    with bound(address) as sock:
        async with contextlib.AsyncExitStack() as stack, server.listening(sock, settings.grace):
            print(f"loading {settings.model} …", file=sys.stderr, flush=True)
            opening = asyncio.ensure_future(open_local(**local_options(settings)))
            stopped = asyncio.ensure_future(stopping.wait())
            await asyncio.wait({opening, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                opening.cancel()
                return 0
            gc.freeze()  # as in child.py
            engine = opening.result()
            stack.push_async_callback(engine.aclose)  # after the last request was answered
            server.open(engine)
            info = engine.info
            announce(log, f"engine ready at {_shown(sock)}: model {info.name}, {info.how}")
            died = asyncio.ensure_future(_end_of(engine))
            await asyncio.wait({stopped, died}, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                raise EngineClosed(died.result())
            died.cancel()
            server.why = "the engine is stopping"
            log.info("stopping: %d requests under way have %g s", len(server.running), settings.grace)
    return 0


async def _end_of(engine: Engine) -> str:
    """Why it will not answer any more."""
    while not (why := await engine.ready()):
        await asyncio.sleep(LOOK_EVERY)
    return why


def _shown(sock: socket.socket) -> str:
    """What to write behind ENGINE=."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _stop(stopping: asyncio.Event) -> None:
    if stopping.is_set():
        os._exit(1)
    stopping.set()
