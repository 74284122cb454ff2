"""Norms of each sample by itself from other libraries, and back: what a module says of itself, and its scale and bias."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from batchnorm import _validate, _where
from batchnorm._arrays import Array
from batchnorm.conventions import Library
from batchnorm.convert.carried import numpy_of, only
from batchnorm.layers import GraphNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from batchnorm.layers.by_sample import SampleLayer
from batchnorm.layers.settings import parameter_dtype

L = TypeVar("L", bound=SampleLayer)

# What each library calls gamma and beta, and its classes, of each kind; "" where it has none. PyTorch's GraphNorm is that of
# PyTorch Geometric, whose name of alpha is the last.
_Names = tuple[str, ...]
_NAMES: dict[Library, dict[type[SampleLayer], _Names]] = {
    "torch": {
        LayerNorm: ("weight", "bias", "LayerNorm"),
        RMSNorm: ("weight", "", "RMSNorm"),
        GroupNorm: ("weight", "bias", "GroupNorm"),
        InstanceNorm: ("weight", "bias", "InstanceNorm"),
        GraphNorm: ("weight", "bias", "GraphNorm", "mean_scale"),
    },
    "keras": {
        LayerNorm: ("gamma", "beta", "LayerNormalization"),
        RMSNorm: ("scale", "", "RMSNormalization"),
        GroupNorm: ("gamma", "beta", "GroupNormalization"),
        InstanceNorm: ("gamma", "beta", "GroupNormalization"),
    },
    "flax": {
        LayerNorm: ("scale", "bias", "LayerNorm"),
        RMSNorm: ("scale", "", "RMSNorm"),
        GroupNorm: ("scale", "bias", "GroupNorm"),
        InstanceNorm: ("scale", "bias", "InstanceNorm"),
    },
    "onnx": {
        LayerNorm: ("Scale", "B", "LayerNormalization"),
        RMSNorm: ("scale", "", "RMSNormalization"),
        GroupNorm: ("scale", "bias", "GroupNormalization"),
        InstanceNorm: ("scale", "B", "InstanceNormalization"),
    },
}


# What PyTorch calls the running statistics of an InstanceNorm.
_RUNNING = {"running_mean": "running_mean", "running_var": "running_var", "update_count": "num_batches_tracked"}


def of_kind(library: Library, kind: type[L], source: Any, dtype: DTypeLike | None, settings: Mapping[str, Any]) -> L:
    """Make a layer of that kind that goes on where a module, or a mapping of its arrays, is.

    settings : what the caller gives, None for what it does not: eps, axis, axes, shape, num_groups, opset, and those of any
        layer.
    """
    if not (isinstance(kind, type) and issubclass(kind, SampleLayer) and kind in _NAMES[library]):
        kinds = ", ".join(["BatchNorm", *(k.__name__ for k in _NAMES[library])])
        raise TypeError(f"kind must be one of {kinds}, got {kind!r}")
    for name in ("convention", "gamma", "beta", "alpha"):
        if name in settings:
            raise TypeError(
                f"{name} must not be given for a layer from elsewhere, as source decides it, got {settings[name]!r}"
            )
    named = _parameters(library, kind)
    running = _RUNNING if library == "torch" and kind is InstanceNorm else {}
    if isinstance(source, Mapping):
        only(source, [*named.values(), *running.values()], "of such a layer")
        state = source
        found: dict[str, Any] = {"running": True} if any(source.get(n) is not None for n in running.values()) else {}
    else:
        _require_class(library, kind, source)
        found = _settings_of(library, kind, source)
        state = {name: getattr(source, name, None) for name in (*named.values(), *running.values())}
    values = {ours: _finite(name, state[name]) for ours, name in named.items() if state.get(name) is not None}
    if library == "torch" and kind is RMSNorm and "gamma" in values and not found:
        found = {"eps": _eps_of_torch(values["gamma"].dtype == np.float64)}
    told = {"convention": library} | found | {name: value for name, value in settings.items() if value is not None}
    values = _of_channels(kind, values, told)
    statistics = _running(state) if found.get("running") and told.get("running") else {}
    if told.get("running") and told.get("update_rate", 0) is None:
        raise ValueError(
            "update_rate must be given for a module with momentum=None: PyTorch then averages all batches alike, which "
            "nothing here continues"
        )
    for a in (*values.values(), *statistics.values()):
        told.setdefault("shape", a.shape)
    layer = _made(kind, told, {ours: ours in values for ours in named}, dtype or _dtype_of(*values.values()))
    for ours, value in values.items():
        setattr(layer, ours, value.astype(layer.dtype))
    if statistics:
        layer.load_state_dict(layer.state_dict() | statistics)
        layer.train(bool(getattr(source, "training", True)))
    return layer


def _running(state: Mapping[str, Any]) -> dict[str, Array]:
    """Give the running statistics that are there, by our names."""
    missing = [name for name in ("running_mean", "running_var") if state.get(name) is None]
    if missing:
        raise ValueError(f"source must have {missing[0]}, as PyTorch's track_running_stats=True has, got none")
    given = {ours: state.get(name) for ours, name in _RUNNING.items()}
    count = given.pop("update_count")
    arrays = {name: _finite(name, value).astype(np.float64) for name, value in given.items()}
    return arrays if count is None else arrays | {"update_count": numpy_of(count)}


def _parameters(library: Library, kind: type[SampleLayer]) -> dict[str, str]:
    """Give what a library calls the parameters of a kind that it has, by our names."""
    gamma, beta, _, *alpha = _NAMES[library][kind]
    return {ours: name for ours, name in zip(("gamma", "beta", "alpha"), (gamma, beta, *alpha), strict=False) if name}


def refuse(kind: Any, **of_batch_norm: object) -> None:
    """Refuse what says something of a batch norm alone."""
    for name, value in of_batch_norm.items():
        if value is not None:
            raise TypeError(f"{name} must be left out for a {getattr(kind, '__name__', kind)}, got {value!r}")


def exported(layer: SampleLayer, library: Library, dtype: DTypeLike | None) -> dict[str, Array]:
    """Give the parameters as fresh arrays by their names in a library, where the layer has them."""
    if type(layer) not in _NAMES[library]:
        raise TypeError(f"the layer must be of a kind that {library} has, got a {type(layer).__name__}")
    named = _parameters(library, type(layer))
    if isinstance(layer, GroupNorm) and layer.grouping != "contiguous":
        raise ValueError(
            f"the layer must have grouping='contiguous' for {library}, whose groups are neighbouring channels, got "
            f"{layer.grouping!r}"
        )
    if library in ("torch", "onnx"):
        _require_usual_axes(layer, "PyTorch" if library == "torch" else "ONNX")
    if layer.beta is not None and "beta" not in named:
        name = _NAMES[library][type(layer)][2]
        raise ValueError(f"the layer must have beta=False for {name}, which has no shift, got beta=True")
    wanted = np.result_type(layer.dtype, np.float32) if dtype is None else parameter_dtype(dtype)
    with np.errstate(all="ignore"):
        values = {name: _where.fetched(getattr(layer, ours)) for ours, name in named.items()}
        given = {name: a.astype(wanted) for name, a in values.items() if a is not None}
        kept = _kept(layer, library, wanted)
    # A module of PyTorch has all parameters or none, but that LayerNorm may lack a bias.
    has_all = isinstance(layer, GraphNorm) or (given and not isinstance(layer, LayerNorm)) or "bias" in given
    if library == "torch" and has_all:
        shape = layer.settings.parameter_shape
        filled = {ours: np.full(shape, float(ours != "beta"), wanted) for ours in named}
        given = {name: given.get(name, filled[ours]) for ours, name in named.items()}
    return given | kept


def _kept(layer: SampleLayer, library: Library, dtype: np.dtype[Any]) -> dict[str, Array]:
    """Give running statistics by PyTorch's names, after refusing what no other library has."""
    if not isinstance(layer, InstanceNorm) or not layer.running:
        return {}
    if library != "torch":
        raise ValueError(
            f"the layer must have running=False for {library}, got True: by running statistics it is a BatchNorm"
        )
    if layer.ddof != 1:
        raise ValueError(
            f"the layer must have ddof=1 for PyTorch, whose running variances are unbiased, got {layer.ddof}"
        )
    values = {name: np.asarray(getattr(layer, name)).astype(dtype) for name in ("running_mean", "running_var")}
    return values | {"num_batches_tracked": np.array(layer.update_count, np.int64)}


