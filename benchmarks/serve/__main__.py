"""Rounds: every peer once per round, in rotated order, each in a process of its own.

    python -m benchmarks.serve --shape small --rounds 3

Peers that are not installed are left out with the reason. pip install -e '.[bench]' brings those that pip can.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from benchmarks.serve import checkpoints, machine, report
from benchmarks.serve.peers import PEERS
from benchmarks.serve.workloads import LENGTHS, WORKLOADS
from core.engine.base import BadCheckpoint
from core.engine.choice import THREADED, parameters
from core.engine.machine import cores
from core.evaluation.selfchat import OPENERS
from core.settings import Settings
from core.tokenizer import Tokenizer

BASELINE = "palaver-int8", "palaver-bfloat16"
ALONE = "palaver", "ctranslate2"
"""Whom a second thread holds up in small models. The embedded one, replies a second of B with one and two: palaver-int8
280 and 207, ctranslate2-int8 83 and 28; but llama.cpp-q8_0 97 and 149, transformers-static 19 and 29."""


@dataclass(slots=True)
class Found:
    """What the turns brought so far."""

    runs: report.Runs = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    """The highest seen: whatever slows a measurement down, nothing makes it faster than the machine."""
    loads: list[float] = field(default_factory=list)


def main() -> None:
    wanted = arguments()
    try:
        checkpoints.check(wanted.shape, wanted.model, *wanted.lengths)
        folder = checkpoints.make(wanted.shape, wanted.model, wanted.work)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        text = quotes(wanted.tokenizer, wanted.work, config["vocab_size"])
        name = wanted.name or (folder.name if wanted.model else wanted.shape)
        report.check(wanted.out, name)
    except BadCheckpoint as error:
        raise SystemExit(str(error)) from None
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"cannot be written ({error}): name another folder with --work or --out") from None
    found = Found()
    try:
        measure(folder, text, wanted, found)
        code = 0
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        code = 130
    runs = {name: found.runs[name] for name in PEERS if name in found.runs}
    if not runs:
        print("nobody was measured", *report.left_out(found.absent), sep="\n", file=sys.stderr)
        sys.exit(code or 1)
    baseline = next(name for name in (*BASELINE, *runs) if name in runs)
    table = report.summary(runs, baseline)
    roofline = report.roofline(runs, config, found.limits, wanted.lengths[1])
    result = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.serve", *sys.argv[1:]]),
        "machine": machine.describe(wanted.device),
        "load_before_each": [round(load, 2) for load in found.loads],
        "threads": wanted.threads,
        "keep": wanted.keep,
        "pause": wanted.pause,
        "lengths": wanted.lengths,
        "limits": found.limits,
        "roofline": roofline,
        "absent": found.absent,
        "baseline": baseline,
        "summary": table,
        "runs": runs,
    }
    written = report.write(wanted.out, name, result)
    print(json.dumps(result["machine"]))
    print(f"limits: {json.dumps({name: round(value, 1) for name, value in found.limits.items()})}")
    print(report.markdown(table, roofline, baseline, found.absent), report.starts(runs), sep="\n\n")
    print("written, of the turns that were through:" if code else "written:", *written)
    sys.exit(code)


def measure(folder: Path, text: Path | None, wanted: argparse.Namespace, found: Found) -> None:
    order = deque(name for name in PEERS if name in wanted.peers)
    for name in order:
        print(f"making ready what {name} loads", flush=True)
        answer = ask(name, folder, wanted)
        if not left_out(name, answer, found.absent):
            print(f"ready in {answer['seconds']:.1f} s", flush=True)
    for number in range(1, wanted.rounds + 1):
        seen = machine.products(wanted.threads or cores(), wanted.device)
        for name in [name for name in order if name not in found.absent]:
            seen |= machine.bandwidth(wanted.threads or cores(), wanted.device)
            found.limits |= {what: max(value, found.limits.get(what, 0.0)) for what, value in seen.items()}
            found.loads.append(os.getloadavg()[0])
            began = time.monotonic()
            turn = wanted.workloads, wanted.seconds, threads(name, folder, wanted), wanted.keep, wanted.pause
            answer = ask(name, folder, wanted, *turn, *wanted.lengths, *filter(None, [text]))
            if not left_out(name, answer, found.absent, f"in round {number} "):
                found.runs.setdefault(name, []).append(answer)
                print(f"round {number}: {name} took {time.monotonic() - began:.0f} s  {brief(answer)}", flush=True)
        order.rotate(-3)


def threads(name: str, folder: Path, wanted: argparse.Namespace) -> int:
    """--threads, or with how many the peer is fastest: as Palaver chooses for itself, every core or one."""
    alone = name.startswith(ALONE) and parameters(folder) < THREADED
    return wanted.threads or (1 if alone else cores())


def arguments() -> argparse.Namespace:
    """Ends the program, with one line, where they make no sense."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--shape", choices=["tiny", *checkpoints.SHAPES], default="small", help="tiny: embedded model")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder in a shape's place")
    parser.add_argument("--tokenizer", type=Path, help="people say real text, in this folder's ids")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="NAME", help="who")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: with those that run there")
    parser.add_argument("--workloads", default="ABCD", help="letters out of " + "".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12, help="of B, of D's second half, of each level of E")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as suit the peer and the model")
    keep = Settings.model_fields["history_keep"].default
    parser.add_argument("--keep", type=float, default=keep, help="what stays of a full window, as HISTORY_KEEP")
    parser.add_argument("--pause", type=float, default=0, help="seconds a single user waits before each message")
    lengths: dict[str, Any] = {"nargs": 2, "type": int, "metavar": ("MESSAGE", "REPLY"), "default": LENGTHS}
    parser.add_argument("--lengths", **lengths, help="ids of each message and of each reply")
    parser.add_argument("--limit", type=float, default=600, help="seconds a peer may take for its turn")
    parser.add_argument("--work", type=Path, default=Path("runs/serve"), help="where the checkpoints are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/serve/results"))
    parser.add_argument("--name", default="", help="of the files written; the shape's or the model's when left out")
    wanted = parser.parse_args()
    if wanted.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine, or this build of torch, has none")
    if not wanted.workloads or set(wanted.workloads) - set(WORKLOADS):
        raise SystemExit(f"--workloads {wanted.workloads!r}: name letters out of {''.join(WORKLOADS)}")
    for name, least in (("rounds", 1), ("threads", 0), ("pause", 0)):
        if not least <= getattr(wanted, name) < math.inf:
            raise SystemExit(f"--{name} {getattr(wanted, name)}: it must be {least} or more")
    if min(wanted.lengths) < 1:
        raise SystemExit(f"--lengths {' '.join(map(str, wanted.lengths))}: each must be 1 or more")
    if not 0 <= wanted.keep <= 1:
        raise SystemExit(f"--keep {wanted.keep}: it must be from 0 to 1")
    for name in ("seconds", "limit"):
        if not 0 < getattr(wanted, name) < math.inf:
            raise SystemExit(f"--{name} {getattr(wanted, name)}: it must be above 0")
    if Path(wanted.name).name != wanted.name:
        raise SystemExit(f"--name {wanted.name}: it must be a file's name; the folder is --out")
    return wanted


