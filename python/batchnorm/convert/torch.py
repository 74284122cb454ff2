"""Batch norms of PyTorch: modules and their state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack, overload

import numpy as np
from numpy.typing import DTypeLike

from batchnorm import _keywords, _validate
from batchnorm._arrays import Array
from batchnorm.convert.carried import AS_EVER, NAMES, AnySettings, Carried, exported, layer_of, numpy_of, only, read
from batchnorm.convert.of_samples import L, of_kind, refuse
from batchnorm.convert.of_samples import exported as exported_of_samples
from batchnorm.layers import BatchNorm, InstanceNorm
from batchnorm.layers.by_sample import SampleLayer


@overload
def from_torch(
    source: Any,
    *,
    kind: type[BatchNorm] = BatchNorm,
    eps: float | None = None,
    momentum: float | None = None,
    update_rate: float | None = None,
    axis: int | None = None,
    dtype: DTypeLike | None = None,
    **settings: Unpack[AnySettings],
) -> BatchNorm: ...
@overload
def from_torch(
    source: Any,
    *,
    kind: type[L],
    eps: float | None = None,
    momentum: float | None = None,
    update_rate: float | None = None,
    axis: int | None = None,
    dtype: DTypeLike | None = None,
    **settings: Unpack[AnySettings],
) -> L: ...
@_keywords.options(AnySettings, AS_EVER)
def from_torch(
    source: Any,
    *,
    kind: Any = BatchNorm,
    eps: float | None = None,
    momentum: float | None = None,
    update_rate: float | None = None,
    axis: int | None = None,
    dtype: DTypeLike | None = None,
    **settings: Unpack[AnySettings],
) -> Any:
    """Make a layer that goes on where a batch norm of PyTorch is, or another norm.

    Parameters
    ----------
    source : a module (BatchNorm1d, 2d, 3d, SyncBatchNorm, or one whose class or base class is named a BatchNorm) or
        its state_dict: weight, bias, running_mean, running_var and num_batches_tracked (absent in old ones), as
        tensors or arrays. (The state_dict of an instance norm has the same names and is not told from it.)
    kind : the layer that source is: `BatchNorm`, or `LayerNorm`, `RMSNorm`, `GroupNorm`, `InstanceNorm`, `GraphNorm` (that of
        PyTorch Geometric, whose mean_scale is alpha), which are made of a module, or of a mapping of its weight and bias
        and of the settings that these do not tell (num_groups, axes, eps). An `InstanceNorm` has the running statistics that
        are there, too; PyTorch does not count its updates.
    eps, momentum : of PyTorch (momentum of a BatchNorm or an InstanceNorm); None for the module's, and for PyTorch's defaults with a state_dict.
    update_rate : in place of momentum, for a module with momentum=None, whose averages nothing here continues.
    axis : the channel axis of x; None for PyTorch's 1.
    dtype : of gamma and beta; None for that of the source's, float32 where it is bfloat16.
    **settings : others of `BatchNorm`, but convention, gamma, beta, domains and debias.

    Returns
    -------
    A layer of that kind. With ddof=1: running variances of PyTorch are unbiased. In the mode of the module, where there are
    any, training for a state_dict; with statistics and affine frozen for a module that has no momentum (FrozenBatchNorm2d).
    TypeError or ValueError for what is no such source: no running statistics, values that are not finite, a negative
    variance.

    >>> one = np.ones(1, np.float32)
    >>> state = {"weight": one, "bias": one, "running_mean": 3 * one, "running_var": 4 * one}
    >>> from_torch(state, eps=0.0).eval()(np.array([[5.0]]))
    array([[2.]])
    """
    if kind is not BatchNorm:
        rate: dict[str, Any] = {}
        if kind is InstanceNorm:
            rate = {"update_rate": momentum if update_rate is None else update_rate}
        else:
            refuse(kind, momentum=momentum, update_rate=update_rate)
        return of_kind("torch", kind, source, dtype, {"eps": eps, "axis": axis, **rate, **settings})
    return layer_of(_read(source, eps, momentum, update_rate, 1 if axis is None else axis), dtype, settings)


def to_torch(
    layer: BatchNorm | SampleLayer, *, dtype: DTypeLike | None = None, any_ddof: bool = False
) -> dict[str, Array]:
    """Give the state_dict of a norm of PyTorch that goes on where the layer is, as arrays.

    Its eps is `eps` and its momentum `update_rate`: give them to the module. A parameter that the layer is without
    is ones or zeros. ``{k: torch.from_numpy(v) for k, v in to_torch(layer).items()}`` loads. The mode is not in it:
    ``module.train(layer.training)``.

    What follows a norm (activation, residual) is not in it, and has a module of its own there.

    Parameters
    ----------
    dtype : of all but num_batches_tracked: float16, float32 or float64; None for float64 in a layer of float64,
        else float32.
    any_ddof : True to export biased running variances too, where the module will not be trained.

    Returns
    -------
    dict of weight, bias, running_mean, running_var, (C,), and num_batches_tracked, int64 without axes; of other kinds
    weight and bias (and mean_scale of a GraphNorm), where such a module has them. ValueError for other axes than
    PyTorch's, ddof=0 (and renorm, but with parity="torchrl") without `any_ddof`, and for domains.

    >>> sorted(to_torch(BatchNorm(2)))
    ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    if isinstance(layer, SampleLayer):
        return exported_of_samples(layer, "torch", dtype)
    count = np.array(layer.update_count, np.int64)
    return exported(layer, "torch", dtype, any_ddof) | {"num_batches_tracked": count}


def _read(source: Any, eps: Any, momentum: Any, update_rate: Any, axis: int) -> Carried:
    """Read a module of PyTorch or the mapping that is its state_dict."""
    is_mapping = isinstance(source, Mapping)
    if not is_mapping:
        _check_module(source)
    state = source if is_mapping else source.state_dict()
    only(state, (*NAMES["torch"].arrays, "num_batches_tracked"), "of PyTorch")
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
    rate = _validate.number("momentum", rate)
    settings = {"eps": _validate.number("eps", eps), "update_rate": rate, "ddof": 1, "axis": axis}
    count, mode = state.get("num_batches_tracked"), {}
    if not is_mapping:
        mode = {"training": bool(getattr(source, "training", True)), "frozen": not hasattr(source, "momentum")}
    update_count = 0 if count is None else _count(numpy_of(count))
    return read("torch", state, settings, update_count=update_count, **mode)


def _check_module(source: Any) -> None:
    """Refuse what is no batch norm by its class: instance norms, for one, keep arrays of the same names."""
    names = [kind.__name__ for kind in type(source).__mro__]
    names.append(str(getattr(source, "original_name", "")))  # of what TorchScript has compiled
    is_batch_norm = any("BatchNorm" in name for name in names)
    if not (is_batch_norm and hasattr(source, "state_dict") and hasattr(source, "eps")):
        raise TypeError(
            f"source must be a batch norm module of PyTorch or its state_dict, got {_validate.kind(source)}"
        )


def _count(value: Array) -> int:
    if value.shape != () or value.dtype.kind not in "iu" or value < 0:
        raise ValueError(
            "source must have a num_batches_tracked that is one integer >= 0, "
            f"got {value} of shape {value.shape} and {value.dtype}"
        )
    return int(value)