def _require_usual_axes(layer: SampleLayer, library: str) -> None:
    if isinstance(layer, LayerNorm | RMSNorm):
        if layer.axes != tuple(range(-len(layer.axes), 0)):
            raise ValueError(f"the layer must have the last axes for {library}, got axes={layer.axes}")
    elif not isinstance(layer, GraphNorm) and getattr(layer, "axis", 1) != 1:
        raise ValueError(f"the layer must have axis=1 for {library}, got axis={getattr(layer, 'axis', 1)}")


# ---- what a module says ----


def _require_class(library: Library, kind: type[SampleLayer], source: Any) -> None:
    wanted = _NAMES[library][kind][2]
    # A class derived from it may do anything: that of a LayerNorm2d, say, normalizes another axis.
    places = "(?:[123]d)?" if kind is InstanceNorm and library == "torch" else ""
    if not re.fullmatch(f"(?:Lazy)?{wanted}{places}", type(source).__name__):
        raise TypeError(f"source must be a {wanted} or a mapping of its arrays, got {_validate.kind(source)}")
    if not hasattr(source, "eps" if library == "torch" else "epsilon"):
        raise TypeError(f"source must be the {wanted} of {library}, with its eps, got another class of that name")


def _settings_of(library: Library, kind: type[SampleLayer], source: Any) -> dict[str, Any]:
    """Give the settings that a module tells, by our names."""
    if library == "torch":
        return _of_torch(kind, source)
    epsilon = _validate.number("epsilon", source.epsilon)
    if library == "keras":
        if getattr(source, "rms_scaling", False):
            raise ValueError(
                "source must have rms_scaling=False, got True: that divides by the spread about the mean, which it does not "
                "take away; neither layer nor RMS norm does"
            )
        axis = source.axis if isinstance(source.axis, int) else tuple(source.axis)
        if kind in (LayerNorm, RMSNorm):
            return {"eps": epsilon, "axes": axis}
        return {"eps": epsilon, "axis": axis, "num_groups": source.groups}
    if kind in (GroupNorm, InstanceNorm):
        groups = {"num_groups": source.num_groups} if kind is GroupNorm else {}
        return {"eps": epsilon, "axis": -1, **groups}
    reduction, features = (_tuple(getattr(source, name, -1)) for name in ("reduction_axes", "feature_axes"))
    if reduction != features:
        raise ValueError(
            f"source must have a scale of the axes that it normalizes, {reduction}, got one of {features}: of one value for "
            "each channel GroupNorm(1, channels) has it"
        )
    return {"eps": epsilon, "axes": reduction}


