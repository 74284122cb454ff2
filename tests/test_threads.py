"""How many threads work: what a call, the process and the environment say is heard by every function and the layer."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import _core
from every_call import ALL, Arguments

# Large enough for each pass to be shared (288 KB a tensor), and ghosts and segments enough for three threads.
SHAPE = (60, 6, 200)


@pytest.fixture(scope="module")
def arguments():
    return Arguments(SHAPE)


@pytest.fixture
def limit():
    """Set a limit for the process, and take it away afterwards."""
    yield bn.set_num_threads
    bn.set_num_threads(None)


def worked(call):
    """Run it, and tell how many threads have worked."""
    _core.threads_worked()
    call()
    return _core.threads_worked()


@pytest.mark.parametrize("name", ALL)
def test_a_function_hears_num_threads(name, arguments):
    for n in (3, 2, 1):
        assert worked(partial(ALL[name], arguments, num_threads=n)) == n


@pytest.mark.parametrize("name", ALL)
def test_a_function_hears_the_limit_of_the_process(name, arguments, limit):
    before = bn.get_num_threads()
    limit(1)
    assert worked(lambda: ALL[name](arguments)) == 1
    assert worked(lambda: ALL[name](arguments, num_threads=3)) == 3
    limit(2)
    assert worked(lambda: ALL[name](arguments)) == min(before, 2)


def test_every_function_hears_omp_num_threads():
    code = """
from batchnorm import _core
from every_call import ALL, Arguments
a = Arguments({shape})
for name, call in ALL.items():
    _core.threads_worked()
    call(a)
    print(name, _core.threads_worked())
"""
    done = subprocess.run(
        [sys.executable, "-c", code.format(shape=SHAPE)],
        env={**os.environ, "OMP_NUM_THREADS": "3"},
        cwd=Path(__file__).parent,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split("\n")[:-1] == [f"{name} 3" for name in ALL]


def training(layer, a):
    return lambda: layer.train()(a.x)


def with_mask(layer, a):
    return lambda: layer.train()(a.x, mask=a.mask)


def backward(layer, a):
    layer.train()(a.x)
    return lambda: layer.backward(a.dy)


def evaluation(layer, a):
    return lambda: layer.eval()(a.x)


def backward_of_evaluation(layer, a):
    layer.eval()(a.x)
    return lambda: layer.backward(a.dy)


def moments_alone(layer, a):
    return lambda: layer.eval()(a.x, use_stats="batch", update_stats=True)


LAYERS = {
    "plain": {},
    "ghosts": {"ghost_size": 3},
    "renorm": {"renorm": bn.RenormSchedule.constant(2.0, 3.0)},
    "relu": {"activation": "relu"},
}
STEPS = (training, backward, evaluation, backward_of_evaluation, moments_alone)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_hears_its_num_threads(kind, step, arguments):
    for n in (3, 1):
        layer = bn.BatchNorm(SHAPE[1], num_threads=n, **LAYERS[kind])
        assert worked(step(layer, arguments)) == n


def test_a_layer_with_a_mask_hears_its_num_threads(arguments):
    for n in (3, 1):
        assert worked(with_mask(bn.BatchNorm(SHAPE[1], num_threads=n), arguments)) == n


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "renorm"])
def test_a_layer_that_updates_without_its_batch_hears_its_num_threads(kind, arguments):
    for n in (3, 1):
        layer = bn.BatchNorm(SHAPE[1], num_threads=n, **LAYERS[kind])
        assert worked(partial(layer.eval(), arguments.x, use_stats="running", update_stats=True)) == n
        refusing = bn.BatchNorm(SHAPE[1], num_threads=n, nonfinite="raise", **LAYERS[kind])
        assert worked(partial(refusing, arguments.x, out=np.empty_like(arguments.x))) == n
