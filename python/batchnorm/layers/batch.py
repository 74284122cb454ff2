"""Batch normalization as an object that keeps parameters, running statistics and what backward needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Self, Unpack, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from batchnorm import _keywords, _validate, _where, conventions
from batchnorm._arrays import Array, PerChannel
from batchnorm._validate import Activation, Parity, WeightsAre
from batchnorm.conventions import Library
from batchnorm.forward import normalize, normalized_by_batch, ordinary_batch_norm, ordinary_saved, same
from batchnorm.layers import calls
from batchnorm.layers.apart import COUNTS, of_one_value
from batchnorm.layers.calls import CallOptions, Options
from batchnorm.layers.layer import SHOWN_FROZEN, Call, Default, Layer, State, is_x, snapshot
from batchnorm.layers.place import beside, follow, statistics_at
from batchnorm.layers.settings import BatchSettings, Nonfinite, Setting, SingleValue, flag
from batchnorm.layers.statistics import Following, Statistics, fill, first_nonfinite, following, merged, updated
from batchnorm.moments import Moments, moments
from batchnorm.report import Report, findings
from batchnorm.running import Renorm, RenormSchedule, new_room
from batchnorm.saved import Saved

__all__ = ["BatchNorm"]

_Given = tuple[State, Array, Options, int, bool, Any]  # what a training call is about
_Made = tuple[Saved, State, Following | None]

# Past the __new__ of a NamedTuple, which takes three times as long.
_new_state: Callable[[tuple[Any, ...]], State] = partial(tuple.__new__, State)

_BY_CONVENTION: Any = Default("by convention")
_SHARES = ("segments", "ghost_size")  # say what shares statistics


class BatchNorm(Layer):
    """Normalize each channel: by the statistics of the batch in training, by running statistics in evaluation.

    ``y = (x - mean)/√(var + eps)·gamma + beta``      (Ioffe & Szegedy 2015, algorithms 1 and 2)

    The var of a batch is biased: it divides by its n values a channel. Each training call also takes the batch into the
    running statistics, in float64; the variance of which divides by n - ddof:

    ``running = (1 - update_rate)·running + update_rate·batch``

    Options are keywords here, and attributes to be read:

    ============== ========= ==================================================================================
    channels                 C >= 0, the size of x along `axis`
    axis           1         the channel axis of x, from -8 to 7
    eps            1e-5      what is added to var, >= 0
    update_rate    0.1       share of the new batch, from 0 (leaves the bits) to 1 (stores the batch's): PyTorch's
                             momentum, 1 minus that of Keras, Flax and ONNX. None: mean and variance of all values
                             that training has seen, exact, as if they had come in one batch
    ddof           1         1: running variances are unbiased, 0: biased
    convention     "torch"   whose the five above are where they are not given: "keras" (axis -1, eps 1e-3, update_rate
                             0.01, ddof 0), "flax" (-1, 1e-5, 0.01, 0), "onnx" (1, 1e-5, 0.1, 0)
    gamma, beta    True      False leaves that parameter out
    dtype          float32   of gamma and beta: or float16, float64. x has its own
    debias         False     running statistics have no share of the zeros and ones that they start as: the t-th update
                             has the rate update_rate/(1 - (1 - update_rate)^t) (Kingma & Ba 2015, section 3)
    nonfinite      "warn"    of what would leave statistics that are infinite or NaN: "warn" and "skip" learn nothing,
                             with and without a RuntimeWarning, "raise" is a ValueError, "propagate" learns it for good
    single_value   "raise"   one value a channel that counts (also in a last ghost) has no variance: "raise",
                             "use_running" (as in evaluation) or "skip" (y = beta). Only update_rate=None learns of it
    domains        None      K sets of running statistics beside one gamma and beta: each call names its `domain`
    ghost_size     None      training normalizes each ghost of so many samples by itself, and learns of each in turn
    renorm         None      RenormSchedule: training is corrected towards the running statistics, within its limits
                             for step `update_count`, by the rules of `parity`: "paper" (default), "keras", "torchrl"
    activation     None      "relu": max(y + residual, 0), the residual being given to the call
    weights_are    None      what weights are to ddof=1: "counts" or "importance", as in `Moments.var`. Without it a
                             training call of weights other than 0 and 1 raises there: no default is right for both
    num_threads    None      threads of each call; None: those of the process
    ============== ========= ==================================================================================

    TypeError and ValueError are raised for options that do not fit.
    A call that raises changes nothing: statistics, counts, gradients, mode and what is kept for backward are as before.
    An x on a CUDA device takes parameters and statistics there, one on the host takes them back. There nothing is looked at:
    "warn" is as "skip", of each ghost and segment by itself, and `update_count` counts calls.
    Memory: a reference to the x of the last call, to its residual in evaluation, and arrays of size C. Copies and pickles
    are layers of their own, without what is kept for backward. Threads: train from one at a time; evaluation calls may
    run at once, also beside training. Layers of other libraries: `batchnorm.convert`.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import BatchNorm
    >>> layer = BatchNorm(2)
    >>> layer
    BatchNorm(2, axis=1, eps=1e-05, update_rate=0.1, ddof=1)
    >>> x = np.array([[1, 10], [2, 20], [3, 60]], np.float32)
    >>> y = layer(x)                              # (3, 2), float32: statistics of x
    >>> layer.running_mean, layer.running_var     # 0.9·0 + 0.1·[2, 30], 0.9·1 + 0.1·[1, 700]
    (array([0.2, 3. ]), array([ 1. , 70.9]))
    >>> dx = layer.backward(np.ones_like(x))
    >>> layer.beta -= 0.5 * layer.dbeta
    >>> z = layer.eval()(x)                       # running statistics; nothing is learned
    """

    settings: BatchSettings
    channels = Setting[int]()
    axis, update_rate, ddof = Setting[int](), Setting[float | None](), Setting[int]()
    debias, domains = Setting[bool](), Setting[int | None]()
    nonfinite, single_value = Setting[Nonfinite](), Setting[SingleValue]()
    ghost_size, renorm = Setting[int | None](), Setting[RenormSchedule | None]()
    parity, weights_are = Setting[Parity](), Setting[WeightsAre | None]()

    @_keywords.keywords
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
        whose = conventions.convention(convention)
        axis = whose.axis if axis is _BY_CONVENTION else axis
        eps = whose.eps if eps is _BY_CONVENTION else eps
        update_rate = whose.update_rate if update_rate is _BY_CONVENTION else update_rate
        ddof = whose.ddof if ddof is _BY_CONVENTION else ddof
        settings = BatchSettings(
            channels, axis, eps, update_rate, ddof, gamma, beta, cast("np.dtype[Any]", dtype), debias, domains,
            ghost_size, renorm, parity, activation, weights_are, nonfinite, single_value, num_threads,
        )  # fmt: skip
        super().__init__(settings)
        # What the functions are told in each call.
        fixed = {"activation": settings.activation, "ghost_size": settings.ghost_size}
        self._fixed: Options = {name: value for name, value in fixed.items() if value is not None}
        self._is_special = settings.single_value != "raise" or settings.domains is not None

    @property
    def running_mean(self) -> PerChannel:
        """Running mean, float64 (C,), read-only: an update replaces it, `load_state_dict` sets it. (K, C) with domains."""
        return self._of_domains([s.mean for s in self._state.statistics])

    @property
    def running_var(self) -> PerChannel:
        """Running variance (unbiased for ddof=1, biased for 0), as `running_mean`."""
        return self._of_domains([s.var for s in self._state.statistics])

    @property
    def update_count(self) -> int | NDArray[np.int64]:
        """Training calls that updated the running statistics since the start or `reset_statistics`; (K,) with domains."""
        counts = [s.update_count for s in self._state.statistics]
        return counts[0] if self.settings.domains is None else np.array(counts, np.int64)

    @property
    def frozen_statistics(self) -> bool:
        """Whether training calls use the running statistics and leave them alone."""
        return self._frozen[0]

    def freeze(self, *, statistics: bool = True, affine: bool = True) -> Self:
        """Freeze what is True, until `unfreeze`, through ``train()`` and ``eval()``; return the layer.

        Frozen statistics normalize training calls too, as constants, and learn nothing. Frozen affine: backward gives dx
        alone. TypeError if not bools.

        >>> layer = BatchNorm(1).freeze(affine=False)
        >>> y = layer(np.array([[3.0], [5.0]]))
        >>> layer.update_count, layer.running_mean
        (0, array([0.]))
        """
        return self._set_frozen(True, statistics, affine)

    def unfreeze(self, *, statistics: bool = True, affine: bool = True) -> Self:
        """Undo `freeze` for what is True; return the layer. TypeError if not bools."""
        return self._set_frozen(False, statistics, affine)

    def _shown_frozen(self) -> str:
        return SHOWN_FROZEN[self._frozen]

    def reset_statistics(self) -> None:
        """Forget all batches: running mean 0, running variance 1, update count 0. Parameters stay."""
        fresh = self._initial_statistics()
        self._take(self._on_host()._replace(statistics=fresh, batch=None, largest_size=0))

    def _of_domains(self, values: list[PerChannel]) -> PerChannel:
        values = [_where.on_host(a) for a in values]
        array = values[0] if self.settings.domains is None else np.stack(values)
        array.flags.writeable = False  # nobody has written to it, and nobody can from now on
        return array

    # ---- forward ----

    @_keywords.options(CallOptions, keep="x")
    def __call__(self, x: Array, *, out: Array | None = None, **options: Unpack[CallOptions]) -> Array:
        """Return the normalized x; in training also update the running statistics.

        TypeError or ValueError for an argument that does not fit; nothing has changed or been written then. Memory: y, and
        what `batch_norm` takes. With `out`, x is read once more where a value that is not finite would raise.

        Parameters
        ----------
        x : ndarray of float16, bfloat16 (ml_dtypes), float32 or float64, 1 to 8 dimensions, any memory order, C long on
            `axis`. Kept by reference: it must be unchanged when `backward` reads it. In training 2 or more values a
            channel, or none, of which nothing is learned.
        residual, mask, weights, lengths, padding, segments : as in `batch_norm`. Running statistics learn of each segment in
            turn, and normalize all alike.
        use_stats : "batch" or "running", whatever the mode says: the statistics that normalize.
        update_stats : whether the running statistics learn of x, whatever the mode says; y is by those of before.
            False is for a step that is run again. (With `renorm`, y depends on what has been learned: let the first run
            have False.)
        domain : from 0 to K - 1, in a layer of K domains.
        out : where to put y: shape and dtype of x. It may be x itself; then there is no backward, but with ``keep="y"``.
        keep : as in `batch_norm`; None where no backward follows: nothing is kept, nor of the call before.

        Returns
        -------
        y : shape, dtype and memory order of x; `out` where given.

        >>> layer = BatchNorm(1, eps=0)
        >>> layer(np.array([[1.0], [3.0]]))
        array([[-1.],
               [ 1.]])
        """
        is_own = options and not options.keys() <= calls.OF_FUNCTIONS
        if is_own:
            _keywords.no_options("BatchNorm.__call__", options)
        if type(x) is not np.ndarray or self._place is not None:
            x = follow(self, x)
        by_batch = update = self._training and not self._frozen[0]
        told, k = self._fixed, 0
        if options:
            told = {**told, **options} if told else options
        if is_own or self._is_special:
            by_batch, update, told, k = self._asked(told, by_batch)
            if by_batch and self.settings.single_value != "raise":
                x = calls.x_channels(x, self.settings.axis, self.settings.channels)
                y = of_one_value(self, x, out, told, k, update)
                if y is not None:
                    return y
        if by_batch:
            return self._by_batch(x, out, told, k, update)
        return self._by_running(x, out, told, k, update)

    def _asked(self, options: Options, by_batch: bool) -> tuple[bool, bool, Options, int]:
        """Give what normalizes, whether that is learned, what the functions are told, and the domain."""
        k, update = calls.domain(options.get("domain"), self.settings.domains), by_batch
        use_stats, update_stats = options.get("use_stats"), options.get("update_stats")
        if use_stats is not None:
            by_batch = _validate.choice("use_stats", use_stats, calls.USE_STATS) == "batch"
        if update_stats is not None:
            update = flag("update_stats", update_stats)
            if update and self._frozen[0]:
                raise ValueError("update_stats must not be True while the layer's statistics are frozen, got True")
        told = {name: value for name, value in options.items() if name not in calls.OF_LAYER}
        return by_batch, update, told, k

    def _by_batch(self, x: Array, out: Array | None, told: Options, k: int, update: bool) -> Array:
        """Normalize by the statistics of x, and learn of them."""
        settings, state = self.settings, self._state
        gamma, now = state.gamma, state.statistics[k]
        if settings.renorm is not None:
            told = {**told, "renorm": self._renorm(now)}
        may_raise = False
        if update and out is not None:
            policy = settings.nonfinite
            may_raise = policy == "raise" or (policy == "warn" and calls.warnings_may_raise())
        if may_raise or gamma is None:  # else the core holds x to the size of gamma
            x = calls.x_channels(x, settings.axis, settings.channels)
        if may_raise:  # x is read once more, before out is written
            update = self._is_finite(now, self._moments(x, told))
        room = new_room(gamma, now.mean) or (snapshot(gamma), _where.empty_like(now.mean), _where.empty_like(now.mean))
        given = state, x, told, k, update, room
        keep: Any = same
        keep_of: Any = ordinary_saved
        if out is not None:  # all that the call leaves is made before it writes, as is what may fail
            made = partial(self._made, given=given, is_before=True)
            keep, keep_of = made, lambda *kept: made(ordinary_saved(*kept))
        rest = (room[0], state.beta, settings.axis, settings.eps)
        done = ordinary_batch_norm(keep_of, x, *rest, out, settings.num_threads, told or None, None)
        if done is None:
            x = calls.x_channels(x, settings.axis, settings.channels)
            done = normalized_by_batch(keep, x, *rest, told, out, settings.num_threads)
        y, kept = done
        saved, after, nexts = kept if out is not None else self._made(kept, given, False)
        if (nexts is None and out is None) or (nexts is not None and not fill(now, nexts, settings)):
            after = self._after(after, state, k, saved, update and x.size > 0)
        if not update and self._state is not state:
            # One that learns nothing takes nothing back of what others have learned meanwhile.
            after = self._state._replace(call=after.call, batch=after.batch, largest_size=after.largest_size)
        self._state = after
        if self._evaluation is not None:
            self._evaluation = None  # it no longer counts, but would keep its x
        return y

    def _made(self, saved: Saved, given: _Given, is_before: bool) -> _Made:
        """Make the state after a call: with statistics to be filled, or, before it writes, with what it learns."""
        state, x, told, k, update, room = given
        gamma, beta, statistics, _, batch, largest, alpha = state
        nexts, size, seen = None, x.size, saved.moments
        assert seen is not None
        call: Call = [] if saved.x is None and saved.y is None else [x, saved]
        if size and update and (not told or told.get("segments") is None):
            nexts = following(statistics[k], seen, self.settings, room)
        weights = saved.part.weights
        if size and (nexts is not None or not is_before or not isinstance(weights, np.ndarray) or weights.any()):
            batch = (k, seen, size)
            if size > largest:  # noqa: PLR1730 - max() takes a fiftieth of the call
                largest = size
            if nexts is not None:
                statistics = (nexts[0],) if len(statistics) == 1 else _with(statistics, k, nexts[0])
            elif update and is_before:
                known = replace(saved, moments=self._moments(x, told))
                statistics = self._learned(statistics, k, known)
        return saved, _new_state((gamma, beta, statistics, call, batch, largest, alpha)), nexts

    def _after(self, after: State, before: State, k: int, saved: Saved, update: bool) -> State:
        """Give the state after a call that is not known to have been a batch, and what it learns."""
        weights, seen = saved.part.weights, saved.moments
        if isinstance(weights, np.ndarray) and seen is not None and not seen.count.any():
            return before._replace(call=after.call)  # as of no values
        return after._replace(statistics=self._learned(before.statistics, k, saved)) if update else after

    def _renorm(self, now: Statistics) -> Renorm:
        settings = self.settings
        assert settings.renorm is not None
        limits = settings.renorm(now.update_count)._asdict()
        return Renorm(_where.on_host(now.mean), _where.on_host(now.var), parity=settings.parity, **limits)

    def _by_running(
        self,
        x: Array,
        out: Array | None,
        told: Options,
        k: int,
        update: bool,
        given: tuple[PerChannel, PerChannel, float] | None = None,
    ) -> Array:
        """Normalize by running statistics, or by mean, var and eps that are given; learn of x where that is asked for."""
        settings, state = self.settings, self._state
        x = calls.x_channels(x, settings.axis, settings.channels)
        now = state.statistics[k]
        mean, var, eps = given or (now.mean, now.var, settings.eps)
        changes = self._changes(x, told, k, state) if update else {}
        keep = "x"
        if told:
            keep = told.get("keep", "x")
            told = {name: value for name, value in told.items() if name not in _SHARES}
        gamma, beta = state.gamma if keep is None else snapshot(state.gamma), state.beta
        call: Call = [x, None]
        saves = False
        if keep is None or (keep == "x" and is_x(out, x)):
            call = []
        elif not told:
            call[1] = Saved(x, None, gamma, settings.axis % max(np.ndim(x), 1), eps, given=(mean, var))
        else:
            saves = self._training or keep == "y" or (out is not None and "residual" in told)
        by: Options = {"axis": settings.axis, "eps": eps, "num_threads": settings.num_threads, **told}
        if call and not saves and told:  # what backward needs is left to the one that hardly ever comes
            call[1] = partial(normalize, x, mean, var, gamma, snapshot(beta), save=True, **by)
        before = self._state
        after, evaluation = before._replace(call=call, **changes) if update else before, (call, before.call)
        # All that the call leaves is made: once y is written, nothing is asked for that there might not be.
        if saves:
            y, call[1] = normalize(x, mean, var, gamma, beta, out=out, save=True, **by)
        else:
            y = normalize(x, mean, var, gamma, beta, out=out, **by)
        if update:
            self._state, self._evaluation = after, None
            return y
        # Whatever training calls of other threads have done meanwhile, this one is the last now.
        if self._state.call is not evaluation[1]:
            evaluation = call, self._state.call
        self._evaluation = evaluation
        evaluation[1].clear()  # backward does not look there any more
        return y

    def _changes(self, x: Array, told: Options, k: int, state: State) -> dict[str, Any]:
        """Give what changes in the state as x is learned of without normalizing by it."""
        settings, size = self.settings, x.size
        if settings.renorm is not None:
            raise ValueError(
                "update_stats must not be True with running statistics in a layer with renorm, which updates as it corrects"
            )
        seen = self._moments(x, {name: value for name, value in told.items() if name != "ghost_size"})
        if not seen.count.any():
            return {}
        if settings.update_rate is not None and seen._has_one_value():  # only those who pool all values take it in
            if settings.single_value == "raise":
                raise ValueError(
                    "x must have at least 2 values per channel that count, to update running statistics by their variance, "
                    "got 1"
                )
            if seen.channels == settings.channels:  # else there are segments that have more
                return {}
        statistics = self._learned(state.statistics, k, seen)
        return {"statistics": statistics, "batch": (k, seen, size), "largest_size": max(state.largest_size, size)}

    # ---- learning ----

    def _initial_statistics(self) -> tuple[Statistics, ...]:
        return tuple(Statistics.initial(self.settings) for _ in range(self.settings.domains or 1))

    def _statistics_arrays(self, statistics: tuple[Statistics, ...]) -> dict[str, Array]:
        parts = [s.arrays(self.settings) for s in statistics]
        if self.settings.domains is None:
            return parts[0]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def _statistics_of(self, arrays: Mapping[str, Array], strict: bool) -> tuple[Statistics, ...]:
        parts, count = [arrays], self.settings.domains
        if count is not None:
            parts = [{name: a[k] for name, a in arrays.items()} for k in range(count)]
        return tuple(Statistics.of_arrays(part, self.settings, strict) for part in parts)

    def _moments(self, x: Array, told: Options) -> Moments:
        counted = {name: told[name] for name in (*COUNTS, *_SHARES) if name in told}
        return moments(x, axis=self.settings.axis, num_threads=self.settings.num_threads, **counted)

    def _learned(self, before: tuple[Statistics, ...], k: int, batch: Saved | Moments) -> tuple[Statistics, ...]:
        """Return the statistics of all domains after one more batch of domain `k`, as the policies say."""
        now = statistics_at(before[k], None)
        if not self._is_finite(now, batch):
            return before
        return _with(before, k, beside(before[k], updated(now, batch, self.settings)))

    def _is_finite(self, now: Statistics, batch: Saved | Moments) -> bool:
        """Tell whether a batch may be learned, after saying what the policy has to say of one that is not finite."""
        policy = self.settings.nonfinite
        channel = -1 if policy == "propagate" else first_nonfinite(now, batch, self.settings)
        if channel >= 0:
            text = f"x must have finite statistics to update the running ones, got infinity or NaN in channel {channel}"
            if policy == "raise":
                raise ValueError(text)
            if policy == "warn":
                warnings.warn(
                    f"{text}: they are left as they are", RuntimeWarning, stacklevel=calls.stacklevel_of_caller()
                )
        return channel < 0

    # ---- diagnostics ----

    def report(self) -> Report:
        """Return what is, or may go, wrong: statistics, parameters, and the last batch since `reset_statistics`.

        Changes nothing, and reads arrays of size C only. What is looked for is told by `Report`.

        >>> layer = BatchNorm(2, nonfinite="skip")
        >>> y = layer(np.array([[1.0, 2.0], [np.inf, 3.0]]))
        >>> print(layer.report())
        warning nonfinite_batch: the last batch's mean or variance is not finite in channel 0
        """
        state, settings = self._on_host(), self.settings
        seen = None if state.batch is None else merged(state.batch[1], settings.channels)
        evaluates = not self._training or self._frozen[0]
        return Report(findings(state, settings, seen, evaluates=evaluates))


def _with(statistics: tuple[Statistics, ...], k: int, new: Statistics) -> tuple[Statistics, ...]:
    return (*statistics[:k], new, *statistics[k + 1 :])
