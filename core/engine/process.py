"""A child process that serves the engine on a Unix socket, started again whenever it dies. Torch-free.

The child has no secrets in its environment, a private folder for its socket, and dies with us (core.engine.child).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import metrics
from core.backoff import backoff
from core.engine import wire
from core.engine.base import EngineClosed, EngineError, ModelInfo
from core.engine.folder import PrivateFolder

if TYPE_CHECKING:
    from core.settings import Settings

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
"""Where `core` stands: the child imports from here and not from the working directory."""
SECRET = re.compile(r"TOKEN(_|$)|SECRET|PASSW|CREDENTIAL|DATABASE_URL|(^|_)(API|PRIVATE|ACCESS)_?KEY", re.IGNORECASE)
START_LIMIT = 300.0
"""Seconds from start to ready, after which it counts as hung."""
LAST_WORDS, LONGEST_LINE = 3, 2_000
_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) (\S+) (.*)")


class EngineProcess:
    """`up` is set while the child is ready at `path`; else `why` says in one line what is the matter. Once closed,
    `up` is set for ever, so that nobody waits for what will not come.

    `generation` counts the starts. `failures` counts the starts since somebody called `proved()`: the more, the longer
    the pause before the next.
    """

    def __init__(self, name: str, engine: dict[str, Any]) -> None:
        """`name`: what people call the model; `engine`: the arguments of core.engine.server.open_local."""
        self._name, self._engine = name, engine
        self._folder = PrivateFolder()
        self.path = self._folder.path / "socket"
        self.up = asyncio.Event()
        self.why = "the engine process is starting"
        self.generation = 0
        self.failures = 0
        self._child: asyncio.subprocess.Process | None = None
        self._logs: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self._killed = ""
        """Why, by ourselves, the last one was."""

    @property
    def pid(self) -> int:
        """Of the child that runs now or ran last; 0 before the first."""
        return self._child.pid if self._child else 0

    async def open(self) -> ModelInfo:
        """Start it and keep it alive from now on. Raises what its start raises: BadCheckpoint or EngineClosed."""
        try:
            info = await self._start()
        except BaseException:
            await self.aclose()
            raise
        self._watch = asyncio.create_task(self._keep_alive())
        return replace(info, name=self._name)

    def kill(self, why: str) -> None:
        """End a child that no longer answers; the next one follows."""
        if self._child and self._child.returncode is None:
            log.error("killing the engine process: %s", why)
            self._killed = why
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()

    def proved(self) -> None:
        """It answered: its next death counts as the first."""
        self.failures = 0

    async def aclose(self) -> None:
        """End it at once; nothing in it is worth saving."""
        self.why = "the engine is closed"
        if self._watch:
            self._watch.cancel()
            await asyncio.wait({self._watch})
        await self._end()
        self.up.set()
        self._folder.close()

    async def _keep_alive(self) -> None:
        assert self._child
        while True:
            await self._child.wait()
            self.up.clear()
            how = f"was killed here ({self._killed})" if self._killed else _how(self._child.returncode)
            self._killed = ""
            self.why = f"the engine process {how} and is starting again"
            log.error("the engine process %s; starting it again", how)
            while not self.up.is_set():
                await asyncio.sleep(self._pause())
                self.failures += 1
                metrics.engine_restarts.inc()
                try:
                    await self._start()
                    log.info("the engine process is there again")
                except Exception as error:  # no file or process to be had, a checkpoint gone: it may come back
                    self.why = str(error) if isinstance(error, EngineError) else wire.one_line(error)
                    log.error("the engine process cannot be started: %s", self.why)

    def _pause(self) -> float:
        return backoff(self.failures) if self.failures else 0.0

    async def _start(self) -> ModelInfo:
        await self._end()
        self._last_words.clear()
        options = {
            "parent": os.getpid(),
            "address": f"unix:{self.path}",
            "log_level": logging.getLevelName(logging.getLogger().getEffectiveLevel()),
            "engine": self._engine,
        }
        try:
            # in this thread on purpose: on Linux a child dies with the thread that started it
            self._child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "core.engine.child", json.dumps(options)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=_environment(),
                start_new_session=True,  # Ctrl-C in the terminal is for us, and we drain first
            )
        except OSError as error:
            raise EngineClosed(f"no process can be started: {error.strerror or error}") from error
        self._logs = asyncio.create_task(self._forward(self._child))
        try:
            info = await asyncio.wait_for(self._ready(self._child), START_LIMIT)
        except TimeoutError:
            raise EngineClosed(f"the engine process was not ready after {START_LIMIT:g} s") from None
        self.generation += 1
        self.why = ""
        self.up.set()
        return info

    async def _ready(self, child: asyncio.subprocess.Process) -> ModelInfo:
        assert child.stdout and self._logs
        async for line in child.stdout:
            if not line.startswith(b"{"):  # not from us
                self._say(line.decode("utf-8", "replace"))
                continue
            said = json.loads(line)
            if "info" in said:
                return wire.load_info(said["info"])
            await child.wait()
            raise wire.load_error(said)
        await child.wait()
        await asyncio.wait({self._logs}, timeout=1.0)  # its last words may still be in the pipe
        words = " | ".join(self._last_words) or "it said nothing"
        raise EngineClosed(f"the engine process {_how(child.returncode)} while it started: {words}")

    async def _end(self) -> None:
        """No child is left when it returns, nor anything of it."""
        if self._child and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
            await self._child.wait()
        if self._logs:
            await asyncio.wait({self._logs}, timeout=1.0)
            self._logs.cancel()
            self._logs = None

    async def _forward(self, child: asyncio.subprocess.Process) -> None:
        """Its log lines into ours, and its last ones kept."""
        assert child.stderr
        rest = b""
        while chunk := await child.stderr.read(1 << 16):
            *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
            for line in [*lines, rest] if len(rest) > 1 << 16 else lines:
                self._say(line.decode("utf-8", "replace"))
            rest = b"" if len(rest) > 1 << 16 else rest
        self._say(rest.decode("utf-8", "replace"))

    def _say(self, line: str) -> None:
        if not line.strip():
            return
        found = _LINE.fullmatch(line[:LONGEST_LINE])
        level, name, text = found.groups() if found else ("WARNING", "engine", line[:LONGEST_LINE].rstrip())
        if text.strip(" ^~"):
            self._last_words.append(text.strip()[:300])
        logging.getLogger(name).log(logging.getLevelNamesMapping()[level], "%s", text)


def _environment() -> dict[str, str]:
    """Ours without secrets, and without what would make the child import something else."""
    kept = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
    paths = [str(ROOT), *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _how(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        cause = ", perhaps for want of memory" if returncode == -signal.SIGKILL else ""
        name = {s.value: s.name for s in signal.Signals}.get(-returncode, f"signal {-returncode}")
        return f"was killed by {name}{cause}"
    return f"ended with exit code {returncode}"


def local_options(settings: Settings) -> dict[str, Any]:
    """What core.engine.server.open_local is told, as JSON."""
    return {
        "kind": "echo" if settings.engine == "echo" else "torch",
        "model": settings.model,
        "revision": settings.model_revision,
        "device": settings.device,
        "dtype": settings.dtype,
        "threads": settings.threads,
        "reverse": settings.reverse_model,
    }
