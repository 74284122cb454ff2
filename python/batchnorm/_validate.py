"""The checks of array arguments, and all their error text: the argument, what was needed, what came.

Sizes, eps and variances of the C++ API are checked by the core too, for those who call it from C++.
Everything here returns its argument in the form the core wants, and changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable
from decimal import Decimal
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm import _where
from batchnorm._arrays import Array

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_TENSORS = (np.dtype(np.float16), *_FLOATS)
_MOST_DIMENSIONS = 8
_SHOWN = 8  # values of an array or a tuple that a repr lists
# The words that arguments may be: for type checkers, and from these for the checks.
Activation = Literal["relu"]
Keep = Literal["x", "y"]
Padding = Literal["zero", "keep", "normalize"]
Parity = Literal["paper", "keras", "torchrl"]
WeightsAre = Literal["counts", "importance"]
ACTIVATIONS: tuple[Activation, ...] = ("relu",)
KEEPS: tuple[Keep, ...] = get_args(Keep)
PADDINGS: tuple[Padding, ...] = get_args(Padding)
PARITIES: tuple[Parity, ...] = get_args(Parity)
WEIGHTS_ARE: tuple[WeightsAre, ...] = get_args(WeightsAre)

# What is None only where the call asked for that; a type checker need not hold everybody to a check for it.
MaybeNone = Any


Choice = TypeVar("Choice", bound=str)


# ---- arrays ----------------------------------------------------------------------------------------------


def array(name: str, a: Any, wanted: np.dtype[Any] | None = _FLOATS[0]) -> Array:
    """Give an ndarray of a floating dtype that the core can read: `a` itself, or a copy where it is not aligned.

    A subclass of ndarray is taken by its memory. `wanted` is the dtype that an error says to write,
    None where there is nothing to write instead.
    """
    if type(a) is not np.ndarray and type(a) is not np.memmap:
        a = _where.recognized_or_same(name, a)
    if type(a) is not np.ndarray and type(a) is not np.memmap and not _where.on_device(a):
        # The values of a masked array mean something else.
        if not isinstance(a, np.ndarray) or isinstance(a, np.ma.MaskedArray):
            raise TypeError(f"{name} must be a numpy.ndarray{to_write(name, a, wanted)}, got {kind(a)}")
        a = np.asarray(a)
    if a.dtype not in _TENSORS and not is_bfloat16(a.dtype):
        native = a.dtype.newbyteorder("=")
        if native in _TENSORS:
            hint = f" (write {name}.astype(np.{native}))" if wanted is not None else ""
            raise TypeError(f"{name} must be in native byte order{hint}, got dtype {a.dtype.str}")
        is_number = wanted is not None and a.dtype.kind in "biuf"
        hint = f" (write {name}.astype({_name(wanted)}))" if is_number else ""
        raise TypeError(f"{name} must have dtype float16, bfloat16, float32 or float64{hint}, got {a.dtype}")
    if not 1 <= a.ndim <= _MOST_DIMENSIONS:
        raise ValueError(f"{name} must have 1 to {_MOST_DIMENSIONS} dimensions, got {a.ndim}")
    if a.flags.aligned:
        as_one: Array = a  # which one of a device is to the package
        return as_one
    if _where.on_device(a):
        raise ValueError(f"{name} must be aligned to its item size on a device, got an address that is not")
    return np.array(a, order="K")


def _name(dtype: np.dtype[Any] | None) -> str:
    """Name a dtype as one writes it."""
    return "ml_dtypes.bfloat16" if dtype is not None and is_bfloat16(dtype) else f"np.{dtype}"


def to_write(name: str, value: object, wanted: np.dtype[Any] | None) -> str:
    """Say how to write a value of another library as an array; nothing where that is not known."""
    if wanted is None:
        return ""
    if isinstance(value, np.ma.MaskedArray):
        return f" (write {name}.filled(0), and what counts as mask=)"
    library = type(value).__module__.partition(".")[0]
    write = {
        "torch": "{}.detach().cpu().numpy()",
        "tensorflow": "{}.numpy()",
        "pandas": "{}.to_numpy({})",
        "polars": "{}.to_numpy()",
        "xarray": "{}.to_numpy()",
        "cupy": "{}.get()",
    }.get(library)
    is_array = hasattr(value, "__array__") and not isinstance(value, np.generic)
    if write is None and (is_array or isinstance(value, list | tuple)):
        write = "np.asarray({}, {})"
    return "" if write is None else f" (write {write.format(name, _name(wanted))})"


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Tell whether it is the bfloat16 of ml_dtypes, which need not be installed otherwise."""
    return dtype.kind == "V" and dtype.itemsize == 2 and dtype.isnative and dtype.name == "bfloat16"


