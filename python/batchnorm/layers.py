"""Batch normalization as an object that keeps parameters, running statistics and what backward needs."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from batchnorm import _validate, _validate_state, state_file
from batchnorm.functional import (
    Gradients,
    batch_norm,
    batch_norm_backward,
    normalize,
    normalize_backward,
    update_running,
)
from batchnorm.moments import Moments

__all__ = ["BatchNorm"]


@dataclass(slots=True, eq=False)
class _Statistics:
    """What training has learned of the data. Never changed, only replaced: one that is held is a snapshot."""

    mean: NDArray[np.float64]  # (C,)
    var: NDArray[np.float64]  # (C,); biased or unbiased as the layer's ddof says
    update_count: int
    pooled: Moments | None  # everything seen, where update_rate is None


# What backward needs of the last forward call: its x, and what gives dx, dgamma and dbeta for a dy.
_LastCall = tuple[NDArray[Any], Callable[..., Gradients]]


class BatchNorm:
    """Normalize each channel, with batch statistics in training and running statistics in evaluation.

    ``y = (x - mean) / sqrt(var + eps) * gamma + beta``      (Ioffe & Szegedy 2015, algorithms 1 and 2)

    In training, mean and var are those of x; var is biased (it divides by the count n of values a channel).
    Each training call also updates the running statistics, in float64:

    ``running = (1 - update_rate) * running + update_rate * batch``

    where the batch variance divides by ``n - ddof``: unbiased unless ``ddof=0``. With ``update_rate=None``
    the running statistics are instead the exact mean and variance of all values seen in training so far, as
    if they had come in one batch. In evaluation (after ``eval()``), mean and var are the running ones and
    nothing is updated.

    Parameters
    ----------
    channels : int >= 0. C below: the size of x along `axis`.
    axis : int from -8 to 7, the channel axis of x. Default 1.
    eps : finite float >= 0. Default 1e-5.
    update_rate : float from 0 to 1, or None. The share of the new batch: 0 leaves the running statistics'
        bits, 1 stores exactly the batch's. It is PyTorch's momentum, and 1 minus the momentum of Keras and
    Flax. ddof : 1 (default) for running variances that are unbiased, 0 for biased ones. No effect on y in
    training. gamma, beta : bool. False leaves that parameter out (gamma = 1, beta = 0).
    dtype : float16, float32 (default) or float64, of gamma and beta. x has its own.
    num_threads : int >= 1 or None: threads of each call, as in the functions.

    Attributes
    ----------
    gamma, beta : (C,) of `dtype`, start as ones and zeros, or None. To be changed in place or by assigning.
    dgamma, dbeta : (C,) of `dtype`, from the last backward; None before it, and where not asked for.
    running_mean, running_var : float64 (C,), read-only; start as zeros and ones.
    update_count : int, training calls that updated them.
    training : bool, True at first.

    Notes
    -----
    A call that raises changes nothing in the layer: running statistics, counters, gradients, mode and what is
    kept for backward are as before. Infinities and NaN in x reach the running statistics of their channel,
    and stay.

    Memory: the layer keeps a reference to the x of its last call (not a copy) until the next call; do not
    overwrite that x before backward. The layer's own arrays are of size C.

    Threads: train a layer from one thread at a time. Evaluation calls may run at once, also while another
    thread trains: each uses one whole set of running statistics; backward then belongs to the call that
    finished last.

    Copies (``copy.copy``, ``copy.deepcopy``, pickle) are independent layers: parameters, gradients,
    statistics and mode are copied, what is kept for backward is not.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import BatchNorm
    >>> layer = BatchNorm(2)
    >>> layer
    BatchNorm(2, axis=1, eps=1e-05, update_rate=0.1, ddof=1)
    >>> x = np.array([[1, 10], [2, 20], [3, 60]], np.float32)
    >>> y = layer(x)                              # (3, 2), float32: statistics of x
    >>> layer.running_mean, layer.running_var     # 0.9*0 + 0.1*[2, 30], 0.9*1 + 0.1*[1, 700]
    (array([0.2, 3. ]), array([ 1. , 70.9]))
    >>> dx = layer.backward(np.ones_like(x))
    >>> layer.beta -= 0.5 * layer.dbeta
    >>> layer.beta
    array([-1.5, -1.5], dtype=float32)
    >>> z = layer.eval()(x)                       # running statistics; nothing is updated
    >>> layer.update_count
    1

    """

    def __init__(
        self,
        channels: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        update_rate: float | None = 0.1,
        ddof: int = 1,
        gamma: bool = True,
        beta: bool = True,
        dtype: DTypeLike = np.float32,
        num_threads: int | None = None,
        **others: Any,
    ) -> None:
        _validate_state.no_other_arguments(others)
        self._channels = _validate_state.channels(channels)
        self._axis = _validate_state.axis(axis)
        self._eps = _validate.eps(eps)
        self._update_rate = _validate_state.update_rate(update_rate)
        self._ddof = _validate_state.ddof(ddof)
        self._dtype = _validate_state.dtype(dtype)
        self._num_threads = _validate.num_threads(num_threads) or None
        self._gamma = np.ones(self._channels, self._dtype) if _validate_state.flag("gamma", gamma) else None
        self._beta = np.zeros(self._channels, self._dtype) if _validate_state.flag("beta", beta) else None
        self._dgamma: NDArray[Any] | None = None
        self._dbeta: NDArray[Any] | None = None
        self._training = True
        self._statistics = _initial_statistics(self._channels, self._update_rate, self._ddof)
        self._last_call: _LastCall | None = None

    # ---- settings, fixed for the layer's life ----

    @property
    def channels(self) -> int:
        """C, the number of channels."""
        return self._channels

    @property
    def axis(self) -> int:
        """The channel axis of x."""
        return self._axis

    @property
    def eps(self) -> float:
        """What is added to the variance under the root."""
        return self._eps

    @property
    def update_rate(self) -> float | None:
        """The share of each new batch in the running statistics; None for all values alike."""
        return self._update_rate

    @property
    def ddof(self) -> int:
        """The running variance divides by n - ddof: 1 is unbiased, 0 biased."""
        return self._ddof

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of gamma, beta and their gradients."""
        return self._dtype

    @property
    def num_threads(self) -> int | None:
        """Threads of each call; None for the setting of the process."""
        return self._num_threads

    # ---- parameters and state ----

    @property
    def gamma(self) -> NDArray[Any] | None:
        """Scale of each channel, (C,) of `dtype`, or None. Assigning copies; ``gamma -= g`` works in place.

        Raises TypeError for another dtype or type, ValueError for another shape or a layer without gamma.
        """
        return self._gamma

    @gamma.setter
    def gamma(self, value: NDArray[Any] | None) -> None:
        # In-place operators assign the very array they have changed: it must stay the same array.
        checked = _validate_state.parameter("gamma", value, self._gamma is not None, self._parameter_entry)
        self._gamma = value if value is self._gamma else checked

    @property
    def beta(self) -> NDArray[Any] | None:
        """Shift of each channel, (C,) of `dtype`, or None. Assigning copies; ``beta -= b`` works in place.

        Raises TypeError for another dtype or type, ValueError for another shape or a layer without beta.
        """
        return self._beta

    @beta.setter
    def beta(self, value: NDArray[Any] | None) -> None:
        checked = _validate_state.parameter("beta", value, self._beta is not None, self._parameter_entry)
        self._beta = value if value is self._beta else checked

    @property
    def dgamma(self) -> NDArray[Any] | None:
        """Gradient of gamma from the last backward, (C,) of `dtype`; None before it or if not asked for."""
        return self._dgamma

    @property
    def dbeta(self) -> NDArray[Any] | None:
        """Gradient of beta from the last backward, (C,) of `dtype`; None before it or if not asked for."""
        return self._dbeta

    @property
    def running_mean(self) -> NDArray[np.float64]:
        """Running mean, float64 (C,), read-only: an update replaces it. To set it, use `load_state_dict`."""
        return _read_only(self._statistics.mean)

    @property
    def running_var(self) -> NDArray[np.float64]:
        """Running variance (unbiased for ddof=1, biased for 0), float64 (C,), as `running_mean`."""
        return _read_only(self._statistics.var)

    @property
    def update_count(self) -> int:
        """Training calls that updated the running statistics, since the start or `reset_statistics`."""
        return self._statistics.update_count

    @property
    def training(self) -> bool:
        """True: batch statistics, and updates. False: running statistics."""
        return self._training

    def train(self, mode: bool = True) -> Self:
        """Switch to training (or, with False, to evaluation); return the layer. TypeError if not a bool."""
        self._training = _validate_state.flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation: running statistics, no updates. Returns the layer."""
        return self.train(False)

    def reset_statistics(self) -> None:
        """Forget all batches: running mean 0, running variance 1, update count 0. Parameters stay."""
        self._statistics = _initial_statistics(self._channels, self._update_rate, self._ddof)

    # ---- forward and backward ----

    def __call__(self, x: NDArray[Any], *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return the normalized x; in training also update the running statistics.

        Training: ``y = (x - mean)/sqrt(var + eps)*gamma + beta`` with the batch's mean and biased variance
        (Ioffe & Szegedy 2015, algorithm 1). Evaluation: the same with `running_mean` and `running_var`.

        Parameters
        ----------
        x : ndarray of float16, bfloat16 (ml_dtypes), float32 or float64, 1 to 8 dimensions, C long on `axis`,
            any memory order. Kept by reference for backward. In training 2 or more values a channel; an empty x
            updates nothing.
        out : where to put y: shape and dtype of x. It may be x itself, but then there is no backward.

        Returns
        -------
        y : shape, dtype and memory order of x; `out` where given.

        Raises
        ------
        TypeError, ValueError
            For an x or out that does not fit. Nothing has changed or been written then.

        Notes
        -----
        Memory: y, and what `batch_norm` takes. Training: one thread at a time; evaluation: any.

        Examples
        --------
        >>> layer = BatchNorm(1, eps=0)
        >>> layer(np.array([[1.0], [3.0]]))
        array([[-1.],
               [ 1.]])

        """
        _validate_state.x_channels(x, self._axis, self._channels)
        return self._train(x, out) if self._training else self._evaluate(x, out)

    def backward(
        self,
        dy: NDArray[Any],
        *,
        needs: Iterable[str] = ("x", "gamma", "beta"),
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any] | None:
        """Return dx for the last call of the layer, and set `dgamma` and `dbeta`.

        With xhat = (x - mean) * rstd, rstd = 1/sqrt(var + eps), and sums over the n values of a channel:

        ``dgamma = sum(dy * xhat)``, ``dbeta = sum(dy)``
        ``dx = gamma * rstd * (dy - dbeta/n - xhat * dgamma/n)``    after a training call (biased var of x)
        ``dx = gamma * rstd * dy``                after an evaluation call (constant statistics)

        It belongs to the last call whatever has happened since: gamma and statistics are those of that call,
        and ``train()``, ``eval()`` or a change of gamma in between make no difference. It may be called
        again.

        Parameters
        ----------
        dy : gradient of y: shape and dtype of that x.
        needs : which of "x", "gamma", "beta" to compute; the others become None.
        out : where to put dx: shape and dtype of x. It may be dy itself; or x itself, for the last backward.

        Returns
        -------
        dx : shape, dtype and memory order of x; None without "x" in `needs`.

        Raises
        ------
        RuntimeError
            Without such a call, or where x has been overwritten by ``out=x``.
        TypeError, ValueError
            For a dy, needs or out that does not fit. Nothing has changed or been written then.

        Notes
        -----
        Source: Ioffe & Szegedy (2015), section 3, simplified. Memory: dx, and what `batch_norm_backward` takes.

        Examples
        --------
        >>> layer = BatchNorm(1, update_rate=1, eps=0)
        >>> y = layer(np.array([[1.0], [2.0], [6.0]]))
        >>> layer.backward(np.array([[1.0], [1.0], [1.0]]))       # a shift of all x changes no y
        array([[0.],
               [0.],
               [0.]])
        >>> layer.dbeta
        array([3.], dtype=float32)

        """
        last = self._last_call
        if last is None:
            raise _validate_state.no_forward_call()
        x, gradients = last
        dx, dgamma, dbeta = gradients(dy, needs=needs, out=out, num_threads=self._num_threads)
        dgamma, dbeta = self._as_gradient(dgamma, self._gamma), self._as_gradient(dbeta, self._beta)
        if _same_memory(x, out):
            self._last_call = None
        self._dgamma, self._dbeta = dgamma, dbeta
        return dx

    def _train(self, x: NDArray[Any], out: NDArray[Any] | None) -> NDArray[Any]:
        gamma = _snapshot(self._gamma)
        y, saved = batch_norm(
            x, gamma, self._beta, axis=self._axis, eps=self._eps, out=out, num_threads=self._num_threads
        )
        statistics = self._statistics
        last_call: _LastCall | None = (x, partial(batch_norm_backward, saved=saved))
        if x.size > 0:
            statistics = _updated_statistics(statistics, saved.moments, self._update_rate, self._ddof)
            if saved.x is None:  # out was x
                last_call = None
        # From here on nothing can raise.
        self._statistics, self._last_call = statistics, last_call
        return y

    def _evaluate(self, x: NDArray[Any], out: NDArray[Any] | None) -> NDArray[Any]:
        gamma, statistics = _snapshot(self._gamma), self._statistics
        mean, var = statistics.mean, statistics.var
        y = normalize(
            x,
            mean,
            var,
            gamma,
            self._beta,
            axis=self._axis,
            eps=self._eps,
            out=out,
            num_threads=self._num_threads,
        )
        gradients = partial(
            normalize_backward, x=x, mean=mean, var=var, gamma=gamma, axis=self._axis, eps=self._eps
        )
        self._last_call = None if _same_memory(x, out) else (x, gradients)
        return y

    def _as_gradient(
        self, gradient: NDArray[Any] | None, parameter: NDArray[Any] | None
    ) -> NDArray[Any] | None:
        if gradient is None or parameter is None:
            return None
        if gradient.dtype == self._dtype:
            return gradient
        with np.errstate(all="ignore"):  # a sum beyond the dtype is an infinity, and no reason for a warning
            return gradient.astype(self._dtype)

    # ---- saved state ----

    @property
    def _parameter_entry(self) -> _validate_state.Entry:
        return _validate_state.Entry((self._channels,), self._dtype)

    def _state_entries(self) -> dict[str, _validate_state.Entry]:
        per_channel = _validate_state.Entry((self._channels,), np.dtype(np.float64))
        entries = {}
        if self._gamma is not None:
            entries["gamma"] = self._parameter_entry
        if self._beta is not None:
            entries["beta"] = self._parameter_entry
        entries |= {"running_mean": per_channel, "running_var": per_channel}
        entries["update_count"] = _validate_state.Entry((), np.dtype(np.int64))
        if self._update_rate is None:
            entries["running_moments"] = _validate_state.Entry((self._channels, 5), np.dtype(np.float64))
        return entries

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the state as fresh arrays: what a layer of the same settings needs to go on bit for bit.

        Returns
        -------
        gamma, beta : (C,) of `dtype`; absent where the layer has none.
        running_mean, running_var : float64 (C,); the variance unbiased or not, as `ddof` says.
        update_count : int64, no axes.
        running_moments : float64 (C, 5), only with ``update_rate=None``: for each channel the count of values
            seen, their mean and m2 = sum((x - mean)**2), mean and m2 in two parts each.

        Notes
        -----
        Settings (axis, eps, update_rate, ddof), mode and gradients are not state.

        Examples
        --------
        >>> sorted(BatchNorm(2, beta=False).state_dict())
        ['gamma', 'running_mean', 'running_var', 'update_count']

        """
        statistics = self._statistics
        state: dict[str, NDArray[Any]] = {}
        if self._gamma is not None:
            state["gamma"] = self._gamma.copy()
        if self._beta is not None:
            state["beta"] = self._beta.copy()
        state["running_mean"] = statistics.mean.copy()
        state["running_var"] = statistics.var.copy()
        state["update_count"] = np.array(statistics.update_count, np.int64)
        if statistics.pooled is not None:
            state["running_moments"] = np.array(statistics.pooled._table)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state as `state_dict` gives it, all or nothing; the arrays are copied.

        Everything is checked before anything is assigned: exactly the entries of `state_dict`, their shapes
        and dtypes; all values finite; running_var >= 0; update_count >= 0 (a plain int will do); and with
        ``update_rate=None`` that running_mean, running_var (for this layer's ddof) and update_count agree
        with running_moments, from which they are then derived. Gradients, mode and what is kept for backward
        stay.

        Raises
        ------
        TypeError, ValueError
            Naming the entry that does not fit. Nothing has changed then.

        Examples
        --------
        >>> a, b = BatchNorm(2), BatchNorm(2)
        >>> y = a(np.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> b.load_state_dict(a.state_dict())
        >>> b.running_mean
        array([0.2, 0.3])

        """
        checked = _validate_state.state(state, self._state_entries())
        count = int(checked["update_count"])
        if self._update_rate is None:
            statistics = self._checked_pooled(checked, count)
        else:
            statistics = _Statistics(checked["running_mean"], checked["running_var"], count, None)
        self._gamma, self._beta, self._statistics = checked.get("gamma"), checked.get("beta"), statistics

    def _checked_pooled(self, checked: Mapping[str, NDArray[Any]], count: int) -> _Statistics:
        table = checked["running_moments"]
        _validate_state.pooled_table(table, count)
        statistics = _pooled_statistics(Moments._from_table(table), count, self._ddof)
        _validate_state.derived("running_mean", checked["running_mean"], statistics.mean)
        _validate_state.derived("running_var", checked["running_var"], statistics.var)
        return statistics

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to the file `path` (.npz, no pickle), all or nothing.

        The path is used as it is: no suffix is added. The file holds state, not settings.

        Raises
        ------
        ValueError
            For what `load` would refuse: NaN or infinity in a parameter or a running statistic.
        OSError
            Where the file cannot be written. An old file is as it was, whatever is raised.

        Examples
        --------
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     BatchNorm(2).save(os.path.join(folder, "layer.npz"))
        ...     print(np.load(os.path.join(folder, "layer.npz"))["gamma"])
        [1. 1.]

        """
        entries = self._state_entries()
        state = _validate_state.state(self.state_dict(), entries)
        state_file.write_state(path, state)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read from the file `path` what `save` wrote, all or nothing; the layer's settings must fit it.

        Safe on files from anywhere: nothing in them is executed, and they can ask for no more memory than a
        few times the layer's own state.

        Raises
        ------
        ValueError
            For any file that is not such a state or is of another format version, naming the member or entry.
            Nothing has changed then.
        OSError
            Where the file cannot be read.

        Examples
        --------
        >>> import os, tempfile
        >>> a, b = BatchNorm(2), BatchNorm(2)
        >>> y = a(np.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     a.save(os.path.join(folder, "layer.npz"))
        ...     b.load(os.path.join(folder, "layer.npz"))
        >>> b.running_var
        array([1.1, 1.1])

        """
        self.load_state_dict(state_file.read_state(path, self._state_entries()))

    # ---- as a Python object ----

    def __repr__(self) -> str:
        settings = [
            f"{self._channels}",
            f"axis={self._axis}",
            f"eps={self._eps}",
            f"update_rate={self._update_rate}",
            f"ddof={self._ddof}",
        ]
        if self._gamma is None:
            settings.append("gamma=False")
        if self._beta is None:
            settings.append("beta=False")
        if self._dtype != np.float32:
            settings.append(f"dtype='{self._dtype}'")
        if self._num_threads is not None:
            settings.append(f"num_threads={self._num_threads}")
        return f"BatchNorm({', '.join(settings)})"

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # layers that share gamma but not running statistics would help nobody

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last_call": None}


