"""BatchNorm of Flax: modules of nnx, and variables of linen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from numpy.typing import DTypeLike

from batchnorm import _keywords, _validate
from batchnorm._arrays import Array
from batchnorm.convert.carried import AS_EVER, NAMES, Carried, MoreSettings, exported, layer_of, only, read, settings_of
from batchnorm.layers import BatchNorm


@_keywords.options(MoreSettings, AS_EVER)
def from_flax(
    variables: Any,
    *,
    epsilon: float | None = None,
    momentum: float | None = None,
    axis: int | None = None,
    dtype: DTypeLike | None = None,
    **settings: Unpack[MoreSettings],
) -> BatchNorm:
    """Make a layer that goes on where a BatchNorm of Flax (nnx or linen) is.

    Parameters
    ----------
    variables : an nnx.BatchNorm; its state, a mapping of mean, var, scale and bias; or the variables of one of
        linen, a mapping of "batch_stats" (mean, var) and "params" (scale, bias). scale and bias absent where not
        used.
    epsilon, momentum, axis : of Flax; None for those of an nnx.BatchNorm, else Flax's defaults: 1e-5, 0.99, -1.
    dtype, **settings : as in `from_torch`, and so are the errors.

    Returns
    -------
    BatchNorm with update_rate = 1 - momentum and ddof=0: running variances of Flax are biased. In evaluation for an
    nnx.BatchNorm with use_running_average=True (after its ``eval()``), else in training mode. Its use_fast_variance
    is a way of rounding, which nothing here needs.

    >>> import numpy as np
    >>> one = np.ones(1, np.float32)
    >>> stats = {"mean": 3 * one, "var": 4 * one}
    >>> from_flax({"batch_stats": stats}, epsilon=0.0).eval()(np.array([[5.0]]))
    array([[1.]])
    """
    source = _read(variables, {"epsilon": epsilon, "momentum": momentum, "axis": axis})
    return layer_of(source, dtype, settings)


def to_flax(layer: BatchNorm, *, dtype: DTypeLike | None = None, any_ddof: bool = False) -> dict[str, dict[str, Array]]:
    """Give the variables of a BatchNorm of Flax that goes on where the layer is.

    Its epsilon is `eps`, its momentum ``1 - update_rate``, its axis `axis`; its use_running_average is
    ``not layer.training``. They are those of linen; for nnx, with ``v = to_flax(layer)``,
    ``nnx.update(module, v["params"] | v["batch_stats"])`` loads.

    Parameters
    ----------
    dtype, any_ddof : as in `to_torch`, but that running variances are biased here, as in `to_keras`; so are the errors.

    Returns
    -------
    {"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}; scale and bias only where the layer has them.

    >>> to_flax(BatchNorm(1, convention="flax"))["batch_stats"]
    {'mean': array([0.], dtype=float32), 'var': array([1.], dtype=float32)}
    """
    arrays = exported(layer, "flax", dtype, any_ddof)
    stats = {name: arrays.pop(name) for name in ("mean", "var")}
    return {"params": arrays, "batch_stats": stats}


def _read(variables: Any, given: Mapping[str, Any]) -> Carried:
    """Read a BatchNorm of Flax's nnx, its state, or the variables of one of linen."""
    module, training, names = None, True, NAMES["flax"].arrays
    if isinstance(variables, Mapping) and "batch_stats" in variables:
        params, stats = variables.get("params", {}), variables["batch_stats"]
        for name, group, known in (("params", params, names[:2]), ("batch_stats", stats, names[2:])):
            if not isinstance(group, Mapping):
                raise TypeError(f"{name} must be a mapping of names to arrays, got {_validate.kind(group)}")
            only(group, known, f"of Flax's {name}")
        state = {**params, **stats}
    elif isinstance(variables, Mapping) and "mean" in variables:
        only(variables, names, "of Flax")
        state = dict(variables)
    elif all(hasattr(variables, name) for name in ("mean", "var", "epsilon", "momentum")):
        module, state = variables, {name: getattr(variables, name, None) for name in names}
        training = not getattr(variables, "use_running_average", False)  # None leaves it to the call
    else:
        raise TypeError(
            "variables must be a BatchNorm of Flax's nnx, its state (mean, var, scale, bias), or a mapping with "
            "'batch_stats' (mean, var) and 'params' (scale, bias), got "
            f"{sorted(map(str, variables)) if isinstance(variables, Mapping) else _validate.kind(variables)}"
        )
    return read("flax", state, settings_of("flax", given, module), training=training)