def is_of_core(dtype: np.dtype[Any]) -> bool:
    """Tell whether the core reads and writes arrays of it."""
    return dtype in _TENSORS or is_bfloat16(dtype)


def array_like(name: str, a: object, x: Array) -> Array:
    """Give `array` of what also has the shape and dtype of `x`."""
    checked = array(name, a, None if name == "out" else x.dtype)
    if checked.shape != x.shape:
        raise ValueError(f"{name} must have shape {x.shape}, got {checked.shape}")
    if checked.dtype != x.dtype:
        raise TypeError(f"{name} must have dtype {x.dtype}, got {checked.dtype}")
    return checked


def axis(value: object, ndim: int, name: str = "axis") -> int:
    """Give an axis, that of the channels, as an index from 0."""
    try:
        index = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {kind(value)}") from None
    if not -ndim <= index < ndim:
        raise ValueError(f"{name} must be in [{-ndim}, {ndim - 1}] for an array of {ndim} dimensions, got {index}")
    return index % ndim


def axes(value: object, ndim: int) -> tuple[int, ...]:
    """Give the axes that are normalized as rising indices from 0."""
    try:
        given = [operator.index(value)]  # type: ignore[arg-type]
    except TypeError:
        if not isinstance(value, tuple | list) or not value:
            shown = "()" if isinstance(value, tuple) else kind(value)
            raise TypeError(f"axes must be an int or a tuple of some, got {shown}") from None
        given = [axis(one, ndim, "axes") for one in value]
    else:
        given = [axis(given[0], ndim, "axes")]
    if len(set(given)) != len(given):
        raise ValueError(f"axes must name each axis once, got {value}")
    return tuple(sorted(given))


def choice(name: str, value: object, choices: tuple[Choice, ...]) -> Choice:
    """Give one of the words that are allowed."""
    for word in choices:
        if isinstance(value, str) and value == word:
            return word
    known = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}" if choices[1:] else repr(choices[0])
    raise ValueError(f"{name} must be {known}, got {value!r}")


def number(name: str, value: object) -> float:
    """Give a real number as a float; one beyond float64 becomes an infinity."""
    if isinstance(value, bool | np.bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, got {kind(value)}")
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return math.inf if value > 0 else -math.inf


def rest(share: float) -> float:
    """Give 1 - share as one would write it: 0.01 for 0.99, where 1 - 0.99 is 0.010000000000000009."""
    return float(1 - Decimal(repr(share)))


def eps(value: object) -> float:
    """Give eps as a float, finite and >= 0."""
    checked = number("eps", value)
    if not 0 <= checked < math.inf:
        raise ValueError(f"eps must be finite and >= 0, got {checked}")
    return checked


def share(name: str, value: object) -> float:
    """Give a float from 0 to 1."""
    checked = number(name, value)
    if not 0 <= checked <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {checked}")
    return checked


def int_at_least(name: str, value: object, least: int, or_none: str = "") -> int:
    """Give an int as one that C++ can hold; `or_none` is what the text says of None."""
    needed = f"an int >= {least}{or_none}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be {needed}, got {kind(value)}")
    if value < least:
        raise ValueError(f"{name} must be {needed}, got {value}")
    return min(int(value), 2**31 - 1)


def num_threads(value: object) -> int:
    """Give the threads asked for, 0 standing for None."""
    return 0 if value is None else int_at_least("num_threads", value, 1, " or None")


