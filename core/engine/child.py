"""The engine process that core.engine.process starts: `python -m core.engine.child OPTIONS`, options in JSON.

Standard output carries one JSON line: {"info": …} when it is ready, or {"error", "message"} and it ends. Standard error
carries log lines. It dies with its parent: the kernel sees to it on Linux, the end of standard input everywhere.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TextIO

LOG_FORMAT = "%(levelname)s %(name)s %(message)s"
_PR_SET_PDEATHSIG = 1


def main() -> None:
    options = json.loads(sys.argv[1])
    die_with(options["parent"])
    parent = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is a log line
    logging.basicConfig(level=options["log_level"].upper(), format=LOG_FORMAT, stream=sys.stderr)
    for name in (signal.SIGINT, signal.SIGTERM):  # sent to all of a service at once; the parent drains and needs us
        signal.signal(name, signal.SIG_IGN)
    asyncio.run(_serve(options, parent))


def die_with(parent: int) -> None:
    """End when the process `parent` ends, even by SIGKILL."""
    threading.Thread(target=_end_with_stdin, name="parent", daemon=True).start()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


async def _serve(options: dict[str, Any], parent: TextIO) -> None:
    from core.engine import wire
    from core.engine.base import EngineError
    from core.engine.server import Server, bound, open_local

    def tell(said: dict[str, object]) -> None:
        print(json.dumps(said), file=parent, flush=True)

    try:
        with bound(options["address"]) as sock:
            engine = await open_local(**options["engine"])
            gc.freeze()  # what is here now stays: nobody need look through it for garbage
            async with Server().open(engine).listening(sock):
                tell({"info": asdict(engine.info)})
                await asyncio.Event().wait()
    except EngineError as error:
        tell(dict(wire.dump_error(error)))


if __name__ == "__main__":
    main()
