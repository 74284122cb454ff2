"""BatchNorm of Flax: modules of nnx, and variables of linen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack, overload

from numpy.typing import DTypeLike

from batchnorm import _keywords, _validate
from batchnorm._arrays import Array
from batchnorm.convert.carried import AS_EVER, NAMES, Carried, MoreSettings, exported, layer_of, only, read, settings_of
from batchnorm.convert.of_samples import L, of_kind, refuse
from batchnorm.convert.of_samples import exported as exported_of_samples
from batchnorm.layers import BatchNorm
from batchnorm.layers.by_sample import SampleLayer


@overload
def from_flax(
    variables: Any,
    *,
    kind: type[BatchNorm] = BatchNorm,
    epsilon: float | None = None,
    momentum: float | None = None,
    axis: int | None = None,
    dtype: DTypeLike | None = None,
    **settings: Unpack[MoreSettings],
) -> BatchNorm: ...
@overload
def from_flax(
    variables: Any,
    *,
    kind: type[L],
    epsilon: float | None = None,
    axis: int | None = None,
    dtype: DTypeLike | None = None,
    **settings: Unpack[MoreSettings],
) -> L: ...
@_keywords.options(MoreSettings, AS_EVER)
def from_flax(
    variables: Any,
    *,
    kind: Any = BatchNorm,
    epsilon: float | None = None,
    momentum: float | None = None,
    axis: int | None = None,
    dtype: DTypeLike | None = None,
    **settings: Unpack[MoreSettings],
) -> Any:
    """Make a layer that goes on where a BatchNorm of Flax (nnx or linen) is, or another norm.

    Parameters
    ----------
    variables : an nnx.BatchNorm; its state, a mapping of mean, var, scale and bias; or the variables of one of
        linen, a mapping of "batch_stats" (mean, var) and "params" (scale, bias). scale and bias absent where not
        used.
    kind : the layer that source is: `BatchNorm`, or `LayerNorm`, `RMSNorm`, `GroupNorm`, `InstanceNorm`, which are made
        of a module, or of a mapping of its scale and bias (of linen its "params") and of the settings that these do not
        tell (num_groups, axes, epsilon).
    epsilon, momentum, axis : of Flax; None for those of an nnx.BatchNorm, else Flax's defaults: 1e-5, 0.99, -1.
    dtype, **settings : as in `from_torch`, and so are the errors.

    Returns
    -------
    A layer of that kind. BatchNorm with update_rate = 1 - momentum and ddof=0: running variances of Flax are biased. In
    evaluation for an nnx.BatchNorm with use_running_average=True (after its ``eval()``), else in training mode. Its
    use_fast_variance is a way of rounding, which nothing here needs.

    >>> import numpy as np
    >>> one = np.ones(1, np.float32)
    >>> stats = {"mean": 3 * one, "var": 4 * one}
    >>> from_flax({"batch_stats": stats}, epsilon=0.0).eval()(np.array([[5.0]]))
    array([[1.]])
    """
    if kind is not BatchNorm:
        refuse(kind, momentum=momentum)
        given = {"eps": epsilon, "axis": axis, **settings}
        return of_kind("flax", kind, _params(variables), dtype, given)
    source = _read(variables, {"epsilon": epsilon, "momentum": momentum, "axis": axis})
    return layer_of(source, dtype, settings)


def to_flax(
    layer: BatchNorm | SampleLayer, *, dtype: DTypeLike | None = None, any_ddof: bool = False
) -> dict[str, dict[str, Array]]:
    """Give the variables of a BatchNorm of Flax, or another norm, that goes on where the layer is.

    Its epsilon is `eps`, its momentum ``1 - update_rate``, its axis `axis`; its use_running_average is
    ``not layer.training``. They are those of linen; for nnx, with ``v = to_flax(layer)``,
    ``nnx.update(module, v["params"] | v["batch_stats"])`` loads.

    What follows a norm (activation, residual) is not in it, and has a module of its own there.

    Parameters
    ----------
    dtype, any_ddof : as in `to_torch`, but that running variances are biased here, as in `to_keras`; so are the errors.

    Returns
    -------
    {"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}; scale and bias only where the layer has them; of
    other kinds "params" alone.

    >>> to_flax(BatchNorm(1, convention="flax"))["batch_stats"]
    {'mean': array([0.], dtype=float32), 'var': array([1.], dtype=float32)}
    """
    if isinstance(layer, SampleLayer):
        return {"params": exported_of_samples(layer, "flax", dtype)}
    arrays = exported(layer, "flax", dtype, any_ddof)
    stats = {name: arrays.pop(name) for name in ("mean", "var")}
    return {"params": arrays, "batch_stats": stats}


def _params(variables: Any) -> Any:
    """Give what linen keeps of a norm without statistics: scale and bias, maybe under "params"."""
    return variables["params"] if isinstance(variables, Mapping) and set(variables) == {"params"} else variables


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