def channel_values(name: str, values: Any, channels: int) -> Array:
    """Give one value per channel as a contiguous float32 or float64 array; a copy only where that takes one.

    Integers become float64.
    """
    a = numbers(name, values)
    if a.dtype.kind not in "fiu" and not is_bfloat16(a.dtype):
        raise TypeError(f"{name} must have a floating dtype, got {a.dtype}")
    if a.shape != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), got {a.shape}")
    if a.dtype in _FLOATS and a.flags.c_contiguous and a.flags.aligned:
        return a
    if _where.on_device(a):
        wanted = np.float32 if a.dtype.itemsize <= 4 and a.dtype.kind not in "iu" else np.float64
        of_device: Array = _where.copy(a, np.dtype(wanted))
        return of_device
    with np.errstate(all="ignore"):  # a long double may well be beyond float64
        is_narrow = a.dtype.itemsize <= 4 and a.dtype.kind not in "iu"
        return np.array(a, dtype=np.float32 if is_narrow else np.float64)


def numbers(name: str, values: Any) -> Array:
    """Give an array of what is one or a sequence."""
    if type(values) is np.ndarray:
        return values
    values = _where.recognized_or_same(name, values)
    if _where.on_device(values):
        of_device: Array = values
        return of_device
    # The values of a masked array mean something else. (NumPy imports np.ma only where it is asked for.)
    if isinstance(values, np.ndarray) and isinstance(values, np.ma.MaskedArray):
        hint = f" (write {name}.filled(0), say)"
        raise TypeError(f"{name} must be a numpy.ndarray or a sequence{hint}, got {type(values).__name__}")
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # ragged, or a tensor that needs gradients or lies on a GPU
        hint = "" if isinstance(values, list | tuple) else to_write(name, values, _FLOATS[0])
        raise TypeError(f"{name} must be an array of numbers{hint}, got {kind(values)}") from None


def float_dtype(values: ArrayLike | None) -> np.dtype[Any]:
    """Tell the dtype of gradients of what a caller gave: its own where that floats, else float64."""
    if values is None or (isinstance(values, list | tuple) and not values):
        return np.dtype(np.float64)
    dtype = numbers("gamma", values).dtype
    return np.dtype(np.float64) if dtype.kind in "iu" else dtype


def optional_channel_values(name: str, values: Any, channels: int) -> Array | None:
    """Let None through."""
    return None if values is None else channel_values(name, values, channels)


def optional_values_of_axes(name: str, values: Any, shape: tuple[int, ...]) -> Array | None:
    """Give one value for each index of the axes that are normalized, flat; None through."""
    if values is None:
        return None
    a = numbers(name, values)
    if a.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, that of the axes of x that are normalized, got {a.shape}")
    return channel_values(name, a.reshape(-1), a.size)


def statistics(mean: Any, var: Any, channels: int) -> tuple[Array, Array]:
    """Give mean and var of each channel, after refusing negative variances. NaN passes: it stays in its channel."""
    given = channel_values("mean", mean, channels), channel_values("var", var, channels)
    not_negative("var", given[1])
    return given


def not_negative(name: str, a: Array) -> None:
    """Refuse a negative value, naming its channel. NaN passes. Values on a device are not looked at."""
    if _where.on_device(a):
        return
    each_channel(name, a, ~(a < 0), "be >= 0 in every channel")


def each_channel(name: str, a: Array, good: NDArray[np.bool], needed: str, kind_of: str = "") -> None:
    """Refuse the first value that is not good, naming its channel, which is the first axis."""
    if not good.all():
        first = tuple(np.argwhere(~good)[0])
        raise ValueError(f"{name} must {needed}, got {kind_of}{a[first]} in channel {first[0]}")


def several_positions(source: str, weights: Array) -> None:
    """Refuse a mask or lengths that leave one position, which has no variance."""
    needed = {"mask": "be True at", "lengths": "leave", "weights": "be above 0 at"}[source]
    if np.count_nonzero(weights) == 1:
        none = "at none" if source == "weights" else "none"
        raise ValueError(
            f"{source} must {needed} 2 positions or more for batch statistics (or {none}), got 1"
        ) from None


