"""Threads and processes as users set them up: forks, odd settings, many Python threads at once."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import batchnorm as bn

FORK = """
import os, select
import numpy as np, batchnorm as bn
{before}
x = np.ones((4, 20000, 20), np.float32)
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.write(writer, repr(float(bn.moments(x, num_threads=4).mean.sum())).encode())
    os._exit(0)
answered = select.select([reader], [], [], 30)[0]
if not answered:
    os.kill(child, 9)
print(os.read(reader, 100).decode() if answered else "hung")
os.waitpid(child, 0)
"""
USED = {
    "this_library": "bn.moments(np.ones((4, 20000, 20), np.float32), num_threads=4)",
    "openmp_elsewhere": """
import ctypes
ctypes.CDLL("libgomp.so.1").GOMP_parallel(ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p), None, 4, 0)
""",
    "nothing": "",
}


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("used", USED)
def test_a_forked_child_computes_whatever_used_threads_before(used):
    done = python(FORK.format(before=USED[used]))
    assert (done.stdout.strip(), done.returncode) == ("20000.0", 0), done.stderr


@pytest.mark.parametrize("setting", ["100000", "0", "many", ""])
def test_an_odd_omp_num_threads_is_survived(setting):
    code = (
        "import numpy as np, batchnorm as bn;"
        "print(bn.moments(np.ones((4, 20000, 20), np.float32)).mean.sum(), 1 <= bn.get_num_threads() <= 4096)"
    )
    done = python(code, OMP_NUM_THREADS=setting)
    assert (done.stdout.strip(), done.returncode) == ("20000.0 True", 0), done.stderr


def test_a_limit_beyond_all_machines_is_none():
    before = bn.get_num_threads()
    bn.set_num_threads(10**9)
    try:
        assert bn.get_num_threads() == before
    finally:
        bn.set_num_threads(None)


def test_python_threads_at_once_get_the_bits_of_one():
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 2, (16, 5, 60, 60)).astype(np.float32) for _ in range(8)]
    expected = [bn.batch_norm(x, num_threads=1)[0] for x in batches]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: bn.batch_norm(x, num_threads=2)[0], batches))
    for y, alone in zip(results, expected, strict=True):
        np.testing.assert_array_equal(y, alone)
