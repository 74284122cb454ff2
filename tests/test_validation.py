"""Every error: its type, its full text in three parts (argument, need, got), and that nothing was changed by it."""

import dataclasses
import functools
import inspect
import operator
import re
import sys
from typing import NamedTuple

import numpy as np
import pytest

import batchnorm as bn
import frozen


class Arrays:
    """Valid arguments, fresh for every call, and what may be broken about them. All of it is kept to be compared."""

    def __init__(self):
        rng = np.random.default_rng(41)
        self.x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
        self.dy = rng.normal(size=self.x.shape).astype(np.float32)
        self.gamma, self.beta = rng.normal(size=3).astype(np.float32), rng.normal(size=3).astype(np.float32)
        self.mean, self.var = rng.normal(size=3), rng.uniform(1, 2, 3)
        self.out = np.full_like(self.x, 7)
        self.out64 = np.full_like(self.x, 7, np.float64)
        self.out_transposed = np.full((5, 4, 3, 2), 7, np.float32)
        self.out_read_only = self._read_only(self.out.copy())
        self.short = np.ones(2, np.float32)
        self.column = np.ones((3, 1), np.float32)
        self.var_negative = np.array([1.0, 2.0, -1.0])
        self.line = np.arange(2 * self.x.size, dtype=np.float32)
        self.saved = bn.batch_norm(self.x, self.gamma, self.beta)[1]
        # Views, of which the memory is compared through their owners.
        self.x_of_line, self.out_shifted = (
            self.line[start : start + self.x.size].reshape(self.x.shape) for start in (0, 1)
        )
        self.out_misaligned = self._misaligned(self.out)
        self.out_stride_0 = np.lib.stride_tricks.as_strided(self.line, self.x.shape, (240, 80, 20, 0))

    @staticmethod
    def _read_only(array):
        array.flags.writeable = False
        return array

    @staticmethod
    def _misaligned(array):
        room = np.zeros(array.nbytes + 1, np.uint8)
        view = room[1:].view(array.dtype).reshape(array.shape)
        view[...] = array
        return view

    def bytes(self):
        return {name: value.tobytes() for name, value in vars(self).items() if isinstance(value, np.ndarray)}


class Mistake(NamedTuple):
    name: str
    call: object  # takes Arrays
    error: type
    text: str


def forward(name):
    """Bring the functions that normalize x under one signature."""
    if name == "batch_norm":
        return lambda a, x=None, gamma=None, beta=None, **options: bn.batch_norm(
            a.x if x is None else x, gamma, beta, **options
        )
    return lambda a, x=None, gamma=None, beta=None, **options: bn.normalize(
        a.x if x is None else x, a.mean, a.var, gamma, beta, **options
    )


def backward(name):
    """Bring the functions that take dy under one signature."""
    if name == "batch_norm_backward":
        return lambda a, dy=None, **options: bn.backward(a.dy if dy is None else dy, a.saved, **options)
    return lambda a, dy=None, **options: frozen.backward(
        a.dy if dy is None else dy, a.x, a.mean, a.var, a.gamma, **options
    )


# ---- what each mistake says ---------------------------------------------------------------------------------


def of_library(module, name):
    """Give what looks like an object of another library."""
    return type(name, (), {"__module__": module, "__array__": lambda self: np.ones(3)})()


FLOATS = "must have dtype float16, bfloat16, float32 or float64"

X = [  # (name, x from Arrays, error, text): for moments, batch_norm, normalize and normalize_backward
    (
        "list",
        lambda a: a.x.tolist(),
        TypeError,
        "x must be a numpy.ndarray (write np.asarray(x, np.float32)), got list",
    ),
    ("str", lambda a: "text", TypeError, "x must be a numpy.ndarray, got str"),
    ("scalar", lambda a: np.float32(1), TypeError, "x must be a numpy.ndarray, got float32"),
    (
        "masked",
        lambda a: np.ma.array(a.x),
        TypeError,
        "x must be a numpy.ndarray (write x.filled(0), and what counts as mask=), got MaskedArray",
    ),
    (
        "torch",
        lambda a: of_library("torch", "Tensor"),
        TypeError,
        "x must be a numpy.ndarray (write x.detach().cpu().numpy()), got Tensor",
    ),
    (
        "pandas",
        lambda a: of_library("pandas.core.frame", "DataFrame"),
        TypeError,
        "x must be a numpy.ndarray (write x.to_numpy(np.float32)), got DataFrame",
    ),
    (
        "xarray",
        lambda a: of_library("xarray.core.dataarray", "DataArray"),
        TypeError,
        "x must be a numpy.ndarray (write x.to_numpy()), got DataArray",
    ),
    (
        "some_array",
        lambda a: of_library("jaxlib._jax", "ArrayImpl"),
        TypeError,
        "x must be a numpy.ndarray (write np.asarray(x, np.float32)), got ArrayImpl",
    ),
    (
        "int64",
        lambda a: a.x.astype(np.int64),
        TypeError,
        f"x {FLOATS} (write x.astype(np.float32)), got int64",
    ),
    ("bool", lambda a: a.x > 0, TypeError, f"x {FLOATS} (write x.astype(np.float32)), got bool"),
    (
        "uint16",
        lambda a: a.x.astype(np.uint16),
        TypeError,
        f"x {FLOATS} (write x.astype(np.float32)), got uint16",
    ),
    ("complex64", lambda a: a.x.astype(np.complex64), TypeError, f"x {FLOATS}, got complex64"),
    (
        "object",
        lambda a: a.x.astype(object),
        TypeError,
        f"x {FLOATS}, got object",
    ),
    (
        "big_endian",
        lambda a: a.x.astype(">f4"),
        TypeError,
        "x must be in native byte order (write x.astype(np.float32)), got dtype >f4",
    ),
    (
        "big_endian_64",
        lambda a: a.x.astype(">f8"),
        TypeError,
        "x must be in native byte order (write x.astype(np.float64)), got dtype >f8",
    ),
    (
        "no_dimension",
        lambda a: np.array(1, np.float32),
        ValueError,
        "x must have 1 to 8 dimensions, got 0",
    ),
    ("nine_dimensions", lambda a: np.ones((1,) * 9), ValueError, "x must have 1 to 8 dimensions, got 9"),
]

