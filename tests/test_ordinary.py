"""The ordinary call, done whole in the binding: it gives what the general way gives, and leaves all else to that."""

import copy
import dataclasses
import pickle
import sys
import tracemalloc
import weakref

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import _core, _validate

NEEDS = ("x", "gamma", "beta")
SHAPE = (4, 3, 5, 2)


class Arguments:
    """Ordinary arguments of every function, of one dtype, fresh for every test."""

    def __init__(self, dtype=np.float32, parameters=np.float32, axis=1):
        rng = np.random.default_rng(11)
        channels = SHAPE[axis]
        self.x, self.dy = rng.normal(3, 2, SHAPE).astype(dtype), rng.normal(size=SHAPE).astype(dtype)
        self.out = np.full(SHAPE, 7, dtype)
        self.gamma, self.beta, self.mean = (rng.normal(size=channels).astype(parameters) for _ in range(3))
        self.var = rng.uniform(1, 2, channels).astype(parameters)
        self.axis, self.eps, self.num_threads, self.needs = axis, 1e-3, None, NEEDS
        self.moments = bn.moments(self.x, axis=axis)
        self.update_rate, self.ddof, self.options = 0.1, 1, None
        self.how = None, 2, None, False, None, 1, 0  # weights, padding, bits, has_residual, offsets, width, about

    def saved(self):
        return bn.Saved(self.x, self.moments, self.gamma, self.axis % 4, self.eps)

    def frozen(self):
        return bn.Saved(self.x, None, self.gamma, self.axis % 4, self.eps, given=(self.mean, self.var))

    def bytes(self):
        return {name: v.tobytes() for name, v in vars(self).items() if isinstance(v, np.ndarray)}


def of(arguments, *names):
    return {name: getattr(arguments, name) for name in names}


FUNCTIONS = {
    "moments": lambda a: bn.moments(a.x, **of(a, "axis", "num_threads")),
    "batch_norm": lambda a: bn.batch_norm(a.x, a.gamma, a.beta, **of(a, "axis", "eps", "out", "num_threads")),
    "normalize": lambda a: bn.normalize(
        a.x, a.mean, a.var, a.gamma, a.beta, **of(a, "axis", "eps", "out", "num_threads")
    ),
    "batch_norm_backward": lambda a: bn.backward(a.dy, a.saved(), **of(a, "needs", "out", "num_threads")),
    "normalize_backward": lambda a: bn.backward(a.dy, a.frozen(), **of(a, "needs", "out", "num_threads")),
    "update_running": lambda a: bn.update_running(
        a.mean.astype(float), a.var.astype(float), a.moments, **of(a, "update_rate", "ddof")
    ),
}


def tuple_of(*items):
    return items


TRIES = {
    "moments": lambda a: _core.try_moments(a.x, a.axis, a.num_threads),
    "batch_norm": lambda a: _core.try_batch_norm(
        tuple_of, a.x, a.gamma, a.beta, a.axis, a.eps, a.out, a.num_threads, a.options, None
    ),
    "normalize": lambda a: _core.try_normalize(
        a.x, a.mean, a.var, a.gamma, a.beta, a.axis, a.eps, a.out, a.num_threads, a.options
    ),
    "batch_norm_backward": lambda a: _core.try_batch_norm_backward(
        bn.Gradients,
        a.dy,
        a.x,
        a.moments._table,
        a.gamma,
        a.axis,
        a.eps,
        a.needs,
        a.out,
        a.num_threads,
        *a.how,
    ),
    "normalize_backward": lambda a: _core.try_normalize_backward(
        bn.Gradients, a.dy, a.x, a.mean, a.var, a.gamma, a.axis, a.eps, a.needs, a.out, a.num_threads
    ),
    "update_running": lambda a: _core.try_update_running(
        a.mean, a.var, a.moments._table, a.update_rate, a.ddof, None, False
    ),
}
WITH_OUT = [name for name in FUNCTIONS if name not in ("moments", "update_running")]


