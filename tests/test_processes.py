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
    bn._core.threads_worked()
    mean = float(bn.moments(x, num_threads=4).mean.sum())
    os.write(writer, f"{{mean}} by {{bn._core.threads_worked()}}".encode())
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
def test_a_forked_child_computes_with_threads_whatever_used_some_before(used):
    done = python(FORK.format(before=USED[used]))
    assert (done.stdout.strip(), done.returncode) == ("20000.0 by 4", 0), done.stderr


AT_EXIT = """
import threading, time
import numpy as np, batchnorm as bn
x = np.ones((64, 16, 1024), np.float32)  # large enough for the GIL to be released
_, saved = bn.batch_norm(x)
calls = 0
def work():
    global calls
    while True:
        {call}
        calls += 1
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
while calls < 3:
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    "call",
    [
        "bn.batch_norm(x, num_threads=1)",
        "bn.backward(x, saved, num_threads=2)",
        "bn.batch_norm(x, mask=np.ones((64, 1024), bool))",
        'bn.batch_norm(x, activation="relu")',
    ],
)
def test_a_process_may_exit_while_daemon_threads_compute(call):
    for _ in range(2):
        done = python(AT_EXIT.format(call=call))
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "options",
    ["weights=np.ones(40_000)", "mask=np.ones(40_000, bool)", "segments=np.arange(40_000) // 10", ""],
)
def test_an_unknown_isa_is_an_error_of_every_call(options):
    code = f"""
import numpy as np, batchnorm as bn
x = np.ones((40_000, 4), np.float32)
try:
    bn.batch_norm(x, num_threads=2, {options})
except ValueError as error:
    print(str(error).split(",")[0].split(" one of")[0])
"""
    done = python(code, BATCHNORM_ISA="nonsense")
    assert (done.stdout.strip(), done.returncode) == ("BATCHNORM_ISA must be", 0), done.stderr


SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
{before}
try:
    failed = interpreters.run_string(interpreters.create(), "import batchnorm")
except Exception as error:
    failed = error
print("ImportError" in repr(failed), "subinterpreter" in str(failed))
"""


@pytest.mark.parametrize("before", ["", "import batchnorm"], ids=["first", "again"])
def test_importing_in_a_subinterpreter_is_an_import_error(before):
    done = python(SUBINTERPRETER.format(before=before))
    assert (done.stdout.strip(), done.returncode) == ("True True", 0), done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processors are bound to on Linux alone")
@pytest.mark.parametrize("pinned", ["caller", "openmp"])
def test_workers_have_the_processors_of_the_process(pinned):
    """A pinned thread calls first, or OpenMP has bound the main thread; the others may still use all."""
    code = """
import os, threading, time
all_of_them = os.sched_getaffinity(0)
import numpy as np, batchnorm as bn
before = set(os.listdir("/proc/self/task"))
def call():
    if {pins}:
        os.sched_setaffinity(0, {{min(all_of_them)}})
    bn.moments(np.ones((64, 64, 64), np.float32), num_threads=3)
    workers = set(os.listdir("/proc/self/task")) - before - {{str(threading.get_native_id())}}
    end = time.monotonic() + 10
    while not (good := [os.sched_getaffinity(int(w)) == all_of_them for w in workers] == [True, True]):
        if time.monotonic() > end:
            break
    print(good)
caller = threading.Thread(target=call)
caller.start()
caller.join()
"""
    pins = pinned == "caller"
    done = python(code.format(pins=pins), **({} if pins else {"OMP_PROC_BIND": "true"}))
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr


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
