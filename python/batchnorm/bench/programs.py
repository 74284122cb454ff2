"""Where the compiled programs are, and what a run of batchnorm-bench writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchnorm.info import compiled_directory


class Missing(Exception):
    """A program is not there, or failed; the text says which and why."""


def find(name: str, folder: Path | None) -> Path | None:
    """Find a program in the folder that was given, else in the package, else on the path."""
    for place in (folder, compiled_directory() / "bench"):
        if place is not None and (place / name).is_file():
            return (place / name).resolve()
    on_path = shutil.which(name)
    return Path(on_path) if on_path else None


def run_bench(folder: Path | None, arguments: Sequence[str]) -> dict[str, Any]:
    """Run batchnorm-bench with these arguments and give its JSON."""
    program = find("batchnorm-bench", folder)
    if program is None:
        raise Missing("batchnorm-bench was not found; --programs tells where it is")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "out.json"
        command = [str(program), *arguments, "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Missing(done.stderr.strip())
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return result
