"""A layer that is called with the options of a function gives the function's bits and gradients (tests/matrix.py lists them)."""

import numpy as np
import pytest

import batchnorm as bn
import matrix
import test_matrix as of_functions
from batchnorm.derivatives import backward
from batchnorm.running import update_running
from test_matrix import BETA, CHANNELS, DY, GAMMA, MEAN, VAR, X, options_of

# r_max and d_max of test_matrix's Renorm, whatever the step.
SCHEDULE = bn.RenormSchedule.constant(1.3, 0.4)
OF_LAYER = ("ghost_size", "activation")

cases = pytest.mark.parametrize("case", matrix.OF_LAYER, ids=lambda case: case.id)


def called(case):
    """Give the layer and the options of its call, the mode being training unless statistics are given."""
    options = options_of(case)
    settings = {name: options.pop(name) for name in OF_LAYER if name in options}
    if options.pop("renorm", None) is not None:
        settings["renorm"] = SCHEDULE
    if case.shares == "instances":
        settings["ghost_size"] = 1  # a sample is a ghost of one
    if case.counts == "weights":
        settings["weights_are"] = "counts"
    layer = bn.BatchNorm(CHANNELS, eps=options.pop("eps"), ddof=0, dtype=np.float64, **settings)
    layer.gamma, layer.beta = GAMMA, BETA
    state = layer.state_dict()
    layer.load_state_dict(state | {"running_mean": MEAN, "running_var": VAR})
    return layer.train(case.statistics != "given"), options


def run(case):
    layer, options = called(case)
    x = X.copy()
    return layer, layer(x, **options, **({"out": x} if case.kept == "y in place" else {}))


@cases
def test_a_layer_gives_the_bits_of_the_function(case):
    y, _ = of_functions.run(case)
    assert run(case)[1].tobytes() == y.tobytes()


@cases
def test_backward_of_a_layer_is_that_of_the_function(case):
    _, saved = of_functions.run(case)
    expected = backward(DY, saved)
    layer, _ = run(case)
    assert layer.backward(DY).tobytes() == expected.dx.tobytes()
    assert layer.dgamma.tobytes() == expected.dgamma.tobytes()
    assert layer.dbeta.tobytes() == expected.dbeta.tobytes()
    assert (layer.dresidual is None) == (expected.dresidual is None)
    if layer.dresidual is not None:
        assert layer.dresidual.tobytes() == expected.dresidual.tobytes()


@cases
def test_a_layer_learns_what_update_running_gives(case):
    layer, _ = run(case)
    mean, var = MEAN, VAR
    if case.statistics != "given":
        _, saved = of_functions.run(case)
        ddof = None if case.statistics == "renorm" else 0
        mean, var = update_running(mean, var, saved, update_rate=0.1, ddof=ddof)
    assert layer.running_mean.tobytes() == mean.tobytes()
    assert layer.running_var.tobytes() == var.tobytes()
    assert layer.update_count == (case.statistics != "given")
