"""A whole measurement: this library and its peers, each in its own process, case by case, in turns."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.bench import programs
from batchnorm.bench.process import Failed, Process

Row = dict[str, Any]
OURS = "batchnorm"
# What is timed of a case: the passes of a norm, and the tensors that each must read or write at least once.
PASSES = {
    "batch": {"train": 2, "infer": 2, "backward": 3},
    "lines": {"train_lines": 2, "backward_lines": 3, "train_rms": 2, "backward_rms": 3},
    "groups": {"train_groups": 2, "backward_groups": 3},
}
TENSORS = {name: tensors for passes in PASSES.values() for name, tensors in passes.items()}
_NORM_OF_CASES = {"tokens": "lines", "diffusion": "groups"}


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    cases: tuple[str, ...]  # names or parts of them; none: all
    peers: tuple[str, ...]
    rounds: int  # samples in each process
    turns: int  # of the processes
    threads: int
    max_mb: float
    programs: Path | None


def measure(plan: Plan, store: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run the plan and give what was measured, which `store` also gets after every case. Progress goes to stderr.

    A case that this library fails is in the report's ``failed``; an interrupt ends the run with what there is.
    """
    cases = _cases(plan)
    processes = start(plan)
    peers = {process.name: process.version for process in processes}
    settings = {"rounds": plan.rounds, "turns": plan.turns, "threads": plan.threads}
    report: dict[str, Any] = {"peers": peers, "settings": settings, "failed": [], "rows": []}
    try:
        for number, case in enumerate(cases, start=1):
            tell(f"{number}/{len(cases)} {case['case']}")
            try:
                head, rows = measure_case(plan, case, processes)
            except programs.Missing as failed:
                tell(f"  {failed}")
                report["failed"].append(str(failed))
                continue
            report = {**head, **report, "rows": report["rows"] + rows}
            store(report)
    except KeyboardInterrupt:
        tell("interrupted")
    finally:
        for process in processes:
            process.stop()
    if not report["rows"]:
        raise programs.Missing("; ".join(report["failed"]) or "nothing was measured")
    return report


def _cases(plan: Plan) -> list[Row]:
    listed = programs.run_bench(plan.programs, ["--list", *_repeated("--case", plan.cases)])["cases"]
    cases = [case for case in listed if 4 * math.prod(case["shape"]) <= plan.max_mb * 1e6]
    if left_out := len(listed) - len(cases):
        tell(f"{left_out} cases skipped: more than {plan.max_mb:g} MB a tensor; --max-mb allows them")
    if not cases:
        raise programs.Missing("no case is left to measure")
    return cases


def start(plan: Plan) -> list[Process]:
    """Start all peers that are here, and this library in Python, which peers in Python are compared with."""
    started = []
    for key in ("batchnorm", *plan.peers):
        process = Process(key, plan.threads, plan.programs)
        if reason := process.start():
            tell(f"{key}: skipped, {reason}")
        else:
            tell(f"{process.name} {process.version}")
            started.append(process)
    return started


def measure_case(plan: Plan, case: Row, processes: Sequence[Process]) -> tuple[dict[str, Any], list[Row]]:
    """Give batchnorm-bench's header and all rows of one case."""
    samples: list[Row] = []
    for _ in range(plan.turns):
        ours = programs.run_bench(plan.programs, _arguments(plan, case))
        samples += [{**row, "peer": OURS} for row in ours.pop("rows")]
        for process in processes:
            try:
                answered = process.ask(case["shape"], plan.rounds, norm_of(case))
            except Failed as failed:
                tell(f"  {process.name} failed: {failed}")
            else:
                samples += [peer_row(plan, case, process, row) for row in answered]
    return ours, merged(samples)


def norm_of(case: Row) -> str:
    """Tell which norm a case is of: batch, but for those of tokens and of diffusion models."""
    return _NORM_OF_CASES.get(case["case"].partition("-")[0], "batch")


def _arguments(plan: Plan, case: Row) -> list[str]:
    passes = _repeated("--pass", tuple(PASSES[norm_of(case)]))
    numbers = {"--threads": plan.threads, "--rounds": plan.rounds, "--max-mb": plan.max_mb}
    return ["--case", case["case"], *passes, *(str(word) for pair in numbers.items() for word in pair)]


def peer_row(plan: Plan, case: Row, process: Process, row: Row) -> Row:
    """Complete a peer's row to one of the form that batchnorm-bench writes."""
    size = TENSORS[row["pass"]] * 4 * math.prod(case["shape"])
    return {
        "case": case["case"],
        "origin": case["origin"],
        "shape": case["shape"],
        "layout": row["layout"],
        "dtype": "float32",
        "pass": row["pass"],
        "threads": plan.threads,
        "rounds": plan.rounds,
        "bytes": size,
        "seconds": row["seconds"],
        "mad": row["mad"],
        "gb_per_s": size / row["seconds"] / 1e9,
        "form": row["form"],
        "others": row["others"],
        "peer": process.name,
    }


def merged(samples: Sequence[Row]) -> list[Row]:
    """Make one row of those of several turns: medians, and the spread from turn to turn."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in samples:
        key = (row["peer"], row["layout"], row["dtype"], row["pass"], row.get("form"))
        groups.setdefault(key, []).append(row)
    return [_median_row(group) for group in groups.values()]


def _median_row(group: Sequence[Row]) -> Row:
    row = {**group[0], "turns": len(group)}
    if len(group) == 1:
        return row
    for field, spread in (("seconds", "mad"), ("ratio", "ratio_mad")):
        if field in row:
            row[field], row[spread] = _median_and_mad([one[field] for one in group])
    row["others"] = max(one["others"] for one in group)
    row["gb_per_s"] = row["bytes"] / row["seconds"] / 1e9
    if "yardstick_seconds" in row:
        row["yardstick_seconds"] = statistics.median(one["yardstick_seconds"] for one in group)
        row["disturbed"] = any(one["disturbed"] for one in group)
    return row


def _median_and_mad(values: Sequence[float]) -> tuple[float, float]:
    median = statistics.median(values)
    return median, statistics.median(abs(value - median) for value in values)


def _repeated(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def tell(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)
