"""Where memory runs out: what the core has written is delivered without asking for more."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="allocations are made to fail by names of glibc")
def test_no_call_wants_memory_once_it_has_written(tmp_path):
    """Else `out` would have changed under a MemoryError. The layer's statistics are as they were, whatever is raised."""
    library = tmp_path / "failing_malloc.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "a C compiler is needed, as for the library itself"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "failing_malloc.c"], check=True)
    done = subprocess.run(
        [sys.executable, HERE / "failing_memory.py"],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "84 calls, 4 layers\n"), done.stderr
