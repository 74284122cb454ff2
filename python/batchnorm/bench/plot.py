"""One picture: the speed of each library over the size of the tensor, under the line that a copy draws."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from batchnorm.bench.findings import IN_PYTHON
from batchnorm.bench.session import OURS, PASSES, TENSORS

Row = dict[str, Any]
PLAIN_NUMBERS = FuncFormatter(lambda value, _position: f"{value:g}")
OUR_COLOR = "#2a6f97"
PEER_STYLES = {  # marker, color
    IN_PYTHON: ("o", OUR_COLOR),
    "oneDNN": ("^", "#e09f3e"),
    "PyTorch": ("s", "#c8553d"),
    "ONNX Runtime": ("D", "#6a994e"),
    "JAX": ("v", "#7b2cbf"),
    "NumPy": ("x", "#8a8a8a"),
}


def draw(report: dict[str, Any], file: Path) -> None:
    """Write a panel for each pass of batch norm: GB/s of the bytes that must move, over the MB of a tensor."""
    rows = [row for row in report["rows"] if row["dtype"] == "float32"]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, len(PASSES["batch"]), sharey=True)
    for ax, pass_name in zip(panels, PASSES["batch"], strict=True):
        _panel(ax, rows, pass_name)
    panels[0].set_ylabel("GB/s of the bytes that must move")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    machine, version = report["machine"], report["library"]["version"]
    threads = rows[0]["threads"]
    figure.suptitle(
        f"batchnorm {version}, {machine['cpu']}, {threads} threads, float32, {report['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(file, dpi=120)


def _panel(ax: Axes, rows: Sequence[Row], pass_name: str) -> None:
    yardstick = "stream" if pass_name == "backward" else "copy"
    line = _smoothed(_points([r for r in rows if r["pass"] == yardstick], TENSORS[pass_name]))
    sizes, speeds = zip(*line, strict=True)
    ax.plot(sizes, speeds, color="#333333", linewidth=1, label="copy (backward: two in, one out)")
    mine = [r for r in rows if r["pass"] == pass_name]
    for peer, (marker, color) in PEER_STYLES.items():
        points = _best([r for r in mine if r.get("peer") == peer], TENSORS[pass_name])
        if points:
            sizes, speeds = zip(*points, strict=True)
            face = color if marker == "x" else "none"  # hollow, where the marker has an inside
            ax.scatter(sizes, speeds, s=18, marker=marker, color=color, facecolors=face, label=peer)
    ours = [r for r in mine if r.get("peer", OURS) == OURS]
    sizes, speeds = zip(*_points(ours, TENSORS[pass_name]), strict=True)
    ax.scatter(sizes, speeds, s=26, marker="o", color=OUR_COLOR, zorder=3, label="batchnorm")
    ax.set(title=pass_name, xlabel="MB a tensor", xscale="log", yscale="log")
    ax.xaxis.set_major_formatter(PLAIN_NUMBERS)
    ax.yaxis.set_major_formatter(PLAIN_NUMBERS)
    ax.grid(alpha=0.3)


def _points(rows: Sequence[Row], tensors: int) -> list[tuple[float, float]]:
    """(MB of a tensor, GB/s) of each row."""
    return [(row["bytes"] / tensors / 1e6, row["gb_per_s"]) for row in rows]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Give the medians of points of about the same size, eight to a factor of ten."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        bins.setdefault(round(8 * math.log10(point[0])), []).append(point)
    medians = [tuple(map(statistics.median, zip(*some, strict=True))) for some in bins.values()]
    return sorted((size, speed) for size, speed in medians)


def _best(rows: Sequence[Row], tensors: int) -> list[tuple[float, float]]:
    """Those of the fastest form for each case and layout."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["case"], row["layout"])
        if key not in best or row["seconds"] < best[key]["seconds"]:
            best[key] = row
    return _points(list(best.values()), tensors)
