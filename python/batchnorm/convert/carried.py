"""What goes over from one library to another: settings and a state, checked, whatever they were read from.

No other library is imported: what is given is read by its attributes and names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import DTypeLike, NDArray

from batchnorm import _validate
from batchnorm._validate import Activation, Parity, WeightsAre
from batchnorm.conventions import CONVENTIONS, Library
from batchnorm.layers import BatchNorm
from batchnorm.layers.settings import Nonfinite, SingleValue, flag, parameter_dtype
from batchnorm.running import RenormSchedule

Array = NDArray[Any]

_NAME = {"torch": "PyTorch", "keras": "Keras", "flax": "Flax", "onnx": "ONNX"}


class AnySettings(TypedDict, total=False):
    """The settings of a `BatchNorm` that no source of another library decides."""

    ddof: int
    nonfinite: Nonfinite
    single_value: SingleValue
    ghost_size: int | None
    renorm: RenormSchedule | None
    parity: Parity
    activation: Activation | None
    weights_are: WeightsAre | None
    num_threads: int | None


class MoreSettings(AnySettings, total=False):
    """The same where a source has eps and update_rate by other names."""

    eps: float
    update_rate: float


class MostSettings(MoreSettings, total=False):
    """The same where a source has no axis."""

    axis: int


class _AsEver:
    """The default of a setting that is that of `BatchNorm`."""

    def __repr__(self) -> str:
        return "<as in BatchNorm()>"


AS_EVER: Any = _AsEver()


@dataclass(frozen=True, eq=False)
class Carried:
    """Settings of a BatchNorm and the state it is to begin with, its mode included."""

    settings: dict[str, Any]
    gamma: Array | None
    beta: Array | None
    mean: Array
    var: Array
    dtype: np.dtype[Any]  # of gamma and beta, or the narrowest of a layer's that holds them
    update_count: int = 0
    training: bool = True
    frozen: bool = False


def carried(settings: dict[str, Any], gamma: Any, beta: Any, mean: Array, var: Array, count: int = 0) -> Carried:
    """Check what was read, which may be of any library of arrays."""
    channels = mean.size
    arrays = {"gamma": gamma, "beta": beta, "running mean": mean, "running variance": var}
    for name, value in arrays.items():
        if value is None:
            continue
        arrays[name] = numpy_of(value)
        if arrays[name].shape != (channels,) or arrays[name].dtype.kind != "f":
            raise ValueError(
                f"source must have a {name} of {channels} floats, got shape {arrays[name].shape} of {arrays[name].dtype}"
            )
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"source must have a finite {name} in every channel, got infinity or NaN")
    if (arrays["running variance"] < 0).any():
        c = int((arrays["running variance"] < 0).argmax())
        raise ValueError(f"source must have running variances >= 0, got {arrays['running variance'][c]} in channel {c}")
    mean, var = arrays["running mean"], arrays["running variance"]
    parameters = [a for a in (arrays["gamma"], arrays["beta"]) if a is not None] or [mean]
    dtype = min(np.result_type(*parameters), np.dtype(np.float64), key=lambda found: found.itemsize)
    return Carried(settings, arrays["gamma"], arrays["beta"], mean, var, dtype, count)


def layer_of(source: Carried, dtype: DTypeLike | None, settings: Mapping[str, Any]) -> BatchNorm:
    """Make the layer that goes on where the source is."""
    _check_settings(settings)
    dtype = source.dtype if dtype is None else dtype
    has = {"gamma": source.gamma is not None, "beta": source.beta is not None}
    layer = BatchNorm(source.mean.size, dtype=dtype, **(source.settings | has | dict(settings)))
    state = {
        "running_mean": source.mean.astype(np.float64),
        "running_var": source.var.astype(np.float64),
        "update_count": np.array(source.update_count, np.int64),
    }
    for name, value in (("gamma", source.gamma), ("beta", source.beta)):
        if value is not None:
            state[name] = value.astype(layer.dtype)
    layer.load_state_dict(state, strict=False)
    if source.frozen:
        layer.freeze()
    return layer.train(source.training)


def exported(layer: BatchNorm, library: Library, dtype: DTypeLike | None, any_ddof: bool) -> list[Array]:
    """Give gamma, beta, mean and var as fresh arrays of `dtype`, for a library that can take them.

    A parameter that the layer is without is ones or zeros. None as dtype: one that holds the layer's and statistics.
    """
    _check_export(layer, library, any_ddof)
    wanted = np.result_type(layer.dtype, np.float32) if dtype is None else parameter_dtype(dtype)
    gamma = np.ones(layer.channels) if layer.gamma is None else layer.gamma
    beta = np.zeros(layer.channels) if layer.beta is None else layer.beta
    with np.errstate(all="ignore"):  # a statistic beyond float32 is an infinity there
        return [a.astype(wanted) for a in (gamma, beta, layer.running_mean, layer.running_var)]


def settings_of(library: str, epsilon: Any, momentum: Any, axis: Any) -> dict[str, Any]:
    """Give the settings of a library whose momentum is the share of the old; None for its defaults."""
    defaults = CONVENTIONS[library]
    if isinstance(axis, Sequence) and not isinstance(axis, str) and len(axis) == 1:  # tf.keras makes a list of it
        axis = axis[0]
    return {
        "eps": defaults.eps if epsilon is None else _validate.number("epsilon", epsilon),
        "update_rate": defaults.update_rate if momentum is None else _rest("momentum", momentum),
        "ddof": defaults.ddof,
        "axis": defaults.axis if axis is None else axis,
    }


def only(state: Mapping[str, Any], names: Sequence[str], whose: str) -> None:
    """Refuse names that are no others'."""
    others = sorted(set(map(str, state)) - set(names))
    if others:
        raise ValueError(f"source must have names {whose} ({', '.join(names)}), got {', '.join(others)}")


def needed(state: Mapping[str, Any], name: str, where: str) -> Array:
    """Give an array that must be there."""
    value = state.get(name)
    if value is None:
        raise ValueError(f"source must have {name}, as {where} has, got none")
    return numpy_of(value)


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
    name, needed = _NAME[library], CONVENTIONS[library].ddof
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


def _rest(name: str, value: Any) -> float:
    """Give 1 - momentum, for those to whom momentum is the share of the old."""
    momentum = _validate.number(name, value)
    if not 0 <= momentum <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {momentum}")
    return _validate.rest(momentum)
