"""What the commands share: settings or a line for each mistake, and an end with the right exit code.

Exit codes: 0 fine, 1 it failed, 74 the journal's disk or file failed under it, 75 try again later (the journal, the
engine or the hub cannot be opened), 78 wrong settings.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

from core import settings as core_settings
from core.settings import Settings, WrongSettings

EX_TEMPFAIL, EX_CONFIG = 75, 78
ResultT = TypeVar("ResultT")


def read(*groups: type[Any]) -> list[Any]:
    """Read them all, or stop with one line per mistake."""
    from core import logs

    try:
        found = core_settings.read(*groups)
    except WrongSettings as error:
        stop(error.lines)
    secrets = [
        value.get_secret_value()
        for group in found
        for value in (getattr(group, name) for name in type(group).model_fields)
        if hasattr(value, "get_secret_value")
    ]
    logs.set_up(next((group.log_level for group in found if isinstance(group, Settings)), "info"), secrets)
    return found


def stop(lines: list[str]) -> NoReturn:
    for line in lines:
        print(line, file=sys.stderr)
    raise SystemExit(EX_CONFIG)


def go(work: Coroutine[None, None, int]) -> int:
    """Run to the end; what cannot be opened is one line."""
    from core.delivery import NotAccepted
    from core.engine.base import BadCheckpoint, EngineError
    from core.engine.hub import of_setting
    from core.journal.database import JournalError, WrongAddress

    try:
        return run_async(work)
    except WrongAddress as error:
        print(error, file=sys.stderr)
        return EX_CONFIG
    except BadCheckpoint as error:
        print(of_setting(error), file=sys.stderr)
        return EX_CONFIG
    except (EngineError, JournalError, NotAccepted) as error:
        print(error, file=sys.stderr)
        return EX_TEMPFAIL
    except KeyboardInterrupt:
        return 130


class _Left(ThreadPoolExecutor):
    """Threads that nobody waits for at the end: a download, or a copy of the journal, may take hours more."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


def run_async(work: Coroutine[None, None, ResultT]) -> ResultT:
    async def beside_threads_that_are_left() -> ResultT:
        asyncio.get_running_loop().set_default_executor(_Left())
        return await work

    return asyncio.run(beside_threads_that_are_left())
