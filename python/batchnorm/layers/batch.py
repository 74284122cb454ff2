"""Batch normalization as an object that keeps parameters, running statistics and what backward needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, Self, TypedDict, Unpack, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from batchnorm import _validate, conventions
from batchnorm._validate import Activation, Padding, Parity, WeightsAre
from batchnorm.conventions import Library
from batchnorm.counted import Positions, counted
from batchnorm.functional import (
    Gradients,
    Saved,
    batch_norm,
    new_room,
    normalize,
    normalize_backward,
    ordinary_batch_norm,
    pool_into,
    update_into,
)
from batchnorm.ghost import GhostSaved, ghost_batch_norm, ghost_batch_norm_backward, ghost_moments
from batchnorm.layers.layer import AnySaved, Call, Layer, State, _Default, is_x
from batchnorm.layers.settings import BatchNormSettings, Nonfinite, Setting, SingleValue, flag, integer
from batchnorm.layers.statistics import (
    MOST_UPDATES,
    Statistics,
    debiased_rate,
    first_nonfinite,
    learn_into,
    updated_statistics,
)
from batchnorm.moments import Moments, merge, moments
from batchnorm.relu import (
    ReluGradient,
    ReluGradients,
    ReluMask,
    batch_norm_relu,
    normalize_relu,
    normalize_relu_backward,
)
from batchnorm.renorm import RenormSchedule, batch_renorm
from batchnorm.report import (
    Batch,
    Report,
    batch_findings,
    parameter_findings,
    statistics_findings,
    untrained_findings,
)
from batchnorm.state_file import Entry

__all__ = ["BatchNorm"]

UseStats = Literal["batch", "running"]
USE_STATS: tuple[UseStats, ...] = get_args(UseStats)

# Past the __new__ of a NamedTuple, which takes three times as long.
_new_state: Callable[[tuple[Any, ...]], State] = partial(tuple.__new__, State)


class _Output(NamedTuple):
    """Where y goes, what is added to it first, and whether backward may follow."""

    out: NDArray[Any] | None
    residual: NDArray[Any] | None
    keep: bool


_BY_CONVENTION: Any = _Default("by convention")

_NO_PARTS: Mapping[str, Any] = {}
_SUM_ROUNDING = 1e-9  # far more than rounding takes from a sum of weights near 2


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
    activation     None      "relu": max(y + residual, 0)
    weights_are    None      what weights are to ddof=1: "counts" or "importance", as in `Moments.var`. Without it a
                             training call of weights other than 0 and 1 raises there: no default is right for both
    num_threads    None      threads of each call; None: those of the process
    ============== ========= ==================================================================================

    Notes
    -----
    A call that raises changes nothing: statistics, counts, gradients, mode and what is kept for backward are as before.
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

    settings: BatchNormSettings
    axis, update_rate, ddof = Setting[int](), Setting[float | None](), Setting[int]()
    debias, domains = Setting[bool](), Setting[int | None]()
    nonfinite, single_value = Setting[Nonfinite](), Setting[SingleValue]()
    ghost_size, renorm = Setting[int | None](), Setting[RenormSchedule | None]()
    parity, weights_are = Setting[Parity](), Setting[WeightsAre | None]()

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
        whose = conventions.convention(convention)
        axis = whose.axis if axis is _BY_CONVENTION else axis
        eps = whose.eps if eps is _BY_CONVENTION else eps
        update_rate = whose.update_rate if update_rate is _BY_CONVENTION else update_rate
        ddof = whose.ddof if ddof is _BY_CONVENTION else ddof
        settings = BatchNormSettings(
            channels, axis, eps, update_rate, ddof, gamma, beta, cast("np.dtype[Any]", dtype), debias, domains,
            ghost_size, renorm, parity, activation, weights_are, nonfinite, single_value, num_threads,
        )  # fmt: skip
        super().__init__(settings)
        # Whether there is nothing beside one set of running statistics that follow each batch as it comes, and a gamma,
        # to whose size the core holds x.
        special = domains, ghost_size, renorm, activation
        self._is_ordinary = (
            settings.gamma
            and all(setting is None for setting in special)
            and settings.single_value == "raise"
            and settings.nonfinite != "raise"
        )

    @property
    def running_mean(self) -> NDArray[np.float64]:
        """Running mean, float64 (C,), read-only: an update replaces it, `load_state_dict` sets it. (K, C) with domains."""
        return self._of_domains([s.mean for s in self._state.statistics])

    @property
    def running_var(self) -> NDArray[np.float64]:
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

    def _set_frozen(self, frozen: bool, statistics: bool, affine: bool) -> Self:
        which = flag("statistics", statistics), flag("affine", affine)
        before = self._frozen
        self._frozen = frozen if which[0] else before[0], frozen if which[1] else before[1]
        return self

    def reset_statistics(self) -> None:
        """Forget all batches: running mean 0, running variance 1, update count 0. Parameters stay."""
        fresh = self._initial_statistics()
        self._state = self._state._replace(statistics=fresh, batch=None, largest_size=0)

    def _initial_statistics(self) -> tuple[Statistics, ...]:
        return tuple(Statistics.initial(self.settings) for _ in range(self.settings.domains or 1))

    def _of_domains(self, values: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return _read_only(values[0] if self.settings.domains is None else np.stack(values))

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

        Parameters
        ----------
        x : ndarray of float16, bfloat16 (ml_dtypes), float32 or float64, 1 to 8 dimensions, any memory order, C long on
            `axis`. Kept by reference: it must be unchanged when `backward` reads it. In training 2 or more values a
            channel, or none, of which nothing is learned.
        residual, mask, weights, lengths, padding : as in `batch_norm`.
        use_stats : "batch" or "running", whatever the mode says: the statistics that normalize.
        update_stats : whether the running statistics learn of x, whatever the mode says; y is by those of before.
            False is for a step that is run again. (With `renorm`, y depends on what has been learned: let the first run
            have False.)
        domain : from 0 to K - 1, in a layer of K domains.
        out : where to put y: shape and dtype of x. It may be x itself, but then there is no backward.
        keep : False where no backward follows: x is not kept, nor that of the call before.

        Returns
        -------
        y : shape, dtype and memory order of x; `out` where given.

        Raises
        ------
        TypeError, ValueError
            For an argument that does not fit. Nothing has changed or been written then.

        Notes
        -----
        Memory: y, and what `batch_norm` takes. With `out`, x is read once more where a value that is not finite would
        raise.

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
        x = _x_channels(x, self.settings.axis, self.settings.channels)
        k = _domain(options.get("domain"), self.settings.domains)
        how, to = _NO_PARTS, _Output(out, None, True)
        if not no_options:
            use_stats, update_stats = options.get("use_stats"), options.get("update_stats")
            if use_stats is not None:
                by_batch = _validate.choice("use_stats", use_stats, USE_STATS) == "batch"
            if update_stats is not None:
                update = flag("update_stats", update_stats)
                if update and self._frozen[0]:
                    raise _update_of_frozen()
            given: Mapping[str, Any] = options
            how = {name: given[name] for name in _PARTS if given.get(name) is not None}
            residual = options.get("residual")
            if self.settings.activation is None and residual is not None:
                raise _residual_without_activation()
            if self.settings.activation is not None and how:
                raise _parts_with_activation(how)
            to = _Output(out, residual, flag("keep", options.get("keep", True)))
        if by_batch and self.settings.single_value != "raise":
            if _is_single_value(x, self.settings.axis) or (how and self._positions(x, how).has_one()):
                pools = update and self.settings.update_rate is None
                if self.settings.single_value == "use_running":
                    return self._by_running(x, to, k, how, pools)
                return self._by_itself(x, to, k, how, pools)
            if (
                self.settings.ghost_size is not None
                and not how
                and _ends_in_one(x, self.settings.axis, self.settings.ghost_size)
            ):
                return self._ghosts_and_one(x, to, k, update)
        if by_batch:
            return self._by_batch(x, to, k, how, update)
        return self._by_running(x, to, k, how, update)

    def _ordinary_training(self, x: NDArray[Any], out: NDArray[Any] | None) -> NDArray[Any] | None:
        """Do the ordinary call, which on the general way below takes two thirds longer for (4, 16, 8, 8).

        None, and nothing has changed, where an argument is not ordinary: the general way takes it, or reports what is
        wrong with it.
        """
        parameter, beta, before, _, _, largest_size = self._state
        now = before[0]
        may_raise = out is not None and self.settings.nonfinite == "warn" and _warnings_may_raise()
        if may_raise and first_nonfinite(now, [self._moments(x, _NO_PARTS)]) >= 0:
            return None
        # All that the call leaves is made before it writes: then nothing is asked for that there might not be.
        room = new_room(parameter, now.mean)
        if room is None:
            return None
        gamma_now, mean, var = room
        rate = self.settings.update_rate
        if self.settings.debias and rate:
            rate = debiased_rate(rate, now.update_count + 1)
        pooled, into = None, room
        if rate is None and now.pooled is not None and now.pooled._dof is None:
            pooled_table = np.empty((self.settings.channels, 5))
            pooled, into = Moments._from_table(pooled_table), (pooled_table, mean, var)
        statistics = (Statistics(mean, var, now.update_count + 1, pooled),)

        def keep(
            kept_x: NDArray[Any] | None, table: NDArray[np.float64], gamma: Any, axis: int, eps: float
        ) -> tuple[NDArray[np.float64], Saved, State]:
            size, seen = x.size, Moments._from_core(table)
            saved = Saved(kept_x, seen, gamma, axis, eps)
            call: Call = [] if kept_x is None else [x, saved]
            largest = largest_size
            if size > largest:  # noqa: PLR1730 - max() takes a fiftieth of the call
                largest = size
            after = (parameter, beta, statistics, call, (0, seen, size), largest)
            return table, saved, _new_state(after)

        done = ordinary_batch_norm(
            keep, x, gamma_now, beta, self.settings.axis, self.settings.eps, out, self.settings.num_threads
        )
        if done is None:
            return None
        y, (table, saved, state) = done
        finite, has_learned = self.settings.nonfinite != "propagate", None
        if now.update_count == MOST_UPDATES:
            pass
        elif rate is not None:
            has_learned = update_into(now.mean, now.var, table, rate, self.settings.ddof, room, finite)
        elif pooled is not None and now.pooled is not None:
            has_learned = pool_into(now.pooled._table, table, self.settings.ddof, into, finite)
        if not has_learned:
            state = state._replace(statistics=self._updated(before, 0, saved.moments, saved))
        self._state = state
        if self._evaluation is not None:
            self._evaluation = None  # it no longer counts, but would keep its x
        return y

    def _by_batch(
        self, x: NDArray[Any], to: _Output, k: int, how: Mapping[str, Any], update: bool
    ) -> NDArray[Any]:
        if how and (self.settings.ghost_size is not None or self.settings.renorm is not None):
            raise _parts_of_small_batches(how)
        state, may_tell = self._state, True
        if update and "weights" in how and self.settings.ddof > 0:
            self._refuse_weights(x, how)
        if to.out is not None and update:
            may_tell = not self._told_before_writing(x, how, state.statistics[k])
        gamma, beta, before, _, last, largest = state
        now, size = before[k], x.size if isinstance(x, np.ndarray) else 0
        # All that the call leaves is made before it writes, and what is not known yet then filled in: then nothing is
        # asked for that there might not be, where statistics follow the batch in the plain way or pool it.
        call: Call = [] if not to.keep or is_x(to.out, x) else [x, None]
        batch: Any = [k, None, size]
        parts: list[Any] = [None]
        rate, finite = self._followed_rate(now), self.settings.nonfinite != "propagate"
        if size == 0:
            batch, update = last, False
        elif size > largest:
            largest = size
        after = _new_state((gamma, beta, before, call, batch, largest))
        room: tuple[NDArray[np.float64], ...] = ()
        if update:
            room, pooled = (np.empty(self.settings.channels), np.empty(self.settings.channels)), None
            if (
                now.pooled is not None
                and now.pooled._dof is None
                and self.settings.weights_are != "importance"
            ):
                table = np.empty((self.settings.channels, 5))
                pooled, room = Moments._from_table(table), (table, *room)
            new = Statistics(room[-2], room[-1], min(now.update_count + 1, MOST_UPDATES), pooled)
            statistics = (new,) if len(before) == 1 else (*before[:k], new, *before[k + 1 :])
            learned = _new_state((gamma, beta, statistics, call, batch, largest))
        y, saved = self._normalized_by_batch(x, state, to, k, how)
        seen = saved.moments
        if size > 0:
            batch[1] = parts[0] = seen
        if call:
            call[1] = saved
        learns = update and learn_into(
            now, seen if isinstance(seen, tuple) else parts, rate, self.settings.ddof, room, finite
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

    def _followed_rate(self, now: Statistics) -> float | None:
        """Return the rate of the next update of statistics that follow the batch in the plain way; else None."""
        rate = self.settings.update_rate
        if (
            rate is None
            or self.settings.renorm is not None
            or (self.settings.debias and self.settings.ghost_size is not None)
        ):
            return None
        return debiased_rate(rate, now.update_count + 1) if self.settings.debias and rate > 0 else rate

    def _merged(self, seen: Moments | tuple[Moments, ...]) -> Moments:
        return merge(Moments.empty(self.settings.channels), *seen) if isinstance(seen, tuple) else seen

    def _normalized_by_batch(
        self,
        x: NDArray[Any],
        state: State,
        to: _Output,
        k: int,
        how: Mapping[str, Any],
    ) -> tuple[NDArray[Any], AnySaved]:
        """Return y, and what its backward takes."""
        gamma, beta = _snapshot(state.gamma), state.beta
        axis, eps, out, threads = self.settings.axis, self.settings.eps, to.out, self.settings.num_threads
        if (
            self.settings.activation is None
            and self.settings.ghost_size is None
            and self.settings.renorm is None
        ):
            return batch_norm(x, gamma, beta, axis=axis, eps=eps, out=out, num_threads=threads, **how)
        options: dict[str, Any] = {"axis": axis, "eps": eps, "out": out, "num_threads": threads}
        if self.settings.activation is not None:
            return batch_norm_relu(x, gamma, beta, residual=to.residual, **options)
        if self.settings.ghost_size is not None:
            return ghost_batch_norm(x, gamma, beta, ghost_size=self.settings.ghost_size, **options)
        assert self.settings.renorm is not None
        now = state.statistics[k]
        limits = self.settings.renorm(now.update_count)._asdict()
        return batch_renorm(
            x, now.mean, now.var, gamma, beta, parity=self.settings.parity, **limits, **options
        )

    def _by_running(
        self, x: NDArray[Any], to: _Output, k: int, how: Mapping[str, Any], update: bool
    ) -> NDArray[Any]:
        if update and self.settings.renorm is not None:
            raise _update_without_renorm()
        state = self._state
        now = state.statistics[k]
        changes: dict[str, Any] = {}
        batch = self._moments(x, how) if update else None
        if batch is not None and batch.count.any() and self._learns_from(batch):
            changes["statistics"] = self._updated(state.statistics, k, batch)
            changes |= {"batch": (k, batch, x.size), "largest_size": max(state.largest_size, x.size)}
        settings: dict[str, Any] = {
            "axis": self.settings.axis,
            "eps": self.settings.eps,
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
        state: State,
        to: _Output,
        settings: Mapping[str, Any],
        changes: Mapping[str, Any] | None,
    ) -> NDArray[Any]:
        """Normalize by statistics that are constants, and make that the last call; None changes nothing of the state."""
        gamma = _snapshot(state.gamma) if to.keep else state.gamma
        given: dict[str, Any] = {"x": x, "mean": mean, "var": var, "gamma": gamma, **settings}
        how: dict[str, Any] = {"beta": state.beta, "num_threads": self.settings.num_threads}
        mask: list[ReluMask | None] = [None]
        # Evaluation leaves the mask to the backward that hardly ever comes, where out cannot be the residual.
        needs_mask = to.keep and (self._training or not (to.out is None or to.residual is None))
        gradients: Callable[..., Gradients | ReluGradients] = partial(normalize_backward, **given)
        if self.settings.activation is not None:
            how["residual"] = to.residual
            kept_how = how if needs_mask or not to.keep else how | {"beta": _snapshot(state.beta)}
            gradients = partial(_relu_backward, mask, given, kept_how)
        call: Call = [] if not to.keep or is_x(to.out, x) else [x, gradients]
        before = self._state
        after, evaluation = before, (call, before.call)
        if changes is not None:
            after = before._replace(call=call, **changes)
        # All that the call leaves is made: once y is written, nothing is asked for that there might not be.
        if self.settings.activation is None:
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
        if self.settings.update_rate is None or not batch._has_one_value():
            return True
        if self.settings.single_value == "raise":
            raise _one_value()
        return False

    def _by_itself(
        self, x: NDArray[Any], to: _Output, k: int, how: Mapping[str, Any], pools: bool
    ) -> NDArray[Any]:
        """Normalize one value a channel by itself and no variance, which gives beta; `pools`: and pool it."""
        state, batch, changes = self._state, self._moments(x, how), dict[str, Any]()
        if pools:
            changes["statistics"] = self._updated(state.statistics, k, batch)
            changes |= {"batch": (k, batch, x.size), "largest_size": max(state.largest_size, x.size)}
        settings: dict[str, Any] = {
            "axis": self.settings.axis,
            "eps": 0.0,
            **self._for_given_statistics(x, how),
        }
        var = np.zeros(self.settings.channels)
        return self._by_constants(x, batch.mean, var, state, to, settings, changes if pools else None)

    def _positions(self, x: NDArray[Any], how: Mapping[str, Any]) -> Positions:
        """Give what a mask, lengths or weights count of x, checked."""
        x = _validate.array("x", x)
        part = counted(x, _validate.axis(self.settings.axis, x.ndim), **how)
        assert isinstance(part, Positions)
        return part

    def _ghosts_and_one(self, x: NDArray[Any], to: _Output, k: int, update: bool) -> NDArray[Any]:
        """Normalize ghosts, and one value a channel behind them as `single_value` says."""
        x = _validate.array("x", x)
        state, threads, may_tell = self._state, self.settings.num_threads, True
        gamma, beta, now = _snapshot(state.gamma), state.beta, state.statistics[k]
        if to.out is not None:
            _validate.output(to.out, x, {"x": x}, {"gamma": gamma, "beta": beta})
        pools = update and self.settings.update_rate is None
        one = self._moments(x[-1:], _NO_PARTS)
        if to.out is not None and update:
            may_tell = not self._told_before_writing(x[:-1], _NO_PARTS, now, (one,) if pools else ())
        constants: dict[str, Any] = {"mean": now.mean, "var": now.var, "eps": self.settings.eps}
        if self.settings.single_value == "skip":
            constants = {"mean": one.mean, "var": np.zeros(self.settings.channels), "eps": 0.0}
        y = np.empty_like(x, subok=False) if to.out is None else to.out
        options: dict[str, Any] = {"axis": self.settings.axis, "num_threads": threads}
        size: Any = self.settings.ghost_size
        _, ghosts = ghost_batch_norm(
            x[:-1], gamma, beta, ghost_size=size, eps=self.settings.eps, out=y[:-1], **options
        )
        normalize(x[-1:], **constants, gamma=gamma, beta=beta, out=y[-1:], **options)
        seen = merge(*ghosts.moments, one) if pools else merge(*ghosts.moments)
        changes: dict[str, Any] = {"batch": (k, seen, x.size)}
        changes["largest_size"] = max(state.largest_size, x.size)
        if update:
            changes["statistics"] = self._updated(state.statistics, k, seen, ghosts, may_tell)
        call: Call = []
        if to.keep and not is_x(to.out, x):
            constants |= {"x": x[-1:], "gamma": gamma, "axis": self.settings.axis}
            call = [x, partial(_ghosts_and_one_backward, x, ghosts, constants)]
        self._state = self._state._replace(call=call, **changes)
        self._evaluation = None
        return y

    def _moments(self, x: NDArray[Any], how: Mapping[str, Any]) -> Moments:
        counted = {name: value for name, value in how.items() if name != "padding"}
        return moments(x, axis=self.settings.axis, num_threads=self.settings.num_threads, **counted)

    def _refuse_weights(self, x: NDArray[Any], how: Mapping[str, Any]) -> None:
        """Refuse weights that leave no unbiased variance, before anything is written."""
        part = self._positions(x, how)
        dof = part.importance_dof(1)
        if dof is None:
            return
        if self.settings.weights_are is None:
            raise _validate.weights_unsaid("a layer with ddof=1")
        if self.settings.weights_are == "counts" and self.settings.update_rate is not None:
            count = part.weights.sum(dtype=np.float64, keepdims=True)
            if abs(count[0] - 2) < _SUM_ROUNDING:  # then the sum that the update takes decides
                count = self._moments(x, how).count
            _validate.weights_leave_variance(count, dof, self.settings.ddof, self.settings.weights_are)

    def _told_before_writing(
        self, x: NDArray[Any], how: Mapping[str, Any], now: Statistics, rest: tuple[Moments, ...] = ()
    ) -> bool:
        """Say that x is not finite where that may end the call, before `out` is written; tell whether it was said.

        `rest` is what statistics learn behind x. x is read once more then. Else `_updated` says it, when the moments of
        the call are known.
        """
        if self.settings.nonfinite != "raise" and not (
            self.settings.nonfinite == "warn" and _warnings_may_raise()
        ):
            return False
        if self.settings.ghost_size is None:
            parts: tuple[Moments, ...] = (self._moments(x, how),)
        else:
            parts = ghost_moments(
                x,
                ghost_size=self.settings.ghost_size,
                axis=self.settings.axis,
                num_threads=self.settings.num_threads,
            )
        channel = first_nonfinite(now, parts + rest)
        if channel >= 0:
            self._tell_nonfinite(channel, 5)
        return channel >= 0

    def _tell_nonfinite(self, channel: int, stacklevel: int) -> None:
        text = _nonfinite_batch(channel)
        if self.settings.nonfinite == "raise":
            raise ValueError(text)
        if self.settings.nonfinite == "warn":
            warnings.warn(f"{text}: they are left as they are", RuntimeWarning, stacklevel=stacklevel)

    def _updated(
        self,
        before: tuple[Statistics, ...],
        k: int,
        batch: Moments,
        saved: AnySaved | None = None,
        may_tell: bool = True,
    ) -> tuple[Statistics, ...]:
        """Return the statistics of all domains after one more batch of domain `k`, as the policies say."""
        if self.settings.nonfinite != "propagate":
            pools = self.settings.update_rate is None
            parts = saved.moments if isinstance(saved, GhostSaved) and not pools else (batch,)
            channel = first_nonfinite(before[k], parts)
            if channel >= 0:
                if may_tell:
                    self._tell_nonfinite(channel, 5)
                return before
        after = updated_statistics(
            before[k], batch, self.settings.update_rate, self.settings.ddof, saved, self.settings.debias, self.settings.counts_ghosts,
            self.settings.weights_are,
        )  # fmt: skip
        return (after,) if len(before) == 1 else (*before[:k], after, *before[k + 1 :])

    # ---- diagnostics ----

    def report(self) -> Report:
        """Return what is, or may go, wrong: statistics, parameters, and the last batch since `reset_statistics`.

        Changes nothing, and reads arrays of size C only. What is looked for is told by `Report`.

        >>> layer = BatchNorm(2, nonfinite="skip")
        >>> y = layer(np.array([[1.0, 2.0], [np.inf, 3.0]]))
        >>> print(layer.report())
        warning nonfinite_batch: the last batch's mean or variance is not finite in channel 0
        """
        gamma, beta, statistics, _, last, largest_size = self._state
        batch = None if last is None else Batch(last[0], self._merged(last[1]), last[2], largest_size)
        findings = parameter_findings(gamma, beta, self.settings.channels)
        evaluates = not self._training or self._frozen[0]
        for k, s in enumerate(statistics):
            domain = None if self.settings.domains is None else k
            if evaluates:
                findings += untrained_findings(s.mean, s.var, s.update_count, domain)
            findings += statistics_findings(
                s.mean, s.var, s.update_count, gamma, beta, self.settings.eps, domain
            )
            if batch is not None and batch.domain == k:
                findings += batch_findings(
                    batch, s.mean, s.var, s.update_count, self.settings.update_rate, s.pooled, self.settings.ddof, domain,
                    self.settings.weights_are,
                )  # fmt: skip
        return Report(tuple(findings))

    # ---- saved state ----

    def _entries(self) -> dict[str, Entry]:
        own, count = Statistics.state_entries(self.settings), self.settings.domains
        if count is not None:
            own = {name: Entry((count, *entry.shape), entry.dtype) for name, entry in own.items()}
        return super()._entries() | own

    def _arrays(self) -> dict[str, NDArray[Any]]:
        parts = [s.arrays(self.settings) for s in self._state.statistics]
        own = (
            parts[0]
            if self.settings.domains is None
            else {n: np.stack([p[n] for p in parts]) for n in parts[0]}
        )
        return super()._arrays() | own

    def _of_arrays(self, arrays: Mapping[str, NDArray[Any]], strict: bool) -> State:
        own = {name: arrays[name] for name in Statistics.state_entries(self.settings)}
        parts = [own]
        if self.settings.domains is not None:
            parts = [{name: a[k] for name, a in own.items()} for k in range(self.settings.domains)]
        statistics = tuple(Statistics.of_arrays(part, self.settings, strict) for part in parts)
        return super()._of_arrays(arrays, strict)._replace(statistics=statistics)

    def _modes(self) -> str:
        others = {(True, True): "", (True, False): "affine=False", (False, True): "statistics=False"}
        modes = f".freeze({others[self._frozen]})" if any(self._frozen) else ""
        return modes + super()._modes()


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


def _read_only(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the array itself, to be handed out: nobody has written to it, and nobody can from now on."""
    array.flags.writeable = False
    return array