AXIS = [  # (name, axis, error, text): of x with 4 dimensions
    ("4", 4, ValueError, "axis must be in [-4, 3] for an array of 4 dimensions, got 4"),
    ("minus_5", -5, ValueError, "axis must be in [-4, 3] for an array of 4 dimensions, got -5"),
    ("float", 1.0, TypeError, "axis must be an int, got float"),
    ("none", None, TypeError, "axis must be an int, got None"),
    ("tuple", (0, 1), TypeError, "axis must be an int, got tuple"),
    ("str", "1", TypeError, "axis must be an int, got str"),
]

EPS = [  # (name, eps, error, text)
    ("negative", -1.0, ValueError, "eps must be finite and >= 0, got -1.0"),
    ("nan", float("nan"), ValueError, "eps must be finite and >= 0, got nan"),
    ("infinite", float("inf"), ValueError, "eps must be finite and >= 0, got inf"),
    ("minus_huge", -(10**400), ValueError, "eps must be finite and >= 0, got -inf"),
    ("bool", True, TypeError, "eps must be a number, got bool"),
    ("complex", np.complex128(1e-5), TypeError, "eps must be a number, got complex128"),
    ("array", np.array([1e-5]), TypeError, "eps must be a number, got ndarray"),
    ("str", "1e-5", TypeError, "eps must be a number, got str"),
    ("none", None, TypeError, "eps must be a number, got None"),
]

CHANNEL_VALUES = [  # (name, value from Arrays, error, text with {}): for gamma, beta, mean and var
    ("short", lambda a: a.short, ValueError, "{} must have shape (3,), got (2,)"),
    ("column", lambda a: a.column, ValueError, "{} must have shape (3,), got (3, 1)"),
    ("bool", lambda a: np.ones(3, bool), TypeError, "{} must have a floating dtype, got bool"),
    ("complex128", lambda a: np.ones(3, complex), TypeError, "{} must have a floating dtype, got complex128"),
    ("object", lambda a: np.ones(3, object), TypeError, "{} must have a floating dtype, got object"),
    ("ragged", lambda a: [1.0, [2.0, 3.0]], TypeError, "{} must be an array of numbers, got list"),
    (
        "masked",
        lambda a: np.ma.array(np.ones(3)),
        TypeError,
        "{0} must be a numpy.ndarray or a sequence (write {0}.filled(0), say), got MaskedArray",
    ),
]

VAR = [  # (name, var from Arrays, error, text)
    (
        "negative",
        lambda a: a.var_negative,
        ValueError,
        "var must be >= 0 in every channel, got -1.0 in channel 2",
    ),
]

NUM_THREADS = [  # (name, num_threads, error, text)
    ("0", 0, ValueError, "num_threads must be an int >= 1 or None, got 0"),
    ("minus_1", -1, ValueError, "num_threads must be an int >= 1 or None, got -1"),
    ("float", 2.0, TypeError, "num_threads must be an int >= 1 or None, got float"),
    ("str", "2", TypeError, "num_threads must be an int >= 1 or None, got str"),
]

OUT = [  # (name, out from Arrays, error, text with {} for what it may be: x or dy)
    ("list", lambda a: a.x.tolist(), TypeError, "out must be a numpy.ndarray, got list"),
    ("shape", lambda a: a.out_transposed, ValueError, "out must have shape (2, 3, 4, 5), got (5, 4, 3, 2)"),
    ("dtype", lambda a: a.out64, TypeError, "out must have dtype float32, got float64"),
    ("read_only", lambda a: a.out_read_only, ValueError, "out must be writeable, got a read-only array"),
    (
        "misaligned",
        lambda a: a.out_misaligned,
        ValueError,
        "out must be aligned to its item size, got an address that is not a multiple of 4",
    ),
    (
        "stride_0",
        lambda a: a.out_stride_0,
        ValueError,
        "out must have one address per value, got stride 0 on axis 3",
    ),
    (
        "overlapping_itself",
        lambda a: np.lib.stride_tricks.as_strided(a.line, a.x.shape, (240, 80, 20, 8)),
        ValueError,
        "out must have one address per value, got overlapping strides (240, 80, 20, 8)",
    ),
    (
        "overlapping_itself_by_one_inside",
        lambda a: np.lib.stride_tricks.as_strided(a.line, a.x.shape, (240, 80, 16, 4)),
        ValueError,
        "out must have one address per value, got overlapping strides (240, 80, 16, 4)",
    ),
    (
        "overlapping_itself_by_one_outside",
        lambda a: np.lib.stride_tricks.as_strided(a.line, a.x.shape, (236, 80, 20, 4)),
        ValueError,
        "out must have one address per value, got overlapping strides (236, 80, 20, 4)",
    ),
]
OVERLAP = "out must be {0} itself or share no memory with {0}, got a partial overlap"

DY = [  # (name, dy from Arrays, error, text)
    (
        "list",
        lambda a: a.dy.tolist(),
        TypeError,
        "dy must be a numpy.ndarray (write np.asarray(dy, np.float32)), got list",
    ),
    ("shape", lambda a: a.dy[..., 1:], ValueError, "dy must have shape (2, 3, 4, 5), got (2, 3, 4, 4)"),
    ("transposed", lambda a: a.dy.T, ValueError, "dy must have shape (2, 3, 4, 5), got (5, 4, 3, 2)"),
    ("dtype", lambda a: a.dy.astype(np.float64), TypeError, "dy must have dtype float32, got float64"),
    (
        "big_endian",
        lambda a: a.dy.astype(">f4"),
        TypeError,
        "dy must be in native byte order (write dy.astype(np.float32)), got dtype >f4",
    ),
]

