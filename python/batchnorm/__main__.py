"""The command line: ``python -m batchnorm demo``, ``bench`` and ``info``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from batchnorm import __version__, bench, demo, show_config
from batchnorm.info import config


def _info(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps(config(), indent=2))
    else:
        show_config()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m batchnorm", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    text = "measure, on handwritten digits, each claim made for batch normalization"
    demo_parser = commands.add_parser("demo", help=text, description=text)
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)

    text = "time it against a copy of the same bytes, and against other libraries"
    bench_parser = commands.add_parser("bench", help=text, description=text)
    bench.add_arguments(bench_parser)
    bench_parser.set_defaults(run=bench.run)

    text = "version, compiler, instruction sets built, available and active, threads"
    info_parser = commands.add_parser("info", help=text, description=text)
    info_parser.add_argument("--json", action="store_true", help="as JSON")
    info_parser.set_defaults(run=_info)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; give its exit code."""
    parsed = _parser().parse_args(arguments)
    return int(parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main())
