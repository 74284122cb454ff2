"""What other libraries mean by the same words, by name: their defaults, and their states as states of a `BatchNorm`.

| | eps | running = | running variance | channels |
|---|---|---|---|---|
| PyTorch | 1e-5 | (1 - momentum)·running + momentum·batch | unbiased | axis 1 |
| Keras 3 | 1e-3 | momentum·running + (1 - momentum)·batch | biased | the last axis |
| Flax | 1e-5 | momentum·running + (1 - momentum)·batch | biased | the last axis |
| ONNX | 1e-5 | momentum·running + (1 - momentum)·batch | biased | axis 1 |

None of them is imported: what is given is read by its attributes and names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from batchnorm import _validate, _validate_state

Array = NDArray[Any]


@dataclass(frozen=True)
class Convention:
    """The defaults of a library: `eps`, `update_rate` and `ddof` of the running statistics, and the channel `axis`."""

    eps: float
    update_rate: float
    ddof: int
    axis: int


CONVENTIONS = {
    "torch": Convention(1e-5, 0.1, 1, 1),
    "keras": Convention(1e-3, 0.01, 0, -1),
    "flax": Convention(1e-5, 0.01, 0, -1),
    "onnx": Convention(1e-5, 0.1, 0, 1),
}
Library = Literal["torch", "keras", "flax", "onnx"]
# What BatchNorm() takes where none is named: those of PyTorch.
DEFAULT = CONVENTIONS["torch"]

_FLAX = ("scale", "bias", "mean", "var")
_LIBRARY = {"torch": "PyTorch", "keras": "Keras", "flax": "Flax", "onnx": "ONNX"}


@dataclass(frozen=True, eq=False)
class Imported:
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


def convention(name: object) -> Convention:
    """Give the convention of that name."""
    if name is None:
        return DEFAULT
    return CONVENTIONS[_validate.choice("convention", name, tuple(CONVENTIONS))]


def from_torch(source: Any, *, eps: Any, momentum: Any, update_rate: Any, axis: int) -> Imported:
    """Read a module of PyTorch or the mapping that is its state_dict."""
    is_mapping = isinstance(source, Mapping)
    if not is_mapping:
        _check_torch_module(source)
    state = source if is_mapping else source.state_dict()
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    _only(state, names, "of PyTorch")
    eps = eps if eps is not None else 1e-5 if is_mapping else source.eps
    rate = update_rate if update_rate is not None else momentum
    if rate is None:
        # A frozen module (of torchvision or detectron2) has no momentum, as it never updates.
        rate = 0.1 if is_mapping else getattr(source, "momentum", 0.0)
    if rate is None:
        raise ValueError(
            "update_rate must be given for a module with momentum=None: PyTorch then averages the variances of all "
            "batches alike, which is not the variance of all their values that update_rate=None stands for"
        )
    settings = {"eps": _number("eps", eps), "update_rate": _number("momentum", rate), "ddof": 1, "axis": axis}
    count = state.get("num_batches_tracked")
    imported = _imported(
        settings,
        state.get("weight"),
        state.get("bias"),
        _needed(state, "running_mean", "PyTorch's track_running_stats=True"),
        _needed(state, "running_var", "PyTorch's track_running_stats=True"),
        0 if count is None else _count(_numpy(count)),
    )
    if is_mapping:
        return imported
    frozen = not hasattr(source, "momentum")
    return replace(imported, training=bool(getattr(source, "training", True)), frozen=frozen)


def _check_torch_module(source: Any) -> None:
    """Refuse what is no batch norm by its class: instance norms, for one, keep arrays of the same names."""
    names = [kind.__name__ for kind in type(source).__mro__]
    names.append(str(getattr(source, "original_name", "")))  # of what TorchScript has compiled
    is_batch_norm = any("BatchNorm" in name for name in names)
    if not (is_batch_norm and hasattr(source, "state_dict") and hasattr(source, "eps")):
        raise TypeError(
            f"source must be a batch norm module of PyTorch or its state_dict, got {_validate.kind(source)}"
        )


def from_keras(source: Any, *, epsilon: Any, momentum: Any, axis: Any, scale: Any, center: Any) -> Imported:
    """Read a layer of Keras, the list of its get_weights(), or a mapping of their names."""
    names, frozen = ("gamma", "beta", "moving_mean", "moving_variance"), False
    if isinstance(source, Sequence) and not isinstance(source, str):
        state = dict(zip(_keras_weights(len(source), scale, center), source, strict=True))
    elif scale is not None or center is not None:
        raise ValueError("scale and center must be None where source is no list: it has its names")
    elif isinstance(source, Mapping):
        _only(source, names, "of Keras")
        state = dict(source)
    elif hasattr(source, "moving_variance"):
        if getattr(source, "renorm", False):
            raise ValueError("source must be a layer without renorm, whose further state has no place here")
        state = {name: getattr(source, name, None) for name in names}
        frozen = not getattr(source, "trainable", True)
        epsilon = source.epsilon if epsilon is None else epsilon
        momentum = source.momentum if momentum is None else momentum
        axis = source.axis if axis is None else axis
    else:
        raise TypeError(
            "source must be a BatchNormalization of Keras that is built, its get_weights(), or a mapping of their names, "
            f"got {_validate.kind(source)}"
        )
    settings = _settings("keras", epsilon, momentum, axis)
    needs = "a layer of Keras that is built"
    imported = _imported(
        settings,
        state.get("gamma"),
        state.get("beta"),
        _needed(state, "moving_mean", needs),
        _needed(state, "moving_variance", needs),
    )
    return replace(imported, frozen=frozen)


def _keras_weights(count: int, scale: Any, center: Any) -> list[str]:
    """Give the names of the arrays of get_weights(), which say nothing of themselves but how many they are."""
    said = {"gamma": scale, "beta": center}
    for name, value in (("scale", scale), ("center", center)):
        if value is not None:
            _validate_state.flag(name, value)
    kinds = [
        kind
        for kind in ({"gamma": a, "beta": b} for a in (True, False) for b in (True, False))
        if sum(kind.values()) == count - 2 and all(said[name] in (None, kind[name]) for name in said)
    ]
    if len(kinds) != 1:
        raise ValueError(
            "source must be the arrays of get_weights(): 4, or 2 without gamma and beta, or 3 with scale=False or "
            f"center=False given to tell which of them is absent, got {count} with scale={scale} and center={center}"
        )
    return [*(name for name, is_there in kinds[0].items() if is_there), "moving_mean", "moving_variance"]


def from_flax(variables: Any, *, epsilon: Any, momentum: Any, axis: Any) -> Imported:
    """Read a BatchNorm of Flax's nnx, its state, or the variables of one of linen."""
    training = True
    if isinstance(variables, Mapping) and "batch_stats" in variables:
        params, stats = variables.get("params", {}), variables["batch_stats"]
        for name, group in (("params", params), ("batch_stats", stats)):
            if not isinstance(group, Mapping):
                raise TypeError(f"{name} must be a mapping of names to arrays, got {_validate.kind(group)}")
        _only(params, ("scale", "bias"), "of Flax's params")
        _only(stats, ("mean", "var"), "of Flax's batch_stats")
        state = {**params, **stats}
    elif isinstance(variables, Mapping) and "mean" in variables:
        _only(variables, _FLAX, "of Flax")
        state = dict(variables)
    elif all(hasattr(variables, name) for name in ("mean", "var", "epsilon", "momentum")):
        state = {name: getattr(variables, name, None) for name in _FLAX}
        epsilon = variables.epsilon if epsilon is None else epsilon
        momentum = variables.momentum if momentum is None else momentum
        axis = variables.axis if axis is None else axis
        training = not getattr(variables, "use_running_average", False)  # None leaves it to the call
    else:
        raise TypeError(
            "variables must be a BatchNorm of Flax's nnx, its state (mean, var, scale, bias), or a mapping with "
            "'batch_stats' (mean, var) and 'params' (scale, bias), got "
            f"{sorted(map(str, variables)) if isinstance(variables, Mapping) else _validate.kind(variables)}"
        )
    settings = _settings("flax", epsilon, momentum, axis)
    mean, var = (_needed(state, name, "Flax's batch_stats") for name in ("mean", "var"))
    imported = _imported(settings, state.get("scale"), state.get("bias"), mean, var)
    return replace(imported, training=training)


