"""The command line of the benchmark. Importing this imports neither NumPy nor anything beyond the standard library."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchnorm.bench import programs

PEERS = ("onednn", "torch", "onnxruntime", "jax", "numpy")
# One of each kind, none over 103 MB.
QUICK = (
    "tiny-4x16x8x8",
    "images-8x3x224x224",
    "table-4096x100",
    "perceptron-4096x512",
    "odd-32x60x28x28",
    "resnet50-32x2048x7x7",
    "resnet50-32x256x56x56",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m batchnorm bench`` to its parser."""
    parser.description = (
        "Time training, inference and backward against a copy of the same bytes, and against those of oneDNN, "
        "PyTorch, ONNX Runtime, JAX and NumPy that are installed: float32, each library in a process of its own, in "
        "turns. batchnorm-bench alone, which this runs, has more options; see bench/README.md."
    )
    what = "the cases whose name contains NAME, or 'all' (hours), or 'quick'; default: resnet50"
    parser.add_argument("--cases", nargs="+", default=["resnet50"], metavar="NAME", help=what)
    names = ", ".join(PEERS)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, metavar="PEER", help=f"of {names}")
    parser.add_argument("--rounds", type=_at_least_one, metavar="N", help="samples in each process (9)")
    parser.add_argument("--turns", type=_at_least_one, metavar="N", help="turns of the processes (3)")
    processors = os.cpu_count() or 1
    threads = "for every library (%(default)s)"
    parser.add_argument("--threads", type=_at_least_one, default=processors, metavar="N", help=threads)
    parser.add_argument("--max-mb", type=float, default=450, metavar="N", help="skip larger tensors (%(default)g)")
    parser.add_argument("--quick", action="store_true", help="a few cases, one turn, 5 rounds: half a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw GB/s over size there; needs matplotlib")
    sources = "measure nothing: take these JSONs, of one machine and build, together"
    parser.add_argument("--from", type=Path, nargs="+", dest="sources", metavar="FILE", help=sources)
    old = "a JSON of this command or of batchnorm-bench, of another commit: print new over old"
    parser.add_argument("--baseline", type=Path, metavar="FILE", help=old)
    folder = "where batchnorm-bench and batchnorm-peer-onednn are (the package)"
    parser.add_argument("--programs", type=Path, metavar="DIR", help=folder)


def run(args: argparse.Namespace) -> int:
    """Measure or read, print, draw and store. Returns the exit code."""
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        print("batchnorm bench --plot needs matplotlib: pip install 'batchnorm[bench]'", file=sys.stderr)
        return 2
    try:
        report = _together(args.sources) if args.sources else _measure(args)
    except programs.Missing as missing:
        print(f"batchnorm bench: {missing}", file=sys.stderr)
        return 2
    if args.json:
        _store(report, args.json)
    _show(report, args)
    return 1 if report.get("failed") else 0


def _together(files: Sequence[Path]) -> dict[str, Any]:
    """Read reports; all but the rows is that of the first."""
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {**reports[0], "rows": [row for report in reports for row in report["rows"]]}


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from batchnorm.bench import session

    cases = args.cases
    if args.quick:
        cases = [*QUICK] if cases == ["resnet50"] else cases
    cases = [name for case in cases for name in (QUICK if case == "quick" else [case])]
    plan = session.Plan(
        cases=() if "all" in cases else tuple(cases),
        peers=tuple(args.peers),
        rounds=args.rounds or (5 if args.quick else 9),
        turns=args.turns or (1 if args.quick else 3),
        threads=args.threads,
        max_mb=args.max_mb,
        programs=args.programs,
    )
    return session.measure(plan, lambda report: _store(report, args.json) if args.json else None)


def _show(report: dict[str, Any], args: argparse.Namespace) -> None:
    from batchnorm.bench import findings

    rows = report["rows"]
    print("\n".join([*findings.table(rows), *findings.summary(rows)]))
    if args.baseline:
        print("\n".join(findings.changes(rows, json.loads(args.baseline.read_text())["rows"])))
    if args.plot:
        from batchnorm.bench.plot import draw

        draw(report, args.plot)


def _store(report: dict[str, Any], file: Path) -> None:
    """Write one row a line, so that two files can be compared by line."""
    rows = ",\n  ".join(json.dumps(row) for row in report["rows"])
    head = {name: value for name, value in report.items() if name != "rows"}
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {rows}\n ]}}\n'
    file.write_text(text, encoding="utf-8")


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value
