"""What goes over from one library to another: settings and a state, checked, whatever they were read from.

No other library is imported: what is given is read by its attributes and names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import DTypeLike

from batchnorm import _validate, _where
from batchnorm._arrays import Array
from batchnorm._validate import Activation, Parity, WeightsAre
from batchnorm.conventions import CONVENTIONS, Library
from batchnorm.layers import BatchNorm
from batchnorm.layers.layer import Default
from batchnorm.layers.settings import Nonfinite, SingleValue, flag, parameter_dtype
from batchnorm.running import RenormSchedule


class Names(NamedTuple):
    """What a library calls itself, and gamma, beta, running mean and running variance.

    `place` is what has the latter two, for errors; `fills` says that ones and zeros stand there for parameters that a
    layer is without.
    """

    library: str
    arrays: tuple[str, str, str, str]
    place: str
    fills: bool = False


NAMES: dict[Library, Names] = {
    "torch": Names(
        "PyTorch", ("weight", "bias", "running_mean", "running_var"), "PyTorch's track_running_stats=True", fills=True
    ),
    "keras": Names("Keras", ("gamma", "beta", "moving_mean", "moving_variance"), "a layer of Keras that is built"),
    "flax": Names("Flax", ("scale", "bias", "mean", "var"), "Flax's batch_stats"),
    "onnx": Names("ONNX", ("scale", "B", "input_mean", "input_var"), "ONNX's BatchNormalization", fills=True),
}


class AnySettings(TypedDict, total=False):
    """The settings of a layer that no source of another library decides, or that bare arrays do not tell."""

    ddof: int
    nonfinite: Nonfinite
    single_value: SingleValue
    ghost_size: int | None
    renorm: RenormSchedule | None
    parity: Parity
    activation: Activation | None
    weights_are: WeightsAre | None
    num_threads: int | None
    # Of the other kinds of layers.
    shape: int | tuple[int, ...]
    axes: int | tuple[int, ...]
    channels: int
    num_groups: int


class MoreSettings(AnySettings, total=False):
    """The same where a source has eps and update_rate by other names."""

    eps: float
    update_rate: float


class MostSettings(MoreSettings, total=False):
    """The same where a source has no axis."""

    axis: int


AS_EVER: Any = Default("as in BatchNorm()")


@dataclass(frozen=True, eq=False)
class Carried:
    """Settings of a BatchNorm and the state it is to begin with, its mode included."""

    settings: dict[str, Any]
    gamma: Array | None
    beta: Array | None
    mean: Array
    var: Array
    update_count: int = 0
    training: bool = True
    frozen: bool = False

    def dtype(self) -> np.dtype[Any]:
        """Tell that of gamma and beta, or the narrowest of a layer's that holds them."""
        parameters = [a for a in (self.gamma, self.beta) if a is not None] or [self.mean]
        return min(np.result_type(*parameters), np.dtype(np.float64), key=lambda found: found.itemsize)


def read(
    library: Library, state: Mapping[str, Any], settings: dict[str, Any], *, needs_all: bool = False, **others: Any
) -> Carried:
    """Check what a library keeps under its names, in arrays of whatever library; `others` are fields of what is given."""
    names = NAMES[library]
    values = [state.get(name) for name in names.arrays]
    for name, value in list(zip(names.arrays, values, strict=True))[0 if needs_all else 2 :]:
        if value is None:
            raise ValueError(f"source must have {name}, as {names.place} has, got none")
    arrays: list[Any] = [None if value is None else numpy_of(value) for value in values]
    shape, var = (arrays[2].size,), arrays[3]
    for name, a in zip(("gamma", "beta", "running mean", "running variance"), arrays, strict=True):
        if a is None:
            continue
        if a.shape != shape or a.dtype.kind != "f":
            raise ValueError(f"source must have a {name} of {shape[0]} floats, got shape {a.shape} of {a.dtype}")
        if not np.isfinite(a).all():
            raise ValueError(f"source must have a finite {name} in every channel, got infinity or NaN")
    if (var < 0).any():
        c = int((var < 0).argmax())
        raise ValueError(f"source must have running variances >= 0, got {var[c]} in channel {c}")
    return Carried(settings, *arrays, **others)


def layer_of(source: Carried, dtype: DTypeLike | None, settings: Mapping[str, Any]) -> BatchNorm:
    """Make the layer that goes on where the source is."""
    _check_settings(settings)
    parameters = {"gamma": source.gamma, "beta": source.beta}
    has = {name: value is not None for name, value in parameters.items()}
    dtype = source.dtype() if dtype is None else dtype
    layer = BatchNorm(source.mean.size, dtype=dtype, **(source.settings | has | dict(settings)))
    state = {
        "running_mean": source.mean.astype(np.float64),
        "running_var": source.var.astype(np.float64),
        "update_count": np.array(source.update_count, np.int64),
    }
    state |= {name: value.astype(layer.dtype) for name, value in parameters.items() if value is not None}
    layer.load_state_dict(state, strict=False)
    if source.frozen:
        layer.freeze()
    return layer.train(source.training)