def bits(result):
    """Everything in a result, as what compares bit for bit."""
    if isinstance(result, np.ndarray):
        return result.dtype.str, result.shape, result.strides, result.tobytes()
    if isinstance(result, bn.Saved):
        fields = (result.moments, result.rstd, result.gamma, result.axis, result.eps, result.part.weights)
        rest = (
            result.part.padding,
            result.has_residual,
            None if result.relu is None else result.relu.to_bool(),
        )
        return result.x is None, *(bits(field) for field in (*fields, *rest))
    if isinstance(result, bn.Moments):
        return bits(result._table)
    if isinstance(result, tuple):
        return type(result), *(bits(each) for each in result)
    return type(result), result


@pytest.fixture
def general_calls(monkeypatch):
    """Count the calls that took the general way, whose first check is that of x, or of a rate, a share."""
    calls = []
    for name in ("array", "instance", "share"):
        check = getattr(_validate, name)
        monkeypatch.setattr(_validate, name, lambda *a, check=check: calls.append(a) or check(*a))
    return calls


# ---- what it gives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_ordinary_call_does_not_take_the_general_way(function, general_calls):
    FUNCTIONS[function](Arguments())
    assert general_calls == []


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_layer_makes_ordinary_calls(mode, general_calls):
    layer, a = bn.BatchNorm(3).train(mode == "training"), Arguments()
    layer(a.x, out=a.out)
    layer.backward(a.dy)
    assert general_calls == []


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -4])
@pytest.mark.parametrize("parameters", [np.float32, np.float64, None], ids=["p32", "p64", "none"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_both_ways_give_the_same_bits(function, parameters, axis, dtype, general_calls):
    results = []
    for general in (False, True):
        a = Arguments(dtype, parameters or np.float64, axis)
        if parameters is None:
            a.gamma = a.beta = None
        if general:  # NumPy's numbers are as good as Python's, but not ordinary
            a.num_threads, a.ddof = np.int64(1), np.int64(1)
        results.append((bits(FUNCTIONS[function](a)), a.bytes()))
        assert bool(general_calls) == general
    assert results[0] == results[1]


PLACES_OF_OUT = [(function, out) for function in WITH_OUT for out in ("new", "x", "view_of_x", "dy")]
PLACES_OF_OUT = [(function, out) for function, out in PLACES_OF_OUT if out != "dy" or "backward" in function]


@pytest.mark.parametrize(("function", "out"), PLACES_OF_OUT)
def test_both_ways_write_the_same_bits_wherever_out_is(function, out, general_calls):
    results = []
    for general in (False, True):
        a = Arguments()
        a.out = {"new": None, "x": a.x, "view_of_x": a.x[...], "dy": a.dy}[out]
        if general:
            a.eps, a.num_threads = np.float64(a.eps), np.int64(1)
        result = FUNCTIONS[function](a)
        y = result if isinstance(result, np.ndarray) else result[0]
        assert y is a.out or out == "new"
        results.append((bits(result), a.bytes()))
        assert bool(general_calls) == general
    assert results[0] == results[1]


@pytest.mark.parametrize("needs", [(), ("x",), ("beta", "x"), ("gamma",), ("gamma", "gamma", "beta")])
@pytest.mark.parametrize("function", ["batch_norm_backward", "normalize_backward"])
def test_both_ways_compute_what_is_needed(function, needs, general_calls):
    results = []
    for way in (tuple, list):
        a = Arguments()
        a.needs = way(needs)
        results.append((bits(FUNCTIONS[function](a)), a.bytes()))
        assert bool(general_calls) == (way is list)
    assert results[0] == results[1]


@pytest.mark.parametrize("shape", [(6, 3), (1, 3, 2), (3, 1, 2), (2, 3, 1, 1, 1, 1, 1, 1)])
def test_both_ways_give_arrays_of_the_same_shape_and_strides(shape, general_calls):
    x = np.random.default_rng(3).normal(size=shape)
    ordinary, general = bn.batch_norm(x, num_threads=1), bn.batch_norm(x, num_threads=np.int64(1))
    assert bits(ordinary) == bits(general)
    assert len(general_calls) == 1


def options_of(a):
    """Give options that are ordinary, by name."""
    rng = np.random.default_rng(5)
    mask, weights = rng.random((4, 5, 2)) < 0.7, rng.uniform(0, 3, (4, 5, 2)).astype(a.x.dtype)
    return {
        "mask": {"mask": mask},
        "padding": {"mask": mask, "padding": "keep"},
        "relu": {"activation": "relu"},
        "residual": {"residual": a.dy},
        "all": {"mask": mask, "padding": "normalize", "residual": a.dy, "activation": "relu", "keep": "x"},
        "weights": {"weights": weights},
        "importance": {"weights": weights, "weights_are": "importance", "padding": "zero"},
        "ghosts": {"ghost_size": 3},
        "ghosts_mask": {"ghost_size": 2, "mask": mask, "activation": "relu"},
        "nothing": {"mask": None, "activation": None, "keep": "x", "segments": None, "renorm": None},
    }


@pytest.mark.parametrize("out", ["new", "given", "x", "dy"])
@pytest.mark.parametrize("name", options_of(Arguments()))
def test_both_ways_do_the_same_with_options(name, out, dtype, general_calls):
    results = []
    for num_threads in (None, np.int64(1)):
        a = Arguments(dtype)
        a.out = {"new": None, "given": a.out, "x": a.x, "dy": a.dy}[out]
        options = {**options_of(a)[name], "out": a.out, "num_threads": num_threads}
        y, saved = bn.batch_norm(a.x, a.gamma, a.beta, eps=a.eps, **options)
        assert bool(general_calls) == (num_threads is not None)
        results.append((bits(y), bits(saved), a.bytes()))
        general_calls.clear()
        if out != "x":
            gradients = bn.backward(np.ones_like(a.x), saved, num_threads=num_threads)
            assert bool(general_calls) == (num_threads is not None)
            results[-1] += (bits(gradients),)
            general_calls.clear()
    assert results[0] == results[1]


@pytest.mark.parametrize("out", ["new", "given", "x", "dy"])
@pytest.mark.parametrize("name", ["mask", "padding", "relu", "residual", "all"])
def test_both_ways_normalize_the_same_with_options(name, out, dtype, general_calls):
    results = []
    for num_threads in (None, np.int64(1)):
        a = Arguments(dtype)
        a.out = {"new": None, "given": a.out, "x": a.x, "dy": a.dy}[out]
        options = {**options_of(a)[name], "out": a.out, "num_threads": num_threads}
        results.append((bits(bn.normalize(a.x, a.mean, a.var, a.gamma, a.beta, eps=a.eps, **options)), a.bytes()))
        assert bool(general_calls) == (num_threads is not None)
        general_calls.clear()
    assert results[0] == results[1]


OF_SAMPLES = {
    "instance_norm": lambda a, axis, **options: bn.instance_norm(a.x, a.gamma, a.beta, axis=axis, **options),
    "group_norm": lambda a, axis, **options: bn.group_norm(a.x, 1, a.gamma, a.beta, axis=axis, **options),
    "layer_norm": lambda a, axis, **options: bn.layer_norm(a.x, a.gamma, a.beta, axes=axis, **options),
    "rms_norm": lambda a, axis, **options: bn.rms_norm(a.x, a.gamma, a.beta, axes=axis, **options),
}


@pytest.mark.parametrize("axis", [1, 2, 3, -1])
@pytest.mark.parametrize("name", ["nothing", "mask", "padding", "relu", "residual", "all"])
@pytest.mark.parametrize("function", OF_SAMPLES)
def test_both_ways_do_the_same_for_norms_of_samples(function, name, axis, dtype, general_calls):
    results = []
    for num_threads in (None, np.int64(1)):
        a = Arguments(dtype, axis=axis)
        options = dict(options_of(a)[name])
        if options.get("mask") is not None:
            options["mask"] = np.random.default_rng(6).random(np.delete(SHAPE, axis)) < 0.7
        options = {n: v for n, v in options.items() if n not in ("segments", "renorm")}
        y, saved = OF_SAMPLES[function](a, axis, eps=a.eps, num_threads=num_threads, **options)
        gradients = bn.backward(a.dy, saved, num_threads=num_threads)
        # instance_norm looks at x before all else where it is not ordinary.
        assert bool(general_calls) == (num_threads is not None)
        results.append((bits(y), bits(saved), bits(gradients), saved.part[3:5], saved.part[6:]))
        general_calls.clear()
    assert repr(results[0]) == repr(results[1])


# ---- what it leaves to the general way ----------------------------------------------------------------------


class Subclass(np.ndarray):
    pass


def misaligned(array):
    room = np.zeros(array.nbytes + 1, np.uint8)
    view = room[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def read_only(array):
    array.flags.writeable = False
    return array


def next_to(array, values):
    """Give an array of the shape of `array` that starts a few values before the memory of another like it."""
    line = np.zeros(array.size + values, array.dtype)
    return line[: array.size].reshape(array.shape), line[values:].reshape(array.shape)


ARRAY = {
    "list": lambda v: v.tolist(),
    "none": lambda v: None,
    "subclass": lambda v: v.view(Subclass),
    "masked": np.ma.array,
    "big_endian": lambda v: v.astype(v.dtype.newbyteorder(">")),
    "float16": lambda v: v.astype(np.float16),
    "long_double": lambda v: v.astype(np.longdouble),
    "int64": lambda v: v.astype(np.int64),
    "misaligned": misaligned,
    "with_gaps": lambda v: np.repeat(v, 2, axis=-1)[..., ::2],
    "reversed": lambda v: v[::-1],
    "no_values": lambda v: v[:0],
    "no_dimension": lambda v: np.array(1, v.dtype),
}
TENSOR = {
    "transposed": lambda v: v.T,
    "fortran": np.asfortranarray,
    "nine_dimensions": lambda v: v.reshape(v.shape + (1,) * (9 - v.ndim)),
}
OUT = {
    "read_only": read_only,
    "shape": lambda v: v[1:],
    "dimensions": lambda v: v.reshape(v.shape[0], -1),
    "dtype": lambda v: v.astype(np.float64),
}
CHANNELS = {
    "short": lambda v: v[1:],
    "column": lambda v: v[:, None],
}
NUMBERS = {
    "axis": (True, np.int64(1), 1.0, None, "1", 4, -5, 2**70, np.array(1)),
    "eps": (0, True, np.float64(1e-3), np.float32(1e-3), -1e-3, float("nan"), float("inf"), None, "1"),
    "num_threads": (0, -1, True, np.int64(1), 1.0, 2**31, 2**70, "1"),
    "needs": (["x"], "x", ("x", "y"), ("x", 1), ("xx",), None, {"x"}),
    "update_rate": (0, 1, True, np.float64(0.5), -0.1, 1.1, float("nan"), None),
    "ddof": (True, np.int64(1), 1.0, -1, 2**31, None, 40),  # a channel has 40 values
}


def unusual():
    """List (function, name, what makes an ordinary Arguments unusual)."""

    def change(name, make):
        return lambda a: setattr(a, name, make(getattr(a, name)))

    for function in WITH_OUT:
        backward = function.endswith("backward")
        for name in ["x", "out", *["dy"] * backward]:
            for kind, make in (ARRAY | TENSOR | (OUT if name == "out" else {})).items():
                if (name, kind) != ("out", "none"):
                    yield function, f"{name}-{kind}", change(name, make)
        statistics = ["mean", "var"] if function.startswith("normalize") else []
        for name in [*statistics, "gamma", *["beta"] * (not backward)]:
            for kind, make in (ARRAY | CHANNELS).items():
                if kind != "none" or name in statistics:
                    yield function, f"{name}-{kind}", change(name, make)
        for name in ["axis", "eps", "num_threads", *["needs"] * backward]:
            for value in NUMBERS[name]:
                yield function, f"{name}-{value!r}", lambda a, n=name, v=value: setattr(a, n, v)
        for name in ["x", *["dy"] * backward]:
            yield function, f"out-overlaps-{name}", overlap_out_and(name)
            if backward:
                yield function, f"unneeded-out-overlaps-{name}", overlap_out_and(name, needs=("gamma",))
        for name in ["gamma", *statistics, *["beta"] * (not backward)]:
            yield function, f"out-overlaps-{name}", put_into_out(name)
    for kind, make in (ARRAY | TENSOR).items():
        yield "moments", f"x-{kind}", change("x", make)
    for name in ("axis", "num_threads"):
        for value in NUMBERS[name]:
            yield "moments", f"{name}-{value!r}", lambda a, n=name, v=value: setattr(a, n, v)
    for name in ("update_rate", "ddof"):
        for value in NUMBERS[name]:
            yield "update_running", f"{name}-{value!r}", lambda a, n=name, v=value: setattr(a, n, v)
    for name in ("mean", "var"):
        for kind, make in (ARRAY | CHANNELS | {"float32": lambda v: v.astype(np.float32)}).items():
            yield "update_running", f"{name}-{kind}", change(name, make)


def overlap_out_and(name, needs=NEEDS):
    def change(a):
        a.needs = needs
        before, after = next_to(a.x, 3)
        after[...] = getattr(a, name)
        a.out = before
        setattr(a, name, after)

    return change


def put_into_out(name):
    def change(a):
        view = a.out.reshape(-1)[:3]
        view[...] = getattr(a, name)
        setattr(a, name, view)

    return change


ALONE = None, 1, 0  # offsets, width, about
UNUSUAL_HOW = {
    "weights_dtype": (np.ones(40), 2, None, False, *ALONE),
    "weights_shape": (np.ones((4, 10), np.float32), 2, None, False, *ALONE),
    "weights_size": (np.ones(39, np.float32), 2, None, False, *ALONE),
    "weights_list": ([1.0] * 40, 2, None, False, *ALONE),
    "padding": (np.ones(40, np.float32), 3, None, False, *ALONE),
    "bits_dtype": (None, 2, np.zeros(30, np.int8), False, *ALONE),
    "bits_size": (None, 2, np.zeros(7, np.uint8), False, *ALONE),
    "bits_gaps": (None, 2, np.zeros(200, np.uint8)[::2], False, *ALONE),
    "offsets_dtype": (None, 2, None, False, np.array([0, 4], np.int32), 1, 0),
    "offsets_end": (None, 2, None, False, np.array([0, 3]), 1, 0),
    "offsets_gaps": (None, 2, None, False, np.array([0, 1, 4])[::2], 1, 0),
    "offsets_of_positions": (None, 2, None, False, np.array([0, 4]), 1, 1),
    "width": (None, 2, None, False, None, 2, 0),
    "width_0": (None, 2, None, False, None, 0, 0),
    "about": (None, 2, None, False, None, 1, 3),
}


@pytest.mark.parametrize("name", UNUSUAL_HOW)
def test_a_backward_pass_that_is_not_ordinary_is_left_alone(name):
    a = Arguments()
    a.how = UNUSUAL_HOW[name]
    before = a.bytes()
    assert TRIES["batch_norm_backward"](a) is None
    assert a.bytes() == before


UNUSUAL = list(unusual())
MASK = np.ones((4, 5, 2), bool)
UNUSUAL_OPTIONS = {
    "list": {"mask": MASK.tolist()},
    "integers": {"mask": MASK.astype(np.uint8)},
    "order": {"mask": np.asfortranarray(MASK)},
    "subclass": {"mask": MASK.view(Subclass)},
    "channel_axis": {"mask": MASK[:, None]},
    "shape": {"mask": MASK[:, :1]},
    "short": {"mask": MASK[:3]},
    "weights_dtype": {"weights": MASK.astype(np.float64)},
    "weights_shape": {"weights": np.ones((4, 5, 1), np.float32)},
    "weights_list": {"weights": MASK.astype(np.float32).tolist()},
    "weights_negative": {"weights": -MASK.astype(np.float32)},
    "weights_and_mask": {"weights": MASK.astype(np.float32), "mask": MASK},
    "weights_are_alone": {"weights_are": "counts"},
    "weights_are_mass": {"weights": MASK.astype(np.float32), "weights_are": "mass"},
    "lengths": {"lengths": [1, 2, 3, 4]},
    "padding": {"mask": MASK, "padding": "reflect"},
    "padding_alone": {"padding": "zero"},
    "activation": {"activation": "gelu"},
    "residual_dtype": {"residual": np.ones(SHAPE)},
    "residual_shape": {"residual": np.ones((4, 3, 5), np.float32)},
    "keep_y": {"keep": "y"},
    "keep_nothing": {"keep": None},
    "no_ghosts": {"ghost_size": 0},
    "ghosts_float": {"ghost_size": 2.0},
    "ghosts_and_segments": {"ghost_size": 2, "segments": [0, 0, 1, 1]},
    "unknown": {"banana": 1},
    "unknown_none": {"banana": None},
    "none_counts": {"mask": ~MASK | (np.arange(40).reshape(4, 5, 2) == 7)},
}


@pytest.mark.parametrize("name", UNUSUAL_OPTIONS)
def test_options_that_are_not_ordinary_are_left_alone(name):
    a = Arguments()
    a.options = UNUSUAL_OPTIONS[name]
    before = a.bytes()
    assert TRIES["batch_norm"](a) is None
    assert a.bytes() == before


def test_out_that_overlaps_a_residual_is_left_alone():
    a = Arguments()
    a.out, residual = next_to(a.x, 3)
    a.options = {"residual": residual}
    before = a.bytes()
    assert TRIES["batch_norm"](a) is None
    assert a.bytes() == before


@pytest.mark.parametrize("options", [*options_of(Arguments()).values(), *UNUSUAL_OPTIONS.values()])
def test_no_call_keeps_a_reference_to_its_options(options):
    a = Arguments()
    a.options = dict(options)
    held = [a.x, a.dy, a.options, *a.options.values()]
    held = [each for each in held if isinstance(each, (np.ndarray, dict))]
    counts = []
    for _ in range(2):
        for _ in range(200):
            TRIES["batch_norm"](a)
        counts.append([sys.getrefcount(each) for each in held])
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("function", "change"), [(f, c) for f, _, c in UNUSUAL], ids=[f"{f}-{n}" for f, n, _ in UNUSUAL]
)
def test_what_is_not_ordinary_is_left_alone(function, change):
    a = Arguments(parameters=np.float64 if function == "update_running" else np.float32)
    assert TRIES[function](copy.copy(a)) is not None
    a = Arguments(parameters=np.float64 if function == "update_running" else np.float32)
    change(a)
    before = a.bytes()
    assert TRIES[function](a) is None
    assert a.bytes() == before


@pytest.mark.parametrize("function", [name for name in TRIES if name != "moments"])
def test_what_the_core_refuses_is_left_to_the_general_way(function):
    a = Arguments(parameters=np.float64)
    a.var[1] = -1
    a.moments = bn.Moments.empty(3) if function == "batch_norm_backward" else bn.Moments(1, a.mean, a.var * 0)
    if function == "batch_norm":
        a.x = a.x[:1, :, :1, :1].copy()  # one value a channel
        a.out = a.out[:1, :, :1, :1].copy()
    before = a.bytes()
    assert TRIES[function](a) is None
    assert a.bytes() == before
    with pytest.raises(ValueError, match="must"):
        FUNCTIONS[function](a)
    assert a.bytes() == before


def test_an_error_of_the_core_is_reported_once_by_the_general_way(python_with_isa):
    code = """
import numpy as np
import batchnorm as bn
try:
    bn.batch_norm(np.ones((2, 3)))
except ValueError as error:
    print(error)
"""
    names = ", ".join([*bn.available_isas(), "reference"])
    assert python_with_isa("sse9", code).stdout.strip() == f"BATCHNORM_ISA must be one of {names}, got sse9"


@pytest.mark.parametrize("name", [name for name in dir(_core) if name.startswith("try_")])
def test_another_number_of_arguments_is_an_error(name):
    for count in (0, 4, 20):
        with pytest.raises(TypeError, match=f"arguments must be [0-9]+, got {count}"):
            getattr(_core, name)(*[None] * count)


def test_every_way_into_the_binding_is_tested_here():
    elsewhere = {"try_observe"}  # test_standardizer.py
    ways = {name for name in dir(_core) if name.startswith("try_")}
    assert {f"try_{name}" for name in TRIES} == ways - elsewhere


@pytest.mark.parametrize("update_rate", [0.1, None])
@pytest.mark.parametrize("bad", [None, np.nan])
def test_a_layer_gives_the_same_on_both_ways(update_rate, bad, monkeypatch):
    given = Arguments()
    ordinary = bn.BatchNorm(3, update_rate=update_rate, nonfinite="skip")
    general = bn.BatchNorm(3, update_rate=update_rate, nonfinite="skip")
    for x in (given.x, given.x[:2] + 1, given.x * 2):
        if bad is not None:
            x[0, 1] = bad
        out = np.empty_like(x)
        results = [ordinary(x, out=out)]
        with monkeypatch.context() as patch:
            patch.setattr("batchnorm.layers.batch.ordinary_batch_norm", lambda *arguments: None)
            results.append(general(x))
        assert results[0] is out
        np.testing.assert_array_equal(*results)
        np.testing.assert_array_equal(*(layer.backward(np.ones_like(x)) for layer in (ordinary, general)))
    for name in ("dgamma", "dbeta", "running_mean", "running_var", "update_count"):
        np.testing.assert_array_equal(getattr(ordinary, name), getattr(general, name))
    assert ordinary.update_count == (3 if bad is None else 0)
    assert str(ordinary.report()) == str(general.report())


@pytest.mark.parametrize("change", [{"x": np.ones((4, 2), np.float32)}, {"out": np.ones((1, 3), np.float32)}])
def test_a_layer_leaves_what_is_not_ordinary_to_the_general_way(change):
    layer = bn.BatchNorm(3)
    before = layer.state_dict()
    given = {"x": np.arange(12, dtype=np.float32).reshape(4, 3), **change}
    with pytest.raises(ValueError, match=r"^(x must have 3 channels on axis 1|out must have)"):
        layer(given.pop("x"), **given)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_memory_map_takes_the_result(tmp_path):
    a = Arguments()
    expected = FUNCTIONS["batch_norm"](Arguments())[0]
    a.out = np.memmap(tmp_path / "y", np.float32, "w+", shape=SHAPE)
    y, _ = FUNCTIONS["batch_norm"](a)
    assert y is a.out
    assert y.tobytes() == expected.tobytes()


def test_a_memory_map_may_be_x(tmp_path):
    a = Arguments()
    expected = FUNCTIONS["batch_norm"](a)[0].copy()
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=SHAPE)
    x[...] = a.x
    a.x, a.out = x, None
    y, saved = FUNCTIONS["batch_norm"](a)
    assert (type(y), saved.x is x) == (np.ndarray, True)
    assert y.tobytes() == expected.tobytes()


def test_a_subclass_may_be_x_and_is_read_where_it_lies():
    a = Arguments()
    expected = FUNCTIONS["batch_norm"](a)[0].copy()
    a.x, a.out = a.x.view(Subclass), None
    y, saved = FUNCTIONS["batch_norm"](a)
    assert (type(y), type(saved.x)) == (np.ndarray, np.ndarray)
    assert np.shares_memory(saved.x, np.asarray(a.x))
    assert y.tobytes() == expected.tobytes()


# ---- what it holds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("general", [False, True], ids=["ordinary", "general"])
@pytest.mark.parametrize("out", ["given", "new", "x"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_call_keeps_a_reference(function, out, general):
    a = Arguments()
    a.out = {"given": a.out, "new": None, "x": a.x}[out]
    a.needs = (*NEEDS,)  # a new tuple, not the constant of this file
    if general:
        a.num_threads, a.ddof = np.int64(1), np.int64(1)
    held = [*vars(a).values(), a.moments._table, a.x.dtype, *a.needs]
    held = [each for each in held if each is not None and not isinstance(each, (int, float))]
    counts = []
    for _ in range(2):
        for _ in range(200):
            FUNCTIONS[function](a)
        counts.append([sys.getrefcount(each) for each in held])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("function", [*FUNCTIONS, "layer"])
def test_ten_thousand_calls_take_no_more_memory_than_one(function):
    a, layer = Arguments(), bn.BatchNorm(3)

    def call():
        if function == "layer":
            layer(a.x)
            layer.backward(a.dy)
        else:
            FUNCTIONS[function](a)

    for _ in range(100):
        call()
    tracemalloc.start()
    try:
        call()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(10_000):
            call()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 10_000  # a byte a call


def test_the_memory_of_the_results_is_given_back():
    a = Arguments()
    a.out = None
    y, saved = FUNCTIONS["batch_norm"](a)
    gone = [weakref.ref(y), weakref.ref(saved), weakref.ref(saved.moments._table)]
    del y, saved
    assert [each() for each in gone] == [None] * 3


# ---- Saved --------------------------------------------------------------------------------------------------


def test_rstd_is_that_of_the_moments_and_computed_once():
    a = Arguments()
    _, saved = FUNCTIONS["batch_norm"](a)
    np.testing.assert_array_equal(saved.rstd, _core.rstd(a.moments._table, a.eps))
    assert saved.rstd is saved.rstd


def test_saved_is_a_dataclass_of_all_its_fields():
    _, saved = FUNCTIONS["batch_norm"](Arguments())
    assert [field.name for field in dataclasses.fields(saved)] == [
        "x",
        "moments",
        "gamma",
        "axis",
        "eps",
        "y",
        "beta",
        "given",
        "part",
        "relu",
        "has_residual",
        "renorm",
        "layout",
    ]


def test_replaced_fields_are_those_that_were_given():
    a = Arguments()
    _, saved = FUNCTIONS["batch_norm"](a)
    moments = bn.Moments.empty(3)
    replaced = dataclasses.replace(saved, moments=moments)
    assert replaced.moments is moments
    for name in ("x", "gamma", "axis", "eps"):
        assert getattr(replaced, name) is getattr(saved, name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        replaced.moments = moments


@pytest.mark.parametrize("kind", ["plain", "masked", "segments", "relu", "y"])
def test_rstd_follows_replaced_moments_and_eps(kind):
    a = Arguments()
    rows = len(a.x)
    options = {
        "masked": {"mask": (np.arange(rows) > 0).reshape(-1, 1, 1)},
        "segments": {"segments": np.arange(rows) // 2},
        "relu": {"activation": "relu"},
        "y": {"keep": "y"},
    }
    _, saved = bn.batch_norm(a.x, a.gamma, **options.get(kind, {}))
    saved.rstd  # noqa: B018  asked for, and so kept, before the moments change
    merged = saved.moments | bn.Moments(saved.moments.count, saved.moments.mean + 3, saved.moments.m2)
    replaced = dataclasses.replace(saved, moments=merged)
    np.testing.assert_allclose(replaced.rstd, 1 / np.sqrt(merged.var() + saved.eps), rtol=1e-14)
    assert (replaced.rstd != saved.rstd).all()
    np.testing.assert_allclose(
        dataclasses.replace(saved, eps=2.0).rstd, 1 / np.sqrt(saved.moments.var() + 2), rtol=1e-14
    )


@pytest.mark.parametrize("rstd", ["asked_for", "not_asked_for"])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_saved_can_be_copied(duplicate, rstd):
    a = Arguments()
    y, saved = FUNCTIONS["batch_norm"](a)
    if rstd == "asked_for":
        saved.rstd  # noqa: B018
    twin = duplicate(saved)
    assert bits(twin) == bits(saved)
    assert bits(bn.backward(y, twin)) == bits(bn.backward(y, saved))


@pytest.mark.parametrize("general", [False, True], ids=["ordinary", "general"])
def test_moments_cannot_be_written_to(general):
    _, saved = bn.batch_norm(Arguments().x, num_threads=np.int64(1) if general else None)
    for each in (saved.moments, saved.moments | saved.moments, bn.moments(Arguments().x)):
        with pytest.raises(ValueError, match="read-only"):
            each.mean[0] = 7