def _of_torch(kind: type[SampleLayer], source: Any) -> dict[str, Any]:
    eps = source.eps
    if kind in (LayerNorm, RMSNorm):
        shape = tuple(source.normalized_shape)
        if eps is None:
            eps = _eps_of_torch(source.weight is not None and str(source.weight.dtype) == "torch.float64")
        return {"eps": eps, "shape": shape}
    if kind is GroupNorm:
        return {"eps": eps, "num_groups": source.num_groups, "shape": (source.num_channels,)}
    if kind is GraphNorm:
        return {"eps": eps, "shape": (source.in_channels,)}
    if getattr(source, "track_running_stats", False):
        return {"eps": eps, "shape": (source.num_features,), "running": True, "update_rate": source.momentum}
    return {"eps": eps, "shape": (source.num_features,)}


def _eps_of_torch(is_wide: bool) -> float:
    """Give what an RMS norm of PyTorch adds where its eps is None: that of what it computes in."""
    return 2.0**-52 if is_wide else 2.0**-23


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


# ---- the layer ----


def _of_channels(kind: type[SampleLayer], values: dict[str, Array], told: dict[str, Any]) -> dict[str, Array]:
    """Give parameters of each channel: those of ONNX's GroupNormalization 18 are of each group."""
    opset = told.pop("opset", None)
    if opset is not None:
        _validate.int_at_least("opset", opset, 1)
    if kind is not GroupNorm or opset is None or opset >= 21:
        return values
    groups, channels = (
        None if told.get(name) is None else _validate.int_at_least(name, told[name], 1)
        for name in ("num_groups", "channels")
    )
    if groups is None or channels is None or channels % groups:
        raise ValueError(
            "channels and num_groups must be given for GroupNormalization before opset 21, whose scale and bias are of each "
            f"group, got channels={channels} and num_groups={groups}"
        )
    told["shape"] = (channels,)
    return {ours: np.repeat(a, channels // groups) for ours, a in values.items()}


def _made(kind: type[L], told: dict[str, Any], has: dict[str, bool], dtype: DTypeLike) -> L:
    shape, channels, groups = told.pop("shape", None), told.pop("channels", None), told.pop("num_groups", None)
    options = told | has | {"dtype": dtype}
    if kind in (LayerNorm, RMSNorm):
        if channels is not None or groups is not None:
            raise TypeError(
                f"channels and num_groups must be left out for a {kind.__name__}, got {channels} and {groups}"
            )
        if shape is None:
            raise ValueError("shape must be given where source has neither scale nor bias, got none")
        return kind(shape, **options)
    channels = prod(shape) if channels is None and shape is not None else channels
    if channels is None:
        raise ValueError("channels must be given where source has neither scale nor bias, got none")
    if groups is not None and kind is GraphNorm:
        raise TypeError(f"num_groups must be left out for a GraphNorm, got {groups}")
    if kind is GraphNorm:
        options.pop("convention")
        return kind(channels, **options)
    if kind is InstanceNorm:
        if groups not in (None, -1, channels):
            raise ValueError(f"source must have groups=-1 for an InstanceNorm, got {groups}")
        return kind(channels, **options)
    if groups is None:
        raise ValueError("num_groups must be given where source does not tell it, got none")
    return kind(channels if groups == -1 else groups, channels, **options)  # type: ignore[call-arg]


def _finite(name: str, value: Any) -> Array:
    array = numpy_of(getattr(value, "value", value) if not hasattr(value, "shape") else value)
    if array.dtype.kind != "f":
        raise ValueError(f"source must have a {name} of floats, got {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError(f"source must have a finite {name}, got infinity or NaN")
    return array


def _dtype_of(*parameters: Array) -> np.dtype[Any]:
    """Tell the narrowest of a layer's that holds them all."""
    found = np.result_type(*parameters) if parameters else np.dtype(np.float32)
    return min(found, np.dtype(np.float64), key=lambda dtype: dtype.itemsize)