def exported(layer: BatchNorm, library: Library, dtype: DTypeLike | None, any_ddof: bool) -> dict[str, Array]:
    """Give gamma, beta, mean and var as fresh arrays of `dtype`, by their names in a library that can take them.

    None as dtype: one that holds the layer's and statistics.
    """
    _check_export(layer, library, any_ddof)
    wanted = np.result_type(layer.dtype, np.float32) if dtype is None else parameter_dtype(dtype)
    gamma, beta = _where.fetched(layer.gamma), _where.fetched(layer.beta)
    if NAMES[library].fills:
        gamma = np.ones(layer.channels) if gamma is None else gamma
        beta = np.zeros(layer.channels) if beta is None else beta
    arrays = zip(NAMES[library].arrays, (gamma, beta, layer.running_mean, layer.running_var), strict=True)
    with np.errstate(all="ignore"):  # a statistic beyond float32 is an infinity there
        return {name: a.astype(wanted) for name, a in arrays if a is not None}


def settings_of(library: Library, given: Mapping[str, Any], source: object = None) -> dict[str, Any]:
    """Give the settings of a library whose momentum is the share of the old.

    given : its epsilon, momentum and axis, in this order; None for those of `source`, else for the library's defaults.
    """
    defaults = CONVENTIONS[library]
    epsilon, momentum, axis = (getattr(source, name, None) if v is None else v for name, v in given.items())
    if isinstance(axis, Sequence) and not isinstance(axis, str) and len(axis) == 1:  # tf.keras makes a list of it
        axis = axis[0]
    return {
        "eps": defaults.eps if epsilon is None else _validate.number("epsilon", epsilon),
        "update_rate": defaults.update_rate
        if momentum is None
        else _validate.rest(_validate.share("momentum", momentum)),
        "ddof": defaults.ddof,
        "axis": defaults.axis if axis is None else axis,
    }


def only(state: Mapping[str, Any], names: Sequence[str], whose: str) -> None:
    """Refuse other names than these."""
    others = sorted(set(map(str, state)) - set(names))
    if others:
        raise ValueError(f"source must have names {whose} ({', '.join(names)}), got {', '.join(others)}")


def numpy_of(value: Any) -> Array:
    """Give an array of any library that lies in this machine's memory."""
    if hasattr(value, "materialize"):
        raise ValueError(
            f"source must have its channels, as a lazy module has after its first input, got {_validate.kind(value)}"
        )
    if hasattr(value, "detach"):  # of PyTorch, perhaps on a device, perhaps of a dtype that NumPy has not
        value = value.detach().cpu()
        return np.asarray(value.float() if str(value.dtype) == "torch.bfloat16" else value)
    if hasattr(value, "numpy") and not isinstance(value, np.ndarray):
        return numpy_of(value.numpy())
    array = np.asarray(value)
    return array.astype(np.float32) if _validate.is_bfloat16(array.dtype) else array


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a layer that what is carried over decides."""
    reasons = {
        "channels": "source tells them",
        "convention": "source has one",
        "gamma": "source has it or not",
        "beta": "source has it or not",
        "domains": "source has one set of statistics",
        "debias": "the statistics of source have a share of the values that they began as",
    }
    for name, reason in reasons.items():
        if name in settings:
            raise TypeError(f"{name} must not be given for a layer from elsewhere, as {reason}, got {settings[name]!r}")
    if "update_rate" in settings and settings["update_rate"] is None:
        raise TypeError("update_rate must be a number for a layer from elsewhere, which has no moments, got None")


def _check_export(layer: BatchNorm, library: Library, any_ddof: object) -> None:
    """Refuse a layer whose running statistics the library could not go on with."""
    ddof, domains = layer.ddof, layer.domains
    parity = None if layer.renorm is None else layer.parity
    name, needed = NAMES[library].library, CONVENTIONS[library].ddof
    if domains is not None:
        raise ValueError(f"the layer must have one set of statistics for {name}, got {domains} domains")
    kinds = "biased", "unbiased"
    has, kept, came = f"ddof={needed}", ddof, f"ddof={ddof}"
    if parity is not None:  # torchrl's N/(N - 1) is unbiased for x of (N, C), the others average biased ones
        kept = int(parity == "torchrl")
        has, came = "no renorm", f"renorm with parity={parity!r}, whose are {kinds[kept]}"
    if not flag("any_ddof", any_ddof) and kept != needed:
        raise ValueError(
            f"the layer must have {has} for {name}, whose running variances are {kinds[needed]}, got {came}: "
            "pass any_ddof=True where it will not be trained there"
        )
    if layer.update_rate is None and library != "torch":
        raise ValueError(f"the layer must have an update_rate for {name}'s momentum, got None")
