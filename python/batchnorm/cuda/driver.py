"""The module of functions for GPUs, in builds that have it, and what is known of devices."""

from __future__ import annotations

import functools
import importlib
from typing import Any

Where = tuple[int, int]  # a device and the address of a stream
LEGACY_STREAM = 1  # the default stream, by the handle that says so

NOT_BUILT = (
    "{} is on a CUDA device, but this batchnorm was built without CUDA; build it with -DBATCHNORM_CUDA=ON or pass a NumPy "
    "array"
)


@functools.cache
def _found() -> Any:
    try:
        return importlib.import_module("batchnorm._cuda")
    except ModuleNotFoundError:
        return None


def module(name: str = "x") -> Any:
    """Give ``batchnorm._cuda``. RuntimeError where this build has none, of which `name` is the argument that asks."""
    found = _found()
    if found is None:
        raise RuntimeError(NOT_BUILT.format(name))
    return found


def facts() -> dict[str, Any]:
    """Tell whether this build has functions for GPUs, and which there are or what is missing; makes no context."""
    found = _found()
    if found is None:
        return {"built": False}
    try:
        return {"built": True, "devices": [found.describe_device(d) for d in range(found.count_devices())]}
    except RuntimeError as error:
        return {"built": True, "missing": str(error)}
