"""What this build is, what this machine runs of it, and the process's setting of threads."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from batchnorm import _core, _keywords, _validate, _where

if TYPE_CHECKING:
    from pathlib import Path


def available_isas() -> list[str]:
    """Instruction sets compiled in that this machine runs, best first.

    All give the same bits. The environment variable BATCHNORM_ISA, read at the first call that computes, forces one by
    name; also "reference", the definition in plain float64 loops.

    >>> active_isa() in [*available_isas(), "reference"]
    True
    """
    return _core.available_isas()


def active_isa() -> str:
    """Name the instruction set in use.

    ValueError where BATCHNORM_ISA names none that can run here; the text lists those that can.

    >>> active_isa() in [*available_isas(), "reference"]
    True
    """
    return _core.active_isa()


@_keywords.keywords
def set_num_threads(num_threads: int | None) -> None:
    """Limit the threads of every call in this process that has no `num_threads` of its own; None removes the limit.

    Results do not depend on it. OMP_NUM_THREADS and threadpoolctl work too, and the smallest wins. TypeError or ValueError
    for what is not an int >= 1 or None.

    >>> set_num_threads(1)
    >>> get_num_threads()
    1
    >>> set_num_threads(None)
    """
    _core.set_num_threads(_validate.num_threads(num_threads))


def get_num_threads() -> int:
    """Tell how many threads a large call from this thread would use now."""
    return _core.get_num_threads()


@_keywords.keywords
def explain(
    shape: Sequence[int], *, axis: int = 1, dtype: DTypeLike = np.float32, num_threads: int | None = None
) -> str:
    """Say how a training call on a C-contiguous array of this shape would be cut and visited, for people.

    TypeError or ValueError for sizes, axis or threads that do not fit.

    >>> print(explain((32, 3, 8, 8), num_threads=1))
    problem {outer 32, channels 3, inner 64}: a task is 3 channel(s) (1 chunk(s) a channel, 32 x 64 values each), threads 1
    """
    # An array of that shape that takes no memory: what it would be checked for, it is.
    x = np.broadcast_to(np.zeros((), dtype), shape)
    _validate.array("an array of this shape and dtype", x)
    axis = _validate.axis(axis, x.ndim)
    problem = (prod(x.shape[:axis]), x.shape[axis], prod(x.shape[axis + 1 :]))
    return _core.explain(problem, x.itemsize, _validate.num_threads(num_threads))


def compiled_directory() -> Path:
    """Give the folder of all that is compiled; an editable installation has the Python files elsewhere."""
    from pathlib import Path  # which takes `import batchnorm` more than the rest of it together

    return Path(_core.__file__).parent


def cpp_directory(folder: str, file: str) -> Path:
    """Give a folder that C++ projects are told: the one of headers, or the one of CMake's files.

    FileNotFoundError where it has no such file: this package was not installed by pip, which puts it there.
    """
    path = compiled_directory() / folder
    if not (path / file).is_file():
        raise FileNotFoundError(f"batchnorm must be installed by pip to have {folder}/{file}, got none in {path}")
    return path


def config() -> dict[str, dict[str, Any]]:
    """Collect what `show_config` shows."""
    build = _core.build_info()
    return {
        "batchnorm": {"version": build["version"], "build type": build["build_type"]},
        "compiler": {"name": build["compiler"], "flags": build["flags"], "assertions": build["assertions"]},
        "isa": {"built": _core.built_isas(), "available": available_isas(), "active": active_isa()},
        "threads": {"openmp": build["openmp"], "num_threads": get_num_threads()},
        "cuda": _where.facts(),
        "python": {"version": platform.python_version(), "numpy": np.__version__, "platform": platform.platform()},
    }


@_keywords.keywords
def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, dict[str, Any]] | None:
    """Show version, compiler, flags, instruction sets (built, available, active), threads, and GPUs or what is missing for them.

    mode : "stdout" prints text; "dicts" returns the same as nested dictionaries that JSON can hold. ValueError for others.

    >>> sorted(show_config("dicts"))
    ['batchnorm', 'compiler', 'cuda', 'isa', 'python', 'threads']
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    facts = config()
    if mode == "dicts":
        return facts
    for title, entries in facts.items():
        print(f"{title}:")
        for name, value in entries.items():
            text = ", ".join(value) if isinstance(value, list) else value
            print(f"  {name}: {text}")
    return None
