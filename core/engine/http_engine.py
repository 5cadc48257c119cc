"""The engine somewhere else: in a child process (`spawn_engine`) or at an address (`connect_engine`). Torch-free.

A request is a pure function of prompt and params, its seed is drawn here, so whenever an engine dies or a wire breaks
the same request is sent again until its deadline: the caller notices nothing but the clock. A wire may also die without
a sign, so one elsewhere that is silent is asked again beside the first time, and counts both as one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from core.backoff import backoff
from core.engine import wire
from core.engine.base import Cancelled, Completion, EngineClosed, Failed, ModelInfo, OtherModel, SamplingParams
from core.engine.folder import PrivateFolder
from core.engine.hub import resolve, resolve_reverse
from core.engine.process import EngineProcess, local_options
from core.settings import SOCKET_PATH, Settings

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds without an engine that a request without a deadline bears, and that a start waits for a remote one."""
OURS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""What keeps us from asking, and says nothing of a child."""
SILENCE = 10.0
"""Seconds in which an answer that needs no model must go on, and after which one elsewhere is asked again."""
MOST_SENDS = 6
"""How often a request is under way at once, each time over another wire."""
HINT = 5.0
"""Seconds for a hint to be taken, after which it is void."""
SUSPECT, MOST_DEATHS = 2, 5
"""A request that was under way when so many children died is sent while no other suspect is; at last it is given up."""
ResultT = TypeVar("ResultT")


class Unreachable(Exception):
    """No answer, so the request may be sent again; str() says why."""


class HttpEngine:
    """Speaks to a core.engine.server. With `process`, that server is ours."""

    mercy = 10.0
    """Seconds at least, from a deadline on, in which a child may still say that it gave the request up; as many as that
    was under way, if those are more. Then it hangs, and is killed."""
    probe_every, probe_waits, probes = 3.0, 10.0, 2
    """A child that is silent to so many probes in a row, each so many seconds, hangs."""

    def __init__(self, address: str, process: EngineProcess | None = None, patience: float = PATIENCE) -> None:
        """`address`: http://…, https://… or unix:PATH."""
        self.address, self.patience = address, patience
        self.process = process
        self._unix = address.startswith("unix:")
        self._base = "http://engine" if self._unix else address.rstrip("/")
        connector = aiohttp.UnixConnector(address.removeprefix("unix:"), limit=0) if self._unix else None
        self._session = aiohttp.ClientSession(
            connector=connector or aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0),
            raise_for_status=False,
        )
        self.ended = ""
        self._info: ModelInfo | None = None
        self._files: PrivateFolder | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._asked: dict[object, str] = {}
        """What is under way, and of which session."""
        self._suspects = asyncio.Lock()
        self._gone = False  # one elsewhere, and the log said so
        self._closed = False

    async def open(self) -> HttpEngine:
        """Wait until it is there and learn its model. Raises BadCheckpoint or EngineClosed."""
        try:
            if self.process:
                self._info = await self.process.open()
                await self._ask_info()  # whose ids they are: should its folder change, the next child refuses them
                self._spawn(self._probe(self.process))
            else:
                self._info = await self._ask_info()
                here = await asyncio.to_thread(self._has_its_files, Path(self._info.path)) if self._unix else False
                if not here:
                    self._info = replace(self._info, path=str(await self._fetch_tokenizer()))
        except BaseException:
            await self.aclose()
            raise
        return self

    @property
    def info(self) -> ModelInfo:
        assert self._info, "open() first"
        return self._info

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, session: str = "", deadline: float | None = None
    ) -> list[Completion]:
        """As core.engine.base says. The same tokens as the engine at the other end draws in its own process."""
        ids = self.info.prompt(prompt)
        if params.seed is None:
            params = replace(params, seed=random.getrandbits(62))
        end = None if deadline is None else time.monotonic() + deadline
        asked = object()
        self._asked[asked] = session

        def body() -> dict[str, object]:
            left = None if end is None else end - time.monotonic()
            return wire.dump_request(ids, params, self._asked[asked], left)

        try:
            answer = await self._insist("POST", "/generate", body, end)
        finally:
            if self._asked.pop(asked) != session:  # it was forgotten, maybe before the engine heard of it
                self._spawn(self._insist("POST", "/forget", lambda: {"session": session}))
        if self.process:
            self.process.proved()
        try:
            return wire.load_completions(answer)
        except (LookupError, TypeError) as error:
            raise Failed(f"the answer makes no sense ({wire.one_line(error)})") from error

    def prepare(self, session: str, ids: Sequence[int]) -> None:
        """Said once: nobody waits for it, and an engine that does not hear it is only slower."""
        if not self._closed and not (self.process and self.process.why):
            with contextlib.suppress(ValueError):
                self._spawn(self._hint(wire.dump_hint(session, self.info.prompt(ids))))

    async def ready(self) -> str:
        if self._closed:
            return "the engine is closed"
        if self.process and self.process.why:
            return self.process.why
        try:
            async with self._session.get(f"{self._base}/readyz", timeout=aiohttp.ClientTimeout(total=5.0)) as answer:
                return "" if answer.status == 200 else " ".join((await answer.text())[:300].split())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return self._unreachable(error)

    async def forget(self, session: str) -> None:
        """A child that died has forgotten already; one elsewhere is asked until it answers, or EngineClosed. What is
        under way and must be sent again is then nobody's."""
        self._asked = {asked: "" if whose == session else whose for asked, whose in self._asked.items()}
        if self.process and not self.process.up.is_set():
            return
        await self._insist("POST", "/forget", lambda: {"session": session})

    async def aclose(self) -> None:
        """What is under way ends with EngineClosed."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.process:
            await self.process.aclose()
        await self._session.close()
        if self._files:
            self._files.close()

    # -- sending, until there is an answer -----------------------------------------------------------------------

    async def _insist(
        self, method: str, path: str, body: Callable[[], dict[str, object]] = dict, end: float | None = None
    ) -> dict[str, Any]:
        """The answer, sent again as often as it takes; `body` is asked anew each time. Raises EngineError."""
        tries = deaths = 0
        lost_at: float | None = None
        while True:
            # A suspect's turn begins with a child that is up and ends with one: what others broke is not its fault.
            async with self._alone(end) if deaths >= SUSPECT else contextlib.nullcontext():
                if self._closed:
                    raise EngineClosed("the engine is closed")
                generation = self.process.generation if self.process else 0
                try:
                    return await self._once(method, path, body, end)
                except Unreachable as error:
                    why = str(error)
                lost_at = lost_at or time.monotonic()
                await self._wait(tries, why, lost_at + self.patience if end is None else end)
            tries += 1
            if self.process and self.process.generation != generation:
                deaths, tries, lost_at = deaths + 1, 0, None
            if deaths >= MOST_DEATHS:
                raise Failed(f"the engine process died {deaths} times while it answered this")

    @contextlib.asynccontextmanager
    async def _alone(self, end: float | None) -> AsyncIterator[None]:
        """A suspect's turn. Cancelled where it does not come before `end`."""
        try:
            async with asyncio.timeout(None if end is None else end - time.monotonic()):
                await self._suspects.acquire()
        except TimeoutError:
            raise Cancelled("no answer within the deadline") from None
        try:
            yield
        finally:
            self._suspects.release()

    async def _wait(self, tries: int, why: str, end: float) -> None:
        """Until it is worth another try. EngineClosed at `end`."""
        left = end - time.monotonic()
        if left <= 0:
            raise EngineClosed(why)
        if tries and not self.process and not self._gone:
            self._gone = True
            log.warning("%s; whoever asks waits for it", why)
        await asyncio.sleep(min(left, backoff(tries, 2.0, first=0.05)))
        if self.process:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.up.wait(), end - time.monotonic())
            why = self.process.why or why
        if time.monotonic() >= end:
            raise EngineClosed(why)

    async def _once(
        self, method: str, path: str, body: Callable[[], dict[str, object]], end: float | None
    ) -> dict[str, Any]:
        """One answer; nobody waits for it beyond `end`, when it raises Cancelled."""
        began, number = time.monotonic(), f"{random.getrandbits(64):x}"
        silence = SILENCE if path == "/generate" and not self.process else math.inf
        asked: set[asyncio.Task[dict[str, Any]]] = set()
        done: set[asyncio.Task[dict[str, Any]]] = set()
        try:
            while (left := math.inf if end is None else end - time.monotonic()) > 0:
                if not done and len(asked) < MOST_SENDS:
                    asked.add(self._spawn(self._exchange(method, path, body(), number)))
                bound = min(left, silence)
                done, asked = await asyncio.wait(
                    asked, timeout=None if bound == math.inf else bound, return_when=asyncio.FIRST_COMPLETED
                )
                if any(exchange.cancelled() for exchange in done):
                    raise EngineClosed("the engine is closed")
                answered = [exchange for exchange in done if not isinstance(exchange.exception(), Unreachable)]
                if answered or not asked:  # a wire that fails beside another is not the last word
                    return (answered or [*done])[0].result()
            if self.process and asked:
                self._spawn(self._overdue(self.process, asked.pop(), max(time.monotonic() - began, self.mercy)))
            raise Cancelled("no answer within the deadline")
        finally:
            for exchange in asked:  # its connection closes, and with that the other end gives the request up
                exchange.cancel()

    async def _hint(self, body: dict[str, object]) -> None:
        async with asyncio.timeout(HINT):
            await self._exchange("POST", "/prepare", body)

    async def _overdue(self, process: EngineProcess, exchange: asyncio.Task[dict[str, Any]], bound: float) -> None:
        """A child that says nothing for `bound` seconds more, not even that it gave the request up, hangs."""
        await asyncio.wait({exchange}, timeout=bound)
        if not exchange.done():
            process.kill("no answer at twice the deadline of a request")
        exchange.cancel()

    async def _exchange(self, method: str, path: str, body: dict[str, object], number: str = "") -> dict[str, Any]:
        session = str(body.get("session") or number)
        try:
            async with self._session.request(
                method,
                f"{self._base}{path}",
                json=body if method == "POST" else None,
                headers={wire.REQUEST: number, wire.SESSION: wire.affinity(session)},
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(sock_connect=10.0, sock_read=None if path == "/generate" else SILENCE),
            ) as answer:
                status, text = answer.status, await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(self._unreachable(error)) from error
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict) or (status != 200 and not wire.is_refusal(said)):
            raise Unreachable(f"{self.address} answers {status} and not like an engine")
        if status == 200:
            if self._gone:
                self._gone = False
                log.info("the engine at %s answers again", self.address)
            return said
        refusal = wire.load_error(said)
        if isinstance(refusal, EngineClosed):  # it is about to end, or loads
            if self.process:
                self.process.kill(str(refusal))
            raise Unreachable(str(refusal))
        if isinstance(refusal, OtherModel):
            self.ended = f"{self.address}: {refusal}"
        raise refusal

    def _unreachable(self, error: BaseException) -> str:
        reason = (isinstance(error, OSError) and error.strerror) or wire.one_line(error)
        return f"the engine {'process' if self.process else f'at {self.address}'} does not answer ({reason})"

    # -- the other end -------------------------------------------------------------------------------------------

    async def _probe(self, process: EngineProcess) -> None:
        """Kill a child that is silent to one probe after the other."""
        silent = generation = 0
        while True:
            await asyncio.sleep(self.probe_every)
            await process.up.wait()
            if process.generation != generation:
                silent, generation = 0, process.generation
            alive = await self._alive()
            silent = silent if alive is None else 0 if alive else silent + 1
            if silent >= self.probes:
                process.kill(f"silent for {silent * self.probe_waits:g} s")

    async def _alive(self) -> bool | None:
        """None when it is we who cannot ask, for want of descriptors or memory."""
        try:
            timeout = aiohttp.ClientTimeout(total=self.probe_waits)
            async with self._session.get(f"{self._base}/livez", timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return None if getattr(error, "errno", None) in OURS else False

    async def _ask_info(self) -> ModelInfo:
        try:
            said = await self._insist("GET", "/info")
            self._session.headers[wire.MODEL] = str(said.pop("fingerprint", ""))
            return wire.load_info(said)
        except (ValueError, TypeError) as error:
            raise EngineClosed(f"{self.address} is no engine of this version ({wire.one_line(error)})") from error

    def _has_its_files(self, folder: Path) -> bool:
        """Still those with which the other end began?"""
        return wire.fingerprint(wire.tokenizer_files(folder)) == self._session.headers[wire.MODEL]

    async def _fetch_tokenizer(self) -> Path:
        """The other end's tokenizer in a folder of ours, which goes when we close."""
        files = await self._insist("GET", "/tokenizer")
        self._files = PrivateFolder()
        for name in wire.TOKENIZER_FILES:
            if isinstance(text := files.get(name), str):
                await asyncio.to_thread((self._files.path / name).write_text, text, "utf-8")
        return self._files.path

    def _spawn(self, work: Coroutine[None, None, ResultT]) -> asyncio.Task[ResultT]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; for one that nobody waited for any more it is no news


async def connect_engine(address: str, patience: float = PATIENCE) -> HttpEngine:
    """The engine that listens at `address`: http://…, https://… or unix:PATH. Raises EngineClosed after `patience`."""
    try:
        place = address.removeprefix("unix:") if address.startswith("unix:") else urlsplit(address).hostname
    except ValueError:
        place = None
    if not place:
        raise EngineClosed(f"{address} is no address: name one like http://127.0.0.1:8100 or unix:/run/palaver/engine")
    if address.startswith("unix:") and len(os.fsencode(place)) > SOCKET_PATH:
        raise EngineClosed(f"{address} is longer than the {SOCKET_PATH} bytes that a socket's path may have")
    return await HttpEngine(address, patience=patience).open()


async def spawn_engine(settings: Settings) -> HttpEngine:
    """An engine in a child process with the model of `settings`. Raises BadCheckpoint, HubAway or EngineClosed.

    What must be fetched from the hub is fetched here, where the terminal is: the child needs no network.
    """
    log.info("loading %s …", settings.model)
    options = local_options(settings)
    options["model"] = str(await asyncio.to_thread(resolve, settings.model, settings.model_revision or None))
    options["revision"] = ""
    options["reverse"] = str(await asyncio.to_thread(resolve_reverse, settings.reverse_model) or "")
    process = EngineProcess(settings.model, options)
    return await HttpEngine(f"unix:{process.path}", process).open()
