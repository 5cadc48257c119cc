"""Rounds: every peer once per round, in rotated order, each in a process of its own.

    python -m benchmarks.serve --shape small --rounds 3

Peers that are not installed are left out with the reason. pip install 'palaver[bench]' brings those that pip can.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.serve import checkpoints, machine, report
from benchmarks.serve.peers import PEERS
from benchmarks.serve.workloads import WORKLOADS
from core.engine.machine import cores
from core.evaluation.selfchat import OPENERS
from core.settings import Settings
from core.tokenizer import Tokenizer

BASELINE = "palaver-int8"


def main() -> None:
    wanted = arguments()
    folder = checkpoints.make(wanted.shape, wanted.model, wanted.work)
    text = quotes(wanted.tokenizer, wanted.work)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    runs: report.Runs = {}
    absent: dict[str, str] = {}
    limits: list[dict[str, float]] = []
    loads: list[float] = []
    order = deque(name for name in PEERS if name in wanted.peers)
    turn = [wanted.workloads, wanted.seconds, wanted.threads, wanted.stride, wanted.pause, *filter(None, [text])]
    for name in order:
        print(f"making ready what {name} loads", flush=True)
        found = ask(name, folder, wanted)
        if not left_out(name, found, absent):
            print(f"ready in {found['seconds']:.1f} s", flush=True)
    for number in range(wanted.rounds):
        limits.append(machine.limits(wanted.threads or cores()))
        for name in [name for name in order if name not in absent]:
            loads.append(os.getloadavg()[0])
            began = time.monotonic()
            found = ask(name, folder, wanted, *turn)
            if not left_out(name, found, absent):
                runs.setdefault(name, []).append(found)
                print(f"round {number + 1}: {name} took {time.monotonic() - began:.0f} s  {brief(found)}", flush=True)
        order.rotate(-3)
    runs = {name: runs[name] for name in PEERS if name in runs}
    baseline = next((name for name in (BASELINE, *runs) if name in runs), "")
    table = report.summary(runs, baseline)
    best = {name: statistics.median(limit[name] for limit in limits) for name in limits[0]}
    roofline = report.roofline(runs, config, best)
    result = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.serve", *sys.argv[1:]]),
        "machine": machine.describe(),
        "load_before_each": [round(load, 2) for load in loads],
        "threads": wanted.threads,
        "stride": wanted.stride,
        "pause": wanted.pause,
        "limits": best,
        "roofline": roofline,
        "absent": absent,
        "baseline": baseline,
        "summary": table,
        "runs": runs,
    }
    written = report.write(wanted.out, wanted.name or folder.name, result)
    print(json.dumps(result["machine"]))
    print(f"limits: {json.dumps({name: round(value, 1) for name, value in best.items()})}")
    print(report.markdown(table, roofline, baseline), report.starts(runs), sep="\n\n")
    print("written:", *written)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--shape", choices=["tiny", *checkpoints.SHAPES], default="small", help="tiny: embedded model")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder in a shape's place")
    parser.add_argument("--tokenizer", type=Path, help="people say real text, in this folder's ids")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="NAME", help="who")
    parser.add_argument("--workloads", default="ABCD", help="letters out of " + "".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12, help="of B, of D's second half, of each level of E")
    parser.add_argument("--threads", type=int, default=0, help="0: every core, or what Palaver chooses")
    parser.add_argument("--stride", type=int, default=Settings.model_fields["history_stride"].default)
    parser.add_argument("--pause", type=float, default=0, help="seconds a single user waits before each message")
    parser.add_argument("--limit", type=float, default=600, help="seconds a peer may take for its turn")
    parser.add_argument("--work", type=Path, default=Path("runs/serve"), help="where the checkpoints are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/serve/results"))
    parser.add_argument("--name", default="", help="of the files written; the shape when left out")
    wanted = parser.parse_args()
    if unknown := set(wanted.workloads) - set(WORKLOADS):
        parser.error(f"unknown workloads: {', '.join(sorted(unknown))}")
    return wanted


def quotes(tokenizer: Path | None, work: Path) -> Path | None:
    """A file with the openers as one text's ids."""
    if not tokenizer:
        return None
    path = work / "quotes.json"
    path.write_text(json.dumps(Tokenizer.load(tokenizer).encode(OPENERS.read_text("utf-8"))), "utf-8")
    return path


def left_out(name: str, found: dict[str, Any], absent: dict[str, str]) -> bool:
    """Has it no result? Then say why and note it."""
    if "absent" in found:
        absent[name] = found["absent"]
        print(f"{name} is left out: {absent[name]}", flush=True)
    return name in absent


def ask(name: str, folder: Path, wanted: argparse.Namespace, *turn: object) -> dict[str, Any]:
    """What the peer's child found in its turn, or in making its files; what goes wrong leaves it out and is said."""
    command = [sys.executable, "-m", "benchmarks.serve.child", name, str(folder), *map(str, turn)]
    environment = os.environ | {"OMP_NUM_THREADS": str(wanted.threads or cores()), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=wanted.limit, env=environment
            )
        except subprocess.TimeoutExpired:
            return {"absent": f"not through after {wanted.limit:g} s (--limit)"}
        errors.seek(0)
        said = errors.read().strip().splitlines()
    lines = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
    return found or {"absent": f"it failed: {said[-1] if said else f'exit code {done.returncode}'}"}


def brief(found: dict[str, Any]) -> str:
    cells = {title: report.values([found], title) for title in report.MEASURES}
    return ", ".join(f"{title} {cell[0]:.1f}" for title, cell in cells.items() if cell)


if __name__ == "__main__":
    main()