NEEDS = [  # (name, needs, error, text)
    (
        "weight",
        ("x", "weight"),
        ValueError,
        "needs must name some of 'x', 'gamma', 'beta', 'residual', got 'weight'",
    ),
    ("dx", ("dx",), ValueError, "needs must name some of 'x', 'gamma', 'beta', 'residual', got 'dx'"),
    ("number", ("x", 1), ValueError, "needs must name some of 'x', 'gamma', 'beta', 'residual', got 1"),
    (
        "array",
        [np.array([1, 2])],
        ValueError,
        "needs must name some of 'x', 'gamma', 'beta', 'residual', got array([1, 2])",
    ),
    ("int", 3, TypeError, "needs must be a tuple of names, got int"),
]


REPLACED = [  # (name, changed fields from Arrays, error, text): of a Saved for x with 3 channels
    (
        "list",
        lambda a: {"x": [1.0]},
        TypeError,
        "saved.x must be a numpy.ndarray (write np.asarray(saved.x, np.float32)), got list",
    ),
    (
        "int_x",
        lambda a: {"x": a.x.astype(np.int64)},
        TypeError,
        f"saved.x {FLOATS} (write saved.x.astype(np.float32)), got int64",
    ),
    ("no_moments", lambda a: {"moments": None}, TypeError, "saved.moments must be Moments, got None"),
    (
        "channels",
        lambda a: {"moments": bn.Moments.empty(2)},
        ValueError,
        "saved.moments must have 3 channels, got 2",
    ),
    (
        "axis",
        lambda a: {"axis": 4},
        ValueError,
        "axis must be in [-4, 3] for an array of 4 dimensions, got 4",
    ),
    ("negative_axis", lambda a: {"axis": -3}, ValueError, "saved.axis must be >= 0, got -3"),
    ("eps", lambda a: {"eps": "a"}, TypeError, "eps must be a number, got str"),
]

DDOF = [  # (name, ddof, error, text)
    ("float", 1.0, TypeError, "ddof must be an int >= 0, got float"),
    ("none", None, TypeError, "ddof must be an int >= 0, got None"),
    ("negative", -3, ValueError, "ddof must be an int >= 0, got -3"),
]

UPDATE_RATE = [  # (name, update_rate, error, text)
    ("str", "a", TypeError, "update_rate must be a number, got str"),
    ("bool", True, TypeError, "update_rate must be a number, got bool"),
    ("large", 10**400, ValueError, "update_rate must be from 0 to 1, got inf"),
    ("negative", -0.1, ValueError, "update_rate must be from 0 to 1, got -0.1"),
]


def mistakes():
    for name, x, error, text in X:
        yield Mistake(f"moments-x-{name}", lambda a, x=x: bn.moments(x(a)), error, text)
        yield Mistake(f"batch_norm-x-{name}", lambda a, x=x: bn.batch_norm(x(a)), error, text)
        yield Mistake(f"normalize-x-{name}", lambda a, x=x: bn.normalize(x(a), a.mean, a.var), error, text)
        yield Mistake(
            f"normalize_backward-x-{name}",
            lambda a, x=x: frozen.backward(a.dy, x(a), a.mean, a.var),
            error,
            text,
        )
    for name, axis, error, text in AXIS:
        yield Mistake(f"moments-axis-{name}", lambda a, axis=axis: bn.moments(a.x, axis=axis), error, text)
    text = "axis must be in [-1, 0] for an array of 1 dimensions, got 1"
    yield Mistake("moments-axis-of-a-line", lambda a: bn.moments(a.gamma), ValueError, text)

    for function in ("batch_norm", "normalize"):
        yield from of_forward(function, forward(function))
    for function in ("batch_norm_backward", "normalize_backward"):
        yield from of_backward(function, backward(function))
    yield from of_statistics()
    yield from of_the_halves()
    yield from of_moments()
    yield from of_updates()
    yield from of_sums()
    yield from of_explain()
    yield from of_settings()


def of_forward(function, call):
    for argument, table in (("axis", AXIS), ("eps", EPS), ("num_threads", NUM_THREADS)):
        for name, value, error, text in table:
            option = {argument: value}
            yield Mistake(f"{function}-{argument}-{name}", lambda a, o=option: call(a, out=a.out, **o), error, text)
    for argument in ("gamma", "beta"):
        for name, value, error, text in CHANNEL_VALUES:
            yield Mistake(
                f"{function}-{argument}-{name}",
                lambda a, argument=argument, value=value: call(a, out=a.out, **{argument: value(a)}),
                error,
                text.format(argument),
            )
    for name, out, error, text in OUT:
        yield Mistake(f"{function}-out-{name}", lambda a, out=out: call(a, out=out(a)), error, text)
    for name, out in (("shifted", lambda a: a.out_shifted), ("reversed", lambda a: a.x_of_line[::-1])):
        yield Mistake(
            f"{function}-out-{name}",
            lambda a, out=out: call(a, x=a.x_of_line, out=out(a)),
            ValueError,
            OVERLAP.format("x"),
        )


def of_backward(function, call):
    for name, dy, error, text in DY:
        yield Mistake(f"{function}-dy-{name}", lambda a, dy=dy: call(a, dy(a), out=a.out), error, text)
    for argument, table in (("needs", NEEDS), ("num_threads", NUM_THREADS)):
        for name, value, error, text in table:
            option = {argument: value}
            yield Mistake(f"{function}-{argument}-{name}", lambda a, o=option: call(a, out=a.out, **o), error, text)
    for name, out, error, text in OUT:
        yield Mistake(f"{function}-out-{name}", lambda a, out=out: call(a, out=out(a)), error, text)
    for name, out in (("shifted", lambda a: a.out_shifted), ("reversed", lambda a: a.x_of_line[::-1])):
        yield Mistake(
            f"{function}-out-{name}",
            lambda a, out=out: call(a, a.x_of_line, out=out(a)),
            ValueError,
            OVERLAP.format("dy"),
        )


