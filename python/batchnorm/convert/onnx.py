"""BatchNormalization of ONNX: its inputs and attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack, overload

import numpy as np
from numpy.typing import DTypeLike

from batchnorm import _keywords, _validate
from batchnorm._arrays import Array
from batchnorm.convert.carried import AS_EVER, NAMES, MostSettings, exported, layer_of, only, read, settings_of
from batchnorm.convert.of_samples import L, of_kind
from batchnorm.convert.of_samples import exported as exported_of_samples
from batchnorm.layers import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from batchnorm.layers.by_sample import SampleLayer


@overload
def from_onnx(
    inputs: Mapping[str, Any],
    *,
    kind: type[BatchNorm] = BatchNorm,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    dtype: DTypeLike | None = None,
    **settings: Unpack[MostSettings],
) -> BatchNorm: ...
@overload
def from_onnx(
    inputs: Mapping[str, Any],
    *,
    kind: type[L],
    epsilon: float = 1e-5,
    opset: int | None = None,
    dtype: DTypeLike | None = None,
    **settings: Unpack[MostSettings],
) -> L: ...
@_keywords.options(MostSettings, AS_EVER)
def from_onnx(
    inputs: Mapping[str, Any],
    *,
    kind: Any = BatchNorm,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    opset: int | None = None,
    dtype: DTypeLike | None = None,
    **settings: Unpack[MostSettings],
) -> Any:
    """Make a layer of the inputs of a BatchNormalization of ONNX (opset 14 and later), or another norm.

    Parameters
    ----------
    inputs : mapping of scale, B, input_mean and input_var, as the specification names them.
    kind : the layer that the node is: `BatchNorm`, or `LayerNorm` (LayerNormalization, of Scale and B), `RMSNorm`
        (RMSNormalization, of scale), `GroupNorm` (GroupNormalization, of scale and bias, with num_groups=) or `InstanceNorm`
        (InstanceNormalization, of scale and B). Their axis and shape follow from scale.
    opset : of a GroupNormalization: before 21 its scale and bias are of each group, and channels= is to be given.
    epsilon, momentum : its attributes, with their defaults.
    dtype, **settings : as in `from_torch`, and so are the errors.

    Returns
    -------
    A layer of that kind. BatchNorm with update_rate = 1 - momentum, ddof=0 and axis=1. In training mode; a node without
    training_mode=1 evaluates.

    >>> import numpy as np
    >>> one = np.ones(1, np.float32)
    >>> inputs = {"scale": one, "B": one, "input_mean": 3 * one, "input_var": 4 * one}
    >>> from_onnx(inputs, epsilon=0.0).eval()(np.array([[5.0]]))
    array([[2.]])
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping of names to arrays, got {_validate.kind(inputs)}")
    if kind is not BatchNorm:
        return of_kind("onnx", kind, inputs, dtype, {"eps": epsilon, "opset": opset, **settings})
    only(inputs, NAMES["onnx"].arrays, "of ONNX")
    given = {"epsilon": epsilon, "momentum": momentum, "axis": None}
    return layer_of(read("onnx", inputs, settings_of("onnx", given), needs_all=True), dtype, settings)


def to_onnx(
    layer: BatchNorm | SampleLayer, *, dtype: DTypeLike | None = None, any_ddof: bool = False
) -> tuple[dict[str, Array], dict[str, float]]:
    """Give the inputs and attributes of a BatchNormalization of ONNX, or another norm, that does what this layer does.

    What follows a norm (activation, residual) is not in it, and has a module of its own there.

    Parameters
    ----------
    dtype, any_ddof : as in `to_torch`, but that running variances are biased here, as in `to_keras`; so are the errors.

    Returns
    -------
    inputs : dict of scale, B, input_mean, input_var; ones and zeros for a parameter that the layer is without.
    attributes : dict of epsilon and momentum (1 - update_rate). Without training_mode, the node evaluates. Of other kinds
        epsilon, and axis or num_groups (opset 21).

    >>> to_onnx(BatchNorm(1, convention="onnx"))[1]
    {'epsilon': 1e-05, 'momentum': 0.9}
    """
    if isinstance(layer, SampleLayer):
        return _of_samples(layer, dtype)
    inputs = exported(layer, "onnx", dtype, any_ddof)
    assert layer.update_rate is not None
    return inputs, {"epsilon": layer.eps, "momentum": _validate.rest(layer.update_rate)}


def _of_samples(layer: SampleLayer, dtype: DTypeLike | None) -> tuple[dict[str, Array], dict[str, float]]:
    """Give those of a norm of samples; ones and zeros for what the layer is without and the node needs."""
    inputs = exported_of_samples(layer, "onnx", dtype)
    shape, wanted = layer.settings.parameter_shape, np.result_type(layer.dtype, np.float32) if dtype is None else dtype
    attributes: dict[str, float] = {"epsilon": layer.eps}
    if isinstance(layer, LayerNorm | RMSNorm):
        inputs.setdefault("Scale" if isinstance(layer, LayerNorm) else "scale", np.ones(shape, wanted))
        return inputs, attributes | {"axis": -len(layer.axes)}
    inputs.setdefault("scale", np.ones(shape, wanted))
    inputs.setdefault("bias" if isinstance(layer, GroupNorm) else "B", np.zeros(shape, wanted))
    return inputs, attributes | ({"num_groups": layer.num_groups} if isinstance(layer, GroupNorm) else {})
