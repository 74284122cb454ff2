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

def moments(x: _Array, sizes: _Sizes, threads: int) -> _Table: ...
def batch_norm(
    x: _Array,
    sizes: _Sizes,
    gamma: _Array | None,
    beta: _Array | None,
    eps: float,
    out: _Array,
    moments: _Table,
    threads: int,
) -> None: ...
def normalize(
    x: _Array,
    sizes: _Sizes,
    mean: _Array,
    var: _Array,
    gamma: _Array | None,
    beta: _Array | None,
    eps: float,
    out: _Array,
    threads: int,
) -> None: ...
def grad_sums(dy: _Array, x: _Array, sizes: _Sizes, moments: _Table, threads: int) -> _Table: ...
def grad_input(
    dy: _Array,
    x: _Array,
    sizes: _Sizes,
    moments: _Table,
    sums: _Table,
    gamma: _Array | None,
    eps: float,
    out: _Array,
    threads: int,
) -> None: ...
def batch_norm_backward(
    dy: _Array,
    x: _Array,
    sizes: _Sizes,
    moments: _Table,
    gamma: _Array | None,
    eps: float,
    out: _Array | None,
    dgamma: _Array | None,
    dbeta: _Array | None,
    threads: int,
) -> None: ...
def normalize_backward(
    dy: _Array,
    x: _Array,
    sizes: _Sizes,
    mean: _Array,
    var: _Array,
    gamma: _Array | None,
    eps: float,
    out: _Array | None,
    dgamma: _Array | None,
    dbeta: _Array | None,
    threads: int,
) -> None: ...
def batch_norm_jvp(
    x_dot: _Array,
    x: _Array,
    sizes: _Sizes,
    moments: _Table,
    gamma: _Array | None,
    gamma_dot: _Array | None,
    beta_dot: _Array | None,
    eps: float,
    out: _Array,
    threads: int,
) -> None: ...
def normalize_jvp(
    x_dot: _Array,
    x: _Array,
    sizes: _Sizes,
    mean: _Array,
    var: _Array,
    gamma: _Array | None,
    mean_dot: _Array | None,
    var_dot: _Array | None,
    gamma_dot: _Array | None,
    beta_dot: _Array | None,
    eps: float,
    out: _Array,
    threads: int,
) -> None: ...
def batch_norm_double_backward(
    v_dx: _Array,
    dy: _Array,
    x: _Array,
    sizes: _Sizes,
    moments: _Table,
    gamma: _Array | None,
    v_dgamma: _Array | None,
    v_dbeta: _Array | None,
    eps: float,
    ddy: _Array | None,
    dx: _Array | None,
    dgamma: _Array | None,
    threads: int,
) -> None: ...
def normalize_double_backward(
    v_dx: _Array,
    dy: _Array,
    x: _Array,
    sizes: _Sizes,
    mean: _Array,
    var: _Array,
    gamma: _Array | None,
    v_dgamma: _Array | None,
    v_dbeta: _Array | None,
    eps: float,
    ddy: _Array | None,
    dx: _Array | None,
    dgamma: _Array | None,
    threads: int,
) -> None: ...
def try_moments(x: object, axis: object, threads: object, /) -> _Table | None: ...
def try_batch_norm(
    keep: Callable[[_Array | None, _Table, _Array | None, int, float], _Kept],
    x: object,
    gamma: object,
    beta: object,
    axis: object,
    eps: object,
    out: object,
    threads: object,
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
    pooled: object,
    moments: object,
    ddof: object,
    into: tuple[_Table, _Table, _Table],
    finite: bool,
    /,
) -> bool | None: ...
def room(gamma: object, mean: object, /) -> tuple[_Array, _Table, _Table] | None: ...
@overload
def try_update_running(
    mean: object,
    var: object,
    moments: object,
    update_rate: object,
    ddof: object,
    into: None,
    finite: bool,
    /,
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
def combine(
    to: _Array | None, a: _Table | None, x: _Array | None, b: _Table | None, y: _Array | None, /
) -> None: ...
def new_moments(channels: int) -> _Table: ...
def weighted_moments(x: _Array, sizes: _Sizes, weights: _Array, threads: int) -> _Table: ...
def weighted_batch_norm(
    x: _Array,
    sizes: _Sizes,
    weights: _Array,
    padding: int,
    gamma: _Array | None,
    beta: _Array | None,
    eps: float,
    out: _Array,
    moments: _Table,
    threads: int,
) -> None: ...
def weighted_normalize(
    x: _Array,
    sizes: _Sizes,
    weights: _Array,
    padding: int,
    mean: _Array,
    var: _Array,
    gamma: _Array | None,
    beta: _Array | None,
    eps: float,
    out: _Array,
    threads: int,
) -> None: ...
def weighted_grad_sums(
    dy: _Array, x: _Array, sizes: _Sizes, weights: _Array, padding: int, moments: _Table, threads: int
) -> _Table: ...
def weighted_grad_input(
    dy: _Array,
    x: _Array,
    sizes: _Sizes,
    weights: _Array,
    padding: int,
    moments: _Table,
    sums: _Table,
    gamma: _Array | None,
    eps: float,
    out: _Array,
    threads: int,
) -> None: ...
def weighted_batch_norm_backward(
    dy: _Array,
    x: _Array,
    sizes: _Sizes,
    weights: _Array,
    padding: int,
    moments: _Table,
    gamma: _Array | None,
    eps: float,
    out: _Array | None,
    dgamma: _Array | None,
    dbeta: _Array | None,
    threads: int,
) -> None: ...
def weighted_normalize_backward(
    dy: _Array,
    x: _Array,
    sizes: _Sizes,
    weights: _Array,
    padding: int,
    mean: _Array,
    var: _Array,
    gamma: _Array | None,
    eps: float,
    out: _Array | None,
    dgamma: _Array | None,
    dbeta: _Array | None,
    threads: int,
) -> None: ...
def segment_moments(x: _Array, sizes: _Sizes, offsets: NDArray[np.int64], threads: int) -> _Table: ...
def segment_batch_norm(
    x: _Array,
    sizes: _Sizes,
    offsets: NDArray[np.int64],
    gamma: _Array | None,
    beta: _Array | None,
    eps: float,
    out: _Array,
    moments: _Table,
    threads: int,
) -> None: ...
def segment_batch_norm_backward(
    dy: _Array,
    x: _Array,
    sizes: _Sizes,
    offsets: NDArray[np.int64],
    moments: _Table,
    gamma: _Array | None,
    eps: float,
    out: _Array | None,
    dgamma: _Array | None,
    dbeta: _Array | None,
    threads: int,
) -> None: ...
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
def relu_mask_bytes(sizes: _Sizes) -> int: ...
def batch_norm_relu(
    x: _Array,
    sizes: _Sizes,
    residual: _Array | None,
    gamma: _Array | None,
    beta: _Array | None,
    eps: float,
    out: _Array,
    mask: NDArray[np.uint8] | None,
    moments: _Table,
    threads: int,
) -> None: ...
def normalize_relu(
    x: _Array,
    sizes: _Sizes,
    residual: _Array | None,
    mean: _Array,
    var: _Array,
    gamma: _Array | None,
    beta: _Array | None,
    eps: float,
    out: _Array,
    mask: NDArray[np.uint8] | None,
    threads: int,
) -> None: ...
def batch_norm_relu_backward(
    dy: _Array,
    x: _Array,
    sizes: _Sizes,
    mask: NDArray[np.uint8],
    moments: _Table,
    gamma: _Array | None,
    eps: float,
    out: _Array | None,
    dresidual: _Array | None,
    dgamma: _Array | None,
    dbeta: _Array | None,
    threads: int,
) -> None: ...
def normalize_relu_backward(
    dy: _Array,
    x: _Array,
    sizes: _Sizes,
    mask: NDArray[np.uint8],
    mean: _Array,
    var: _Array,
    gamma: _Array | None,
    eps: float,
    out: _Array | None,
    dresidual: _Array | None,
    dgamma: _Array | None,
    dbeta: _Array | None,
    threads: int,
) -> None: ...