def ghost_values(x: Array, axis: int, size: int) -> None:
    """Refuse channels along the samples, and a ghost of one value per channel. An empty batch passes."""
    if axis == 0:
        raise ValueError("axis must not be 0, which holds the samples that ghosts are made of, got 0")
    if not x.size:
        return
    values_of_a_sample = x.size // (x.shape[0] * x.shape[axis])
    for samples in (min(size, x.shape[0]), x.shape[0] % size):
        if samples and samples * values_of_a_sample < 2:
            raise ValueError(
                "ghost_size must leave every ghost at least 2 values per channel, "
                f"got a ghost of 1 from ghost_size {size} and shape {x.shape}"
            )


def renorm_limits(r_max: object, d_max: object, weight: object, r_min: object, parity: object) -> dict[str, float]:
    """Give the limits of r and d by their names, as floats; where r_min is None, what `parity` says."""
    choice("parity", parity, PARITIES)
    most, offset = _at_least("r_max", r_max, 1.0), _at_least("d_max", d_max, 0.0)
    mixed = _at_least("weight", weight, 0.0)
    if mixed == math.inf:
        raise ValueError("weight must be finite, got inf")
    least = 0.0 if parity == "keras" else 1.0 / most
    if r_min is not None:
        least = share("r_min", r_min)
    return {"r_min": least, "r_max": most, "d_max": offset, "weight": mixed}


def renorm_samples(parity: str, samples: int | None, x: Array, axis: int, offsets: Array | None) -> None:
    """Refuse what torchrl's N/(N - 1), N the samples of a set, has no answer for. An empty one passes."""
    if parity != "torchrl" or samples is not None:
        return
    if axis == 0:
        raise ValueError("axis must not be 0, which holds the samples for parity='torchrl', got 0")
    if x.size and (x.shape[0] < 2 or (offsets is not None and (np.diff(offsets) == 1).any())):
        raise ValueError(
            "x must have at least 2 samples on axis 0 (in each segment and ghost) for parity='torchrl', got 1"
        )


def y_tells_x(activation: object, residual: object, x: Array) -> None:
    """Refuse what y does not tell x̂ after."""
    for name, value in (("activation", activation), ("residual", residual)):
        if value is not None:
            raise ValueError(f"keep must be 'x' with {name}, after which y does not tell what was normalized, got 'y'")
    if x.itemsize == 2:
        raise TypeError(
            "x must have dtype float32 or float64 for keep='y', got one of 16 bits, whose y has lost too much"
        )


def schedule_points(name: str, points: Any, least: float) -> tuple[tuple[int, float], ...]:
    """Give points (step, value) as a tuple of tuples."""
    try:
        pairs = [(at, value) for at, value in points]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a tuple of (step, value), got {points!r}") from None
    if not pairs:
        raise ValueError(f"{name} must have at least one point, got none")
    checked = tuple((int_at_least("step", at, 0), _at_least(name, value, least)) for at, value in pairs)
    for (a, _), (b, _) in pairwise(checked):
        if a >= b:
            raise ValueError(f"{name} must have rising steps, got {a} before {b}")
    if len(checked) > 1 and any(value == math.inf for _, value in checked):
        raise ValueError(f"{name} must be finite where it has several points, got inf")
    return checked


def _at_least(name: str, value: object, least: float) -> float:
    checked = number(name, value)
    if not checked >= least:  # so that NaN is refused
        raise ValueError(f"{name} must be >= {least:g}, got {checked}")
    return checked


