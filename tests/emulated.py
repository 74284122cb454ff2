"""A CUDA device that is none: batchnorm._cuda of kernels that run on the CPU, and libraries whose arrays say they are there.

Memory is the host's, so that tests see what was written; the package may not look at it, which `to_numpy` alone does.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path

import numpy as np

import batchnorm
from batchnorm.cuda import driver

ROOT = Path(__file__).parents[1]


def module_file():
    """Give the newest module that was built for this Python, or None."""
    suffix = next(s for s in importlib.machinery.EXTENSION_SUFFIXES if "cpython" in s or "abi3" in s)
    found = ROOT.glob(f"build/**/emulated/_cuda{suffix}")
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


@contextlib.contextmanager
def module(file):
    """Let the package find this module."""
    spec = importlib.util.spec_from_file_location("batchnorm._cuda", file)
    emulated = sys.modules.get("batchnorm._emulated_cuda")
    if emulated is None:  # once a process, as all modules of C
        emulated = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(emulated)
        sys.modules["batchnorm._emulated_cuda"] = emulated
    sys.modules["batchnorm._cuda"] = emulated
    driver._found.cache_clear()
    try:
        yield emulated
    finally:
        del sys.modules["batchnorm._cuda"]
        if hasattr(batchnorm, "_cuda"):
            del batchnorm._cuda
        driver._found.cache_clear()


class Foreign:
    """An array of a library of which the package knows the protocols alone: DLPack."""

    def __init__(self, values, device=0, read_only=False):
        self.values, self.device, self.read_only = values, device, read_only
        self.streams = []

    shape = property(lambda self: self.values.shape)
    size = property(lambda self: self.values.size)
    ndim = property(lambda self: self.values.ndim)
    nbytes = property(lambda self: self.values.nbytes)

    def __dlpack_device__(self):
        return 2, self.device

    def __dlpack__(self, *, stream=None, max_version=None):
        self.streams.append(stream)
        a = self.values
        kind = 4 if a.dtype.name == "bfloat16" else {"i": 0, "u": 1, "f": 2, "b": 6}[a.dtype.kind]
        strides = [s // a.itemsize for s in a.strides]
        return driver.module().to_dlpack(
            a.__array_interface__["data"][0], self.device, (kind, 8 * a.itemsize), list(a.shape), strides, self, True
        )


class Older:
    """One that speaks ``__cuda_array_interface__``."""

    def __init__(self, values, stream=1):
        self.values, self.stream = values, stream

    @property
    def __cuda_array_interface__(self):
        return {**self.values.__array_interface__, "stream": self.stream, "version": 3}


def values_of(a):
    """Give what an array on the device holds, None through."""
    if a is None or isinstance(a, np.ndarray):
        return a
    return a.values if isinstance(a, Foreign | Older) else a.to_numpy()
