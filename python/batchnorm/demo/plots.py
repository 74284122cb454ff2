"""One picture per claim: a panel for each network, medians over the seeds as lines, their range as bands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from batchnorm.demo import batch_sizes, claims
from batchnorm.demo.experiment import Results
from batchnorm.demo.findings import Finding, on_test, on_validation
from batchnorm.demo.networks import NETWORKS, SHALLOW
from batchnorm.demo.training import Record, Run, evaluation_steps

PLAIN, NORMALIZED, NEUTRAL = "#c8553d", "#2a6f97", "#8a8a8a"
# normalized or not: label, color, marker
STYLES = {False: ("plain", PLAIN, "o"), True: ("batch norm", NORMALIZED, "s")}
PLAIN_NUMBERS = FuncFormatter(lambda value, _position: f"{value:g}")

# The panels of one network, from top to bottom.
Column = NDArray[Any]


def draw(results: Results, findings: Sequence[Finding], folder: Path) -> list[Path]:
    """Write ``<number>_<key>.png`` for every claim and return the paths."""
    paths = []
    for number, claim in enumerate(claims.CLAIMS, start=1):
        verdicts = {finding.network: finding.verdict for finding in findings if finding.claim is claim}
        panels, rows = PANELS[claim]
        figure = Figure(figsize=(9.6, 4.2 if rows == 1 else 7.2), layout="constrained")
        axes = figure.subplots(rows, len(NETWORKS), sharey="row", squeeze=False)
        for network, column in zip(NETWORKS, axes.T, strict=True):
            panels(column, results, network)
            column[0].set_title(f"{network}: {'held' if verdicts[network].held else 'not held'}", fontsize=10)
        for ax in axes[:, 1:].flat:
            ax.set_ylabel("")
        figure.suptitle(claim.title, fontweight="bold")
        paths.append(folder / f"{number}_{claim.key}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def fewer_steps(column: Column, results: Results, network: str) -> None:
    """Draw validation accuracy over training, each net at its own best rate."""
    (ax,) = column
    steps = evaluation_steps(results.settings.steps)
    for normalized, (label, color, _marker) in STYLES.items():
        rate = results.best_rates[network, normalized]
        curves = [results.records[run].validation_curve for run in results.runs(network, normalized)]
        band(ax, steps, curves, f"{label}, rate {rate:g}", color)
    ax.axhline(claims.TARGET_ACCURACY, color=NEUTRAL, linewidth=1, linestyle="--", label="target")
    logarithmic(ax, round_steps(steps[-1]))
    finish(ax, "training step", "validation accuracy", legend="lower right")


def higher_rates(column: Column, results: Results, network: str) -> None:
    """Draw validation accuracy at the end over the learning rate."""
    (ax,) = column
    rates = results.settings.rates

    def runs(normalized: bool, k: int) -> list[Run]:
        return results.runs(network, normalized, rates[k])

    sweep(ax, results, rates, runs, on_validation)
    ax.axhline(claims.TRAINED_ACCURACY, color=NEUTRAL, linewidth=1, linestyle="--", label="counts as trained")
    finish(ax, "learning rate", "validation accuracy at the end", legend="center left")


def init_scale(column: Column, results: Results, network: str) -> None:
    """Draw test accuracy over the scale of the initial weights."""
    (ax,) = column
    scales = results.settings.init_scales

    def runs(normalized: bool, k: int) -> list[Run]:
        return results.rescaled(network, normalized, scales[k])

    sweep(ax, results, scales, runs, on_test)
    finish(ax, "scale of the initial weights (1: as usual)", "test accuracy", legend="lower left")


def regularizes(column: Column, results: Results, network: str) -> None:
    """Draw the gap of each seed without and with batch norm: the pairs that the criterion compares."""
    (ax,) = column

    def points(normalized: bool, quantity: Callable[[Record], float]) -> NDArray[np.float64]:
        return 100 * np.array(results.of(results.runs(network, normalized), quantity))

    gaps = [points(normalized, lambda record: record.training - record.test) for normalized in STYLES]
    ax.plot([0, 1], gaps, color=NEUTRAL, linewidth=1, alpha=0.7, zorder=1)
    labels = []
    for x, (normalized, (label, color, marker)) in enumerate(STYLES.items()):
        ax.scatter(np.full(len(gaps[x]), x), gaps[x], color=color, marker=marker, zorder=2)
        middle = np.median(gaps[x])
        ax.hlines(middle, x - 0.12, x + 0.12, color=color, linewidth=2.5, label=f"{label}, median")
        labels.append(f"{label}\ntest accuracy {np.median(points(normalized, on_test)):.1f}%")
    ax.axhline(0, color=NEUTRAL, linewidth=1)
    ax.set_xlim(-0.4, 1.4)
    ax.set_xticks([0, 1], labels)
    finish(ax, "", "training minus test accuracy (points)", share=False, legend="lower center")


def batch_noise(column: Column, results: Results, network: str) -> None:
    """Draw the noise of the trained net above, test accuracy after training below, over the batch size."""
    noise_ax, accuracy_ax = column
    sizes = results.settings.batch_sizes
    noise = [found for run in results.runs(network, True) if (found := results.inspections[run].noise)]
    if noise:
        band(noise_ax, sizes, noise, "trained net", NORMALIZED, "s")
        last = float(np.median([seed[-1] for seed in noise]))
        root = last * np.sqrt(sizes[-1] / np.array(sizes))
        noise_ax.plot(sizes, root, color=NEUTRAL, linestyle="--", linewidth=1, label="1 / sqrt(batch)")
    noise_ax.set_yscale("log")
    noise_ax.yaxis.set_major_formatter(PLAIN_NUMBERS)
    logarithmic(noise_ax, sizes)
    finish(noise_ax, "batch size", "noise from companions / signal", share=False, legend="lower left")

    def runs(normalized: bool, k: int) -> list[Run]:
        return results.rebatched(network, normalized, sizes[k])

    sweep(accuracy_ax, results, sizes, runs, on_test)
    xlabel = f"batch size in training, {results.settings.steps} steps each"
    finish(accuracy_ax, xlabel, "test accuracy", legend="lower right")


def running_statistics(column: Column, results: Results, network: str) -> None:
    """Draw over training how far inference with either statistics agrees, and how good each is."""
    (ax,) = column
    found = [results.inspections[run] for run in results.runs(network, True)]
    found = [inspection for inspection in found if inspection.steps]
    if found:
        steps = found[0].steps
        band(ax, steps, [one.same_digit for one in found], "same digit from both", NEUTRAL)
        band(ax, steps, [one.population_accuracy for one in found], "accuracy, whole training set", PLAIN)
        band(ax, steps, [one.running_accuracy for one in found], "accuracy, running statistics", NORMALIZED)
        logarithmic(ax, round_steps(steps[-1]))
    finish(ax, "training step", "share of test images", legend="lower right")


def band(ax: Axes, x: Sequence[float], by_seed: ArrayLike, label: str, color: str, marker: str | None = None) -> None:
    """Draw the median over the seeds as a line and their range as a band. by_seed: (seeds, len(x))."""
    values = np.asarray(by_seed, float)
    middle, low, high = np.median(values, axis=0), values.min(axis=0), values.max(axis=0)
    ax.plot(x, middle, color=color, label=label, marker=marker, markersize=4, linewidth=1.8)
    ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def sweep(
    ax: Axes,
    results: Results,
    x: Sequence[float],
    runs: Callable[[bool, int], list[Run]],
    quantity: Callable[[Record], float],
) -> None:
    """Draw a quantity of ``runs(normalized, k)`` over x[k], without and with batch norm."""
    for normalized, (label, color, marker) in STYLES.items():
        by_x = [results.of(runs(normalized, k), quantity) for k in range(len(x))]
        band(ax, x, np.transpose(by_x), label, color, marker)
    logarithmic(ax, x)


def logarithmic(ax: Axes, ticks: Sequence[float]) -> None:
    """Make the x axis logarithmic, with plain numbers at ``ticks``, thinned to at most eight."""
    ax.set_xscale("log")
    ax.set_xticks(ticks[:: -(-len(ticks) // 8)])
    ax.xaxis.set_major_formatter(PLAIN_NUMBERS)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()


def round_steps(last: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50 and so on, up to the last step."""
    steps = [first * 10**power for power in range(len(str(last))) for first in (1, 2, 5)]
    return [step for step in steps if step <= last]


