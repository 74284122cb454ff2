"""Batch normalization as an object that keeps parameters, running statistics and what backward needs."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Self, TypedDict, Unpack, get_args

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from batchnorm import _validate, _validate_state, conventions, state_file
from batchnorm._validate import Activation, MaybeNone, NoOptions, Padding, Parity, WeightsAre
from batchnorm.conventions import Library
from batchnorm.counted import Positions, counted
from batchnorm.functional import (
    Gradients,
    Saved,
    _rounded,
    batch_norm,
    batch_norm_backward,
    new_room,
    normalize,
    normalize_backward,
    ordinary_batch_norm,
    pool_into,
    update_into,
    update_running,
)
from batchnorm.ghost import (
    GhostSaved,
    ghost_batch_norm,
    ghost_batch_norm_backward,
    ghost_moments,
    ghost_update_running,
)
from batchnorm.moments import Moments, merge, moments
from batchnorm.relu import NEEDS as RELU_NEEDS
from batchnorm.relu import (
    ReluGradient,
    ReluGradients,
    ReluMask,
    SavedRelu,
    batch_norm_relu,
    batch_norm_relu_backward,
    normalize_relu,
    normalize_relu_backward,
)
from batchnorm.renorm import (
    RenormSaved,
    RenormSchedule,
    batch_renorm,
    batch_renorm_backward,
    renorm_update_running,
)
from batchnorm.report import (
    Batch,
    Report,
    batch_findings,
    parameter_findings,
    statistics_findings,
    untrained_findings,
)
from batchnorm.settings import Settings

__all__ = ["BatchNorm"]


@dataclass(slots=True, eq=False)
class _Statistics:
    """What training has learned of the data. Never changed, only replaced: one that is held is a snapshot."""

    mean: NDArray[np.float64]  # (C,)
    var: NDArray[np.float64]  # (C,); biased or unbiased as the layer's ddof says
    update_count: int
    pooled: Moments | None  # everything seen, where update_rate is None
    ghost_count: int = 0  # updates that the t of debiasing counts, where one call makes several


# What backward needs of a call: [x, what the function saved or what gives the gradients for a dy]; empty where there is
# no backward (any more). Each call makes one, so that it also tells calls apart. A class of its own takes four times as
# long to make.
_Call = list[Any]


class _State(NamedTuple):
    """All that a training call or a load changes, replaced by one assignment.

    So that nothing that ends a call in its midst, an error, a signal or a thread that looks, finds a part of it done.
    """

    gamma: NDArray[Any] | None
    beta: NDArray[Any] | None
    statistics: tuple[_Statistics, ...]  # one per domain; replaced as a whole, never changed
    call: _Call  # the last that was no mere evaluation
    # The last that normalized or updated: domain, moments (of each ghost), size of x. Never changed once it is here.
    batch: Sequence[Any] | None
    largest_size: int  # of an x that did


# What backward has given: dgamma, dbeta and dresidual. Replaced by one assignment.
_Results = list[NDArray[Any] | None]

# Past the __new__ of a NamedTuple, which takes three times as long.
_new_state: Callable[[tuple[Any, ...]], _State] = partial(tuple.__new__, _State)


class _Output(NamedTuple):
    """Where y goes, what is added to it first, and whether backward may follow."""

    out: NDArray[Any] | None
    residual: NDArray[Any] | None
    keep: bool


class _Default:
    """The default of an argument whose value depends on others."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return f"<{self._text}>"


_BY_CONVENTION: Any = _Default("by convention")
_ALL: Any = _Default("all")
_AS_EVER: Any = _Default("as in BatchNorm()")

_NO_PARTS: Mapping[str, Any] = {}
_MOST_UPDATES = 2**63 - 1  # that a state file can hold
_SUM_ROUNDING = 1e-9  # far more than rounding takes from a sum of weights near 2

Nonfinite = Literal["raise", "skip", "warn", "propagate"]
SingleValue = Literal["raise", "use_running", "skip"]
UseStats = Literal["batch", "running"]
NONFINITE: tuple[Nonfinite, ...] = get_args(Nonfinite)
SINGLE_VALUE: tuple[SingleValue, ...] = get_args(SingleValue)
USE_STATS: tuple[UseStats, ...] = get_args(UseStats)


class _CallOptions(TypedDict, total=False):
    """What a call of a layer may be told beside x and out."""

    residual: NDArray[Any] | None
    mask: ArrayLike | None
    weights: ArrayLike | None
    lengths: ArrayLike | None
    padding: Padding | None
    use_stats: UseStats | None
    update_stats: bool | None
    domain: int | None
    keep: bool


_PARTS = ("mask", "weights", "lengths", "padding")


class _Settings(TypedDict, total=False):
    """The settings of a layer that no source of another library decides."""

    ddof: int
    nonfinite: Nonfinite
    single_value: SingleValue
    ghost_size: int | None
    renorm: RenormSchedule | None
    parity: Parity
    activation: Activation | None
    weights_are: WeightsAre | None
    num_threads: int | None


class _MoreSettings(_Settings, total=False):
    """The same where a source has eps and update_rate by other names."""

    eps: float
    update_rate: float


class _MostSettings(_MoreSettings, total=False):
    """The same where a source has no axis."""

    axis: int


_AnySaved = Saved | SavedRelu | GhostSaved | RenormSaved
_BACKWARD: dict[type, Callable[..., Gradients | ReluGradients]] = {
    Saved: batch_norm_backward,
    SavedRelu: batch_norm_relu_backward,
    GhostSaved: ghost_batch_norm_backward,
    RenormSaved: batch_renorm_backward,
}


