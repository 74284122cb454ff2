"""Twelve faults that were dangerous, each as the call that showed it. A case passes where the call does what is promised.

    python tests/reproductions.py           all, each in a process of its own; exit code 1 where one fails
    python tests/reproductions.py NAME      one, in this process

Where a fault comes back, the test of its own file says more; this is the list to run first on a new machine or build.
"""

import ctypes
import math
import mmap
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np

import batchnorm as bn

SECONDS = 120  # until a case counts as hanging


def at_the_end_of_mapped_memory(values):
    """Copy an array to memory behind which nothing is mapped."""
    values = np.ascontiguousarray(values)
    page = mmap.PAGESIZE
    size = -(-values.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + size), page, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = np.frombuffer(memory, values.dtype, values.size, size - values.nbytes).reshape(values.shape)
    copy[...] = values
    return copy


def masks_read_no_byte_behind_the_array():
    rng = np.random.default_rng(0)
    for length in range(1040, 1104):
        x = at_the_end_of_mapped_memory(rng.normal(size=(1, 2, length)).astype(np.float32))
        for weights in (rng.random((1, length)) < 0.5, rng.uniform(size=(1, length))):
            w = at_the_end_of_mapped_memory(weights.astype(np.float32))
            _, saved = bn.batch_norm(x, weights=w)
            bn.backward(x, saved)


def an_unknown_isa_is_an_error_on_every_way():
    code = (
        "import numpy as np, batchnorm as bn\n"
        "x = np.ones((40000, 4), np.float32)\n"
        "for options in ({}, {'mask': np.arange(40000) % 2 > 0}, {'segments': np.arange(40000) // 100}):\n"
        "    try:\n"
        "        bn.batch_norm(x, num_threads=2, **options)\n"
        "    except ValueError as error:\n"
        "        assert 'BATCHNORM_ISA' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(options)\n"
    )
    environment = {**os.environ, "BATCHNORM_ISA": "nonsense"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=SECONDS)


def a_process_may_end_while_a_daemon_thread_computes():
    def work():
        x = np.ones((64, 64, 32, 32), np.float32)
        while True:
            bn.batch_norm(x)

    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    threading.Event().wait(0.2)
    # The case passes where this process now exits with code 0.


def a_state_of_other_settings_is_not_taken():
    x = np.random.default_rng(0).normal(size=(20, 3))
    layer, other = bn.BatchNorm(3, eps=1e-5), bn.BatchNorm(3, eps=1.0)
    layer(x)
    try:
        other.load_state_dict(layer.state_dict())
    except ValueError as error:
        assert "eps" in str(error), error
    else:
        np.testing.assert_array_equal(other.eval()(x), layer.eval()(x))


def a_subinterpreter_gets_an_import_error():
    try:
        import _interpreters as interpreters
    except ImportError:
        import _xxsubinterpreters as interpreters

    try:
        failed = interpreters.run_string(interpreters.create(), "import batchnorm")
    except Exception as error:  # noqa: BLE001 - whatever it raises
        failed = error
    assert "ImportError" in repr(failed), failed


def far_apart_segment_ids_take_no_memory():
    limit = 4 << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        y, _ = bn.batch_norm(np.array([[1.0], [3.0], [5.0], [7.0]]), segments=[0, 0, 100_000_000, 100_000_000])
    except ValueError as error:
        assert "segments" in str(error), error
    else:
        np.testing.assert_allclose(y[:, 0], [-1, 1, -1, 1], rtol=1e-4)


def weights_of_float64_keep_the_variance():
    rng = np.random.default_rng(0)
    x, w = 1e5 + rng.normal(size=2000), rng.uniform(size=2000)
    values, weights = [[Fraction(v) for v in a.tolist()] for a in (x, w)]
    total = sum(weights)
    mean = sum(a * b for a, b in zip(weights, values, strict=True)) / total
    var = sum(a * (b - mean) ** 2 for a, b in zip(weights, values, strict=True)) / total
    got = bn.moments(x[:, None], weights=w).var()[0]
    assert abs(Fraction(float(got)) - var) <= var * Fraction(2) ** -52


