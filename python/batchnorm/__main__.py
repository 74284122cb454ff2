"""The command line: ``python -m batchnorm demo``, ``bench`` and ``info``; ``--cmakedir`` and ``--includes`` for C++."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from batchnorm import __version__, bench, demo, show_config
from batchnorm.info import config, cpp_directory


class _Print(argparse.Action):
    """An option that prints one line, as --version does, and ends the program."""

    def __init__(self, *, text: Callable[[], str], **others: Any) -> None:
        super().__init__(nargs=0, **others)
        self.text = text

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            print(self.text())
        except FileNotFoundError as error:
            parser.error(str(error))
        parser.exit()


def _info(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps(config(), indent=2))
    else:
        show_config()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m batchnorm", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    text = "print the folder of batchnormConfig.cmake, for -Dbatchnorm_DIR="
    cmake = partial(cpp_directory, "lib/cmake/batchnorm", "batchnormConfig.cmake")
    parser.add_argument("--cmakedir", action=_Print, text=lambda: str(cmake()), help=text)
    text = "print the compiler's option that finds the C++ headers"
    include = partial(cpp_directory, "include", "batchnorm/batchnorm.hpp")
    parser.add_argument("--includes", action=_Print, text=lambda: f"-I{include()}", help=text)
    commands = parser.add_subparsers(required=True, metavar="command")

    claims = "measure, on handwritten digits, each claim made for batch normalization"
    times = "time it against a copy of the same bytes, and against other libraries"
    for name, program, text in (("demo", demo, claims), ("bench", bench, times)):
        of_program = commands.add_parser(name, help=text, description=text)
        program.add_arguments(of_program)
        of_program.set_defaults(run=program.run)

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