def _snapshot(parameter: NDArray[Any] | None) -> NDArray[Any] | None:
    return None if parameter is None else parameter.copy()


# ---- what a call is given ---------------------------------------------------------------------------------


def _x_channels(x: Any, axis: int, needed: int) -> Any:
    """Give x, of a subclass as the array that it is, after refusing another number of channels.

    What else is wrong with x is the functions' to say.
    """
    if type(x) is not np.ndarray and isinstance(x, np.ndarray) and type(x) is not np.memmap:
        x = x if isinstance(x, np.ma.MaskedArray) else np.asarray(x)
    if isinstance(x, np.ndarray) and -x.ndim <= axis < x.ndim and x.shape[axis] != needed:
        raise ValueError(f"x must have {needed} channels on axis {axis}, got shape {x.shape}")
    return x


def _domain(value: object, count: int | None) -> int:
    """Give the index of the set of statistics that a call means."""
    if count is None:
        if value is not None:
            raise ValueError(f"domain must be None in a layer built without domains, got {value!r}")
        return 0
    if value is None:
        raise TypeError(
            f"domain must be an int from 0 to {count - 1} in a layer of {count} domains, got None"
        )
    number = integer("domain", value)
    if not 0 <= number < count:
        raise ValueError(f"domain must be from 0 to {count - 1}, got {number}")
    return number


