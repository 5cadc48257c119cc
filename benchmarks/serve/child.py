"""One peer's turn, in a process of its own so that no two libraries' threads meet. The last line it prints is JSON.

It ends when its parent or its standard input does, and what it has started with it.

python -m benchmarks.serve.child PEER FOLDER WORKLOADS SECONDS THREADS KEEP PAUSE MESSAGE REPLY [TEXT]
python -m benchmarks.serve.child PEER FOLDER    only makes the files that the peer loads
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.serve import peers
from benchmarks.serve.workloads import CHANNELS, WINDOWS, WORKLOADS, Script, Talk
from core.engine.child import die_with
from core.evaluation.load import resident_bytes


async def measure(
    name: str, folder: Path, workloads: str, seconds: float, threads: int, reply: int, **script: Any
) -> dict[str, Any]:
    """{"absent": why} or what each workload measured, with the start and the memory. The rest is the script's."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    began = time.perf_counter()
    try:
        peer = peers.make(name, folder, threads)
        how = await peer.open()
    except peers.Absent as error:
        return {"absent": str(error)}
    loaded = time.perf_counter()

    def of(letter: str) -> Script:
        room = config["n_positions"] - reply
        ids = config["vocab_size"], config["eos_token_id"], config["bos_token_id"]
        return Script(*ids, min(WINDOWS[letter], room), reply=reply, **script)

    await peer.expect(1, 256)
    first = await Talk(of("A"), 0).say(peer)
    found: dict[str, Any] = {"how": how, "load_s": loaded - began, "first_reply_s": first.seconds}
    for letter in workloads:
        what = of(letter)
        await peer.expect(CHANNELS[letter], what.window + reply)
        found[letter] = await WORKLOADS[letter](peer, what, seconds)
    found["peak_mb"] = resident_bytes() / 1e6
    await peer.aclose()
    return found


def convert(name: str, folder: Path) -> dict[str, Any]:
    """{"absent": why} or how long it took."""
    began = time.perf_counter()
    try:
        peers.make(name, folder, 0).convert()
    except peers.Absent as error:
        return {"absent": str(error)}
    return {"seconds": time.perf_counter() - began}


def main() -> None:
    name, folder, *rest = sys.argv[1:]
    die_with(os.getppid())
    out = os.dup(1)
    os.dup2(2, 1)  # libraries may say what they like
    if rest:
        workloads, seconds, threads, keep, pause, message, reply, *text = rest
        ids = json.loads(Path(text[0]).read_text("utf-8")) if text else []
        found = asyncio.run(
            measure(
                name,
                Path(folder),
                workloads,
                float(seconds),
                int(threads),
                int(reply),
                message=int(message),
                keep=float(keep),
                pause=float(pause),
                text=ids,
            )
        )
    else:
        found = convert(name, Path(folder))
    os.write(out, json.dumps(found).encode() + b"\n")
    os._exit(0)  # some libraries' threads never end


if __name__ == "__main__":
    main()
