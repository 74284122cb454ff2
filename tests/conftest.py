"""What tests vary, as named fixtures: layout, dtype, threads, isa. And the machine, in the report's header."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import settings

import batchnorm as bn

# The oracle and the tables are modules of this folder, which importlib's import mode does not put on the path.
sys.path.insert(0, str(Path(__file__).parent))

# The same examples on every run; no deadline, since a test must not depend on how busy the machine is.
settings.register_profile("batchnorm", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("batchnorm")


class Layout(NamedTuple):
    """A C-contiguous shape and where its channels are."""

    name: str
    shape: tuple
    axis: int

    @property
    def channels(self):
        return self.shape[self.axis]

    def normal(self, dtype, seed=0):
        """Give normals whose mean and spread differ from channel to channel."""
        rng = np.random.default_rng(seed)
        shape = [1] * len(self.shape)
        shape[self.axis] = -1
        mean, std = rng.normal(0, 3, self.channels), rng.uniform(0.5, 2, self.channels)
        values = rng.normal(size=self.shape) * std.reshape(shape) + mean.reshape(shape)
        return values.astype(dtype)


LAYOUTS = [
    Layout("nchw", (4, 5, 6, 7), 1),
    Layout("nhwc", (4, 6, 7, 5), -1),
    Layout("nc", (97, 5), 1),
    Layout("channel_in_the_middle", (3, 4, 5, 6, 3), 2),
]


def pytest_addoption(parser):
    parser.addoption(
        "--no-absent-libraries",
        action="store_true",
        help="what is skipped for want of a library fails, as in CI",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    wanted = item.config.getoption("no_absent_libraries")
    if report.skipped and wanted and call.excinfo and call.excinfo.traceback[-1].name == "importorskip":
        *_, reason = report.longrepr
        report.outcome, report.longrepr = "failed", f"{reason} (a failure under --no-absent-libraries)"
    return report


def pytest_report_header():
    facts = []
    for key, value in bn.show_config("dicts").items():
        inner = value if isinstance(value, dict) else {"": value}
        facts.append(f"batchnorm {key}: " + ", ".join(f"{k} {v}".strip() for k, v in inner.items()))
    return [*facts, f"numpy {np.__version__}, python {sys.version.split()[0]}"]


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.name)
def layout(request):
    return request.param


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture(params=[1, 2, 3, 7], ids=lambda n: f"{n}_threads" if n > 1 else "1_thread")
def threads(request):
    return request.param


@pytest.fixture(params=bn.available_isas())
def isa(request):
    """Give the name of an instruction set this machine can run. Forced at load time, so use it with `python_with_isa`."""
    return request.param


@pytest.fixture(scope="session")
def python_with_isa():
    """Run Python code in a process of its own with BATCHNORM_ISA set, in this folder; give the process."""

    def run(name, code):
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "BATCHNORM_ISA": name},
            cwd=Path(__file__).parent,
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