def _update_of_frozen() -> ValueError:
    """Return the error for a call that would update statistics that are frozen."""
    return ValueError("update_stats must not be True while the layer's statistics are frozen, got True")


def _nonfinite_batch(channel: int) -> str:
    """Say what is wrong with a batch's statistics."""
    return (
        f"x must have finite statistics to update the running ones, got infinity or NaN in channel {channel}"
    )


def _one_value() -> ValueError:
    """Return the error for one value a channel in statistics that follow the batch."""
    return ValueError(
        "x must have at least 2 values per channel that count, to update running statistics by their variance, got 1"
    )


def _parts_with_activation(names: Mapping[str, object]) -> ValueError:
    """Tell that an activation leaves nothing of x out."""
    return ValueError(f"{next(iter(names))} must be None in a layer with an activation")


def _residual_without_activation() -> ValueError:
    """Tell which layers take a residual."""
    return ValueError("residual must be None in a layer without activation='relu'")


def _parts_of_small_batches(names: Mapping[str, object]) -> ValueError:
    """Return the error for a mask in a layer of ghosts or renormalization."""
    return ValueError(
        f"{', '.join(names)} must be None in training with ghost_size or renorm, which take all of a batch"
    )


def _update_without_renorm() -> ValueError:
    """Return the error for statistics that renormalization does not keep."""
    return ValueError(
        "update_stats must not be True with running statistics in a layer with renorm, which updates as it corrects"
    )