def y_is_right_where_beta_is_just_below_a_power_of_two():
    steps = np.array([-2, -1, -1, -1, 0, 0, 0], np.int32)
    x = (np.full(7, 1.33377540, np.float32).view(np.int32) + steps).view(np.float32)[:, None]
    gamma, beta = np.array([0.013389457], np.float32), np.array([-3.99996089], np.float32)
    y, _ = bn.batch_norm(x, gamma, beta, eps=0.0)
    wide = x.astype(np.float64)
    before_beta = (wide - wide.mean()) / wide.std() * float(gamma[0])
    bound = 3 * 2.0**-24 * np.abs(before_beta).max() + np.spacing(np.maximum(np.abs(y), np.abs(beta)))
    assert (np.abs(y - (before_beta + float(beta[0]))) <= bound).all()


def float64_far_from_zero_is_no_nan():
    y, saved = bn.batch_norm(np.full((1000, 1), 1.797e303), beta=np.array([3.0]))
    assert (y == 3.0).all()
    assert saved.moments.var()[0] == 0.0


def importance_weights_give_a_sane_running_variance():
    rng = np.random.default_rng(0)
    for seed in range(200):
        w = np.random.default_rng(seed).uniform(size=50)
        layer = bn.BatchNorm(1, update_rate=1.0)
        try:
            layer(rng.normal(size=(50, 1)), weights=w / w.sum())
        except ValueError as error:
            assert "weights" in str(error), error
        else:
            assert 0.1 < layer.running_var[0] < 10, layer.running_var


def an_interrupted_call_changes_nothing_of_the_layer():
    class Interrupted(Exception):
        pass

    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 8, 3))
    package = str(Path(bn.__file__).parent)

    def interrupting_at(n):
        seen = 0

        def trace(frame, event, argument):
            nonlocal seen
            if frame.f_code.co_filename.startswith(package):
                seen += 1
                if seen == n:
                    raise Interrupted
            return trace

        return trace

    for n in range(1, 2000):
        layer = bn.BatchNorm(3)
        layer(first)
        before = layer.update_count, layer.running_mean.copy(), layer.backward(first).copy()
        layer(first)
        sys.settrace(interrupting_at(n))
        try:
            layer(second)
        except Interrupted:
            pass
        else:
            break
        finally:
            sys.settrace(None)
        is_new = layer.update_count == before[0] + 2
        of_call = bn.BatchNorm(3)
        of_call(second if is_new else first)
        np.testing.assert_array_equal(layer.backward(first), of_call.backward(first))


def saving_replaces_no_device_and_keeps_the_mode():
    layer = bn.BatchNorm(3)
    with tempfile.TemporaryDirectory() as folder:
        pipe, private = Path(folder) / "pipe", Path(folder) / "private.npz"
        os.mkfifo(pipe)
        try:
            layer.save(pipe)
        except (OSError, ValueError):
            assert stat.S_ISFIFO(pipe.lstat().st_mode)
        else:
            raise AssertionError("a pipe was written to")
        layer.save(private)
        private.chmod(0o600)
        layer.save(private)
        assert private.stat().st_mode & 0o777 == 0o600


CASES = [
    masks_read_no_byte_behind_the_array,
    an_unknown_isa_is_an_error_on_every_way,
    a_process_may_end_while_a_daemon_thread_computes,
    a_state_of_other_settings_is_not_taken,
    a_subinterpreter_gets_an_import_error,
    far_apart_segment_ids_take_no_memory,
    weights_of_float64_keep_the_variance,
    y_is_right_where_beta_is_just_below_a_power_of_two,
    float64_far_from_zero_is_no_nan,
    importance_weights_give_a_sane_running_variance,
    an_interrupted_call_changes_nothing_of_the_layer,
    saving_replaces_no_device_and_keeps_the_mode,
]


def outcome(name):
    """Run one case in a process of its own; give "held", or what became of it."""
    try:
        process = subprocess.run(
            [sys.executable, __file__, name], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    if process.returncode == 0:
        return "held"
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}"
    return (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]


def main(names):
    if names:
        for case in CASES:
            if case.__name__ in names:
                case()
        return 0
    failed = 0
    width = max(len(case.__name__) for case in CASES)
    for case in CASES:
        result = outcome(case.__name__)
        failed += result != "held"
        print(f"{case.__name__.replace('_', ' '):{width}}  {result}", flush=True)
    print(f"{len(CASES) - failed} passed, {failed} failed")
    return math.ceil(failed / len(CASES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
