"""The results as text for people and as JSON for programs."""

from __future__ import annotations

import json
import math
import os
import platform
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby, zip_longest
from pathlib import Path
from statistics import median

import batchnorm as bn
from batchnorm.demo.claims import TARGET_ACCURACY, Claim
from batchnorm.demo.experiment import Results
from batchnorm.demo.findings import Finding, Quantity
from batchnorm.demo.networks import NETWORKS
from batchnorm.demo.training import evaluation_steps

WIDTH = 120


def table(results: Results, findings: Sequence[Finding]) -> str:
    """Return, per claim: its criterion and, for each network, what was measured and whether it held here."""
    s = results.settings
    heading = (
        f"Medians over {s.seeds} seeds [smallest, largest]. SGD, {s.steps} steps, batch {s.batch} unless "
        "said otherwise. Nets of one seed share the split, the order of the samples and the initial weights. "
        f"A net's best rate is the one of {', '.join(f'{rate:g}' for rate in s.rates)} that reaches "
        f"{TARGET_ACCURACY:.0%} validation accuracy in the fewest steps (median); claims 1, 3, 4 and 6 are "
        "measured at it. Batch sizes (5) are compared at one rate for both nets: the lower of the two best, "
        f"times sqrt(batch / {s.batch}) below {s.batch}."
    )
    return "\n".join([*textwrap.wrap(heading, WIDTH), "", *_blocks(findings), "", *_answers(findings)])


def _blocks(findings: Sequence[Finding]) -> Iterator[str]:
    for number, (claim, of_claim) in enumerate(_by_claim(findings), start=1):
        yield "=" * WIDTH
        yield f"{number}  {claim.title}"
        words = textwrap.wrap(f"held if: {claim.criterion}", WIDTH - 3)
        yield textwrap.indent("\n".join(words), "   ")
        yield "-" * WIDTH
        yield _row("", "", "plain", "batch norm", "held here")
        for finding in of_claim:
            answers = [_yes_or_no(finding), *finding.verdict.why.split("; ")]
            for k, (quantity, answer) in enumerate(zip_longest(finding.quantities, answers)):
                name, plain, normalized = _cells(quantity) if quantity else ("", "", "")
                yield _row(finding.network if k == 0 else "", name, plain, normalized, answer or "")
    yield "=" * WIDTH


def _answers(findings: Sequence[Finding]) -> Iterator[str]:
    """Claims down, networks across, yes or no: the whole result at a glance."""
    yield f"   {'Held here':{WIDTH - 40}}" + "".join(f"{network:>12}" for network in NETWORKS)
    for number, (claim, of_claim) in enumerate(_by_claim(findings), start=1):
        answers = "".join(f"{_yes_or_no(finding):>12}" for finding in of_claim)
        yield f"{number}  {claim.title:{WIDTH - 40}}{answers}"


def _by_claim(findings: Sequence[Finding]) -> list[tuple[Claim, list[Finding]]]:
    return [(claim, list(group)) for claim, group in groupby(findings, key=lambda finding: finding.claim)]


def _yes_or_no(finding: Finding) -> str:
    return "yes" if finding.verdict.held else "no"


def _row(network: str, quantity: str, plain: str, normalized: str, answer: str) -> str:
    return f"   {network:9}{quantity:38}{plain:23}{normalized:23}{answer}".rstrip()


def _cells(quantity: Quantity) -> tuple[str, str, str]:
    plain = "" if quantity.plain is None else summary(quantity.plain, quantity.unit)
    return quantity.name, plain, summary(quantity.normalized, quantity.unit)


def summary(values: Sequence[float], unit: str) -> str:
    """Return "median [smallest, largest]" of one number per seed, in the unit of a :class:`Quantity`."""
    if not values:
        return "no run"
    show = FORMATS[unit]
    percent = "%" if unit == "share" else ""
    return f"{show(median(values))}{percent} [{show(min(values))}, {show(max(values))}]"


FORMATS: dict[str, Callable[[float], str]] = {
    "steps": lambda value: f"{value:.0f}" if math.isfinite(value) else "never",
    "rate": lambda value: f"{value:g}" if value else "none",
    "ratio": lambda value: f"{value:.3f}",
    "points": lambda value: f"{100 * value:.1f}",
    "share": lambda value: f"{100 * value:.1f}",
}


def write_json(path: Path, results: Results, findings: Sequence[Finding], seconds: float) -> None:
    """Write all that was measured, seed by seed, and what it takes to measure it again. Never is null."""
    document: dict[str, object] = {
        "versions": _versions(),
        "machine": {"platform": platform.platform(), "processors": os.cpu_count(), "isa": bn.active_isa()},
        "settings": asdict(results.settings),
        "best_rates": [
            {"network": network, "normalized": normalized, "rate": rate}
            for (network, normalized), rate in results.best_rates.items()
        ],
        "seconds": {**results.seconds, "all": seconds},
        "claims": [
            {**asdict(finding.claim), "network": finding.network, **asdict(finding.verdict)}
            | {"quantities": [asdict(quantity) for quantity in finding.quantities]}
            for finding in findings
        ],
        "evaluation_steps": evaluation_steps(results.settings.steps),
        "runs": [asdict(run) | asdict(record) for run, record in results.records.items()],
        "inspections": [asdict(run) | asdict(found) for run, found in results.inspections.items()],
    }
    path.write_text(_lines(document), encoding="utf-8")


def _versions() -> dict[str, str | None]:
    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("batchnorm", "numpy", "scikit-learn", "matplotlib", "tqdm")
    return {"python": platform.python_version(), **{name: installed(name) for name in names}}


def _without_infinities(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_infinities(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(document: dict[str, object]) -> str:
    """JSON with one line per entry and per item of a list of entries: a run is a line."""

    def text(value: object) -> str:
        return json.dumps(_without_infinities(value), allow_nan=False)

    def entry(value: object) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(f"  {text(item)}" for item in value) + "\n ]"
        return text(value)

    return "{\n" + ",\n".join(f' "{name}": {entry(value)}' for name, value in document.items()) + "\n}\n"