def quotes(tokenizer: Path | None, work: Path, vocab: int) -> Path | None:
    """A file with the openers as one text's ids. Raises BadCheckpoint."""
    if not tokenizer:
        return None
    path = work / "quotes.json"
    path.write_text(json.dumps(Tokenizer.load(tokenizer, vocab).encode(OPENERS.read_text("utf-8"))), "utf-8")
    return path


def left_out(name: str, answer: dict[str, Any], absent: dict[str, str], when: str = "") -> bool:
    """Has it no result? Then say why and note it."""
    if "absent" in answer:
        absent[name] = when + answer["absent"]
        print(f"{name} is left out: {absent[name]}", flush=True)
    return name in absent


def ask(name: str, folder: Path, wanted: argparse.Namespace, *turn: object) -> dict[str, Any]:
    """What the peer's child found in its turn, or in making its files; what goes wrong leaves it out and is said."""
    command = [sys.executable, "-m", "benchmarks.serve.child", name, str(folder), *map(str, turn)]
    chosen = {"OMP_NUM_THREADS": str(threads(name, folder, wanted)), "HF_HUB_OFFLINE": "1", "DEVICE": wanted.device}
    ours, theirs = os.pipe()  # never written to: the child ends where this process does
    with tempfile.TemporaryFile("w+") as errors, os.fdopen(ours) as stdin, os.fdopen(theirs, "w"):
        try:
            done = subprocess.run(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=wanted.limit,
                env=os.environ | chosen,
            )
        except subprocess.TimeoutExpired:
            return {"absent": f"not through after {wanted.limit:g} s (--limit)"}
        errors.seek(0)
        said = errors.read().strip().splitlines()
    lines = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
    return found or {"absent": f"it failed: {reason(said, done.returncode)}"}


def reason(said: Sequence[str], code: int) -> str:
    """The exception that was printed last, or what killed it, or its last line: libraries say much besides."""
    heads = [at for at, line in enumerate(said) if line.startswith("Traceback (")]
    errors = [line for line in said[heads[-1] + 1 :] if re.match(r"\w", line)] if heads else []
    if errors:
        return errors[0]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return said[-1] if said else f"exit code {code}"


def brief(found: dict[str, Any]) -> str:
    cells = {title: report.values([found], title) for title in report.MEASURES}
    return ", ".join(f"{title} {cell[0]:.1f}" for title, cell in cells.items() if cell)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