class BatchNorm:
    """Normalize each channel, with batch statistics in training and running statistics in evaluation.

    ``y = (x - mean) / sqrt(var + eps) * gamma + beta``      (Ioffe & Szegedy 2015, algorithms 1 and 2)

    In training, mean and var are those of x; var is biased (it divides by the count n of values a channel).
    Each training call also updates the running statistics, in float64:

    ``running = (1 - update_rate) * running + update_rate * batch``

    where the batch variance divides by ``n - ddof``: unbiased unless ``ddof=0``. With ``update_rate=None``
    the running statistics are instead the exact mean and variance of all values seen in training so far, as
    if they had come in one batch (the variance stays 1 until there have been two values). In evaluation (after
    ``eval()``), mean and var are the running ones and nothing is updated.

    Parameters
    ----------
    channels : int >= 0. C below: the size of x along `axis`.
    axis : int from -8 to 7, the channel axis of x. Default 1, -1 by the conventions of Keras and Flax.
    convention : None, "torch", "keras", "flax" or "onnx": whose defaults `eps`, `update_rate`, `ddof` and `axis` have
        where they are not given: 1e-5, 0.1, 1 and 1 for "torch" and None; 1e-3, 0.01, 0 and -1 for "keras"; 1e-5, 0.01,
        0 and -1 for "flax"; 1e-5, 0.1, 0 and 1 for "onnx".
    eps : finite float >= 0.
    update_rate : float from 0 to 1, or None. The share of the new batch: 0 leaves the running statistics'
        bits, 1 stores exactly the batch's. It is PyTorch's momentum, and 1 minus the momentum of Keras, Flax and ONNX.
    ddof : 1 for running variances that are unbiased, 0 for biased ones. No effect on y in training.
    gamma, beta : bool. False leaves that parameter out (gamma = 1, beta = 0).
    dtype : float16, float32 (default) or float64, of gamma and beta. x has its own.
    debias : bool. True: running statistics are the average of the batches seen so far, weighted as `update_rate`
        says, with no share of the zeros and ones they start as: the t-th update has the rate
        ``update_rate / (1 - (1 - update_rate)**t)``, the first stores the batch's. (Kingma & Ba 2015, section 3.) With
        `ghost_size` each ghost is an update.
    nonfinite : what a training call does where the mean or variance of its batch (of a ghost; with update_rate=None, of
        all that has been seen with this batch) is infinite or NaN in any channel:
        "warn" (default) and "skip" leave all running statistics and counts as they are (bit for bit), with and
        without a RuntimeWarning; "raise" raises a ValueError; "propagate" lets them in, to stay.
    single_value : what a training call does with one value a channel, which has no variance: "raise" (default),
        "use_running" (as in evaluation) or "skip" (y = beta). Statistics that follow the batch are not updated then; those
        of ``update_rate=None`` take the value in, as one more of all that have been seen. It is heard too where a mask,
        lengths or weights leave one position, and for a last ghost of one value, which alone is treated so.
    domains : int >= 1 or None. K sets of running statistics beside one gamma and beta; each call names its set by
        ``domain=``. Statistics and counts then have a first axis of K.
    ghost_size : int >= 1 or None. Training calls normalize each ghost of so many samples by its own statistics, which
        update the running ones one after another (`ghost_batch_norm`, `ghost_update_running`).
    renorm : RenormSchedule or None. Training calls are corrected towards the running statistics (`batch_renorm`), within
        the limits that the schedule gives for step `update_count`.
    parity : "paper" (default), "keras" or "torchrl": whose rules `renorm` follows; its running variance is not
        `ddof`'s then (`renorm_update_running`).
    activation : "relu" or None. "relu": each call gives max(y + residual, 0) in the same pass (`batch_norm_relu`), and
        backward goes through that. Not with `ghost_size` and `renorm`, nor with masks.
    weights_are : "counts" (a weight of 2 is a value that came twice), "importance" (only their ratios matter:
        probabilities, reliabilities), or None (default): the unbiased variance of ddof=1 divides by sum(w) - 1, or by
        sum(w) - sum(w²)/sum(w). Without it, a training call of weights other than 0 and 1 raises: there is no default
        that would be right for both, and weights that sum to 1 would leave counts nothing to divide by. No effect
        where ddof=0 or weights are 0 and 1, of which both are one.
    num_threads : int >= 1 or None: threads of each call, as in the functions.

    Attributes
    ----------
    gamma, beta : (C,) of `dtype`, start as ones and zeros, or None. To be changed in place or by assigning.
    dgamma, dbeta : (C,) of `dtype`, from the last backward; None before it, and where not asked for.
    dresidual : like x, from the last backward; None before it, without a residual, and where not asked for.
    running_mean, running_var : float64 (C,), read-only; start as zeros and ones.
    update_count : int, training calls that updated them.
    training : bool, True at first.
    frozen_statistics, frozen_affine : bool, False at first; see `freeze`.

    Notes
    -----
    A call that raises changes nothing in the layer: running statistics, counters, gradients, mode and what is
    kept for backward are as before.

    Memory: the layer keeps a reference to the x of its last call (not a copy) until the next call, in evaluation too,
    and there to the residual; do not overwrite them before backward. A call with ``keep=False`` keeps nothing, and lets
    go of what the call before it has kept. The layer's own arrays are of size C.

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

    @_validate.keywords
    def __init__(
        self,
        channels: int,
        *,
        axis: int = _BY_CONVENTION,
        convention: Library | None = None,
        eps: float = _BY_CONVENTION,
        update_rate: float | None = _BY_CONVENTION,
        ddof: int = _BY_CONVENTION,
        gamma: bool = True,
        beta: bool = True,
        dtype: DTypeLike = np.float32,
        debias: bool = False,
        nonfinite: Nonfinite = "warn",
        single_value: SingleValue = "raise",
        domains: int | None = None,
        ghost_size: int | None = None,
        renorm: RenormSchedule | None = None,
        parity: Parity = "paper",
        activation: Activation | None = None,
        weights_are: WeightsAre | None = None,
        num_threads: int | None = None,
    ) -> None:
        self._channels = _validate_state.channels(channels)
        defaults = conventions.convention(convention)
        self._axis = _validate_state.axis(defaults.axis if axis is _BY_CONVENTION else axis)
        self._eps = _validate.eps(defaults.eps if eps is _BY_CONVENTION else eps)
        self._update_rate = _validate_state.update_rate(
            defaults.update_rate if update_rate is _BY_CONVENTION else update_rate
        )
        self._ddof = _validate_state.ddof(defaults.ddof if ddof is _BY_CONVENTION else ddof)
        self._dtype = _validate_state.dtype(dtype)
        self._debias = _validate_state.debias(debias, self._update_rate)
        self._nonfinite = _validate.choice("nonfinite", nonfinite, NONFINITE)
        self._single_value = _validate.choice("single_value", single_value, SINGLE_VALUE)
        self._domains = _validate_state.domains(domains)
        self._ghost_size = None if ghost_size is None else _validate.ghost_size(ghost_size)
        self._renorm: RenormSchedule | None = _validate_state.renorm(
            renorm, self._ghost_size, self._update_rate
        )
        self._parity = _validate.choice("parity", parity, _validate.PARITIES)
        self._activation = _validate_state.activation(activation, self._ghost_size, self._renorm)
        self._weights_are = _validate_state.weights_are(weights_are)
        self._num_threads = _validate.num_threads(num_threads) or None
        scale = np.ones(self._channels, self._dtype) if _validate_state.flag("gamma", gamma) else None
        shift = np.zeros(self._channels, self._dtype) if _validate_state.flag("beta", beta) else None
        # Each of these is replaced by one assignment. Evaluation calls write _evaluation alone, so that those of other
        # threads never take back what a training call has learned meanwhile.
        self._state = _State(scale, shift, self._initial_statistics(), [], None, 0)
        self._evaluation: tuple[_Call, _Call] | None = (
            None  # the last, and the call of _state that it came after
        )
        self._results: _Results = [None, None, None]
        self._training = True
        self._frozen = False, False  # statistics, affine
        # Whether there is nothing beside one set of running statistics that follow each batch as it comes, and a gamma,
        # to whose size the core holds x.
        special = domains, ghost_size, renorm, activation
        self._is_ordinary = (
            scale is not None
            and all(setting is None for setting in special)
            and self._single_value == "raise"
            and self._nonfinite != "raise"
        )

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
    def debias(self) -> bool:
        """Whether running statistics are corrected for their start."""
        return self._debias

    @property
    def nonfinite(self) -> Nonfinite:
        """What a training call does with statistics that are not finite."""
        return self._nonfinite

    @property
    def single_value(self) -> SingleValue:
        """What a training call does with one value a channel."""
        return self._single_value

    @property
    def domains(self) -> int | None:
        """K, the sets of running statistics; None for one without an axis of its own."""
        return self._domains

    @property
    def ghost_size(self) -> int | None:
        """Samples of each ghost in training; None for the whole batch."""
        return self._ghost_size

    @property
    def renorm(self) -> RenormSchedule | None:
        """The limits of batch renormalization by step; None without it."""
        return self._renorm

    @property
    def parity(self) -> Parity:
        """Whose rules batch renormalization follows."""
        return self._parity

    @property
    def activation(self) -> Activation | None:
        """What follows the normalization in the same pass."""
        return self._activation

    @property
    def weights_are(self) -> WeightsAre | None:
        """What weights other than 0 and 1 are to an unbiased running variance."""
        return self._weights_are

    @property
    def num_threads(self) -> int | None:
        """Threads of each call; None for the setting of the process."""
        return self._num_threads

    # ---- parameters and state ----

    @property
    def gamma(self) -> NDArray[Any] | MaybeNone:
        """Scale of each channel, (C,) of `dtype`, or None. Assigning copies; ``gamma -= g`` works in place.

        Raises TypeError for another dtype or type, ValueError for another shape or a layer without gamma.
        """
        return self._state.gamma

    @gamma.setter
    def gamma(self, value: NDArray[Any] | None) -> None:
        # In-place operators assign the very array they have changed: it must stay the same array.
        now = self._state.gamma
        checked = _validate_state.parameter("gamma", value, now is not None, self._parameter_entry)
        if value is not now:
            self._state = self._state._replace(gamma=checked)

    @property
    def beta(self) -> NDArray[Any] | MaybeNone:
        """Shift of each channel, (C,) of `dtype`, or None. Assigning copies; ``beta -= b`` works in place.

        Raises TypeError for another dtype or type, ValueError for another shape or a layer without beta.
        """
        return self._state.beta

    @beta.setter
    def beta(self, value: NDArray[Any] | None) -> None:
        now = self._state.beta
        checked = _validate_state.parameter("beta", value, now is not None, self._parameter_entry)
        if value is not now:
            self._state = self._state._replace(beta=checked)

    @property
    def dgamma(self) -> NDArray[Any] | MaybeNone:
        """Gradient of gamma from the last backward, (C,) of `dtype`; None before it or if not asked for."""
        return self._results[0]

    @property
    def dbeta(self) -> NDArray[Any] | MaybeNone:
        """Gradient of beta from the last backward, (C,) of `dtype`; None before it or if not asked for."""
        return self._results[1]

    @property
    def dresidual(self) -> NDArray[Any] | MaybeNone:
        """Gradient of the residual from the last backward; None where there was none, or it was not asked for."""
        return self._results[2]

    @property
    def running_mean(self) -> NDArray[np.float64]:
        """Running mean, float64 (C,), read-only: an update replaces it. (K, C) with K domains.

        To set it, use `load_state_dict`.
        """
        return self._of_domains([s.mean for s in self._state.statistics])

    @property
    def running_var(self) -> NDArray[np.float64]:
        """Running variance (unbiased for ddof=1, biased for 0), as `running_mean`."""
        return self._of_domains([s.var for s in self._state.statistics])

    @property
    def update_count(self) -> int | NDArray[np.int64]:
        """Training calls that updated the running statistics, since the start or `reset_statistics`.

        With K domains an int64 array (K,).
        """
        counts = [s.update_count for s in self._state.statistics]
        return counts[0] if self._domains is None else np.array(counts, np.int64)

    @property
    def frozen_statistics(self) -> bool:
        """Whether training calls use the running statistics and leave them alone."""
        return self._frozen[0]

    @property
    def frozen_affine(self) -> bool:
        """Whether backward leaves out the gradients of gamma and beta."""
        return self._frozen[1]

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

    def freeze(self, *, statistics: bool = True, affine: bool = True) -> Self:
        """Freeze what is True, until `unfreeze`, through ``train()`` and ``eval()``; return the layer.

        Frozen statistics: training calls normalize by the running statistics, as constants, and update nothing.
        Frozen affine: backward gives dx alone; `dgamma` and `dbeta` become None. TypeError if not bools.

        Examples
        --------
        >>> layer = BatchNorm(1).freeze(affine=False)
        >>> y = layer(np.array([[3.0], [5.0]]))
        >>> layer.update_count, layer.running_mean
        (0, array([0.]))

        """
        return self._set_frozen(True, statistics, affine)

    def unfreeze(self, *, statistics: bool = True, affine: bool = True) -> Self:
        """Undo `freeze` for what is True; return the layer. TypeError if not bools."""
        return self._set_frozen(False, statistics, affine)

    def _set_frozen(self, frozen: bool, statistics: bool, affine: bool) -> Self:
        which = _validate_state.flag("statistics", statistics), _validate_state.flag("affine", affine)
        before = self._frozen
        self._frozen = frozen if which[0] else before[0], frozen if which[1] else before[1]
        return self

    def reset_statistics(self) -> None:
        """Forget all batches: running mean 0, running variance 1, update count 0. Parameters stay."""
        fresh = self._initial_statistics()
        self._state = self._state._replace(statistics=fresh, batch=None, largest_size=0)

    def _initial_statistics(self) -> tuple[_Statistics, ...]:
        return tuple(
            _initial_statistics(self._channels, self._update_rate, self._ddof)
            for _ in range(self._domains or 1)
        )

    def _of_domains(self, values: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return _read_only(values[0] if self._domains is None else np.stack(values))

    # ---- forward and backward ----

    @_validate.options(_CallOptions, keep=True)
    def __call__(
        self,
        x: NDArray[Any],
        *,
        out: NDArray[Any] | None = None,
        **options: Unpack[_CallOptions],
    ) -> NDArray[Any]:
        """Return the normalized x; in training also update the running statistics.

        Training: ``y = (x - mean)/sqrt(var + eps)*gamma + beta`` with the batch's mean and biased variance
        (Ioffe & Szegedy 2015, algorithm 1). Evaluation: the same with `running_mean` and `running_var`.

        Parameters
        ----------
        x : ndarray of float16, bfloat16 (ml_dtypes), float32 or float64, 1 to 8 dimensions, C long on `axis`,
            any memory order. Kept by reference for backward. In training 2 or more values a channel; an empty x
            updates nothing.
        residual : in a layer with activation="relu": added before it; shape and dtype of x.
        mask, weights, lengths, padding : what of x counts, and what y is elsewhere, as in `batch_norm`. Where
            nothing counts, nothing is updated.
        use_stats : "batch" or "running": the statistics that normalize, whatever the mode; None for the mode's.
        update_stats : whether the running statistics take in this batch, whatever the mode; None for the mode's.
            With "running", y comes from the statistics before the update. False is for a step that is run again, of
            which y is the same, but not in a layer with `renorm`: there y depends on the running statistics and
            `update_count`, which the first run has moved. Let the first run have False, and the last update; or run it
            again on a ``copy.copy(layer)`` of before.
        domain : int from 0 to K - 1 in a layer of K domains: the statistics that this call uses and updates.
        out : where to put y: shape and dtype of x. It may be x itself, but then there is no backward.
        keep : False where no backward will follow: the layer then keeps no reference to x.

        Returns
        -------
        y : shape, dtype and memory order of x; `out` where given.

        Raises
        ------
        TypeError, ValueError
            For an x, residual or out that does not fit. Nothing has changed or been written then.

        Notes
        -----
        Memory: y, and what `batch_norm` takes. With `out`, and where x that is not finite raises (``nonfinite="raise"``, or
        a RuntimeWarning that filters turn into an exception), x is read once more, before out is written. What the call
        leaves is asked for before it writes too; only the new statistics, of size C, of `renorm`, of ghosts with
        `debias` or a last one of one value, and of pooled importance weights come after. Training: one thread at a time; evaluation: any.

        Examples
        --------
        >>> layer = BatchNorm(1, eps=0)
        >>> layer(np.array([[1.0], [3.0]]))
        array([[-1.],
               [ 1.]])

        """
        no_options = not options or _validate.no_options("BatchNorm.__call__", options)
        by_batch = update = self._training and not self._frozen[0]
        if by_batch and no_options and self._is_ordinary:
            y = self._ordinary_training(x, out)
            if y is not None:
                return y
        x = _validate_state.x_channels(x, self._axis, self._channels)
        k = _validate_state.domain(options.get("domain"), self._domains)
        how, to = _NO_PARTS, _Output(out, None, True)
        if not no_options:
            use_stats, update_stats = options.get("use_stats"), options.get("update_stats")
            if use_stats is not None:
                by_batch = _validate.choice("use_stats", use_stats, USE_STATS) == "batch"
            if update_stats is not None:
                update = _validate_state.flag("update_stats", update_stats)
                if update and self._frozen[0]:
                    raise _validate_state.update_of_frozen()
            given: Mapping[str, Any] = options
            how = {name: given[name] for name in _PARTS if given.get(name) is not None}
            residual = options.get("residual")
            if self._activation is None and residual is not None:
                raise _validate_state.residual_without_activation()
            if self._activation is not None and how:
                raise _validate_state.parts_with_activation(how)
            to = _Output(out, residual, _validate_state.flag("keep", options.get("keep", True)))
        if by_batch and self._single_value != "raise":
            if _is_single_value(x, self._axis) or (how and self._positions(x, how).has_one()):
                pools = update and self._update_rate is None
                if self._single_value == "use_running":
                    return self._by_running(x, to, k, how, pools)
                return self._by_itself(x, to, k, how, pools)
            if self._ghost_size is not None and not how and _ends_in_one(x, self._axis, self._ghost_size):
                return self._ghosts_and_one(x, to, k, update)
        if by_batch:
            return self._by_batch(x, to, k, how, update)
        return self._by_running(x, to, k, how, update)

    @_validate.options(NoOptions)
    def backward(
        self,
        dy: NDArray[Any],
        *,
        needs: Iterable[ReluGradient] = _ALL,
        out: NDArray[Any] | None = None,
        **others: Unpack[NoOptions],
    ) -> NDArray[Any] | MaybeNone:
        """Return dx for the last call of the layer, and set `dgamma` and `dbeta`.

        With xhat = (x - mean) * rstd, rstd = 1/sqrt(var + eps), and sums over the n values of a channel:

        ``dgamma = sum(dy * xhat)``, ``dbeta = sum(dy)``
        ``dx = gamma * rstd * (dy - dbeta/n - xhat * dgamma/n)``    after a training call (biased var of x)
        ``dx = gamma * rstd * dy``                after an evaluation call (constant statistics)

        In a layer with activation="relu", dy is first set to 0 where y was not above 0 before ReLU; that is `dresidual`,
        which is set after a call with a residual.

        It belongs to the last call whatever has happened since: gamma and statistics are those of that call,
        and ``train()``, ``eval()`` or a change of gamma in between make no difference. It may be called
        again.

        Parameters
        ----------
        dy : gradient of y: shape and dtype of that x.
        needs : which of "x", "gamma", "beta" (and "residual") to compute; the others become None. Default: all.
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
        if others:
            _validate.no_options("BatchNorm.backward", others)
        call, evaluation = self._state.call, self._evaluation
        if evaluation is not None and evaluation[1] is call:
            call = evaluation[0]
        try:
            x, saved = call
        except ValueError:
            raise _validate_state.no_forward_call() from None
        known: tuple[str, ...] = _validate.GRADIENTS if self._activation is None else RELU_NEEDS
        names: Iterable[str] = known if needs is _ALL else needs
        overwrites = out is not None and _is_x(out, x)
        if self._frozen[1] or overwrites:
            left_out = ("gamma", "beta") if self._frozen[1] else ()
            asked = _validate.needs_among(known, names)
            names = [n for n, wanted in zip(known, asked, strict=True) if wanted and n not in left_out]
        to: Any = out if self._activation is None or out is None else (out, None)
        results: _Results = [None, None, None]  # before anything is written, as `out` may be
        if overwrites and "x" in names:
            call.clear()  # before its first value is gone: from there on a signal may end the call at any time
        try:
            backward = _BACKWARD.get(type(saved))
            if backward is None:
                given = saved(dy, needs=names, out=to, num_threads=self._num_threads)
            else:
                given = backward(dy, saved, needs=names, out=to, num_threads=self._num_threads)
        except (TypeError, ValueError, MemoryError):  # which come before anything is written
            call[:] = x, saved
            raise
        state = self._state
        results[0] = self._as_gradient(given[1], state.gamma)
        results[1] = self._as_gradient(given[2], state.beta)
        if len(given) > 3:
            results[2] = given[3]
        self._results = results
        dx: NDArray[Any] | None = given[0]
        return dx

    def _ordinary_training(self, x: NDArray[Any], out: NDArray[Any] | None) -> NDArray[Any] | None:
        """Do the ordinary call, which on the general way below takes two thirds longer for (4, 16, 8, 8).

        None, and nothing has changed, where an argument is not ordinary: the general way takes it, or reports what is
        wrong with it.
        """
        parameter, beta, before, _, _, largest_size = self._state
        now = before[0]
        may_raise = out is not None and self._nonfinite == "warn" and _warnings_may_raise()
        if may_raise and _first_nonfinite(now, [self._moments(x, _NO_PARTS)]) >= 0:
            return None
        # All that the call leaves is made before it writes: then nothing is asked for that there might not be.
        room = new_room(parameter, now.mean)
        if room is None:
            return None
        gamma_now, mean, var = room
        rate = self._update_rate
        if self._debias and rate:
            rate = _debiased_rate(rate, now.update_count + 1)
        pooled, into = None, room
        if rate is None and now.pooled is not None and now.pooled._dof is None:
            pooled_table = np.empty((self._channels, 5))
            pooled, into = Moments._from_table(pooled_table), (pooled_table, mean, var)
        statistics = (_Statistics(mean, var, now.update_count + 1, pooled),)

        def keep(
            kept_x: NDArray[Any] | None, table: NDArray[np.float64], gamma: Any, axis: int, eps: float
        ) -> tuple[NDArray[np.float64], Saved, _State]:
            size, seen = x.size, Moments._from_core(table)
            saved = Saved(kept_x, seen, gamma, axis, eps)
            call: _Call = [] if kept_x is None else [x, saved]
            largest = largest_size
            if size > largest:  # noqa: PLR1730 - max() takes a fiftieth of the call
                largest = size
            after = (parameter, beta, statistics, call, (0, seen, size), largest)
            return table, saved, _new_state(after)

        done = ordinary_batch_norm(keep, x, gamma_now, beta, self._axis, self._eps, out, self._num_threads)
        if done is None:
            return None
        y, (table, saved, state) = done
        finite, has_learned = self._nonfinite != "propagate", None
        if now.update_count == _MOST_UPDATES:
            pass
        elif rate is not None:
            has_learned = update_into(now.mean, now.var, table, rate, self._ddof, room, finite)
        elif pooled is not None and now.pooled is not None:
            has_learned = pool_into(now.pooled._table, table, self._ddof, into, finite)
        if not has_learned:
            state = state._replace(statistics=self._updated(before, 0, saved.moments, saved))
        self._state = state
        if self._evaluation is not None:
            self._evaluation = None  # it no longer counts, but would keep its x
        return y

    def _by_batch(
        self, x: NDArray[Any], to: _Output, k: int, how: Mapping[str, Any], update: bool
    ) -> NDArray[Any]:
        if how and (self._ghost_size is not None or self._renorm is not None):
            raise _validate_state.parts_of_small_batches(how)
        state, may_tell = self._state, True
        if update and "weights" in how and self._ddof > 0:
            self._refuse_weights(x, how)
        if to.out is not None and update:
            may_tell = not self._told_before_writing(x, how, state.statistics[k])
        gamma, beta, before, _, last, largest = state
        now, size = before[k], x.size if isinstance(x, np.ndarray) else 0
        # All that the call leaves is made before it writes, and what is not known yet then filled in: then nothing is
        # asked for that there might not be, where statistics follow the batch in the plain way or pool it.
        call: _Call = [] if not to.keep or _is_x(to.out, x) else [x, None]
        batch: Any = [k, None, size]
        parts: list[Any] = [None]
        rate, finite = self._followed_rate(now), self._nonfinite != "propagate"
        if size == 0:
            batch, update = last, False
        elif size > largest:
            largest = size
        after = _new_state((gamma, beta, before, call, batch, largest))
        room: tuple[NDArray[np.float64], ...] = ()
        if update:
            room, pooled = (np.empty(self._channels), np.empty(self._channels)), None
            if now.pooled is not None and now.pooled._dof is None and self._weights_are != "importance":
                table = np.empty((self._channels, 5))
                pooled, room = Moments._from_table(table), (table, *room)
            new = _Statistics(room[-2], room[-1], min(now.update_count + 1, _MOST_UPDATES), pooled)
            statistics = (new,) if len(before) == 1 else (*before[:k], new, *before[k + 1 :])
            learned = _new_state((gamma, beta, statistics, call, batch, largest))
        y, saved = self._normalized_by_batch(x, state, to, k, how)
        seen = saved.moments
        if size > 0:
            batch[1] = parts[0] = seen
        if call:
            call[1] = saved
        learns = update and _learned(
            now, seen if isinstance(seen, tuple) else parts, rate, self._ddof, room, finite
        )
        if how and not learns and not self._merged(seen).count.any():  # as of no values: they are no batch
            batch, largest, update = last, state.largest_size, False
            after = after._replace(batch=batch, largest_size=largest)
        if learns:
            after = learned
        elif update:
            statistics = self._updated(before, k, self._merged(seen), saved, may_tell)
            after = after._replace(statistics=statistics)
        elif (
            self._state is not state
        ):  # one that learns nothing takes nothing back of what others have learned meanwhile
            after = self._state._replace(call=call, batch=batch, largest_size=largest)
        self._state, self._evaluation = after, None
        return y

    def _followed_rate(self, now: _Statistics) -> float | None:
        """Return the rate of the next update of statistics that follow the batch in the plain way; else None."""
        rate = self._update_rate
        if rate is None or self._renorm is not None or (self._debias and self._ghost_size is not None):
            return None
        return _debiased_rate(rate, now.update_count + 1) if self._debias and rate > 0 else rate

    def _merged(self, seen: Moments | tuple[Moments, ...]) -> Moments:
        return merge(Moments.empty(self._channels), *seen) if isinstance(seen, tuple) else seen

    def _normalized_by_batch(
        self,
        x: NDArray[Any],
        state: _State,
        to: _Output,
        k: int,
        how: Mapping[str, Any],
    ) -> tuple[NDArray[Any], _AnySaved]:
        """Return y, and what its backward takes."""
        gamma, beta = _snapshot(state.gamma), state.beta
        axis, eps, out, threads = self._axis, self._eps, to.out, self._num_threads
        if self._activation is None and self._ghost_size is None and self._renorm is None:
            return batch_norm(x, gamma, beta, axis=axis, eps=eps, out=out, num_threads=threads, **how)
        options: dict[str, Any] = {"axis": axis, "eps": eps, "out": out, "num_threads": threads}
        if self._activation is not None:
            return batch_norm_relu(x, gamma, beta, residual=to.residual, **options)
        if self._ghost_size is not None:
            return ghost_batch_norm(x, gamma, beta, ghost_size=self._ghost_size, **options)
        assert self._renorm is not None
        now = state.statistics[k]
        limits = self._renorm(now.update_count)._asdict()
        return batch_renorm(x, now.mean, now.var, gamma, beta, parity=self._parity, **limits, **options)

    def _by_running(
        self, x: NDArray[Any], to: _Output, k: int, how: Mapping[str, Any], update: bool
    ) -> NDArray[Any]:
        if update and self._renorm is not None:
            raise _validate_state.update_without_renorm()
        state = self._state
        now = state.statistics[k]
        changes: dict[str, Any] = {}
        batch = self._moments(x, how) if update else None
        if batch is not None and batch.count.any() and self._learns_from(batch):
            changes["statistics"] = self._updated(state.statistics, k, batch)
            changes |= {"batch": (k, batch, x.size), "largest_size": max(state.largest_size, x.size)}
        settings: dict[str, Any] = {
            "axis": self._axis,
            "eps": self._eps,
            **self._for_given_statistics(x, how),
        }
        return self._by_constants(x, now.mean, now.var, state, to, settings, changes if update else None)

    def _for_given_statistics(self, x: NDArray[Any], how: Mapping[str, Any]) -> dict[str, Any]:
        """Give what `normalize` takes of it: of weights only where they are 0, and only if that is padding."""
        weights = how.get("weights")
        if weights is None:
            return dict(how)
        part = self._positions(x, how)
        part.require_weights()
        if part.padding == "normalize":
            return {}
        return {"mask": np.asarray(weights) != 0, "padding": part.padding}

    def _by_constants(
        self,
        x: NDArray[Any],
        mean: NDArray[np.float64],
        var: NDArray[np.float64],
        state: _State,
        to: _Output,
        settings: Mapping[str, Any],
        changes: Mapping[str, Any] | None,
    ) -> NDArray[Any]:
        """Normalize by statistics that are constants, and make that the last call; None changes nothing of the state."""
        gamma = _snapshot(state.gamma) if to.keep else state.gamma
        given: dict[str, Any] = {"x": x, "mean": mean, "var": var, "gamma": gamma, **settings}
        how: dict[str, Any] = {"beta": state.beta, "num_threads": self._num_threads}
        mask: list[ReluMask | None] = [None]
        # Evaluation leaves the mask to the backward that hardly ever comes, where out cannot be the residual.
        needs_mask = to.keep and (self._training or not (to.out is None or to.residual is None))
        gradients: Callable[..., Gradients | ReluGradients] = partial(normalize_backward, **given)
        if self._activation is not None:
            how["residual"] = to.residual
            kept_how = how if needs_mask or not to.keep else how | {"beta": _snapshot(state.beta)}
            gradients = partial(_relu_backward, mask, given, kept_how)
        call: _Call = [] if not to.keep or _is_x(to.out, x) else [x, gradients]
        before = self._state
        after, evaluation = before, (call, before.call)
        if changes is not None:
            after = before._replace(call=call, **changes)
        # All that the call leaves is made: once y is written, nothing is asked for that there might not be.
        if self._activation is None:
            y = normalize(**given, **how, out=to.out)
        else:
            y, mask[0] = normalize_relu(**given, **how, out=to.out, needs_mask=needs_mask)
        if changes is not None:
            self._state, self._evaluation = after, None
            return y
        # Whatever training calls of other threads have done meanwhile, this one is the last now.
        if self._state.call is not evaluation[1]:
            evaluation = call, self._state.call
        self._evaluation = evaluation
        evaluation[1].clear()  # backward does not look there any more
        return y

    def _learns_from(self, batch: Moments) -> bool:
        """Tell whether statistics take in this batch: one value a channel only where they pool all values."""
        if self._update_rate is None or not batch._has_one_value():
            return True
        if self._single_value == "raise":
            raise _validate_state.one_value()
        return False

    def _by_itself(
        self, x: NDArray[Any], to: _Output, k: int, how: Mapping[str, Any], pools: bool
    ) -> NDArray[Any]:
        """Normalize one value a channel by itself and no variance, which gives beta; `pools`: and pool it."""
        state, batch, changes = self._state, self._moments(x, how), dict[str, Any]()
        if pools:
            changes["statistics"] = self._updated(state.statistics, k, batch)
            changes |= {"batch": (k, batch, x.size), "largest_size": max(state.largest_size, x.size)}
        settings: dict[str, Any] = {"axis": self._axis, "eps": 0.0, **self._for_given_statistics(x, how)}
        var = np.zeros(self._channels)
        return self._by_constants(x, batch.mean, var, state, to, settings, changes if pools else None)

    def _positions(self, x: NDArray[Any], how: Mapping[str, Any]) -> Positions:
        """Give what a mask, lengths or weights count of x, checked."""
        x = _validate.array("x", x)
        part = counted(x, _validate.axis(self._axis, x.ndim), **how)
        assert isinstance(part, Positions)
        return part

    def _ghosts_and_one(self, x: NDArray[Any], to: _Output, k: int, update: bool) -> NDArray[Any]:
        """Normalize ghosts, and one value a channel behind them as `single_value` says."""
        x = _validate.array("x", x)
        state, threads, may_tell = self._state, self._num_threads, True
        gamma, beta, now = _snapshot(state.gamma), state.beta, state.statistics[k]
        if to.out is not None:
            _validate.output(to.out, x, {"x": x}, {"gamma": gamma, "beta": beta})
        pools = update and self._update_rate is None
        one = self._moments(x[-1:], _NO_PARTS)
        if to.out is not None and update:
            may_tell = not self._told_before_writing(x[:-1], _NO_PARTS, now, (one,) if pools else ())
        constants: dict[str, Any] = {"mean": now.mean, "var": now.var, "eps": self._eps}
        if self._single_value == "skip":
            constants = {"mean": one.mean, "var": np.zeros(self._channels), "eps": 0.0}
        y = np.empty_like(x, subok=False) if to.out is None else to.out
        options: dict[str, Any] = {"axis": self._axis, "num_threads": threads}
        size: Any = self._ghost_size
        _, ghosts = ghost_batch_norm(
            x[:-1], gamma, beta, ghost_size=size, eps=self._eps, out=y[:-1], **options
        )
        normalize(x[-1:], **constants, gamma=gamma, beta=beta, out=y[-1:], **options)
        seen = merge(*ghosts.moments, one) if pools else merge(*ghosts.moments)
        changes: dict[str, Any] = {"batch": (k, seen, x.size)}
        changes["largest_size"] = max(state.largest_size, x.size)
        if update:
            changes["statistics"] = self._updated(state.statistics, k, seen, ghosts, may_tell)
        call: _Call = []
        if to.keep and not _is_x(to.out, x):
            constants |= {"x": x[-1:], "gamma": gamma, "axis": self._axis}
            call = [x, partial(_ghosts_and_one_backward, x, ghosts, constants)]
        self._state = self._state._replace(call=call, **changes)
        self._evaluation = None
        return y

    def _moments(self, x: NDArray[Any], how: Mapping[str, Any]) -> Moments:
        counted = {name: value for name, value in how.items() if name != "padding"}
        return moments(x, axis=self._axis, num_threads=self._num_threads, **counted)

    def _refuse_weights(self, x: NDArray[Any], how: Mapping[str, Any]) -> None:
        """Refuse weights that leave no unbiased variance, before anything is written."""
        part = self._positions(x, how)
        dof = part.importance_dof(1)
        if dof is None:
            return
        if self._weights_are is None:
            raise _validate.weights_unsaid("a layer with ddof=1")
        if self._weights_are == "counts" and self._update_rate is not None:
            count = part.weights.sum(dtype=np.float64, keepdims=True)
            if abs(count[0] - 2) < _SUM_ROUNDING:  # then the sum that the update takes decides
                count = self._moments(x, how).count
            _validate.weights_leave_variance(count, dof, self._ddof, self._weights_are)

    def _told_before_writing(
        self, x: NDArray[Any], how: Mapping[str, Any], now: _Statistics, rest: tuple[Moments, ...] = ()
    ) -> bool:
        """Say that x is not finite where that may end the call, before `out` is written; tell whether it was said.

        `rest` is what statistics learn behind x. x is read once more then. Else `_updated` says it, when the moments of
        the call are known.
        """
        if self._nonfinite != "raise" and not (self._nonfinite == "warn" and _warnings_may_raise()):
            return False
        if self._ghost_size is None:
            parts: tuple[Moments, ...] = (self._moments(x, how),)
        else:
            parts = ghost_moments(
                x, ghost_size=self._ghost_size, axis=self._axis, num_threads=self._num_threads
            )
        channel = _first_nonfinite(now, parts + rest)
        if channel >= 0:
            self._tell_nonfinite(channel, 5)
        return channel >= 0

    def _tell_nonfinite(self, channel: int, stacklevel: int) -> None:
        text = _validate_state.nonfinite_batch(channel)
        if self._nonfinite == "raise":
            raise ValueError(text)
        if self._nonfinite == "warn":
            warnings.warn(f"{text}: they are left as they are", RuntimeWarning, stacklevel=stacklevel)

    def _updated(
        self,
        before: tuple[_Statistics, ...],
        k: int,
        batch: Moments,
        saved: _AnySaved | None = None,
        may_tell: bool = True,
    ) -> tuple[_Statistics, ...]:
        """Return the statistics of all domains after one more batch of domain `k`, as the policies say."""
        if self._nonfinite != "propagate":
            pools = self._update_rate is None
            parts = saved.moments if isinstance(saved, GhostSaved) and not pools else (batch,)
            channel = _first_nonfinite(before[k], parts)
            if channel >= 0:
                if may_tell:
                    self._tell_nonfinite(channel, 5)
                return before
        after = _updated_statistics(
            before[k], batch, self._update_rate, self._ddof, saved, self._debias, self._counts_ghosts,
            self._weights_are,
        )  # fmt: skip
        return (after,) if len(before) == 1 else (*before[:k], after, *before[k + 1 :])

    def _as_gradient(
        self, gradient: NDArray[Any] | None, parameter: NDArray[Any] | None
    ) -> NDArray[Any] | None:
        return None if gradient is None or parameter is None else _rounded(gradient, self._dtype)

    # ---- diagnostics ----

    def report(self) -> Report:
        """Return what is, or may go, wrong: statistics, parameters, and the last batch beside them.

        Changes nothing, and reads arrays of size C only: between two training steps, say, or before a layer is
        deployed. The last batch is that of the last call that normalized or updated by its batch, since the start or
        `reset_statistics`; without one, what needs it is left out.

        Returns
        -------
        Report : findings with kind, severity, channels and text. What is looked for, and the thresholds, are in
            `Report`. Empty, and false, where nothing was found.

        Examples
        --------
        >>> layer = BatchNorm(2, nonfinite="skip")
        >>> y = layer(np.array([[1.0, 2.0], [np.inf, 3.0]]))
        >>> print(layer.report())
        warning nonfinite_batch: the last batch's mean or variance is not finite in channel 0

        """
        gamma, beta, statistics, _, last, largest_size = self._state
        batch = None if last is None else Batch(last[0], self._merged(last[1]), last[2], largest_size)
        findings = parameter_findings(gamma, beta, self._channels)
        evaluates = not self._training or self._frozen[0]
        for k, s in enumerate(statistics):
            domain = None if self._domains is None else k
            if evaluates:
                findings += untrained_findings(s.mean, s.var, s.update_count, domain)
            findings += statistics_findings(s.mean, s.var, s.update_count, gamma, beta, self._eps, domain)
            if batch is not None and batch.domain == k:
                findings += batch_findings(
                    batch, s.mean, s.var, s.update_count, self._update_rate, s.pooled, self._ddof, domain,
                    self._weights_are,
                )  # fmt: skip
        return Report(tuple(findings))

    # ---- saved state ----

    @property
    def _parameter_entry(self) -> _validate_state.Entry:
        return _validate_state.Entry((self._channels,), self._dtype)

    def _state_entries(self) -> dict[str, _validate_state.Entry]:
        entries = {}
        if self._state.gamma is not None:
            entries["gamma"] = self._parameter_entry
        if self._state.beta is not None:
            entries["beta"] = self._parameter_entry
        return entries | self._statistics_entries()

    def _statistics_entries(self) -> dict[str, _validate_state.Entry]:
        """Entries of one domain's statistics."""
        per_channel = _validate_state.Entry((self._channels,), np.dtype(np.float64))
        entries = {"running_mean": per_channel, "running_var": per_channel}
        entries["update_count"] = _validate_state.Entry((), np.dtype(np.int64))
        if self._update_rate is None:
            entries["running_moments"] = _validate_state.Entry((self._channels, 5), np.dtype(np.float64))
            if self._weights_are == "importance":
                entries["running_importance_dof"] = per_channel
        if self._counts_ghosts:
            entries["ghost_count"] = entries["update_count"]
        return entries

    @property
    def _counts_ghosts(self) -> bool:
        return self._debias and self._ghost_size is not None

    def _file_entries(self) -> dict[str, _validate_state.Entry]:
        """Entries of a whole state, that is with an axis of domains."""
        if self._domains is None:
            return self._state_entries()
        wide = {
            name: _validate_state.Entry((self._domains, *entry.shape), entry.dtype)
            for name, entry in self._statistics_entries().items()
        }
        return self._state_entries() | wide

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the state as fresh arrays: what a layer of the same settings needs to go on bit for bit.

        Returns
        -------
        gamma, beta : (C,) of `dtype`; absent where the layer has none.
        running_mean, running_var : float64 (C,); the variance unbiased or not, as `ddof` says.
        update_count : int64, no axes.
        running_moments : float64 (C, 5), only with ``update_rate=None``: for each channel the count of values
            seen, their mean and m2 = sum((x - mean)**2), mean and m2 in two parts each.
        running_importance_dof : float64 (C,), only with that and weights_are="importance": `Moments.importance_dof`.
        ghost_count : int64, no axes, only with `debias` and `ghost_size`: the ghosts that updated.
        settings : str, no axes: the settings that y and the statistics depend on, as JSON.
        All but gamma, beta and settings have a first axis of K with K domains.

        Notes
        -----
        The settings are all but `nonfinite`, `single_value` and `num_threads`, which only say how a call behaves. Mode
        and gradients are not state.

        Examples
        --------
        >>> state = BatchNorm(2, beta=False).state_dict()
        >>> sorted(state)
        ['gamma', 'running_mean', 'running_var', 'settings', 'update_count']
        >>> print(state["settings"])       # doctest: +ELLIPSIS
        {"channels": 2, "axis": 1, "eps": 1e-05, "update_rate": 0.1, "ddof": 1, ...}

        """
        now, state = self._state, dict[str, NDArray[Any]]()
        if now.gamma is not None:
            state["gamma"] = now.gamma.copy()
        if now.beta is not None:
            state["beta"] = now.beta.copy()
        keeps = self._counts_ghosts, self._weights_are == "importance"
        parts = [_state_of(statistics, *keeps) for statistics in now.statistics]
        if self._domains is None:
            state |= parts[0]
        else:
            state |= {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        return state | {"settings": np.array(self._settings.text())}

    @property
    def _settings(self) -> Settings:
        renorm, points = self._renorm, None
        if renorm is not None:
            points = {"r_max": renorm.r_max, "d_max": renorm.d_max, "weight": renorm.weight}
        return Settings(
            channels=self._channels,
            axis=self._axis,
            eps=self._eps,
            update_rate=self._update_rate,
            ddof=self._ddof,
            gamma=self._state.gamma is not None,
            beta=self._state.beta is not None,
            dtype=self._dtype.name,
            debias=self._debias,
            domains=self._domains,
            ghost_size=self._ghost_size,
            renorm=points,
            parity=None if renorm is None else self._parity,
            activation=self._activation,
            weights_are=self._weights_are,
        )

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take over a state as `state_dict` gives it, all or nothing; the arrays are copied.

        Everything is checked before anything is assigned: that the settings are this layer's; exactly the entries of
        `state_dict`, their shapes and dtypes; all values finite; running_var >= 0; update_count >= 0 (a plain int will
        do); and with ``update_rate=None`` that running_mean, running_var and update_count agree with running_moments,
        from which they are then derived. Gradients, mode and what is kept for backward stay.

        Parameters
        ----------
        state : mapping of the names of `state_dict`.
        strict : False to take the arrays whatever settings they come with, or without any: they then mean what this
            layer's settings say. They must fit it all the same.

        Raises
        ------
        TypeError, ValueError
            Naming the settings that differ, or the entry that does not fit. Nothing has changed then.

        Examples
        --------
        >>> a, b = BatchNorm(2), BatchNorm(2)
        >>> y = a(np.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> b.load_state_dict(a.state_dict())
        >>> b.running_mean
        array([0.2, 0.3])

        """
        is_strict = _validate_state.flag("strict", strict)
        if isinstance(state, Mapping):  # anything else is told below
            if is_strict:
                self._settings.require(state.get("settings"))
            state = {name: value for name, value in state.items() if name != "settings"}
        self._take(state, is_strict)

    def _take(self, state: Mapping[str, Any], strict: bool) -> None:
        """Take over a state without its settings, which have been compared where `strict`."""
        statistics = []
        for k in range(self._domains or 1):
            checked, one = self._checked_state(state, k, strict)
            statistics.append(one)
        gamma, beta = checked.get("gamma"), checked.get("beta")
        self._state = self._state._replace(gamma=gamma, beta=beta, statistics=tuple(statistics))

    def _checked_state(
        self, state: Mapping[str, Any], k: int, strict: bool
    ) -> tuple[dict[str, NDArray[Any]], _Statistics]:
        """Check all entries but the settings, with the statistics of domain `k` for those of the layer."""
        entries = self._state_entries()
        if self._domains is not None:
            own = self._statistics_entries()
            shared = {name: entry for name, entry in entries.items() if name not in own}
            state = _validate_state.of_domain(state, own, shared, self._domains, k)
        checked = _validate_state.state(state, entries)
        count = int(checked["update_count"])
        if self._update_rate is None:
            return checked, self._checked_pooled(checked, count, strict)
        ghosts = int(checked.get("ghost_count", 0))
        return checked, _Statistics(checked["running_mean"], checked["running_var"], count, None, ghosts)

    def _checked_pooled(self, checked: Mapping[str, NDArray[Any]], count: int, strict: bool) -> _Statistics:
        table = checked["running_moments"]
        _validate_state.pooled_table(table, count)
        pooled = Moments._from_table(table)
        dof = checked.get("running_importance_dof")
        if dof is not None:
            _validate_state.pooled_dof(dof, pooled.count)
            if (dof != pooled.importance_dof).any():
                pooled = Moments._from_table(table, dof)
        statistics = _pooled_statistics(pooled, count, self._ddof, self._weights_are)
        _validate_state.derived("running_mean", checked["running_mean"], statistics.mean)
        if strict:  # else running_var may be of another ddof
            _validate_state.derived("running_var", checked["running_var"], statistics.var)
        return statistics

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to the file `path` (.npz, no pickle), all or nothing.

        The path is used as it is: no suffix is added, links are followed. A file that is there keeps its permissions, a
        new one has those of the umask.

        Raises
        ------
        ValueError
            For what `load` would refuse: NaN or infinity in a parameter or a running statistic, and a path of what is no
            file (a pipe, a device).
        OSError
            Where the file cannot be written. An old file is as it was, whatever is raised.

        Notes
        -----
        A new file takes the place of the old one, so that nobody sees half of it; one of several hard links is written
        in place, where a process that is killed can leave half.

        Examples
        --------
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     BatchNorm(2).save(os.path.join(folder, "layer.npz"))
        ...     print(np.load(os.path.join(folder, "layer.npz"))["gamma"])
        [1. 1.]

        """
        state = self.state_dict()
        arrays = {name: value for name, value in state.items() if name != "settings"}
        for k in range(self._domains or 1):
            self._checked_state(arrays, k, True)
        # The settings first, where they are found in a file that is too large for the layer that reads it.
        state_file.write_state(path, {"settings": state["settings"]} | arrays)

    def load(self, path: str | os.PathLike[str], *, strict: bool = True) -> None:
        """Read from the file `path` what `save` wrote, all or nothing; the layer's settings must be those of the file.

        Safe on files from anywhere: nothing in them is executed, and they can ask for no more memory than a
        few times the layer's own state.

        Parameters
        ----------
        path : of the file, used as it is.
        strict : False to take its arrays whatever settings they come with, as in `load_state_dict`.

        Raises
        ------
        ValueError
            For settings that differ, naming them; for any file that is not such a state, not even a file, or is of
            another format version, naming the member or entry. Nothing has changed then.
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
        is_strict, settings = _validate_state.flag("strict", strict), self._settings
        text = state_file.Text(
            "settings", 4 * len(settings.text()), settings.require if is_strict else lambda _: None
        )
        self._take(state_file.read_state(path, self._file_entries(), text), is_strict)

    # ---- from and to other libraries ----

    @classmethod
    def _from(
        cls, source: conventions.Imported, dtype: DTypeLike | None, settings: Mapping[str, Any]
    ) -> Self:
        conventions.check_settings(settings)
        dtype = source.dtype if dtype is None else dtype
        has = {"gamma": source.gamma is not None, "beta": source.beta is not None}
        layer = cls(source.mean.size, dtype=dtype, **(source.settings | has | dict(settings)))
        state = {
            "running_mean": source.mean.astype(np.float64),
            "running_var": source.var.astype(np.float64),
            "update_count": np.array(source.update_count, np.int64),
        }
        for name, value in (("gamma", source.gamma), ("beta", source.beta)):
            if value is not None:
                state[name] = value.astype(layer.dtype)
        layer.load_state_dict(state, strict=False)
        if source.frozen:
            layer.freeze()
        return layer.train(source.training)

    @classmethod
    @_validate.options(_Settings, _AS_EVER)
    def from_torch(
        cls,
        source: Any,
        *,
        eps: float | None = None,
        momentum: float | None = None,
        update_rate: float | None = None,
        axis: int = 1,
        dtype: DTypeLike | None = None,
        **settings: Unpack[_Settings],
    ) -> Self:
        """Make a layer that goes on where a batch norm of PyTorch is.

        Parameters
        ----------
        source : a module (BatchNorm1d, 2d, 3d, SyncBatchNorm, or one whose class or base class is named a BatchNorm) or
            its state_dict: weight, bias, running_mean, running_var and num_batches_tracked (absent in old ones), as
            tensors or arrays. (The state_dict of an instance norm has the same names and is not told from it.)
        eps, momentum : of PyTorch; None for the module's, and for PyTorch's defaults with a state_dict.
        update_rate : in place of momentum, for a module with momentum=None, whose averages nothing here continues.
        axis : the channel axis of x; PyTorch's is 1.
        dtype : of gamma and beta; None for that of the source's, float32 where it is bfloat16.
        **settings : others of `BatchNorm`, but convention, gamma, beta, domains and debias.

        Returns
        -------
        BatchNorm with ddof=1: running variances of PyTorch are unbiased. In the mode of the module, training for a
        state_dict; with statistics and affine frozen for a module that has no momentum (FrozenBatchNorm2d).

        Raises
        ------
        TypeError, ValueError
            For what is no such source: no running statistics, values that are not finite, a negative variance.

        Examples
        --------
        >>> one = np.ones(1, np.float32)
        >>> state = {"weight": one, "bias": one, "running_mean": 3 * one, "running_var": 4 * one}
        >>> BatchNorm.from_torch(state, eps=0.0).eval()(np.array([[5.0]]))
        array([[2.]])

        """
        given = {"eps": eps, "momentum": momentum, "update_rate": update_rate}
        return cls._from(conventions.from_torch(source, **given, axis=axis), dtype, settings)

    def to_torch(self, *, dtype: DTypeLike | None = None, any_ddof: bool = False) -> dict[str, NDArray[Any]]:
        """Give the state_dict of a batch norm of PyTorch that goes on where this layer is, as arrays.

        Its eps is `eps` and its momentum `update_rate`: give them to the module. A parameter that the layer is without
        is ones or zeros. ``{k: torch.from_numpy(v) for k, v in layer.to_torch().items()}`` loads. The mode is not in it:
        ``module.train(layer.training)``.

        Parameters
        ----------
        dtype : of all but num_batches_tracked: float16, float32 or float64; None for float64 in a layer of float64,
            else float32.
        any_ddof : True to export biased running variances too, where the module will not be trained.

        Returns
        -------
        dict of weight, bias, running_mean, running_var, (C,), and num_batches_tracked, int64 without axes.

        Raises
        ------
        ValueError
            For ddof=0 (and renorm, but with parity="torchrl") without `any_ddof`, and for domains.

        Examples
        --------
        >>> sorted(BatchNorm(2).to_torch())
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']

        """
        weight, bias, mean, var = self._exported("torch", dtype, any_ddof)
        count = np.array(self._state.statistics[0].update_count, np.int64)
        return {
            "weight": weight,
            "bias": bias,
            "running_mean": mean,
            "running_var": var,
            "num_batches_tracked": count,
        }

    @classmethod
    @_validate.options(_MoreSettings, _AS_EVER)
    def from_keras(
        cls,
        source: Any,
        *,
        epsilon: float | None = None,
        momentum: float | None = None,
        axis: int | None = None,
        scale: bool | None = None,
        center: bool | None = None,
        dtype: DTypeLike | None = None,
        **settings: Unpack[_MoreSettings],
    ) -> Self:
        """Make a layer that goes on where a BatchNormalization of Keras is.

        Parameters
        ----------
        source : a built layer, the list of its get_weights(), or a mapping of gamma, beta, moving_mean and
            moving_variance (gamma or beta absent with scale or center False).
        epsilon, momentum, axis : of Keras; None for the layer's, else Keras's defaults: 1e-3, 0.99, -1.
        scale, center : of Keras, for a list only: whether gamma and beta are in it. To be given for one of 3 arrays,
            which does not tell; one of 4 has both and one of 2 has neither.
        dtype : of gamma and beta; None for that of the source's, float32 where it is bfloat16.
        **settings : others of `BatchNorm`, but convention, gamma, beta, domains and debias.

        Returns
        -------
        BatchNorm with update_rate = 1 - momentum and ddof=0: moving variances of Keras 3 are biased. (Those of the
        fused kernels of TensorFlow were not: pass ddof=1 to go on with them.) In training mode, which Keras has by
        call; with statistics and affine frozen for a layer of ``trainable=False``.

        Raises
        ------
        TypeError, ValueError
            For what is no such source.

        Examples
        --------
        >>> one = np.ones(1, np.float32)
        >>> BatchNorm.from_keras([one, one, 3 * one, 4 * one], epsilon=0.0).eval()(np.array([[5.0]]))
        array([[2.]])

        """
        source = conventions.from_keras(
            source, epsilon=epsilon, momentum=momentum, axis=axis, scale=scale, center=center
        )
        return cls._from(source, dtype, settings)

    def to_keras(self, *, dtype: DTypeLike | None = None, any_ddof: bool = False) -> dict[str, NDArray[Any]]:
        """Give the weights of a BatchNormalization of Keras that goes on where this layer is.

        Its epsilon is `eps`, its momentum ``1 - update_rate``, its axis `axis`.
        ``keras_layer.set_weights(list(layer.to_keras().values()))`` loads. What `freeze` has frozen is
        ``keras_layer.trainable = False`` there.

        Parameters
        ----------
        dtype : float16, float32 or float64; None for float64 in a layer of float64, else float32.
        any_ddof : True to export unbiased running variances too, where the layer will not be trained.

        Returns
        -------
        dict of gamma, beta (each only where the layer has it), moving_mean, moving_variance, in this order.

        Raises
        ------
        ValueError
            For ddof=1 (and renorm with parity="torchrl") without `any_ddof`, update_rate=None, and domains.

        Examples
        --------
        >>> list(BatchNorm(2, convention="keras", beta=False).to_keras())
        ['gamma', 'moving_mean', 'moving_variance']

        """
        gamma, beta, mean, var = self._exported("keras", dtype, any_ddof)
        weights = {} if self.gamma is None else {"gamma": gamma}
        weights |= {} if self.beta is None else {"beta": beta}
        return weights | {"moving_mean": mean, "moving_variance": var}

    @classmethod
    @_validate.options(_MoreSettings, _AS_EVER)
    def from_flax(
        cls,
        variables: Any,
        *,
        epsilon: float | None = None,
        momentum: float | None = None,
        axis: int | None = None,
        dtype: DTypeLike | None = None,
        **settings: Unpack[_MoreSettings],
    ) -> Self:
        """Make a layer that goes on where a BatchNorm of Flax (nnx or linen) is.

        Parameters
        ----------
        variables : an nnx.BatchNorm; its state, a mapping of mean, var, scale and bias; or the variables of one of
            linen, a mapping of "batch_stats" (mean, var) and "params" (scale, bias). scale and bias absent where not
            used.
        epsilon, momentum, axis : of Flax; None for those of an nnx.BatchNorm, else Flax's defaults: 1e-5, 0.99, -1.
        dtype : of gamma and beta; None for that of the source's, float32 where it is bfloat16.
        **settings : others of `BatchNorm`, but convention, gamma, beta, domains and debias.

        Returns
        -------
        BatchNorm with update_rate = 1 - momentum and ddof=0: running variances of Flax are biased. In evaluation for an
        nnx.BatchNorm with use_running_average=True (after its ``eval()``), else in training mode. Its use_fast_variance
        is a way of rounding, which nothing here needs.

        Raises
        ------
        TypeError, ValueError
            For what is no such source.

        Examples
        --------
        >>> one = np.ones(1, np.float32)
        >>> stats = {"mean": 3 * one, "var": 4 * one}
        >>> BatchNorm.from_flax({"batch_stats": stats}, epsilon=0.0).eval()(np.array([[5.0]]))
        array([[1.]])

        """
        source = conventions.from_flax(variables, epsilon=epsilon, momentum=momentum, axis=axis)
        return cls._from(source, dtype, settings)

    def to_flax(
        self, *, dtype: DTypeLike | None = None, any_ddof: bool = False
    ) -> dict[str, dict[str, NDArray[Any]]]:
        """Give the variables of a BatchNorm of Flax that goes on where this layer is.

        Its epsilon is `eps`, its momentum ``1 - update_rate``, its axis `axis`; its use_running_average is
        ``not layer.training``. They are those of linen; for nnx, with ``v = layer.to_flax()``,
        ``nnx.update(module, v["params"] | v["batch_stats"])`` loads.

        Parameters
        ----------
        dtype : float16, float32 or float64; None for float64 in a layer of float64, else float32.
        any_ddof : True to export unbiased running variances too, where it will not be trained.

        Returns
        -------
        {"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}; scale and bias only where the layer has them.

        Raises
        ------
        ValueError
            For ddof=1 (and renorm with parity="torchrl") without `any_ddof`, update_rate=None, and domains.

        Examples
        --------
        >>> BatchNorm(1, convention="flax").to_flax()["batch_stats"]
        {'mean': array([0.], dtype=float32), 'var': array([1.], dtype=float32)}

        """
        gamma, beta, mean, var = self._exported("flax", dtype, any_ddof)
        params = {} if self.gamma is None else {"scale": gamma}
        params |= {} if self.beta is None else {"bias": beta}
        return {"params": params, "batch_stats": {"mean": mean, "var": var}}

    @classmethod
    @_validate.options(_MostSettings, _AS_EVER)
    def from_onnx(
        cls,
        inputs: Mapping[str, Any],
        *,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        dtype: DTypeLike | None = None,
        **settings: Unpack[_MostSettings],
    ) -> Self:
        """Make a layer of the inputs of a BatchNormalization of ONNX (opset 14 and later).

        Parameters
        ----------
        inputs : mapping of scale, B, input_mean and input_var, as the specification names them.
        epsilon, momentum : its attributes, with their defaults.
        dtype : of gamma and beta; None for that of the source's, float32 where it is bfloat16.
        **settings : others of `BatchNorm`, but convention, gamma, beta, domains and debias.

        Returns
        -------
        BatchNorm with update_rate = 1 - momentum, ddof=0 and axis=1. In training mode; a node without training_mode=1
        evaluates.

        Raises
        ------
        TypeError, ValueError
            For what is no such mapping.

        Examples
        --------
        >>> one = np.ones(1, np.float32)
        >>> inputs = {"scale": one, "B": one, "input_mean": 3 * one, "input_var": 4 * one}
        >>> BatchNorm.from_onnx(inputs, epsilon=0.0).eval()(np.array([[5.0]]))
        array([[2.]])

        """
        return cls._from(conventions.from_onnx(inputs, epsilon=epsilon, momentum=momentum), dtype, settings)

    def to_onnx(
        self, *, dtype: DTypeLike | None = None, any_ddof: bool = False
    ) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        """Give the inputs and attributes of a BatchNormalization of ONNX that does what this layer does.

        Parameters
        ----------
        dtype : float16, float32 or float64; None for float64 in a layer of float64, else float32.
        any_ddof : True to export unbiased running variances too, where the node will not be trained.

        Returns
        -------
        inputs : dict of scale, B, input_mean, input_var; ones and zeros for a parameter that the layer is without.
        attributes : dict of epsilon and momentum (1 - update_rate). Without training_mode, the node evaluates.

        Raises
        ------
        ValueError
            For ddof=1 (and renorm with parity="torchrl") without `any_ddof`, update_rate=None, and domains.

        Examples
        --------
        >>> BatchNorm(1, convention="onnx").to_onnx()[1]
        {'epsilon': 1e-05, 'momentum': 0.9}

        """
        scale, shift, mean, var = self._exported("onnx", dtype, any_ddof)
        assert self._update_rate is not None
        inputs = {"scale": scale, "B": shift, "input_mean": mean, "input_var": var}
        return inputs, {"epsilon": self._eps, "momentum": _validate.rest(self._update_rate)}

    def _exported(self, library: str, dtype: DTypeLike | None, any_ddof: bool) -> list[NDArray[Any]]:
        """Return gamma, beta, mean and var as fresh arrays of `dtype`, for a library that can take them."""
        parity = None if self._renorm is None else self._parity
        conventions.check_export(library, self._ddof, self._update_rate, self._domains, parity, any_ddof)
        wanted, state = conventions.floats(dtype, self._dtype), self._state
        gamma = np.ones(self._channels) if state.gamma is None else state.gamma
        beta = np.zeros(self._channels) if state.beta is None else state.beta
        statistics = state.statistics[0]
        with np.errstate(all="ignore"):  # a statistic beyond float32 is an infinity there
            return [a.astype(wanted) for a in (gamma, beta, statistics.mean, statistics.var)]

    # ---- as a Python object ----

    def __repr__(self) -> str:
        settings = [
            f"{self._channels}",
            f"axis={self._axis}",
            f"eps={self._eps}",
            f"update_rate={self._update_rate}",
            f"ddof={self._ddof}",
        ]
        if self.gamma is None:
            settings.append("gamma=False")
        if self.beta is None:
            settings.append("beta=False")
        if self._dtype != np.float32:
            settings.append(f"dtype='{self._dtype}'")
        if self._debias:
            settings.append("debias=True")
        if self._nonfinite != "warn":
            settings.append(f"nonfinite={self._nonfinite!r}")
        if self._single_value != "raise":
            settings.append(f"single_value={self._single_value!r}")
        if self._domains is not None:
            settings.append(f"domains={self._domains}")
        if self._ghost_size is not None:
            settings.append(f"ghost_size={self._ghost_size}")
        if self._renorm is not None:
            settings.append(f"renorm={self._renorm}, parity={self._parity!r}")
        if self._activation is not None:
            settings.append(f"activation={self._activation!r}")
        if self._weights_are is not None:
            settings.append(f"weights_are={self._weights_are!r}")
        if self._num_threads is not None:
            settings.append(f"num_threads={self._num_threads}")
        others = {(True, True): "", (True, False): "affine=False", (False, True): "statistics=False"}
        modes = f".freeze({others[self._frozen]})" if any(self._frozen) else ""
        if not self._training:
            modes += ".eval()"
        return f"{type(self).__name__}({', '.join(settings)}){modes}"

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # layers that share gamma but not running statistics would help nobody

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_state": self._state._replace(call=[]), "_evaluation": None}


