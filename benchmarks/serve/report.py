"""Medians over rounds, their spread, ratios and limits: as Markdown, JSON and PNG."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serve.machine import least_seconds

Runs = dict[str, list[dict[str, Any]]]
"""peer -> what its child found, round by round"""

MEASURES: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "A mean ms": ("A", ("mean_ms",), False),
    "A growing p50 ms": ("A", ("growing_ms",), False),
    "A sliding p50 ms": ("A", ("sliding_ms",), False),
    "B replies/s": ("B", ("replies_per_s",), True),
    "B p95 ms": ("B", ("p95_ms",), False),
    "C mean ms": ("C", ("mean_ms",), False),
    "D mean ms": ("D", ("mean_ms",), False),
    "D replies/s": ("D", ("busy", "replies_per_s"), True),
    "A processor ms": ("A", ("processor_ms",), False),
    "B processor ms": ("B", ("processor_ms",), False),
    "C processor ms": ("C", ("processor_ms",), False),
    "D processor ms": ("D", ("processor_ms",), False),
    "E replies/s": ("E", ("replies_per_s",), True),
    "F replies/s": ("F", ("replies_per_s",), True),
    "F p95 ms": ("F", ("p95_ms",), False),
}
"""title -> (workload, where it stands in the child's result, whether more is better)"""


def values(runs: Sequence[dict[str, Any]], title: str) -> list[float]:
    """One per round that measured it."""
    letter, path, _ = MEASURES[title]
    found = []
    for run in runs:
        value: Any = run.get(letter)
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found.append(float(value))
    return found


def summary(runs: Runs, baseline: str) -> dict[str, dict[str, dict[str, float]]]:
    """peer -> measure -> median, spread ((highest - lowest) / median), ratio (above 1: the baseline is better).

    `at_least` is there where some round found no limit.
    """
    table: dict[str, dict[str, dict[str, float]]] = {}
    for title, (letter, _, more) in MEASURES.items():
        base = values(runs.get(baseline, []), title)
        for peer, rounds in runs.items():
            if found := values(rounds, title):
                middle = statistics.median(found)
                cell = {"median": middle, "spread": (max(found) - min(found)) / middle if middle else 0.0}
                if base and middle and (ours := statistics.median(base)):
                    cell["ratio"] = ours / middle if more else middle / ours
                if any(run.get(letter, {}).get("at_least") for run in rounds):
                    cell["at_least"] = 1.0
                table.setdefault(peer, {})[title] = cell
    return table


def roofline(runs: Runs, config: dict[str, Any], machine: dict[str, float], reply: int) -> dict[str, dict[str, float]]:
    """precision -> measure -> what the limits of memory and arithmetic allow for the prompts that were asked."""
    table: dict[str, dict[str, float]] = {}
    for precision in ("float32", "bfloat16", "int8"):
        for title, together in (("A mean ms", 1), ("B replies/s", 16), ("C mean ms", 1), ("F replies/s", 256)):
            letter, _, more = MEASURES[title]
            asked = next((run[letter]["asked"] for rounds in runs.values() for run in rounds if letter in run), None)
            if asked:
                seconds = least_seconds(config, machine, precision, asked, reply, together)
                table.setdefault(precision, {})[title] = 1 / seconds if more else 1e3 * seconds
    return table


def markdown(
    table: dict[str, dict[str, dict[str, float]]],
    limits: dict[str, dict[str, float]],
    baseline: str,
    absent: dict[str, str],
) -> str:
    """Each cell: median ±half the spread, where there were rounds to differ, (ratio). Below, who is absent and why."""
    titles = [title for title in MEASURES if any(title in row for row in table.values())]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for peer, row in table.items():
        shown = (_cell(row.get(t), peer == baseline) for t in titles)
        lines.append(f"| {peer}{' (left out)' * (peer in absent)} | " + " | ".join(shown) + " |")
    for precision, row_of_limits in limits.items():
        shown = (_number(row_of_limits[t]) if t in row_of_limits else "–" for t in titles)
        lines.append(f"| *limit, {precision}* | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", f"in brackets: against {baseline}", *left_out(absent)])


def left_out(absent: dict[str, str]) -> list[str]:
    return [f"left out: {name}: {why}" for name, why in absent.items()]