def _initial_statistics(channels: int, update_rate: float | None, ddof: int) -> _Statistics:
    if update_rate is None:
        return _pooled_statistics(Moments.empty(channels), 0, ddof)
    return _Statistics(np.zeros(channels), np.ones(channels), 0, None)


def _updated_statistics(
    statistics: _Statistics, batch: Moments, update_rate: float | None, ddof: int
) -> _Statistics:
    """Return the statistics after one more batch. Changes none of its arguments."""
    count = statistics.update_count + 1
    if count >= 2**63:  # more than a state file can hold
        count -= 1
    if statistics.pooled is not None:
        return _pooled_statistics(statistics.pooled | batch, count, ddof)
    assert update_rate is not None
    mean, var = update_running(statistics.mean, statistics.var, batch, update_rate=update_rate, ddof=ddof)
    return _Statistics(mean, var, count, None)


def _pooled_statistics(pooled: Moments, update_count: int, ddof: int) -> _Statistics:
    if update_count == 0:
        return _Statistics(np.zeros(pooled.channels), np.ones(pooled.channels), 0, pooled)
    return _Statistics(pooled.mean.copy(), pooled.var(ddof), update_count, pooled)


def _read_only(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the array itself, to be handed out: nobody has written to it, and nobody can from now on."""
    array.flags.writeable = False
    return array


def _snapshot(parameter: NDArray[Any] | None) -> NDArray[Any] | None:
    return None if parameter is None else parameter.copy()


def _same_memory(x: NDArray[Any], out: NDArray[Any] | None) -> bool:
    """Tell whether out is x. The functions have refused any other overlap, so the first byte tells."""
    if out is None or x.size == 0 or not np.may_share_memory(x, out):
        return False
    return bool(x.__array_interface__["data"][0] == out.__array_interface__["data"][0])