def _initial_statistics(channels: int, update_rate: float | None, ddof: int) -> _Statistics:
    if update_rate is None:
        return _pooled_statistics(Moments.empty(channels), 0, ddof)
    return _Statistics(np.zeros(channels), np.ones(channels), 0, None)


def _state_of(statistics: _Statistics, counts_ghosts: bool, keeps_dof: bool) -> dict[str, NDArray[Any]]:
    state: dict[str, NDArray[Any]] = {
        "running_mean": statistics.mean.copy(),
        "running_var": statistics.var.copy(),
        "update_count": np.array(statistics.update_count, np.int64),
    }
    if statistics.pooled is not None:
        pooled = statistics.pooled
        state["running_moments"] = np.array(pooled._table)
        if keeps_dof:
            state["running_importance_dof"] = np.array(pooled.importance_dof)
    if counts_ghosts:
        state["ghost_count"] = np.array(statistics.ghost_count, np.int64)
    return state


def _debiased_rate(rate: float, count: int) -> float:
    """Share of the batch that is the `count`-th: what it weighs of all that have been seen."""
    return rate if rate == 1 else rate / -math.expm1(count * math.log1p(-rate))


def _relu_backward(
    kept: Sequence[ReluMask | None],
    given: Mapping[str, Any],
    how: Mapping[str, Any],
    dy: NDArray[Any],
    *,
    needs: Iterable[ReluGradient],
    **rest: Any,
) -> ReluGradients:
    """Call `normalize_relu_backward`, which does not know whether there was a residual, with the mask of that call."""
    mask = normalize_relu(**given, **how, needs_mask=True).mask if kept[0] is None else kept[0]
    if how["residual"] is None:
        needs = [n for n in needs if n != "residual"]
    return normalize_relu_backward(dy, mask=mask, **given, needs=needs, **rest)