def _cell(cell: dict[str, float] | None, is_baseline: bool) -> str:
    if cell is None:
        return "–"
    said = "at least " * ("at_least" in cell) + _number(cell["median"])
    said += f" ±{50 * cell['spread']:.0f} %" if cell["spread"] else ""
    return said if is_baseline or "ratio" not in cell else f"{said} ({cell['ratio']:.1f} ×)"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def starts(runs: Runs) -> str:
    """Loading, the first reply and memory, medians."""
    lines = ["| | load s | first reply s | peak MB | how it runs |", "|---|---|---|---|---|"]
    for peer, rounds in runs.items():
        load, first, peak = (
            statistics.median(r[name] for r in rounds) for name in ("load_s", "first_reply_s", "peak_mb")
        )
        lines.append(f"| {peer} | {load:.1f} | {first:.2f} | {peak:.0f} | {rounds[0]['how']} |")
    return "\n".join(lines)


def check(folder: Path, name: str) -> None:
    """Makes the folder. Raises OSError where `write` would."""
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f"{name}-load.png.part"
    trial.touch()
    trial.unlink()


def write(folder: Path, name: str, result: dict[str, Any]) -> list[Path]:
    """NAME.json, and a picture per measure group when matplotlib is there. The paths written."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1), "utf-8")
    written = [path]
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install -e '.[bench]')")
        return written
    matplotlib.use("Agg")
    if result["summary"]:
        written.append(_bars(folder / f"{name}.png", result))
    if curves := {peer: found for peer, rounds in result["runs"].items() if (found := _levels(rounds))}:
        written.append(_curves(folder / f"{name}-load.png", curves))
    return written


def _levels(rounds: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(load, delay of the slowest 5 %) where E found a delay with an end."""
    levels = [level for run in rounds if "E" in run for level in run["E"]["levels"]]
    return sorted((level["rate"], level["p95_s"]) for level in levels if math.isfinite(level["p95_s"]))


def _bars(path: Path, result: dict[str, Any]) -> Path:
    """One panel per measure, a bar per peer with a dot per round, a line per limit."""
    from matplotlib import pyplot

    table, runs = result["summary"], result["runs"]
    wanted = (
        "A mean ms",
        "A processor ms",
        "B replies/s",
        "B processor ms",
        "C mean ms",
        "D mean ms",
        "D replies/s",
        "F replies/s",
    )
    titles = [title for title in wanted if any(title in row for row in table.values())]
    titles = titles or [title for title in MEASURES if any(title in row for row in table.values())]
    figure, axes = pyplot.subplots(
        1, len(titles), figsize=(3.2 * len(titles) + 1.5, 0.32 * len(table) + 1.6), squeeze=False
    )
    peers = list(table)[::-1]
    for axis, title in zip(axes[0], titles, strict=True):
        medians = [table[p].get(title, {}).get("median", 0.0) for p in peers]
        colours = ["#2a6f97" if p.startswith("palaver") else "#b7b7b7" for p in peers]
        axis.barh(peers, medians, color=colours)
        for height, peer in enumerate(peers):
            dots = values(runs[peer], title)
            axis.plot(dots, [height] * len(dots), ".", color="black", markersize=4)
        for (precision, row), style in zip(result["roofline"].items(), (":", "--", "-."), strict=False):
            if title in row and row[title] < 1.5 * max(medians):
                axis.axvline(row[title], linestyle=style, color="#c1121f", linewidth=1, label=f"limit, {precision}")
        axis.set_title(f"{title}\n({'more' if MEASURES[title][2] else 'less'} is better)", fontsize=9)
        axis.tick_params(labelsize=8)
        if axis is not axes[0][0]:
            axis.set_yticklabels([])
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    lines = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=len(lines), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _curves(path: Path, curves: dict[str, list[tuple[float, float]]]) -> Path:
    """E: the delay of the slowest 5 % over the load."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for peer, levels in curves.items():
        axis.plot(*zip(*levels, strict=True), "o-", label=peer, markersize=3)
    axis.axhline(2.0, linestyle=":", color="#c1121f")
    axis.set(xlabel="messages a second", ylabel="p95 delay, s", ylim=(0, 6), title="1,000 channels, Poisson arrivals")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