def finish(ax: Axes, xlabel: str, ylabel: str, *, share: bool = True, legend: Any = "best") -> None:
    """Name the axes, add a light grid and the legend; with ``share``, y runs to 1 and reads in percent."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if share:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc=legend, frameon=False, fontsize=9)


def draw_batch_sizes(settings: batch_sizes.Settings, found: dict[batch_sizes.Trial, float], file: Path) -> None:
    """Draw test accuracy over the batch size: a panel for each network, a line for each norm."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    colors = (NORMALIZED, "#7b2cbf", "#e09f3e", "#6a994e", PLAIN, NEUTRAL)
    names = {"ghost": f"ghosts of {settings.ghost}", "renorm": "batch renorm"}
    for ax, network in zip(figure.subplots(1, len(SHALLOW)), SHALLOW, strict=True):
        for norm, color, marker in zip(batch_sizes.NORMS, colors, "so^Dvx", strict=True):
            by_size = {size: batch_sizes.of(found, settings, network, norm, size) for size in settings.sizes}
            sizes = [size for size, accuracies in by_size.items() if accuracies]
            if sizes:
                band(
                    ax,
                    sizes,
                    np.transpose([by_size[size] for size in sizes]),
                    names.get(norm, f"{norm} norm"),
                    color,
                    marker,
                )
        logarithmic(ax, settings.sizes)
        ax.set_title(network, fontsize=10)
        finish(ax, f"batch size, {settings.passes} passes over the data each", "test accuracy")
    figure.savefig(file, dpi=120)


# The function that draws one network's panels, and how many rows of them.
PANELS: dict[claims.Claim, tuple[Callable[[Column, Results, str], None], int]] = {
    claims.FEWER_STEPS: (fewer_steps, 1),
    claims.HIGHER_RATES: (higher_rates, 1),
    claims.INIT_SCALE: (init_scale, 1),
    claims.REGULARIZES: (regularizes, 1),
    claims.BATCH_NOISE: (batch_noise, 2),
    claims.RUNNING_STATISTICS: (running_statistics, 1),
}