def of_statistics():
    """List mistakes in a mean and var that are given."""
    functions = {
        "normalize": lambda a, mean, var, **o: bn.normalize(a.x, mean, var, out=a.out, **o),
        "normalize_backward": lambda a, mean, var, **o: frozen.backward(a.dy, a.x, mean, var, out=a.out, **o),
    }
    for function, call in functions.items():
        for name, value, error, text in CHANNEL_VALUES:
            mean, var = text.format("mean"), text.format("var")
            yield Mistake(f"{function}-mean-{name}", lambda a, c=call, value=value: c(a, value(a), a.var), error, mean)
            yield Mistake(f"{function}-var-{name}", lambda a, c=call, value=value: c(a, a.mean, value(a)), error, var)
        for name, value, error, text in VAR:
            yield Mistake(f"{function}-var-{name}", lambda a, c=call, value=value: c(a, a.mean, value(a)), error, text)
    backward_of_given = functions["normalize_backward"]
    for name, eps, error, text in EPS:
        yield Mistake(
            f"normalize_backward-eps-{name}",
            lambda a, e=eps: backward_of_given(a, a.mean, a.var, eps=e),
            error,
            text,
        )
    for name, axis, error, text in AXIS:
        yield Mistake(
            f"normalize_backward-axis-{name}",
            lambda a, x=axis: backward_of_given(a, a.mean, a.var, axis=x),
            error,
            text,
        )
    for name, value, error, text in CHANNEL_VALUES:
        yield Mistake(
            f"normalize_backward-gamma-{name}",
            lambda a, value=value: frozen.backward(a.dy, a.x, a.mean, a.var, value(a), out=a.out),
            error,
            text.format("gamma"),
        )
    for shape in ((1, 4), (1, 4, 1), (1, 3, 1, 1)):
        yield Mistake(
            f"batch_norm-one-value-a-channel-{len(shape)}d",
            lambda a, shape=shape: bn.batch_norm(np.ones(shape, np.float32)),
            ValueError,
            f"x must have at least 2 values per channel for batch statistics, got shape {shape}",
        )
    yield Mistake(
        "batch_norm-one-value-a-channel-1d",
        lambda a: bn.batch_norm(np.ones(5), axis=0),
        ValueError,
        "x must have at least 2 values per channel for batch statistics, got shape (5,)",
    )


def of_the_halves():
    for name, dy, error, text in DY:
        yield Mistake(f"grad_sums-dy-{name}", lambda a, dy=dy: bn.grad_sums(dy(a), a.saved), error, text)
        yield Mistake(
            f"grad_input-dy-{name}",
            lambda a, dy=dy: bn.grad_input(dy(a), a.saved, bn.grad_sums(a.dy, a.saved), out=a.out),
            error,
            text,
        )
    for name, out, error, text in OUT:
        yield Mistake(
            f"grad_input-out-{name}",
            lambda a, out=out: bn.grad_input(a.dy, a.saved, bn.grad_sums(a.dy, a.saved), out=out(a)),
            error,
            text,
        )
    yield Mistake(
        "grad_input-out-gamma",
        lambda a: bn.grad_input(
            a.dy,
            dataclasses.replace(a.saved, gamma=a.out.reshape(-1)[:3]),
            bn.grad_sums(a.dy, a.saved),
            out=a.out,
        ),
        ValueError,
        "out must share no memory with gamma, got an overlap",
    )
    for name, value, error, text in NUM_THREADS:
        yield Mistake(
            f"grad_sums-num_threads-{name}",
            lambda a, n=value: bn.grad_sums(a.dy, a.saved, num_threads=n),
            error,
            text,
        )
        yield Mistake(
            f"grad_input-num_threads-{name}",
            lambda a, n=value: bn.grad_input(a.dy, a.saved, bn.grad_sums(a.dy, a.saved), out=a.out, num_threads=n),
            error,
            text,
        )
    calls = {
        "batch_norm_backward": lambda a, saved: bn.backward(a.dy, saved),
        "grad_sums": lambda a, saved: bn.grad_sums(a.dy, saved),
        "grad_input": lambda a, saved: bn.grad_input(a.dy, saved, bn.grad_sums(a.dy, a.saved)),
    }
    for function, call in calls.items():
        text = "saved must be what a forward call saved, got tuple"
        yield Mistake(f"{function}-saved-tuple", lambda a, c=call: c(a, (a.x, a.gamma)), TypeError, text)
        for name, change, error, text in REPLACED:
            yield Mistake(
                f"{function}-saved-{name}",
                lambda a, c=call, change=change: c(a, dataclasses.replace(a.saved, **change(a))),
                error,
                text,
            )
    yield Mistake(
        "grad_input-sums-tuple",
        lambda a: bn.grad_input(a.dy, a.saved, (1, 2, 3)),
        TypeError,
        "sums must be GradSums, got tuple",
    )


def of_moments():
    two, three = bn.Moments.empty(2), bn.Moments.empty(3)
    text = "moments must have 3 channels to merge with the first, got 2"
    yield Mistake("merge-channels", lambda a: bn.merge(three, two), ValueError, text)
    yield Mistake("bar-channels", lambda a: three | two, ValueError, text)
    yield Mistake("merge-nothing", lambda a: bn.merge(), TypeError, "merge must have at least 1 Moments, got none")
    yield Mistake("merge-array", lambda a: bn.merge(three, a.mean), TypeError, "merge must have Moments, got ndarray")
    values = {
        "mean-shape": ((2, np.ones((3, 1)), np.ones(3)), ValueError, "mean must have 1 dimension, got 2"),
        "m2-shape": ((2, np.ones(3), np.ones(2)), ValueError, "m2 must have shape (3,), got (2,)"),
        "count-shape": (
            (np.ones(2), np.ones(3), np.ones(3)),
            ValueError,
            "count must have shape (3,), got (2,)",
        ),
        "count-negative": (
            (-1, np.ones(3), np.ones(3)),
            ValueError,
            "count must be >= 0 in every channel, got -1.0 in channel 0",
        ),
        "count-nan": (
            (np.array([1, np.nan, 1]), np.ones(3), np.ones(3)),
            ValueError,
            "count must be finite, got nan in channel 1",
        ),
        "mean-of-nothing": (
            (0, np.array([0.0, 5.0, 0.0]), np.zeros(3)),
            ValueError,
            "mean must be 0 where count is 0, got 5.0 in channel 1",
        ),
        "m2-negative": (
            (2, np.ones(3), np.array([0.0, -1.0, 0.0])),
            ValueError,
            "m2 must be >= 0 in every channel, got -1.0 in channel 1",
        ),
    }
    for name, (arguments, error, text) in values.items():
        yield Mistake(f"moments-{name}", lambda a, arguments=arguments: bn.Moments(*arguments), error, text)