def _ends_in_one(x: object, axis: int, ghost_size: int) -> bool:
    """Tell whether the ghosts of x have 2 values a channel or more, but for the last, which has one."""
    if not isinstance(x, np.ndarray) or not -x.ndim <= axis < x.ndim or axis % x.ndim == 0:
        return False
    samples = len(x)
    return x.size == samples * x.shape[axis] > 0 and samples > ghost_size > 1 == samples % ghost_size


def _ghosts_and_one_backward(
    x: NDArray[Any],
    ghosts: GhostSaved,
    one: Mapping[str, Any],
    dy: NDArray[Any],
    *,
    needs: Iterable[str],
    out: NDArray[Any] | None,
    num_threads: int | None,
) -> Gradients:
    """Give the gradients of ghosts and of a last sample that was normalized by constants."""
    needed = _validate.needs(needs)
    names = [name for name, need in zip(_validate.GRADIENTS, needed, strict=True) if need]
    dy = _validate.array_like("dy", dy, x)
    if out is not None:
        _validate.output(out, x, {"dy": dy, "x": x}, {"gamma": ghosts.gamma})
    dx = None if "x" not in names else np.empty_like(x, subok=False) if out is None else out
    # In float64, so that the two parts of dgamma and dbeta are not rounded before they are added.
    gamma = None if ghosts.gamma is None else ghosts.gamma.astype(np.float64)
    to = (None, None) if dx is None else (dx[:-1], dx[-1:])
    options: dict[str, Any] = {"needs": names, "num_threads": num_threads}
    a = ghost_batch_norm_backward(dy[:-1], replace(ghosts, gamma=gamma), out=to[0], **options)
    b = normalize_backward(dy[-1:], **{**one, "gamma": gamma}, out=to[1], **options)
    with np.errstate(all="ignore"):
        dgamma = None if a.dgamma is None or b.dgamma is None else a.dgamma + b.dgamma
        dbeta = None if a.dbeta is None or b.dbeta is None else a.dbeta + b.dbeta
    return Gradients(dx, dgamma, dbeta)


