"""BatchNormalization of Keras: layers and their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack, overload

from numpy.typing import DTypeLike

from batchnorm import _keywords, _validate
from batchnorm._arrays import Array
from batchnorm.convert.carried import AS_EVER, NAMES, Carried, MoreSettings, exported, layer_of, only, read, settings_of
from batchnorm.convert.of_samples import L, of_kind, refuse
from batchnorm.convert.of_samples import exported as exported_of_samples
from batchnorm.layers import BatchNorm
from batchnorm.layers.by_sample import SampleLayer
from batchnorm.layers.settings import flag


@overload
def from_keras(
    source: Any,
    *,
    kind: type[BatchNorm] = BatchNorm,
    epsilon: float | None = None,
    momentum: float | None = None,
    axis: int | None = None,
    scale: bool | None = None,
    center: bool | None = None,
    dtype: DTypeLike | None = None,
    **settings: Unpack[MoreSettings],
) -> BatchNorm: ...
@overload
def from_keras(
    source: Any,
    *,
    kind: type[L],
    epsilon: float | None = None,
    axis: int | None = None,
    dtype: DTypeLike | None = None,
    **settings: Unpack[MoreSettings],
) -> L: ...
@_keywords.options(MoreSettings, AS_EVER)
def from_keras(
    source: Any,
    *,
    kind: Any = BatchNorm,
    epsilon: float | None = None,
    momentum: float | None = None,
    axis: int | None = None,
    scale: bool | None = None,
    center: bool | None = None,
    dtype: DTypeLike | None = None,
    **settings: Unpack[MoreSettings],
) -> Any:
    """Make a layer that goes on where a BatchNormalization of Keras is, or another norm.

    Parameters
    ----------
    source : a built layer, the list of its get_weights(), or a mapping of gamma, beta, moving_mean and
        moving_variance (gamma or beta absent with scale or center False).
    kind : the layer that source is: `BatchNorm`, or `LayerNorm`, `RMSNorm`, `GroupNorm`, `InstanceNorm`, which are made
        of a module, or of a mapping of its gamma and beta (scale of an RMS norm) and of the settings that these do not
        tell (num_groups, axes, epsilon).
    epsilon, momentum, axis : of Keras; None for the layer's, else Keras's defaults: 1e-3, 0.99, -1.
    scale, center : of Keras, for a list only: whether gamma and beta are in it. To be given for one of 3 arrays,
        which does not tell; one of 4 has both and one of 2 has neither.
    dtype, **settings : as in `from_torch`, and so are the errors.

    Returns
    -------
    A layer of that kind; of ``rms_scaling=True``, which neither layer nor RMS norm is, a ValueError. BatchNorm with
    update_rate = 1 - momentum and ddof=0: moving variances of Keras 3 are biased. (Those of the fused kernels of
    TensorFlow were not: pass ddof=1 to go on with them.) In training mode, which Keras has by call; with statistics and
    affine frozen for a layer of ``trainable=False``.

    >>> import numpy as np
    >>> one = np.ones(1, np.float32)
    >>> from_keras([one, one, 3 * one, 4 * one], epsilon=0.0).eval()(np.array([[5.0]]))
    array([[2.]])
    """
    if kind is not BatchNorm:
        refuse(kind, momentum=momentum, scale=scale, center=center)
        return of_kind("keras", kind, source, dtype, {"eps": epsilon, "axis": axis, **settings})
    source = _read(source, {"epsilon": epsilon, "momentum": momentum, "axis": axis}, scale, center)
    return layer_of(source, dtype, settings)


def to_keras(
    layer: BatchNorm | SampleLayer, *, dtype: DTypeLike | None = None, any_ddof: bool = False
) -> dict[str, Array]:
    """Give the weights of a BatchNormalization of Keras, or another norm, that goes on where the layer is.

    Its epsilon is `eps`, its momentum ``1 - update_rate``, its axis `axis`.
    ``keras_layer.set_weights(list(to_keras(layer).values()))`` loads. What `freeze` has frozen is
    ``keras_layer.trainable = False`` there.

    What follows a norm (activation, residual) is not in it, and has a module of its own there.

    Parameters
    ----------
    dtype, any_ddof : as in `to_torch`, but that running variances are biased here.

    Returns
    -------
    dict of gamma, beta (each only where the layer has it), moving_mean, moving_variance, in this order; of other kinds
    gamma and beta, or scale. ValueError for
    ddof=1 (and renorm with parity="torchrl") without `any_ddof`, for update_rate=None, and for domains.

    >>> list(to_keras(BatchNorm(2, convention="keras", beta=False)))
    ['gamma', 'moving_mean', 'moving_variance']
    """
    if isinstance(layer, SampleLayer):
        return exported_of_samples(layer, "keras", dtype)
    return exported(layer, "keras", dtype, any_ddof)


def _read(source: Any, given: Mapping[str, Any], scale: Any, center: Any) -> Carried:
    """Read a layer of Keras, the list of its get_weights(), or a mapping of their names."""
    layer, frozen, names = None, False, NAMES["keras"].arrays
    if isinstance(source, Sequence) and not isinstance(source, str):
        state = dict(zip(_names_of_weights(len(source), scale, center), source, strict=True))
    elif scale is not None or center is not None:
        raise ValueError("scale and center must be None where source is no list: it has its names")
    elif isinstance(source, Mapping):
        only(source, names, "of Keras")
        state = dict(source)
    elif hasattr(source, "moving_variance"):
        if getattr(source, "renorm", False):
            raise ValueError("source must be a layer without renorm, whose further state has no place here")
        layer, state = source, {name: getattr(source, name, None) for name in names}
        frozen = not getattr(source, "trainable", True)
    else:
        raise TypeError(
            "source must be a BatchNormalization of Keras that is built, its get_weights(), or a mapping of their names, "
            f"got {_validate.kind(source)}"
        )
    return read("keras", state, settings_of("keras", given, layer), frozen=frozen)


def _names_of_weights(count: int, scale: Any, center: Any) -> list[str]:
    """Give the names of the arrays of get_weights(), which say nothing of themselves but how many they are."""
    for name, value in (("scale", scale), ("center", center)):
        if value is not None:
            flag(name, value)
    kinds = [
        (has_gamma, has_beta)
        for has_gamma in (True, False)
        for has_beta in (True, False)
        if has_gamma + has_beta == count - 2 and scale in (None, has_gamma) and center in (None, has_beta)
    ]
    if len(kinds) != 1:
        raise ValueError(
            "source must be the arrays of get_weights(): 4, or 2 without gamma and beta, or 3 with scale=False or "
            f"center=False given to tell which of them is absent, got {count} with scale={scale} and center={center}"
        )
    are_there = (*kinds[0], True, True)
    return [name for name, is_there in zip(NAMES["keras"].arrays, are_there, strict=True) if is_there]
