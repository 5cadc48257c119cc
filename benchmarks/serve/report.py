"""Medians over rounds, their spread, ratios and limits: as Markdown, JSON and PNG."""

from __future__ import annotations

import json
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
    """peer -> measure -> median, spread ((highest - lowest) / median), ratio (above 1: the baseline is better)."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for title, (_, _, more) in MEASURES.items():
        base = values(runs.get(baseline, []), title)
        for peer, rounds in runs.items():
            if found := values(rounds, title):
                middle = statistics.median(found)
                cell = {"median": middle, "spread": (max(found) - min(found)) / middle if middle else 0.0}
                if base and middle and (ours := statistics.median(base)):
                    cell["ratio"] = ours / middle if more else middle / ours
                table.setdefault(peer, {})[title] = cell
    return table


def roofline(runs: Runs, config: dict[str, Any], machine: dict[str, float]) -> dict[str, dict[str, float]]:
    """precision -> measure -> what the limits of memory and arithmetic allow for the prompts that were asked."""
    table: dict[str, dict[str, float]] = {}
    for precision in ("float32", "bfloat16", "int8"):
        for title, together in (("A mean ms", 1), ("B replies/s", 16), ("C mean ms", 1)):
            letter, _, more = MEASURES[title]
            asked = next((run[letter]["asked"] for rounds in runs.values() for run in rounds if letter in run), None)
            if asked:
                seconds = least_seconds(config, machine, precision, asked, together)
                table.setdefault(precision, {})[title] = 1 / seconds if more else 1e3 * seconds
    return table


def markdown(table: dict[str, dict[str, dict[str, float]]], limits: dict[str, dict[str, float]], baseline: str) -> str:
    """Each cell: median ±half the spread, where there were rounds to differ, (ratio)."""
    titles = [title for title in MEASURES if any(title in row for row in table.values())]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for peer, row in table.items():
        lines.append(f"| {peer} | " + " | ".join(_cell(row.get(t), peer == baseline) for t in titles) + " |")
    for precision, row_of_limits in limits.items():
        shown = (_number(row_of_limits[t]) if t in row_of_limits else "–" for t in titles)
        lines.append(f"| *limit, {precision}* | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _cell(cell: dict[str, float] | None, is_baseline: bool) -> str:
    if cell is None:
        return "–"
    said = _number(cell["median"]) + (f" ±{50 * cell['spread']:.0f} %" if cell["spread"] else "")
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


def write(folder: Path, name: str, result: dict[str, Any]) -> list[Path]:
    """NAME.json, and a picture per measure group when matplotlib is there. The paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1), "utf-8")
    written = [path]
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install 'palaver[bench]')")
        return written
    matplotlib.use("Agg")
    if result["summary"]:
        written.append(_bars(folder / f"{name}.png", result))
    if any("E" in run for rounds in result["runs"].values() for run in rounds):
        written.append(_curves(folder / f"{name}-load.png", result))
    return written


def _bars(path: Path, result: dict[str, Any]) -> Path:
    """One panel per measure, a bar per peer with a dot per round, a line per limit."""
    from matplotlib import pyplot

    table, runs = result["summary"], result["runs"]
    wanted = ("A mean ms", "A processor ms", "B replies/s", "B processor ms", "C mean ms", "D mean ms", "D replies/s")
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


def _curves(path: Path, result: dict[str, Any]) -> Path:
    """E: the delay of the slowest 5 % over the load."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for peer, rounds in result["runs"].items():
        levels = sorted((level["rate"], level["p95_s"]) for run in rounds if "E" in run for level in run["E"]["levels"])
        finite = [pair for pair in levels if pair[1] < float("inf")]
        axis.plot(*zip(*finite, strict=True), "o-", label=peer, markersize=3) if finite else None
    axis.axhline(2.0, linestyle=":", color="#c1121f")
    axis.set(xlabel="messages a second", ylabel="p95 delay, s", ylim=(0, 6), title="1,000 channels, Poisson arrivals")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