# Where filters may belong to a context (Python 3.14), what gives those of the present one.
_context_filters: Callable[[], list[Any]] | None = getattr(warnings, "_get_filters", None)
# The filters as they were when they were last looked at, their number, the first, and what they said.
_filters: tuple[Any, int, Any, bool] = (None, 0, None, False)


def _warnings_may_raise() -> bool:
    """Tell whether a RuntimeWarning may be turned into an exception (``-W error``)."""
    global _filters
    now: Any = warnings.filters if _context_filters is None else _context_filters()
    first = now[0] if now else None
    if _filters[0] is now and _filters[1] == len(now) and _filters[2] is first:
        return _filters[3]
    may = any(action == "error" and issubclass(RuntimeWarning, kind) for action, _, kind, *_ in now)
    _filters = now, len(now), first, may
    return may


def _is_single_value(x: object, axis: int) -> bool:
    return isinstance(x, np.ndarray) and -x.ndim <= axis < x.ndim and 0 < x.size == x.shape[axis]


def _first_nonfinite(now: _Statistics, parts: Sequence[Moments]) -> int:
    """Give the first channel that keeps statistics from learning `parts` one after another; -1 where none does.

    Each part that an average takes in must be finite; where all are pooled, the union with all that has been seen,
    which may be beyond float64 though no part is.
    """
    learned = parts if now.pooled is None else [merge(now.pooled, *parts)]
    return next((channel for part in learned if (channel := part._first_nonfinite()) >= 0), -1)


