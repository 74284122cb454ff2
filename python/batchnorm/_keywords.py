"""The keywords of functions: those that many have, and errors for unknown ones, which say what to write instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from numbers import Real
from typing import ParamSpec, TypedDict, TypeVar

from numpy.typing import ArrayLike

from batchnorm import _validate
from batchnorm._validate import Padding

F = TypeVar("F", bound=Callable[..., object])
P = ParamSpec("P")
R = TypeVar("R")


class NoOptions(TypedDict):
    """The keywords of a function that has no others than those it names."""


class Counts(TypedDict, total=False):
    """What of x counts."""

    mask: ArrayLike | None
    weights: ArrayLike | None
    lengths: ArrayLike | None
    segments: ArrayLike | None


class Counted(TypedDict, total=False):
    """Which positions count, and what y is elsewhere."""

    mask: ArrayLike | None
    weights: ArrayLike | None
    lengths: ArrayLike | None
    padding: Padding | None


# What other libraries call what has another name here.
_NAMES_ELSEWHERE = {
    "num_features": "channels",
    "features": "channels",
    "num_channels": "channels",
    "normalized_shape": "shape",
    "groups": "num_groups",
    "reduction_axes": "axes",
    "elementwise_affine": "affine",
    "epsilon": "eps",
    "weight": "gamma",
    "scale": "gamma",
    "bias": "beta",
    "offset": "beta",
    "input": "x",
    "inputs": "x",
    "running_mean": "mean",
    "running_var": "var",
    "with_mean": "center",
    "with_std": "scale",
}
_MODES = ("training", "train", "use_running_average")
# What is said of running statistics, which norms of samples have not.
_OF_STATISTICS = ("momentum", "update_rate", "ddof", "track_running_stats", "use_stats", "update_stats", *_MODES)
_MODULES_OF_SAMPLES = ("batchnorm.by_sample", "batchnorm.layers.by_sample", "batchnorm.layers.graph")
_SETTINGS_OF_SAVED = ("eps", "axis", "gamma")
# How what is called stands to a layer. "" is any function.
_MAKING, _CALL = "making", "call"
_TO_CALLS = (
    "use_stats must be given to the calls of a layer instead of track_running_stats: write "
    'layer(x, use_stats="batch") for track_running_stats=False'
)
# What to write instead of a keyword that nothing here has, by what is called.
_INSTEAD = {
    "affine": {
        _MAKING: "gamma and beta must be given instead of {name}: write gamma={shown}, beta={shown}",
        _CALL: "gamma and beta must be given to {layer} instead of {name}",
        "": "{name} must be left out: {called} takes no gamma and beta",
    },
    "track_running_stats": {
        _MAKING: _TO_CALLS,
        _CALL: _TO_CALLS,
        "": "{name} must be left out: functions keep nothing, a layer and update_running() do",
    },
    "training": {
        _MAKING: "{name} must be left out: write layer.train() or layer.eval(), a new layer is in training",
        _CALL: "{name} must be left out: write layer.train()(x) or layer.eval()(x), or "
        'use_stats="batch" or "running" for one call',
        "": "{name} must be left out: batch_norm(x) normalizes by the batch, normalize(x, mean, var) by running statistics",
    },
}


def keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Let unknown keywords of `function` be refused by an error that says what to write (`unknown_keywords`)."""
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **named: P.kwargs) -> R:
        if not named.keys() <= known:
            raise unknown_keywords(call, named)
        return function(*args, **named)

    return call


# By name, since a function of the module may have been replaced by one that counts or traces its calls.
_WITH_OPTIONS: dict[str, tuple[Callable[..., object], dict[str, object]]] = {}


def options(rest: type, default: object = None, /, **defaults: object) -> Callable[[F], F]:
    """Let a function that takes ``**options: Unpack[rest]`` show them by name in its signature.

    For functions whose calls are so short that the wrapper of `keywords` would be seen in them. It takes the less time
    the more keywords, which are hardly ever given, it does not name; it refuses unknown ones itself (`no_options`).
    Their default is `default`, or what `defaults` has for them.
    """
    names = {name: getattr(text, "__forward_arg__", text) for name, text in rest.__annotations__.items()}

    def decorate(function: F) -> F:
        _WITH_OPTIONS[function.__qualname__] = function, {n: defaults.get(n, default) for n in names}
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        at = next((i for i, p in enumerate(named) if p.name == "out"), len(named))
        named[at:at] = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name, default), annotation=text
            )
            for name, text in names.items()
        ]
        function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
        return function

    return decorate


