"""Logs for operators: one line per event, no secret and no forged line in it, whatever raised where.

Every known secret is cut out of the finished line, tracebacks included; line breaks inside a message are written out.
"""

from __future__ import annotations

import errno
import logging
import re
import sys
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger(__name__)

_TELEGRAM_TOKEN = re.compile(r"(?<!\d)\d{6,12}:[A-Za-z0-9_-]{30,}")
_DISCORD_TOKEN = re.compile(r"(?<![A-Za-z0-9_.-])[A-Za-z0-9_-]{23,28}\.[A-Za-z0-9_-]{6,7}\.[A-Za-z0-9_-]{27,}")
_PASSWORD = re.compile(r"(?<=://)([^\s:/@]*):[^\s/@]+@")
_CONTROLS = (*range(0x09), *range(0x0A, 0x20), *range(0x7F, 0xA0))  # all but the tab
ESCAPED = {code: f"\\u{code:04x}" for code in (*_CONTROLS, *range(0x2028, 0x202F), *range(0x2066, 0x206A))}
"""For str.translate: what would break a line, turn it round or speak to a terminal, written out as JSON has it."""
LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
STRANGERS = ("aiohttp.http_exceptions", "aiohttp.web_protocol")
"""Where the exceptions come from that tell of what is no HTTP."""


class Redacting(logging.Formatter):
    """Formats as logging.Formatter does, then removes secrets. A traceback's lines are indented by "| "."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")
        self._secrets = sorted({secret for secret in secrets if len(secret) >= 6}, key=len, reverse=True)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        record.message = record.message.translate(ESCAPED)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802
        text = super().formatException(ei)  # type: ignore[arg-type]  # typeshed keeps the tuple's type private
        return "\n".join("| " + line.translate(ESCAPED) for line in text.splitlines())

    def format(self, record: logging.LogRecord) -> str:
        return self.redact(super().format(record))

    def redact(self, text: str) -> str:
        """`text` without secrets: those of the settings, and whatever looks like a token or a password in an URL."""
        for secret in self._secrets:
            text = text.replace(secret, "[secret]")
        for pattern in (_TELEGRAM_TOKEN, _DISCORD_TOKEN):
            text = pattern.sub("[secret]", text)
        return _PASSWORD.sub(r"\1:[secret]@", text)


class Complaints:
    """What the event loop complains of: that nothing can be accepted for want of descriptors, which it tells a hundred
    times a second, is one line in ten seconds. So is that a listener, which it wanted to try again, is closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._before, self._next = loop.get_exception_handler(), 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        lacking = isinstance(error, OSError) and error.errno in LACKING
        closed = isinstance(error, ValueError) and "_start_serving" in context.get("message", "")
        if lacking or closed:
            if loop.time() >= self._next:
                self._next = loop.time() + 10.0
                log.warning("no connection can be accepted now: %s", error)
        elif self._before:
            self._before(loop, context)
        else:
            loop.default_exception_handler(context)


class Often(logging.Filter):
    """Of warnings that differ in their arguments alone, in ten seconds the first ten; the next one after that says how
    many were left out. A journal that is away is told of at each message, and would fill the disk that it waits for."""

    MOST, SECONDS = 10, 10.0

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        key, now = (record.name, str(record.msg)), time.monotonic()
        since, count = self._seen.get(key, (now, 0))
        if now - since >= self.SECONDS:
            if count > self.MOST:
                record.msg = f"{record.getMessage()} ({count - self.MOST} such lines before it were left out)"
                record.args = None
            since, count = now, 0
        if len(self._seen) > 1000:  # who writes no templates
            self._seen.clear()
        self._seen[key] = since, count + 1
        return count < self.MOST


def _ours(record: logging.LogRecord) -> bool:
    """Not what whoever found the port has sent: it was answered 400, and a scan must not fill the disk."""
    return not record.exc_info or type(record.exc_info[1]).__module__ not in STRANGERS


def announce(log: logging.Logger, line: str) -> None:
    """To standard output, for scripts, and to the log; once where a person sees both."""
    try:
        print(line, flush=True)
    except OSError:  # nobody reads it, or the disk is full; what its buffer holds must not fail once more at the exit
        sys.stdout = None
    if not all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr)):
        log.info("%s", line)


def set_up(level: str, secrets: Iterable[str] = ()) -> None:
    """Log to standard error through one redacting handler; libraries that log URLs are kept quiet."""
    formatter = Redacting(secrets)
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(formatter)
    stream.addFilter(Often())
    logging.basicConfig(level=level.upper(), handlers=[stream], force=True)
    for name in ("httpx", "httpcore", "httpx2", "httpcore2", "aiohttp.access", "discord.gateway", "alembic", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("aiohttp.server").addFilter(_ours)
    logging.captureWarnings(True)
    crash = logging.getLogger("palaver")
    sys.excepthook = lambda kind, error, trace: crash.critical("crashed", exc_info=(kind, error, trace))
    threading.excepthook = lambda args: crash.error(
        "a thread crashed", exc_info=(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    )
