"""The C++ core of batchnorm on dense NumPy arrays. Private: use the functions of the package."""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

_Array: TypeAlias = NDArray[Any]
_Table: TypeAlias = NDArray[np.float64]
_Sizes: TypeAlias = tuple[int, int, int]
_Kept = TypeVar("_Kept")
_Gradients = TypeVar("_Gradients", bound=tuple[_Array | None, ...])

__version__: str

# A call: (sizes, offsets, weights, padding, gamma, beta, eps, residual, relu, bits).
_Call: TypeAlias = tuple[
    _Sizes, _Array | None, _Array | None, int, _Array | None, _Array | None, float, _Array | None, bool, _Array | None
]

def relu_mask_bytes(sizes: _Sizes) -> int: ...
def moments(x: _Array, call: _Call, out: _Table, threads: int) -> None: ...
def batch_norm(x: _Array, call: _Call, out: _Array, moments: _Table, threads: int) -> None: ...
def normalize(x: _Array, call: _Call, mean: _Array, var: _Array, out: _Array, threads: int) -> None: ...
def normalize_by_moments(x: _Array, call: _Call, moments: _Table, out: _Array, threads: int) -> None: ...
def grad_sums(dy: _Array, x: _Array, call: _Call, moments: _Table, out: _Table, threads: int) -> None: ...
def grad_input(
    dy: _Array,
    x: _Array,
    call: _Call,
    moments: _Table,
    sums: _Table,
    out: _Array,
    dresidual: _Array | None,
    threads: int,
) -> None: ...
def backward(
    dy: _Array,
    x: _Array,
    call: _Call,
    moments: _Table,
    out: _Array | None,
    dresidual: _Array | None,
    dgamma: _Array | None,
    dbeta: _Array | None,
    threads: int,
) -> None: ...
def normalize_backward(
    dy: _Array,
    x: _Array,
    call: _Call,
    mean: _Array,
    var: _Array,
    out: _Array | None,
    dresidual: _Array | None,
    dgamma: _Array | None,
    dbeta: _Array | None,
    threads: int,
) -> None: ...
def jvp(
    x_dot: _Array,
    x: _Array,
    call: _Call,
    moments: _Table,
    gamma_dot: _Array | None,
    beta_dot: _Array | None,
    out: _Array,
    threads: int,
) -> None: ...
def normalize_jvp(
    x_dot: _Array,
    x: _Array,
    call: _Call,
    mean: _Array,
    var: _Array,
    mean_dot: _Array | None,
    var_dot: _Array | None,
    gamma_dot: _Array | None,
    beta_dot: _Array | None,
    out: _Array,
    threads: int,
) -> None: ...
def double_backward(
    v_dx: _Array,
    dy: _Array,
    x: _Array,
    call: _Call,
    moments: _Table,
    v_dgamma: _Array | None,
    v_dbeta: _Array | None,
    ddy: _Array | None,
    dx: _Array | None,
    dgamma: _Array | None,
    threads: int,
) -> None: ...
def normalize_double_backward(
    v_dx: _Array,
    dy: _Array,
    x: _Array,
    call: _Call,
    mean: _Array,
    var: _Array,
    v_dgamma: _Array | None,
    v_dbeta: _Array | None,
    ddy: _Array | None,
    dx: _Array | None,
    dgamma: _Array | None,
    threads: int,
) -> None: ...
def try_moments(x: object, axis: object, threads: object, /) -> _Table | None: ...
def try_batch_norm(
    keep: Callable[..., _Kept],
    x: object,
    gamma: object,
    beta: object,
    axis: object,
    eps: object,
    out: object,
    threads: object,
    options: object,
    /,
) -> tuple[_Array, _Kept] | None: ...
def try_normalize(
    x: object,
    mean: object,
    var: object,
    gamma: object,
    beta: object,
    axis: object,
    eps: object,
    out: object,
    threads: object,
    /,
) -> _Array | None: ...
def try_batch_norm_backward(
    type: type[_Gradients],
    dy: object,
    x: object,
    moments: object,
    gamma: object,
    axis: object,
    eps: object,
    needs: object,
    out: object,
    threads: object,
    weights: object,
    padding: object,
    bits: object,
    has_residual: object,
    /,
) -> _Gradients | None: ...
def try_normalize_backward(
    type: type[_Gradients],
    dy: object,
    x: object,
    mean: object,
    var: object,
    gamma: object,
    axis: object,
    eps: object,
    needs: object,
    out: object,
    threads: object,
    /,
) -> _Gradients | None: ...
def pool(
    pooled: object, moments: object, ddof: object, into: tuple[_Table, _Table, _Table], finite: bool, /
) -> bool | None: ...
def room(gamma: object, mean: object, /) -> tuple[_Array, _Table, _Table] | None: ...
@overload
def try_update_running(
    mean: object, var: object, moments: object, update_rate: object, ddof: object, into: None, finite: bool, /
) -> tuple[_Table, _Table] | None: ...
@overload
def try_update_running(
    mean: object,
    var: object,
    moments: object,
    update_rate: object,
    ddof: object,
    into: tuple[_Array, ...],
    finite: bool,
    /,
) -> bool | None: ...
def combine(to: _Array | None, a: _Table | None, x: _Array | None, b: _Table | None, y: _Array | None, /) -> None: ...
def merge(a: _Table, b: _Table) -> _Table: ...
def variance(moments: _Table, ddof: int) -> _Table: ...
def rstd(moments: _Table, eps: float) -> _Table: ...
def first_nonfinite(moments: _Table) -> int: ...
def update_running(
    mean: _Table, var: _Table, moments: _Table, update_rate: float, ddof: int
) -> tuple[_Table, _Table]: ...
def built_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def set_num_threads(threads: int) -> None: ...
def get_num_threads() -> int: ...
def threads_worked() -> int: ...
def build_info() -> dict[str, Any]: ...
def explain(sizes: _Sizes, item_size: int, threads: int) -> str: ...