def no_options(name: str, given: Mapping[str, object]) -> bool:
    """Tell whether all options that a call gives are their defaults, after refusing those that the function has not."""
    function, defaults = _WITH_OPTIONS[name]
    if not given.keys() <= defaults.keys():
        raise unknown_keywords(function, given)
    return all(value is defaults[option] for option, value in given.items())


def unknown_keywords(function: Callable[..., object], named: Mapping[str, object]) -> TypeError:
    """Return the error for keywords that `function` has not: what to write instead, where other libraries tell."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    others = {name: value for name, value in named.items() if name not in known}
    owner, _, own = function.__qualname__.rpartition(".")
    kind = {"__init__": _MAKING, "__call__": _CALL}.get(own, "")
    called = {_MAKING: f"{owner}()", _CALL: "a layer's call"}.get(kind, f"{function.__name__}()")
    learns = function.__module__ not in _MODULES_OF_SAMPLES
    layer = "BatchNorm()" if learns else "the layer as it is made"
    for name, value in others.items():
        if not learns and name in _OF_STATISTICS:
            text = f"{name} must be left out: each sample is normalized by itself, in training and evaluation alike"
        else:
            text = _instead(name, value, known, kind, called=called, layer=layer)
        if text:
            return TypeError(f"{text}, got {name}={_shown(value)}")
    return TypeError(f"keywords of {called} must be of {', '.join(known)}, got {', '.join(others)}")


def _instead(name: str, value: object, known: list[str], kind: str, *, called: str, layer: str) -> str:
    """Say what to write instead of a keyword of other libraries; nothing where it is none.

    kind, called, layer : how what is called stands to a layer, what it is called, and where a layer's settings are given.
    """
    here, shown = _NAMES_ELSEWHERE.get(name, name), _shown(value)
    if here in known:
        write = f"{called.removesuffix('()')}({shown})" if known.index(here) == 0 else f"{here}={shown}"
        return f"{here} must be given instead of {name}: write {write}"
    if here == "channels":
        return f"{name} must be left out: x tells its channels, along axis"
    if name == "pytorch_compatible" and "grouping" in known:
        return f"grouping must be given instead of {name}: write grouping={'contiguous' if value else 'strided'!r}"
    if name == "momentum":
        return _instead_of_momentum(value, "update_rate" in known)
    if here == "affine" and "gamma" in known and kind != _MAKING:
        return f"gamma must be given instead of {name}: an array, or None for {name}=False"
    texts = _INSTEAD.get("training" if name in _MODES else here)
    if texts is not None:
        return texts.get(kind, texts[""]).format(name=name, shown=shown, called=called, layer=layer)
    if here in _SETTINGS_OF_SAVED and "saved" in known:
        return f"{name} must be left out: it is that of the call that gave saved"
    if here in ("mean", "var"):
        return f"{name} must be left out: normalize(x, mean, var) normalizes by given statistics, batch_norm(x) by those of x"
    if here == "eps" and kind != _CALL:
        return f"{name} must be left out: {called} adds nothing to a variance"
    if kind == _CALL and here in ("eps", "axis", "axes", "shape", "gamma", "beta", "update_rate", "num_threads"):
        return f"{here} must be given to {layer}, not to its calls"
    return ""


def _instead_of_momentum(momentum: object, has_rate: bool) -> str:
    reading = "1-momentum"
    if isinstance(momentum, Real) and not isinstance(momentum, bool):
        reading = f"{_validate.rest(float(momentum)):g}"
    place = "" if has_rate else " to BatchNorm() or update_running()"
    return (
        f"update_rate must be given{place} instead of momentum, whose meaning differs between frameworks: write "
        f"update_rate={_shown(momentum)} for PyTorch's momentum={_shown(momentum)}, update_rate={reading} for that of "
        "Keras, Flax or ONNX"
    )


def _shown(value: object) -> str:
    """Show a value as one writes it, if it is short."""
    if value is None or isinstance(value, str | bool | int | float):
        text = repr(value)
        return text if len(text) <= 40 else f"{text[:37]}..."
    return f"<{_validate.kind(value)}>"
