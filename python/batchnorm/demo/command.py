"""The command line of the demonstration. Importing this imports neither NumPy nor anything beyond it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchnorm.demo.experiment import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m batchnorm demo`` to its parser."""
    parser.description = (
        "Train a small multilayer perceptron, a small convolutional network and a deep one on 1797 real images of "
        "digits, with and without batch norm, and measure the claims made for it. The table goes to stdout, "
        "progress to stderr."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="five seeds, half a minute (the default)")
    size.add_argument("--full", action="store_true", help="ten seeds, more steps, finer sweeps; some minutes")
    sizes = "only test accuracy over batch sizes 1 to 256: batch, ghost, renorm, group, layer and instance norm"
    size.add_argument("--batch-sizes", action="store_true", help=sizes)
    parser.add_argument("--seeds", type=_at_least_one, metavar="N", help="seeds (5, or 10 with --full)")
    out = Path("batchnorm-demo")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="results folder (%(default)s)")
    parser.add_argument("--no-plots", action="store_true", help="write the JSON only")
    jobs = "processes (as many as processors); no effect on the numbers"
    parser.add_argument("--jobs", type=_at_least_one, metavar="N", help=jobs)


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw and store.

    Returns the exit code: 0, whichever claims held, or 2 if a package is missing.
    """
    needed = {"scikit-learn": "sklearn", "tqdm": "tqdm"}
    if not args.no_plots:
        needed["matplotlib"] = "matplotlib"
    missing = [name for name, module in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"batchnorm demo needs {' and '.join(missing)}: pip install 'batchnorm[demo]'", file=sys.stderr)
        return 2

    jobs = args.jobs or _processors()
    if args.batch_sizes:
        return compare_batch_sizes(args.seeds, args.out, jobs, plots=not args.no_plots)

    from batchnorm.demo import experiment

    settings = experiment.FULL if args.full else experiment.QUICK
    settings = replace(settings, seeds=args.seeds or settings.seeds, jobs=jobs)
    return demonstrate(settings, args.out, plots=not args.no_plots)


def demonstrate(settings: Settings, out: Path, *, plots: bool) -> int:
    """Run the demonstration at these settings. Returns 0."""
    from functools import partial

    from tqdm import tqdm

    from batchnorm.demo import data, experiment, findings, report

    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    results = experiment.measure(settings, data.load_digits(), partial(tqdm, unit="run", file=sys.stderr))
    judged = findings.judge(results)
    print(report.table(results, judged))
    written = [out / "results.json"]
    if plots:
        from batchnorm.demo.plots import draw

        written += draw(results, judged, out)
    seconds = time.perf_counter() - started
    report.write_json(out / "results.json", results, judged, seconds)
    print(f"\n{len(results.records)} runs in {seconds:.0f} s. Written to {out}:")
    print("\n".join(f"   {path.name}" for path in written))
    return 0


def compare_batch_sizes(seeds: int | None, out: Path, jobs: int, *, plots: bool, **settings: Any) -> int:
    """Print test accuracies over the batch size, and write them and a plot. Returns 0."""
    from functools import partial

    from tqdm import tqdm

    from batchnorm.demo import batch_sizes, data

    out.mkdir(parents=True, exist_ok=True)
    chosen = batch_sizes.Settings(**settings)
    chosen = replace(chosen, seeds=seeds or chosen.seeds)
    progress = partial(tqdm, unit="run", file=sys.stderr)
    found = batch_sizes.measure(chosen, data.load_digits(), progress, jobs)
    print(batch_sizes.table(chosen, found))
    batch_sizes.write_json(out / "batch_sizes.json", chosen, found)
    if plots:
        from batchnorm.demo.plots import draw_batch_sizes

        draw_batch_sizes(chosen, found, out / "batch_sizes.png")
    return 0


def _processors() -> int:
    """Processors this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