def _learned(
    now: _Statistics,
    parts: Sequence[Moments],
    rate: float | None,
    ddof: int,
    room: tuple[NDArray[np.float64], ...],
    finite: bool,
) -> bool:
    """Write the statistics after one more batch, its ghosts one after the other, to `room`; tell whether that was done.

    `room` is for mean and variance, and begins with a table for the moments where all are pooled. Not done where there
    is no rate, nothing counts, weights want to be told what they are, or what is learned must be finite and is not. Asks
    for no memory.
    """
    k = 0
    if len(room) == 3:
        assert now.pooled is not None
        table = now.pooled._table
        while k < len(parts) and pool_into(table, parts[k]._table, ddof, room, finite):
            table, k = room[0], k + 1
    elif rate is not None:
        mean, var = now.mean, now.var
        while k < len(parts) and parts[k]._dof is None:
            if not update_into(mean, var, parts[k]._table, rate, ddof, room, finite):
                break
            (mean, var), k = room, k + 1
    return 0 < k == len(parts)


def _updated_statistics(
    statistics: _Statistics,
    batch: Moments,
    update_rate: float | None,
    ddof: int,
    saved: _AnySaved | None = None,
    debias: bool = False,
    counts_ghosts: bool = False,
    weights_are: WeightsAre | None = None,
) -> _Statistics:
    """Return the statistics after one more batch, that of `saved`. Changes none of its arguments."""
    count = min(statistics.update_count + 1, _MOST_UPDATES)
    if statistics.pooled is not None:
        if weights_are != "importance" and batch._dof is not None:
            batch = Moments._from_core(batch._table)  # nothing asks for it, and a state has no place for it
        return _pooled_statistics(statistics.pooled | batch, count, ddof, weights_are)
    assert update_rate is not None
    mean, var, ghosts = statistics.mean, statistics.var, statistics.ghost_count
    if debias and update_rate > 0:
        if isinstance(saved, GhostSaved):
            for ghost in saved.moments:
                ghosts = min(ghosts + 1, _MOST_UPDATES)
                rate = _debiased_rate(update_rate, ghosts)
                mean, var = update_running(mean, var, ghost, update_rate=rate, ddof=ddof)
            return _Statistics(mean, var, count, None, ghosts)
        if counts_ghosts:  # a whole batch, in evaluation, is one update among those of ghosts
            ghosts = min(ghosts + 1, _MOST_UPDATES)
        update_rate = _debiased_rate(update_rate, ghosts if counts_ghosts else count)
    if isinstance(saved, RenormSaved):
        mean, var = renorm_update_running(mean, var, saved, update_rate=update_rate)
    elif isinstance(saved, GhostSaved):
        mean, var = ghost_update_running(mean, var, saved.moments, update_rate=update_rate, ddof=ddof)
    elif batch._dof is None:
        mean, var = update_running(mean, var, batch, update_rate=update_rate, ddof=ddof)
    else:
        mean, var = update_running(
            mean, var, batch, update_rate=update_rate, ddof=ddof, weights_are=weights_are
        )
    return _Statistics(mean, var, count, None, ghosts)


def _pooled_statistics(
    pooled: Moments, update_count: int, ddof: int, weights_are: WeightsAre | None = None
) -> _Statistics:
    if update_count == 0:
        return _Statistics(np.zeros(pooled.channels), np.ones(pooled.channels), 0, pooled)
    var = pooled.var(ddof, weights_are=weights_are)
    if (pooled.count < 2).any():
        # One value has no variance, whatever ddof is: it stays as it began. So it does for counts of less than 2.
        none = pooled.count < 2 if ddof else (pooled.count <= 1) & (pooled.m2 == 0)
        var = np.where(none if pooled._dof is None else pooled._dof == 0, 1.0, var)
    return _Statistics(pooled.mean.copy(), var, update_count, pooled)


def _read_only(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the array itself, to be handed out: nobody has written to it, and nobody can from now on."""
    array.flags.writeable = False
    return array


def _snapshot(parameter: NDArray[Any] | None) -> NDArray[Any] | None:
    return None if parameter is None else parameter.copy()


def _is_x(out: NDArray[Any] | None, x: NDArray[Any]) -> bool:
    return out is not None and isinstance(x, np.ndarray) and x.size > 0 and _validate.same_memory(out, x)
