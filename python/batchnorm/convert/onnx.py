"""BatchNormalization of ONNX: its inputs and attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from numpy.typing import DTypeLike

from batchnorm import _keywords, _validate
from batchnorm._arrays import Array
from batchnorm.convert.carried import AS_EVER, NAMES, MostSettings, exported, layer_of, only, read, settings_of
from batchnorm.layers import BatchNorm


@_keywords.options(MostSettings, AS_EVER)
def from_onnx(
    inputs: Mapping[str, Any],
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    dtype: DTypeLike | None = None,
    **settings: Unpack[MostSettings],
) -> BatchNorm:
    """Make a layer of the inputs of a BatchNormalization of ONNX (opset 14 and later).

    Parameters
    ----------
    inputs : mapping of scale, B, input_mean and input_var, as the specification names them.
    epsilon, momentum : its attributes, with their defaults.
    dtype, **settings : as in `from_torch`, and so are the errors.

    Returns
    -------
    BatchNorm with update_rate = 1 - momentum, ddof=0 and axis=1. In training mode; a node without training_mode=1
    evaluates.

    >>> import numpy as np
    >>> one = np.ones(1, np.float32)
    >>> inputs = {"scale": one, "B": one, "input_mean": 3 * one, "input_var": 4 * one}
    >>> from_onnx(inputs, epsilon=0.0).eval()(np.array([[5.0]]))
    array([[2.]])
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping of names to arrays, got {_validate.kind(inputs)}")
    only(inputs, NAMES["onnx"].arrays, "of ONNX")
    given = {"epsilon": epsilon, "momentum": momentum, "axis": None}
    return layer_of(read("onnx", inputs, settings_of("onnx", given), needs_all=True), dtype, settings)


def to_onnx(
    layer: BatchNorm, *, dtype: DTypeLike | None = None, any_ddof: bool = False
) -> tuple[dict[str, Array], dict[str, float]]:
    """Give the inputs and attributes of a BatchNormalization of ONNX that does what this layer does.

    Parameters
    ----------
    dtype, any_ddof : as in `to_torch`, but that running variances are biased here, as in `to_keras`; so are the errors.

    Returns
    -------
    inputs : dict of scale, B, input_mean, input_var; ones and zeros for a parameter that the layer is without.
    attributes : dict of epsilon and momentum (1 - update_rate). Without training_mode, the node evaluates.

    >>> to_onnx(BatchNorm(1, convention="onnx"))[1]
    {'epsilon': 1e-05, 'momentum': 0.9}
    """
    inputs = exported(layer, "onnx", dtype, any_ddof)
    assert layer.update_rate is not None
    return inputs, {"epsilon": layer.eps, "momentum": _validate.rest(layer.update_rate)}