def of_updates():
    for name, ddof, error, text in DDOF:
        yield Mistake(f"var-ddof-{name}", lambda a, d=ddof: a.saved.moments.var(d), error, text)
        if ddof is not None:  # which is the default there
            yield Mistake(
                f"update_running-ddof-{name}",
                lambda a, d=ddof: bn.update_running(a.mean, a.var, a.saved, ddof=d),
                error,
                text,
            )
    for name, rate, error, text in UPDATE_RATE:
        yield Mistake(
            f"update_running-update_rate-{name}",
            lambda a, r=rate: bn.update_running(a.mean, a.var, a.saved.moments, update_rate=r),
            error,
            text,
        )
    yield Mistake(
        "update_running-too-few-values",
        lambda a: bn.update_running(a.mean, a.var, bn.Moments(1, a.mean, np.zeros(3))),
        ValueError,
        "batch must have at least 2 values in every channel, got 1 in channel 0",
    )
    text = "moments must count the values of x in every channel, got count 0 in channel 0"
    yield Mistake(
        "grad_input-moments-of-nothing",
        lambda a: bn.grad_input(
            a.dy,
            dataclasses.replace(a.saved, moments=bn.Moments.empty(3)),
            bn.GradSums(np.zeros(3), np.zeros((3, 4))),
        ),
        ValueError,
        text,
    )


def of_sums():
    for name, table, error, text in [
        ("list", lambda t: t.tolist(), TypeError, "table must be a float64 array of 2 dimensions, got list"),
        (
            "float32",
            lambda t: t.astype(np.float32),
            TypeError,
            "table must be a float64 array of 2 dimensions, got ndarray",
        ),
        (
            "flat",
            lambda t: t.ravel(),
            TypeError,
            "table must be a float64 array of 2 dimensions, got ndarray",
        ),
        ("narrow", lambda t: t[:, :3], ValueError, "table must have 4 columns, got 3"),
    ]:
        yield Mistake(
            f"GradSums-table-{name}",
            lambda a, table=table: bn.GradSums(a.mean, table(np.zeros((3, 4)))),
            error,
            text,
        )
    yield Mistake(
        "GradSums-count",
        lambda a: bn.GradSums(a.short, np.zeros((3, 4))),
        ValueError,
        "count must have shape (3,), got (2,)",
    )


def of_explain():
    text = "an array of this shape and dtype must have dtype float16, bfloat16, float32 or float64, got <U1"
    yield Mistake("explain-dtype", lambda a: bn.explain((2, 3), dtype="U0"), TypeError, text)
    text = "an array of this shape and dtype must have 1 to 8 dimensions, got 0"
    yield Mistake("explain-nothing", lambda a: bn.explain(()), ValueError, text)


def of_settings():
    for name, num_threads, error, text in NUM_THREADS:
        yield Mistake(
            f"moments-num_threads-{name}",
            lambda a, n=num_threads: bn.moments(a.x, num_threads=n),
            error,
            text,
        )
        yield Mistake(f"set_num_threads-{name}", lambda a, n=num_threads: bn.set_num_threads(n), error, text)
    yield Mistake(
        "show_config-mode",
        lambda a: bn.show_config("json"),
        ValueError,
        "mode must be 'stdout' or 'dicts', got 'json'",
    )


@pytest.fixture(autouse=True)
def _keep_num_threads():
    before = bn.get_num_threads()
    yield
    bn.set_num_threads(before)


@pytest.mark.parametrize("mistake", list(mistakes()), ids=operator.attrgetter("name"))
def test_a_mistake_says_what_was_needed_and_what_came_and_changes_nothing(mistake):
    arrays = Arrays()
    before, num_threads = arrays.bytes(), bn.get_num_threads()
    with pytest.raises(mistake.error) as caught:
        mistake.call(arrays)
    assert str(caught.value) == mistake.text
    assert type(caught.value) is mistake.error
    assert arrays.bytes() == before
    assert bn.get_num_threads() == num_threads


def test_every_mistake_has_a_name_of_its_own():
    names = [mistake.name for mistake in mistakes()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "call",
    [
        lambda a: bn.batch_norm(a.x, axis=np.int64(1), eps=np.float32(1e-5), num_threads=np.int32(1)),
        lambda a: bn.batch_norm(a.x, eps=0, num_threads=None),
        lambda a: bn.normalize(a.x, a.mean, a.var.astype(np.float16)),
        lambda a: bn.backward(a.dy, a.saved, needs=["x"]),
        lambda a: bn.backward(a.dy, a.saved, needs=()),
        lambda a: bn.batch_norm(np.lib.stride_tricks.as_strided(a.x, writeable=False)),
    ],
    ids=["numpy_scalars", "int_eps", "float16_var", "list_of_needs", "no_needs", "read_only_x"],
)
def test_what_is_close_to_a_mistake_is_accepted(call):
    call(Arrays())


# ---- keywords ------------------------------------------------------------------------------------------------


def takers():
    """(name, function) of all that is public and takes keywords."""
    for name in bn.__all__:
        f = getattr(bn, name)
        if inspect.isfunction(f) and inspect.signature(f).parameters and f is not bn.merge:
            yield name, f
    yield "BatchNorm", bn.BatchNorm.__init__
    yield "call", bn.BatchNorm.__call__
    yield "backward", bn.BatchNorm.backward


