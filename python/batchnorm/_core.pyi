"""The C++ core of batchnorm on dense NumPy arrays. Private: use the functions of the package."""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

_Array: TypeAlias = NDArray[Any]
_Table: TypeAlias = NDArray[np.float64]
_Maybe: TypeAlias = _Array | None
_Statistics: TypeAlias = _Table | tuple[_Array, _Array]  # moments, or mean and var that are given
_Sizes: TypeAlias = tuple[int, int, int]
_Kept = TypeVar("_Kept")
_Gradients = TypeVar("_Gradients", bound=tuple[_Array | None, ...])

__version__: str

# (sizes, offsets, width, weights, padding, gamma, beta, eps, residual, relu, bits, each_position, about_zero,
# alpha, strided)
_Call: TypeAlias = tuple[
    _Sizes, _Maybe, int, _Maybe, int, _Maybe, _Maybe, float, _Maybe, bool, _Maybe, bool, bool, _Maybe, bool
]  # fmt: skip

def relu_mask_bytes(sizes: _Sizes) -> int: ...
def moments(x: _Array, call: _Call, out: _Table, where: int) -> None: ...
def batch_norm(x: _Array, call: _Call, out: _Array, moments: _Table, where: int) -> None: ...
def normalize(x: _Array, call: _Call, statistics: _Statistics, out: _Array, where: int) -> None: ...
def grad_sums(dy: _Array, x: _Array, call: _Call, moments: _Table, out: _Table, where: int) -> None: ...
def grad_input(
    dy: _Array, x: _Array, call: _Call, moments: _Table, sums: _Table, out: _Array, dresidual: _Maybe, where: int
) -> None: ...
def backward(
    dy: _Array, x: _Array, call: _Call, statistics: _Statistics,
    out: _Maybe, dresidual: _Maybe, dgamma: _Maybe, dbeta: _Maybe, where: int,
) -> None: ...  # fmt: skip
def jvp(
    x_dot: _Array, x: _Array, call: _Call, statistics: _Statistics,
    mean_dot: _Maybe, var_dot: _Maybe, gamma_dot: _Maybe, beta_dot: _Maybe, out: _Array, where: int,
) -> None: ...  # fmt: skip
def double_backward(
    v_dx: _Array, dy: _Array, x: _Array, call: _Call, statistics: _Statistics,
    v_dgamma: _Maybe, v_dbeta: _Maybe, ddy: _Maybe, dx: _Maybe, dgamma: _Maybe, where: int,
) -> None: ...  # fmt: skip

# Ordinary calls, which look at what they are given, of any kind: None where it is not ordinary. try_update_running gives
# (mean, var), or where `into` is given a bool.
def try_moments(x: object, axis: object, threads: object, /) -> _Table | None: ...
def try_batch_norm(
    keep: Callable[..., _Kept], x: object, gamma: object, beta: object, axis: object, eps: object, out: object,
    threads: object, options: object, shares: object, /,
) -> tuple[_Array, _Kept] | None: ...  # fmt: skip
def try_normalize(
    x: object, mean: object, var: object, gamma: object, beta: object, axis: object, eps: object, out: object,
    threads: object, options: object, /,
) -> _Array | None: ...  # fmt: skip
def try_batch_norm_backward(
    type: type[_Gradients], dy: object, x: object, moments: object, gamma: object, axis: object, eps: object,
    needs: object, out: object, threads: object, weights: object, padding: object, bits: object,
    has_residual: object, offsets: object, width: object, about: object, /,
) -> _Gradients | None: ...  # fmt: skip
def try_normalize_backward(
    type: type[_Gradients], dy: object, x: object, mean: object, var: object, gamma: object, axis: object,
    eps: object, needs: object, out: object, threads: object, /,
) -> _Gradients | None: ...  # fmt: skip
def try_update_running(
    mean: object, var: object, moments: object, update_rate: object, ddof: object, into: object,
    finite: object, /,
) -> Any: ...  # fmt: skip
def pool(pooled: object, moments: object, ddof: object, into: tuple[_Table, ...], finite: bool, /) -> bool | None: ...
def try_observe(
    known: tuple[_Table, _Table | None], x: object, how: tuple[Any, ...], /
) -> tuple[tuple[_Table, _Table | None], _Array] | None: ...
def standardizing(moments: _Table, eps: float, center: bool, scale: bool) -> _Table: ...
def room(gamma: object, mean: object, /) -> tuple[_Array, _Table, _Table] | None: ...
def combine(to: _Maybe, a: _Table | None, x: _Maybe, b: _Table | None, y: _Maybe, /) -> None: ...
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