def needs_among(known: tuple[str, ...], names: Any) -> tuple[bool, ...]:
    """Tell which of the known gradients are named."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"needs must be a tuple of names, got {kind(names)}")
    asked = tuple(names)
    for name in asked:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"needs must name some of {', '.join(map(repr, known))}, got {name!r}")
    return tuple(name in asked for name in known)


def output(out: object, x: Array, may_be: dict[str, Array], apart_from: dict[str, Array | None]) -> Array:
    """Refuse an `out` unlike `x`, one that cannot be written, and one that overlaps an input by part.

    `may_be` are the inputs it may be exactly; the first gives its name to the error text.
    """
    checked = array_like("out", out, x)
    _where.require_like(x, out=checked)
    if checked is not out:
        if (type(out) is np.ndarray or type(out) is np.memmap) and not out.flags.aligned:
            raise ValueError(
                f"out must be aligned to its item size, got an address that is not a multiple of {out.itemsize}"
            )
        raise TypeError(f"out must be a numpy.ndarray (write out.view(np.ndarray)), got {kind(out)}")
    if not checked.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    _one_address_per_value(checked)
    for name, a in may_be.items():
        if _where.overlap(checked, a) and not _where.same_memory(checked, a):
            raise ValueError(f"out must be {name} itself or share no memory with {name}, got a partial overlap")
    for name, values in apart_from.items():
        if values is not None and _where.overlap(checked, values):
            raise ValueError(f"out must share no memory with {name}, got an overlap")
    return checked


def two_outputs(
    out: Any, x: Array, may_be: dict[str, Array], apart_from: dict[str, Array | None], names: str
) -> tuple[Array | None, Array | None]:
    """Refuse what is not two outputs (`output`) or None, apart from each other; `names` tells which they are."""
    if out is None:
        return None, None
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"out must be a tuple ({names}) of arrays or None, got {kind(out)}")
    for a in out:
        if a is not None:
            output(a, x, may_be, apart_from)
    if out[0] is not None and out[1] is not None and _where.overlap(out[0], out[1]):
        raise ValueError("out must be two arrays that share no memory, got an overlap")
    return out


def weights_unsaid(where: str) -> ValueError:
    """Return the error for an unbiased variance of weights that nobody said the meaning of."""
    return ValueError(
        "weights_are must be 'counts' (a weight of 2 is a value that came twice) or 'importance' (only their ratios matter) "
        f"for {where} and weights other than 0 and 1, of which it decides the unbiased variance, got None"
    )


def weights_leave_variance(count: Array, dof: Array, ddof: int, weights_are: WeightsAre | None) -> None:
    """Refuse sums of weights that have no variance of this ddof. None at all are passed."""
    if ddof == 0:
        return
    if weights_are == "counts":
        good, needed = count - ddof >= 1, f"sum to at least {ddof + 1} where they are counts and ddof={ddof}"
    else:
        good, needed = ddof * dof > (ddof - 1) * count, f"be above 0 at {ddof + 1} positions for ddof={ddof}"
    each_channel("weights", count, good | (count == 0), f"{needed} (weights_are={weights_are!r})", "a sum of ")


def instance(name: str, value: object, wanted: type | tuple[type, ...], text: str) -> None:
    """Refuse what is not an instance of `wanted`."""
    if not isinstance(value, wanted):
        raise TypeError(f"{name} must be {text}, got {kind(value)}")


def _one_address_per_value(out: Array) -> None:
    if out.flags.c_contiguous:
        return
    block = 0  # bytes that the axes so far, from the smallest stride on, reach over
    for stride, n, d in sorted((abs(out.strides[d]), out.shape[d], d) for d in range(out.ndim)):
        if n > 1 and stride == 0:
            raise ValueError(f"out must have one address per value, got stride 0 on axis {d}")
        if n > 1 and stride < block + out.itemsize:
            raise ValueError(f"out must have one address per value, got overlapping strides {out.strides}")
        block += (n - 1) * stride


def kind(value: object) -> str:
    """Say what came in a word: None, or the name of its type."""
    return "None" if value is None else type(value).__name__


def summary(value: Any) -> str:
    """Show the fields of a NamedTuple, or of a dataclass those that are not its defaults.

    Of more than a few values, how many they are.
    """
    if isinstance(value, tuple):
        names: Iterable[str] = value._fields  # type: ignore[attr-defined]
    else:
        fields = dataclasses.fields(value)
        names = [f.name for f in fields if f.repr and getattr(value, f.name) is not f.default]
    texts = (f"{name}={shown(getattr(value, name))}" for name in names)
    return f"{type(value).__name__}({', '.join(texts)})"


def shown(value: object) -> str:
    """Show a value of a summary: of a long array its dtype and shape."""
    if isinstance(value, np.ndarray) and value.size > _SHOWN:
        return f"<{value.dtype} {value.shape}>"
    if isinstance(value, tuple) and len(value) > _SHOWN:
        return f"<{len(value)} {type(value[0]).__name__}>"
    return repr(value)