def arguments_of(f):
    """Something for each argument that must be given; none is looked at where a keyword is unknown."""
    parameters = [p for p in inspect.signature(f).parameters.values() if p.default is p.empty]
    positional = [None for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return positional, {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("f", list(dict(takers()).values()), ids=list(dict(takers())))
def test_an_unknown_keyword_is_refused_with_the_list_of_the_signature(f):
    parameters = inspect.signature(f).parameters.values()
    assert {p.kind for p in parameters} <= {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }
    positional, named = arguments_of(f)
    known = ", ".join(p.name for p in parameters if p.name != "self")
    with pytest.raises(TypeError, match=f"^keywords of .* must be of {known}, got banana$"):
        f(*positional, banana=1, **named)


@pytest.mark.parametrize("f", list(dict(takers()).values()), ids=list(dict(takers())))
@pytest.mark.parametrize("word", ["num_features", "affine", "epsilon", "track_running_stats", "momentum", "training"])
def test_a_word_of_other_libraries_gets_a_sentence_wherever_it_is_written(word, f):
    positional, named = arguments_of(f)
    with pytest.raises(TypeError) as caught:
        f(*positional, **{word: 0.25}, **named)
    text = str(caught.value)
    assert re.search(r" must be (given|left out)\b", text)
    assert text.endswith(f", got {word}=0.25")


def test_the_signature_of_a_call_that_names_few_keywords_shows_them_all():
    parameters = inspect.signature(bn.batch_norm).parameters
    names = (
        "x gamma beta axis eps mask weights lengths padding residual activation keep segments ghost_size weights_are renorm "
        "out num_threads"
    )
    assert list(parameters) == names.split()
    assert parameters["mask"].default is None
    assert parameters["mask"].annotation == "ArrayLike | None"
    assert parameters["keep"].default == "x"
    call = inspect.signature(bn.BatchNorm.__call__).parameters
    assert call["keep"].default == "x"
    assert list(inspect.signature(bn.BatchNorm(3)).parameters) == list(call)[1:]


@pytest.mark.parametrize("library", ["torch", "keras", "flax", "onnx"])
def test_a_layer_from_elsewhere_names_every_setting_that_its_source_does_not_decide(library):
    settings = set(inspect.signature(bn.BatchNorm).parameters)
    named = set(inspect.signature(getattr(bn.convert, f"from_{library}")).parameters)
    assert settings - named == {"convention", "gamma", "beta", "domains", "debias"}


@pytest.mark.parametrize("f", [bn.batch_norm, bn.normalize, bn.moments], ids=lambda f: f.__name__)
def test_a_keyword_that_is_given_its_default_is_as_none_given(f):
    a = Arrays()
    x = (a.x, a.mean, a.var) if f is bn.normalize else (a.x,)
    assert repr(f(*x, mask=None, lengths=None)) == repr(f(*x))


@pytest.mark.parametrize("f", [bn.batch_norm, bn.moments, bn.BatchNorm.__call__], ids=lambda f: f.__name__)
def test_options_are_known_where_the_function_was_replaced_by_one_that_counts_its_calls(f, monkeypatch):
    calls = []

    def counted(*args, **named):
        calls.append(named)
        return f(*args, **named)

    place = bn.BatchNorm if f is bn.BatchNorm.__call__ else sys.modules[f.__module__]
    monkeypatch.setattr(place, f.__name__, counted)
    call = bn.BatchNorm(3) if place is bn.BatchNorm else getattr(place, f.__name__)
    x = Arrays().x
    call(x, mask=np.ones((2, 4, 5), bool))
    with pytest.raises(TypeError, match=r"got banana$"):
        call(x, banana=1)
    assert len(calls) == 2


WORDS = [  # (keyword and its value, what takes it, text)
    (
        {"num_features": 3},
        lambda a, **o: bn.BatchNorm(**o),
        "channels must be given instead of num_features: write BatchNorm(3)",
    ),
    (
        {"num_features": 3},
        lambda a, **o: bn.batch_norm(a.x, **o),
        "num_features must be left out: x tells its channels, along axis",
    ),
    (
        {"affine": False},
        lambda a, **o: bn.BatchNorm(3, **o),
        "gamma and beta must be given instead of affine: write gamma=False, beta=False",
    ),
    (
        {"affine": False},
        lambda a, **o: bn.batch_norm(a.x, **o),
        "gamma must be given instead of affine: an array, or None for affine=False",
    ),
    (
        {"epsilon": 0.001},
        lambda a, **o: bn.normalize(a.x, a.mean, a.var, **o),
        "eps must be given instead of epsilon: write eps=0.001",
    ),
    (
        {"epsilon": 0.001},
        lambda a, **o: bn.BatchNorm(3)(a.x, **o),
        "eps must be given to BatchNorm(), not to its calls",
    ),
    (
        {"eps": 0.001},
        lambda a, **o: bn.backward(a.dy, a.saved, **o),
        "eps must be left out: it is that of the call that gave saved",
    ),
    (
        {"epsilon": 0.001},
        lambda a, **o: bn.moments(a.x, **o),
        "epsilon must be left out: moments() adds nothing to a variance",
    ),
    (
        {"track_running_stats": False},
        lambda a, **o: bn.BatchNorm(3, **o),
        (
            "use_stats must be given to the calls of a layer instead of track_running_stats: write "
            'layer(x, use_stats="batch") for track_running_stats=False'
        ),
    ),
    (
        {"track_running_stats": False},
        lambda a, **o: bn.batch_norm(a.x, **o),
        "track_running_stats must be left out: functions keep nothing, a layer and update_running() do",
    ),
    (
        {"momentum": 0.9},
        lambda a, **o: bn.update_running(a.mean, a.var, a.saved.moments, **o),
        (
            "update_rate must be given instead of momentum, whose meaning differs between frameworks: write "
            "update_rate=0.9 for PyTorch's momentum=0.9, update_rate=0.1 for that of Keras, Flax or ONNX"
        ),
    ),
    (
        {"momentum": 0.9},
        lambda a, **o: bn.BatchNorm(3)(a.x, **o),
        (
            "update_rate must be given to BatchNorm() or update_running() instead of momentum, whose meaning differs "
            "between frameworks: write update_rate=0.9 for PyTorch's momentum=0.9, update_rate=0.1 for that of Keras, "
            "Flax or ONNX"
        ),
    ),
    (
        {"training": False},
        lambda a, **o: bn.BatchNorm(3, **o),
        "training must be left out: write layer.train() or layer.eval(), a new layer is in training",
    ),
    (
        {"training": False},
        lambda a, **o: bn.BatchNorm(3)(a.x, **o),
        (
            'training must be left out: write layer.train()(x) or layer.eval()(x), or use_stats="batch" or '
            '"running" for one call'
        ),
    ),
    (
        {"training": False},
        lambda a, **o: bn.batch_norm(a.x, **o),
        (
            "training must be left out: batch_norm(x) normalizes by the batch, normalize(x, mean, var) by running "
            "statistics"
        ),
    ),
    (
        {"bias": 0.0},
        lambda a, **o: bn.batch_norm(a.x, **o, activation="relu"),
        "beta must be given instead of bias: write beta=0.0",
    ),
    (
        {"running_var": 1.0},
        lambda a, **o: bn.batch_norm(a.x, **o),
        (
            "running_var must be left out: normalize(x, mean, var) normalizes by given statistics, batch_norm(x) by "
            "those of x"
        ),
    ),
]


@pytest.mark.parametrize(
    ("keyword", "call", "text"), WORDS, ids=[f"{i}-{next(iter(w[0]))}" for i, w in enumerate(WORDS)]
)
def test_a_word_of_other_libraries_is_told_what_to_write(keyword, call, text):
    with pytest.raises(TypeError) as caught:
        call(Arrays(), **keyword)
    ((name, value),) = keyword.items()
    assert str(caught.value) == f"{text}, got {name}={value!r}"


# Per function: which values of channels it reads, and the call with some of them given.
X64, DY64 = np.random.default_rng(43).normal(size=(2, 4, 3))
STATISTICS = {"mean": np.zeros(3), "var": np.ones(3)}
RENORM = bn.Renorm(**STATISTICS, r_max=2.0, d_max=1.0)
READ_BY = {
    "batch_norm": ("gamma beta", lambda out, v: bn.batch_norm(X64, **v, out=out)),
    "batch_norm with a mask": (
        "gamma beta",
        lambda out, v: bn.batch_norm(X64, **v, mask=[True, True, False, True], out=out),
    ),
    "batch_norm with relu": (
        "gamma beta",
        lambda out, v: bn.batch_norm(X64, **v, out=out, activation="relu"),
    ),
    "batch_norm of ghosts": ("gamma beta", lambda out, v: bn.batch_norm(X64, **v, ghost_size=2, out=out)),
    "batch_norm with renorm": (
        "gamma beta",
        lambda out, v: bn.batch_norm(X64, **v, renorm=RENORM, out=out),
    ),
    "normalize": ("mean var gamma beta", lambda out, v: bn.normalize(X64, **(STATISTICS | v), out=out)),
    "normalize with relu": (
        "mean var gamma beta",
        lambda out, v: bn.normalize(X64, **(STATISTICS | v), out=out, activation="relu"),
    ),
    "backward of normalize": (
        "gamma",
        lambda out, v: frozen.backward(DY64, X64, **(STATISTICS | v), out=out),
    ),
    "backward of normalize with relu": (
        "gamma",
        lambda out, v: frozen.backward(DY64, X64, **(STATISTICS | v), activation="relu", out=(out, None)),
    ),
    "backward": (
        "gamma",
        lambda out, v: bn.backward(DY64, bn.batch_norm(X64, **v)[1], out=out),
    ),
    "backward with relu": (
        "gamma",
        lambda out, v: bn.backward(DY64, bn.batch_norm(X64, **v, activation="relu")[1], out=(None, out)),
    ),
    "backward of ghosts": (
        "gamma",
        lambda out, v: bn.backward(DY64, bn.batch_norm(X64, **v, ghost_size=2)[1], out=out),
    ),
    "backward with renorm": (
        "gamma",
        lambda out, v: bn.backward(DY64, bn.batch_norm(X64, **v, renorm=RENORM)[1], out=out),
    ),
    "jvp": (
        "gamma gamma_dot beta_dot",
        lambda out, v: bn.jvp(
            DY64,
            bn.batch_norm(X64, v.get("gamma"))[1],
            out=out,
            **{name: value for name, value in v.items() if name != "gamma"},
        ),
    ),
    "jvp of normalize": (
        "gamma mean_dot var_dot gamma_dot beta_dot",
        lambda out, v: frozen.jvp(DY64, X64, **(STATISTICS | v), out=out),
    ),
    "double_backward": (
        "gamma v_dgamma v_dbeta",
        lambda out, v: bn.double_backward(
            DY64,
            DY64,
            bn.batch_norm(X64, v.get("gamma"))[1],
            out=(out, None),
            **{name: value for name, value in v.items() if name != "gamma"},
        ),
    ),
    "double_backward of normalize": (
        "gamma v_dgamma v_dbeta",
        lambda out, v: frozen.double_backward(DY64, DY64, X64, **(STATISTICS | v), out=(None, out)),
    ),
}


@pytest.mark.parametrize(
    ("function", "argument"), [(name, word) for name, (words, _) in READ_BY.items() for word in words.split()]
)
def test_out_shares_no_memory_with_values_that_are_read(function, argument):
    out = np.ones((4, 3))
    with pytest.raises(ValueError, match=f"^out must share no memory with (saved[.])?{argument}, got an overlap$"):
        READ_BY[function][1](out, {argument: out.reshape(-1)[3:6]})
    assert (out == 1).all()


# Per function: the tensors that it reads, and the call with some of them given.
LINE64 = np.arange(30.0)
SAVED64, SAVED_RELU64 = bn.batch_norm(X64)[1], bn.batch_norm(X64, activation="relu")[1]
TENSORS_OF = {
    "batch_norm": ("x", lambda out, t: bn.batch_norm(out=out, **t)),
    "batch_norm with relu": (
        "x residual",
        lambda out, t: bn.batch_norm(**({"x": X64} | t), out=out, activation="relu"),
    ),
    "batch_norm of ghosts": ("x", lambda out, t: bn.batch_norm(out=out, ghost_size=2, **t)),
    "batch_norm with renorm": ("x", lambda out, t: bn.batch_norm(out=out, renorm=RENORM, **t)),
    "normalize": ("x", lambda out, t: bn.normalize(out=out, **STATISTICS, **t)),
    "normalize with relu": (
        "x residual",
        lambda out, t: bn.normalize(**({"x": X64} | STATISTICS | t), out=out, activation="relu"),
    ),
    "backward": ("dy", lambda out, t: bn.backward(saved=SAVED64, out=out, **t)),
    "backward with relu": (
        "dy",
        lambda out, t: bn.backward(saved=SAVED_RELU64, out=(out, None), **t),
    ),
    "backward of normalize": (
        "dy x",
        lambda out, t: frozen.backward(**({"dy": DY64, "x": X64} | STATISTICS | t), out=out),
    ),
    "backward of normalize with relu": (
        "dy x",
        lambda out, t: frozen.backward(
            **({"dy": DY64, "x": X64} | STATISTICS | t), residual=X64, activation="relu", out=(None, out)
        ),
    ),
    "grad_input": (
        "dy",
        lambda out, t: bn.grad_input(saved=SAVED64, sums=bn.grad_sums(DY64, SAVED64), out=out, **t),
    ),
    "jvp": ("x_dot", lambda out, t: bn.jvp(saved=SAVED64, out=out, **t)),
    "jvp of normalize": (
        "x_dot x",
        lambda out, t: frozen.jvp(**({"x_dot": DY64, "x": X64} | STATISTICS | t), out=out),
    ),
    "double_backward": (
        "v_dx dy",
        lambda out, t: bn.double_backward(**({"v_dx": DY64, "dy": DY64} | t), saved=SAVED64, out=(None, out)),
    ),
    "double_backward of normalize": (
        "v_dx dy x",
        lambda out, t: frozen.double_backward(
            **({"v_dx": DY64, "dy": DY64, "x": X64} | STATISTICS | t), out=(out, None)
        ),
    ),
}


@pytest.mark.parametrize(
    ("function", "argument"),
    [(name, word) for name, (words, _) in TENSORS_OF.items() for word in words.split()],
)
def test_out_is_a_tensor_that_is_read_or_shares_no_memory_with_it(function, argument):
    call, line = TENSORS_OF[function][1], LINE64.copy()
    tensor, out = (line[at : at + 12].reshape(4, 3) for at in (0, 6))
    text = f"out must be {argument} itself or share no memory with {argument}, got a partial overlap"
    with pytest.raises(ValueError, match=f"^{text}$"):
        call(out, {argument: tensor})
    assert (line == LINE64).all()
    expected = np.empty((4, 3))
    call(expected, {argument: tensor})
    call(tensor, {argument: tensor})
    np.testing.assert_array_equal(tensor, expected)


# What a call means by leaving a word out; everything else is None. A change here changes what users' programs do.
X_AXIS = {"axis": 1, "eps": 1e-5}
DEFAULTS = {
    bn.batch_norm: X_AXIS | {"keep": "x"},
    bn.instance_norm: X_AXIS | {"keep": "x"},
    bn.group_norm: X_AXIS | {"grouping": "contiguous", "keep": "x"},
    bn.graph_norm: X_AXIS | {"keep": "x"},
    bn.layer_norm: {"axes": -1, "eps": 1e-5, "keep": "x"},
    bn.rms_norm: {"axes": -1, "eps": 1e-6, "keep": "x"},
    bn.normalize: X_AXIS | {"keep": "x", "save": False},
    bn.backward: {"needs": ("x", "gamma", "beta", "residual")},
    bn.double_backward: {"needs": ("dy", "x", "gamma")},
    bn.jvp: {},
    bn.grad_input: {},
    bn.grad_sums: {},
    bn.moments: {"axis": 1},
    bn.update_running: {"update_rate": 0.1, "segments": "each"},
    bn.Renorm: {"weight": 1.0, "parity": "paper"},
    bn.explain: {"axis": 1, "dtype": np.float32},
    bn.show_config: {"mode": "stdout"},
    bn.Moments.var: {"ddof": 0},
    bn.RenormSchedule.torchrl: {"warmup_steps": 10_000, "smooth": False, "r_max": 3.0, "d_max": 5.0},
    bn.convert.from_onnx: {"kind": bn.BatchNorm, "epsilon": 1e-5, "momentum": 0.9},
    bn.BatchNorm.load_state_dict: {"strict": True},
}


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda function: function.__qualname__)
def test_a_word_that_is_left_out_means_what_it_meant(function):
    parameters = inspect.signature(function).parameters.values()
    given = {p.name: p.default for p in parameters if p.default not in (p.empty, None)}
    found = {name: value for name, value in given.items() if not repr(value).startswith("<as in")}
    assert found == DEFAULTS[function]


def test_options_are_keyword_only():
    a = Arrays()
    with pytest.raises(TypeError):
        bn.batch_norm(a.x, a.gamma, a.beta, 1)
    with pytest.raises(TypeError):
        bn.normalize(a.x, a.mean, a.var, a.gamma, a.beta, 1)


def test_an_unknown_instruction_set_is_refused_with_the_list_of_known_ones(python_with_isa):
    code = """
import numpy as np
try:
    import batchnorm as bn
    bn.moments(np.ones((2, 3)))
except ValueError as error:
    print(error)
"""
    names = ", ".join([*bn.available_isas(), "reference"])
    assert python_with_isa("sse9", code).stdout.strip() == f"BATCHNORM_ISA must be one of {names}, got sse9"


@functools.cache
def huge_view():
    """View 4 bytes of memory as 2^40 values."""
    return np.broadcast_to(np.float32(1), (2**20, 2, 2**19))


def test_an_impossible_amount_of_memory_is_a_memory_error():
    with pytest.raises(MemoryError):
        bn.normalize(huge_view(), np.zeros(2), np.ones(2))