def from_onnx(inputs: Any, *, epsilon: Any, momentum: Any) -> Imported:
    """Read the inputs of a BatchNormalization of ONNX, by their names in its specification."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping of names to arrays, got {_validate.kind(inputs)}")
    names = ("scale", "B", "input_mean", "input_var")
    _only(inputs, names, "of ONNX")
    gamma, beta, mean, var = (_needed(inputs, name, "ONNX's BatchNormalization") for name in names)
    return _imported(_settings("onnx", epsilon, momentum, None), gamma, beta, mean, var)


def check_settings(settings: Mapping[str, Any]) -> None:
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
            raise TypeError(
                f"{name} must not be given for a layer from elsewhere, as {reason}, got {settings[name]!r}"
            )
    if "update_rate" in settings and settings["update_rate"] is None:
        raise TypeError(
            "update_rate must be a number for a layer from elsewhere, which has no moments, got None"
        )


def check_export(
    library: str,
    ddof: int,
    update_rate: float | None,
    domains: int | None,
    parity: str | None,
    any_ddof: object,
) -> None:
    """Refuse a layer whose running statistics the library could not go on with; `parity` is that of its renorm."""
    name, needed = _LIBRARY[library], CONVENTIONS[library].ddof
    if domains is not None:
        raise ValueError(f"the layer must have one set of statistics for {name}, got {domains} domains")
    kinds = "biased", "unbiased"
    has, kept, came = f"ddof={needed}", ddof, f"ddof={ddof}"
    if parity is not None:  # torchrl's N/(N - 1) is unbiased for x of (N, C), the others average biased ones
        kept = int(parity == "torchrl")
        has, came = "no renorm", f"renorm with parity={parity!r}, whose are {kinds[kept]}"
    if not _validate_state.flag("any_ddof", any_ddof) and kept != needed:
        raise ValueError(
            f"the layer must have {has} for {name}, whose running variances are {kinds[needed]}, got {came}: "
            "pass any_ddof=True where it will not be trained there"
        )
    if update_rate is None and library != "torch":
        raise ValueError(f"the layer must have an update_rate for {name}'s momentum, got None")


def floats(dtype: Any, own: np.dtype[Any]) -> np.dtype[Any]:
    """Give the dtype of exported arrays: where None is asked for, one that holds `own` and statistics."""
    return np.result_type(own, np.float32) if dtype is None else _validate_state.dtype(dtype)


def _settings(library: str, epsilon: Any, momentum: Any, axis: Any) -> dict[str, Any]:
    """Give the settings of a library whose momentum is the share of the old; None for its defaults."""
    defaults = CONVENTIONS[library]
    if (
        isinstance(axis, Sequence) and not isinstance(axis, str) and len(axis) == 1
    ):  # tf.keras makes a list of it
        axis = axis[0]
    return {
        "eps": defaults.eps if epsilon is None else _number("epsilon", epsilon),
        "update_rate": defaults.update_rate if momentum is None else _rest("momentum", momentum),
        "ddof": defaults.ddof,
        "axis": defaults.axis if axis is None else axis,
    }


def _imported(
    settings: dict[str, Any], gamma: Any, beta: Any, mean: Array, var: Array, count: int = 0
) -> Imported:
    channels = mean.size
    arrays = {"gamma": gamma, "beta": beta, "running mean": mean, "running variance": var}
    for name, value in arrays.items():
        if value is None:
            continue
        arrays[name] = _numpy(value)
        if arrays[name].shape != (channels,) or arrays[name].dtype.kind != "f":
            raise ValueError(
                f"source must have a {name} of {channels} floats, got shape {arrays[name].shape} of {arrays[name].dtype}"
            )
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"source must have a finite {name} in every channel, got infinity or NaN")
    if (arrays["running variance"] < 0).any():
        c = int((arrays["running variance"] < 0).argmax())
        raise ValueError(
            f"source must have running variances >= 0, got {arrays['running variance'][c]} in channel {c}"
        )
    mean, var = arrays["running mean"], arrays["running variance"]
    parameters = [a for a in (arrays["gamma"], arrays["beta"]) if a is not None] or [mean]
    dtype = min(np.result_type(*parameters), np.dtype(np.float64), key=lambda found: found.itemsize)
    return Imported(settings, arrays["gamma"], arrays["beta"], mean, var, dtype, count)


def _count(value: Array) -> int:
    if value.shape != () or value.dtype.kind not in "iu" or value < 0:
        raise ValueError(
            "source must have a num_batches_tracked that is one integer >= 0, "
            f"got {value} of shape {value.shape} and {value.dtype}"
        )
    return int(value)


def _only(state: Mapping[str, Any], names: Sequence[str], whose: str) -> None:
    others = sorted(set(map(str, state)) - set(names))
    if others:
        raise ValueError(f"source must have names {whose} ({', '.join(names)}), got {', '.join(others)}")


def _needed(state: Mapping[str, Any], name: str, where: str) -> Array:
    value = state.get(name)
    if value is None:
        raise ValueError(f"source must have {name}, as {where} has, got none")
    return _numpy(value)


def _numpy(value: Any) -> Array:
    """Give an array of any library that lies in this machine's memory."""
    if hasattr(value, "materialize"):
        raise ValueError(
            f"source must have its channels, as a lazy module has after its first input, got {_validate.kind(value)}"
        )
    if hasattr(value, "detach"):  # of PyTorch, perhaps on a device, perhaps of a dtype that NumPy has not
        value = value.detach().cpu()
        return np.asarray(value.float() if str(value.dtype) == "torch.bfloat16" else value)
    if hasattr(value, "numpy") and not isinstance(value, np.ndarray):
        return _numpy(value.numpy())
    array = np.asarray(value)
    return array.astype(np.float32) if _validate.is_bfloat16(array.dtype) else array


def _number(name: str, value: Any) -> float:
    return _validate.number(name, value)


def _rest(name: str, value: Any) -> float:
    """Give 1 - momentum, for those to whom momentum is the share of the old."""
    momentum = _number(name, value)
    if not 0 <= momentum <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {momentum}")
    return _validate.rest(momentum)
