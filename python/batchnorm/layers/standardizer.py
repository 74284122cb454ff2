"""Standardization of a stream or a table: statistics of features that never stop, and their inverse."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import ArrayLike

from batchnorm import _keywords, _validate, _where, state_file
from batchnorm._arrays import Array, PerChannel
from batchnorm.forward import given_moments, normalize
from batchnorm.layers import entries
from batchnorm.layers.estimator import Estimator, row_weights
from batchnorm.layers.settings import Settings, flag, int_within
from batchnorm.layers.statistics import check_parts
from batchnorm.moments import Moments, merge, moments
from batchnorm.running import observe, standardizing

__all__ = ["Standardizer"]

Missing = Literal["keep", "zero"]


@dataclass(frozen=True)
class StandardizerSettings(Settings):
    """Those of a `Standardizer`, which says what they mean, checked."""

    features: int | None
    update_rate: float | None
    eps: float
    clip: float | None
    center: bool
    scale: bool
    missing: Missing
    num_threads: int | None = field(default=None, metadata={"saved": False})

    def __post_init__(self) -> None:
        rate = None if self.update_rate is None else _validate.share("update_rate", self.update_rate)
        clip = None if self.clip is None else _validate.number("clip", self.clip)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be above 0, or None, got {clip}")
        vars(self).update(
            features=None if self.features is None else int_within("features", self.features, ">= 0 or None", 0),
            update_rate=rate,
            eps=_validate.eps(self.eps),
            clip=clip,
            center=flag("center", self.center),
            scale=flag("scale", self.scale),
            missing=_validate.choice("missing", self.missing, get_args(Missing)),
            num_threads=_validate.num_threads(self.num_threads) or None,
        )

    def saved(self) -> dict[str, Any]:
        """Give what a state depends on; not the features, which its arrays tell."""
        names = "update_rate", "eps", "clip", "center", "scale", "missing"
        return {name: getattr(self, name) for name in names}


class _Ready(NamedTuple):
    """Checked settings, and what the core is told in a call that learns and in one that does not."""

    settings: StandardizerSettings
    keep: float  # what has been seen counts for so much after one value more
    learns: tuple[Any, ...]
    applies: tuple[Any, ...]


_Known = tuple[PerChannel, PerChannel | None]  # the table of moments, and their importance_dof where weights differ


class Standardizer(Estimator):
    """Bring each feature of a stream or a table to a mean of 0 and a variance of 1, by all that has been seen of it.

    ``y = (x - mean)/√(var + eps)``, var biased, and 1 in place of the root where that is 0 or nothing has been seen

    ``y = norm(x)`` learns of x and normalizes it then: one observation of shape (F,), or many, (..., F). In evaluation
    (``norm.eval()``) it learns nothing. Statistics are held to twice float64's digits, so that no offset of the data is too
    large; each value counts alike, or, with `update_rate`, each (1 - update_rate) times as much as the next one of its
    feature (to 2⁻⁵¹/update_rate then): a stream gives the same statistics however it is cut into calls. NaN is a missing
    value: it changes nothing of its feature. Infinity cannot be learned: that is an error. In evaluation it is infinity.

    Follows scikit-learn's protocol for transformers too (``fit``, ``partial_fit``, ``transform``, ``Pipeline``, ``clone``,
    DataFrames); that is not needed for it. Parameters, all but the first by keyword; they may be changed at any time (but
    for features, once they are known), and are checked as they are used:

    ============== ========= ==================================================================================
    features       None      F >= 0, the size of the last axis of x; None: that of what comes first
    update_rate    None      None: pooled, all values count alike. From 0 to 1: exponential, the weight of the
                             newest value where many have been seen
    eps            0.0       what is added to var, >= 0. 1e-8 is usual for observations of an agent
    clip           None      y is from -clip to clip, > 0, where x is not missing: 10 and 5 are usual for an agent
    center         True      False: y = x/√(var + eps)
    scale          True      False: y = x - mean
    missing        "keep"    y where x is missing: "keep": NaN, or under a mask what x is; "zero": 0, the mean
    num_threads    None      threads of each call; None: those of the process
    ============== ========= ==================================================================================

    Attributes
    ----------
    moments : Moments (F,) of what has been seen. Assigning sets them: ``norm.moments = a.moments | b.moments`` joins what
        workers that began with nothing have seen. ``moments.var(1)`` is the unbiased variance where all values count alike,
        else ``moments.var(1, weights_are=...)``.
    training : bool. Whether a call learns (`train`, `eval`).
    n_features_in_, feature_names_in_, mean_, var_, scale_, n_samples_seen_ : as scikit-learn's StandardScaler has them;
        var_ is biased, scale_ = √(var_ + eps), or 1.

    TypeError or ValueError, before anything has changed, for what does not fit, and for values whose moments leave
    float64. Memory: 40 bytes a feature, 48 with update_rate; while a call runs 8 bytes an observation with update_rate,
    a copy of float16 and float32 data then, and of features that miss values one at a time. Threads: learn from one at
    a time. Copies and pickles are objects of their own. `save`, `load`: the state as a file.

    Source: Chan, Golub, LeVeque (1979); the exponential form weights values as pandas' ``ewm(alpha=update_rate)``.

    Examples
    --------
    >>> norm = Standardizer(2, clip=10.0)
    >>> for observation in np.array([[1.0, 100.0], [3.0, np.nan], [5.0, 300.0]]):
    ...     y = norm(observation)
    >>> y
    array([1.22474487, 1.        ])
    >>> norm.moments.count, norm.moments.mean
    (array([3., 2.]), array([  3., 200.]))
    >>> norm.inverse(y)
    array([  5., 300.])
    """

    _training = True
    _ready: _Ready | None = None
    _known: _Known | None = None

    @_keywords.keywords
    def __init__(
        self,
        features: int | None = None,
        *,
        update_rate: float | None = None,
        eps: float = 0.0,
        clip: float | None = None,
        center: bool = True,
        scale: bool = True,
        missing: Missing = "keep",
        num_threads: int | None = None,
    ) -> None:
        self.features, self.update_rate, self.eps, self.clip = features, update_rate, eps, clip
        self.center, self.scale, self.missing, self.num_threads = center, scale, missing, num_threads

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if name in _PARAMETERS:
            self.__dict__.pop("_ready", None)  # to be checked again

    # ---- calls ----

    def __call__(
        self, x: Array, *, mask: ArrayLike | None = None, weights: ArrayLike | None = None, out: Array | None = None
    ) -> Array:
        """Learn of x, unless in evaluation, and return it normalized by what has been seen then.

        Parameters
        ----------
        x : (F,) or (..., F) of float16, bfloat16, float32 or float64; any memory order. NaN is missing.
        mask : bools of the shape of x, or None: False is missing, whatever x holds.
        weights : (...) of float, >= 0, a weight of each observation, or None: 2 counts as two of the same; with update_rate,
            a factor of the weight that its age gives.
        out : where to put y, may be x, or None.

        Returns
        -------
        y : like x, within 3·2⁻²⁴ (float32) of the largest abs(y) of a feature.

        TypeError or ValueError for what does not fit; MemoryError: nothing is learned then.
        """
        ready, known = self._ready, self._known
        if ready is not None and known is not None and mask is None and weights is None and out is None:
            done = observe(known, x, ready.learns if self._training else ready.applies)
            if done is not None:
                if self._training:  # others may learn while one does not
                    self.__dict__["_known"] = done[0]
                return done[1]
        x = _validate.array("x", x)
        _where.require_host("Standardizer", x=x)
        ready, known = self._of(x.shape[-1], f"x must have {{}} features on its last axis, got shape {x.shape}")
        if out is not None:
            _validate.output(out, x, {"x": x}, {"mask": _as_array(mask), "weights": _as_array(weights)})
        there = None if mask is None else _mask(mask, x)
        if self._training:
            known = self._learned(ready, known, x, there, weights)
        elif weights is not None:
            raise ValueError("weights must be None in evaluation, where nothing is learned, got some")
        y = self._applied(ready, known, x, there, out)
        self.__dict__["_ready"] = ready
        if self._training and x.size:
            self.__dict__["_known"] = known
        return y

    def inverse(self, y: Array, *, out: Array | None = None) -> Array:
        """Return x = mean + y·√(var + eps), of what has been seen; what `clip` has cut off is lost.

        y : (F,) or (..., F), as of a call. Returns x, like y: one rounding of mean and of x each. TypeError or ValueError
        for what does not fit; where nothing has been seen x is y.
        """
        y = _validate.array("y", y)
        _where.require_host("Standardizer", y=y)
        ready, known = self._of(y.shape[-1], f"y must have {{}} features on its last axis, got shape {y.shape}")
        line = _line(ready, known[0])
        mean, scale = np.array(line[:, 1]), np.sqrt(line[:, 3] / line[:, 0])
        rows = y if y.ndim > 1 else y[None]
        into = None if out is None else _validate.output(out, y, {"y": y}, {})
        into = into if into is None or y.ndim > 1 else into[None]
        zero, one, threads = np.zeros(mean.size), np.ones(mean.size), ready.settings.num_threads
        x = normalize(rows, zero, one, scale, mean, axis=-1, eps=0.0, out=into, num_threads=threads)
        return x.reshape(y.shape) if out is None else out

    @property
    def training(self) -> bool:
        """Whether a call learns."""
        return self._training

    def train(self, mode: bool = True) -> Self:
        """Let calls learn, or, with False, not; return the object. TypeError if not a bool."""
        self._training = flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Let calls learn nothing; return the object. `fit` and `partial_fit` learn all the same."""
        return self.train(False)

    # ---- what has been seen ----

    @property
    def moments(self) -> Moments:
        """What has been seen of each feature; assigning sets it. AttributeError before the features are known."""
        known = self._known
        if known is None:
            if self.features is None:
                raise AttributeError("features must be known to have moments, got none: give them, or call it first")
            known = self._of(self.features, "")[1]
        return Moments._from_core(*known)

    @moments.setter
    def moments(self, value: Moments) -> None:
        _validate.instance("moments", value, Moments, "Moments")
        needed = f"moments must be of {{}} features, got {value.channels}"
        ready, _ = self._of(value.channels, needed)
        at = value._first_nonfinite()
        if at >= 0:
            raise ValueError(f"moments must be finite, got those of feature {at}, which are not")
        self.__dict__.update(_ready=ready, _known=_known(value, ready))

    def reset(self) -> Self:
        """Forget all that has been seen, and the names of features; return the object."""
        for name in ("_known", "feature_names_in_"):
            self.__dict__.pop(name, None)
        return self

    def state_dict(self) -> dict[str, Array]:
        """Return what another one of the same parameters needs to go on bit for bit, in fresh arrays.

        moments : float64 (F, 5): count, mean and m2 = Σ(x - mean)², the latter in two parts each. importance_dof : float64
        (F,), as of `Moments`. settings : str, JSON, all but features and num_threads. Names of features are not state.

        >>> sorted(Standardizer(3).state_dict())
        ['importance_dof', 'moments', 'settings']
        """
        known = self.moments
        return _arrays(known) | {"settings": np.array(self._checked().settings.text())}

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take over a state as `state_dict` gives it, all or nothing; the arrays are copied.

        TypeError or ValueError for a state of other parameters, which ``strict=False`` ignores, and for what cannot be.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of names to arrays, got {_validate.kind(state)}")
        if flag("strict", strict):
            self._checked().settings.require(state.get("settings"))
        self._take({name: value for name, value in state.items() if name != "settings"})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to the file `path` (.npz, no pickle, no suffix added), all or nothing. OSError."""
        state = self.state_dict()
        state_file.write_state(path, {"settings": state.pop("settings")} | state)

    def load(self, path: str | os.PathLike[str], *, strict: bool = True) -> None:
        """Read what `save` wrote, all or nothing; safe on files from anywhere. `features` must be known.

        ValueError for other parameters, which ``strict=False`` ignores, and for what is no such file; OSError;
        AttributeError where `features` is not known.
        """
        settings, moments_now = self._checked().settings, self.moments
        needed = entries.of(_arrays(moments_now))
        text = settings.require if flag("strict", strict) else lambda _: None
        limit = state_file.Text("settings", 4 * len(settings.text()), text)
        self._take(state_file.read_state(path, needed, limit))

    def _take(self, arrays: Mapping[str, Any]) -> None:
        features = np.shape(arrays.get("moments", ()))[:1]
        shape = (features[0] if features else self.features or 0, 5)
        own = entries.checked(arrays, entries.of(_arrays(Moments._from_table(np.zeros(shape)))))
        table, dof = own["moments"], own["importance_dof"]
        for name, values in own.items():
            _validate.each_channel(name, values, np.isfinite(values), "be finite")
        count = table[:, 0]
        _validate.each_channel("moments", count, count >= 0, "have count >= 0")
        _validate.each_channel("moments", table, (table == 0) | (count > 0)[:, None], "be 0 where count is 0")
        check_parts("moments", table)
        _validate.each_channel("importance_dof", dof, (dof >= 0) & (dof <= count), "be from 0 to the count")
        plain = Moments._from_table(table)
        self.moments = plain if (dof == plain.importance_dof).all() else Moments._from_table(table, dof)

    # ---- how ----

    def _checked(self) -> _Ready:
        """Give the parameters, checked."""
        ready = self._ready
        if ready is None:
            s = StandardizerSettings(*(getattr(self, name) for name in _PARAMETERS))
            missing = 0.0 if s.missing == "zero" else math.nan
            keep = 1.0 if s.update_rate is None else 1.0 - s.update_rate
            how = keep, s.eps, math.inf if s.clip is None else s.clip, s.center, s.scale, missing
            ready = _Ready(s, keep, (*how, True), (*how, False))
        return ready

    def _of(self, features: int, needed: str, *, anew: bool = False) -> tuple[_Ready, _Known]:
        """Give the parameters, checked, and what is known of so many features, after refusing another number of them."""
        ready, known = self._checked(), None if anew else self._known
        wanted = ready.settings.features if known is None else len(known[0])
        if ready.settings.features not in (None, wanted):
            raise ValueError(
                f"features must be {wanted}, of which something has been seen, got {ready.settings.features}: "
                "write reset() to begin anew"
            )
        if wanted is not None and features != wanted:
            raise ValueError(needed.format(wanted))
        if known is None:
            known = _known(Moments.empty(features), ready)
        return ready, known

    def _learned(self, ready: _Ready, known: _Known, x: Array, mask: Array | None, weights: ArrayLike | None) -> _Known:
        """Give what is known after the observations of x."""
        features = x.shape[-1]
        rows = x.reshape(math.prod(x.shape[:-1]), features)
        there = None if mask is None else mask.reshape(rows.shape)
        if len(rows) == 1 and weights is None and features > 0:
            one = rows.astype(np.float64 if x.dtype == np.float64 else np.float32)
            if there is not None:
                one[~there] = np.nan
            done = observe(known, one, ready.learns)
            if done is not None:
                return done[0]
        threads = ready.settings.num_threads
        given = None if weights is None else row_weights("weights", weights, x.shape[:-1])
        seen = _seen(rows, there, given, ready.keep, threads)
        fade = np.ones(features) if ready.keep == 1 else ready.keep**seen.values
        both = merge(_faded(Moments._from_core(*known), fade), seen.moments)
        at = both._first_nonfinite()
        if at >= 0:
            raise _not_finite(rows if there is None else np.where(there, rows, 0), at)
        return _known(both, ready)

    def _applied(self, ready: _Ready, known: _Known, x: Array, mask: Array | None, out: Array | None) -> Array:
        """Give x normalized by what is known."""
        settings = ready.settings
        gone = None if mask is None else ~mask
        if settings.missing == "zero":
            gone = np.isnan(x) if gone is None else gone | np.isnan(x)
        left = None if gone is None or settings.missing == "zero" else x[gone]  # before out, which may be x
        rows = x if x.ndim > 1 else x[None]
        into = None if out is None else (out if x.ndim > 1 else out[None])
        table = _line(ready, known[0])
        y = given_moments(rows, table, axis=-1, out=into, num_threads=settings.num_threads)
        if settings.clip is not None:
            with np.errstate(over="ignore"):  # a limit beyond the type of y is none
                limit = np.asarray(settings.clip).astype(y.dtype)
            np.clip(y, -limit, limit, out=y)
        y = y if x.ndim > 1 else y[0]
        if gone is not None:
            y[gone] = 0 if left is None else left
        return y if out is None else out

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._shown())})"

    def _shown(self) -> Iterator[str]:
        if self.features is not None:
            yield repr(self.features)
        for name in _PARAMETERS[1:]:
            value = getattr(self, name)
            if value is not _DEFAULTS[name] and value != _DEFAULTS[name]:
                yield f"{name}={value!r}"


_DEFAULTS = Standardizer._defaults()
_PARAMETERS = tuple(_DEFAULTS)


# ---- moments of observations -----------------------------------------------------------------------------


class _Seen(NamedTuple):
    """Moments of some observations, and how many values of each feature they had."""

    moments: Moments
    values: PerChannel


def _seen(rows: Array, there: Array | None, weights: Array | None, keep: float, threads: int | None) -> _Seen:
    """Give the moments of rows (n, F): of all at once, and again of each column that misses values, by itself."""
    if weights is not None and (weights == 0).any():
        counts = weights > 0
        rows, weights = rows[counts], weights[counts]
        there = None if there is None else there[counts]
    n, features = rows.shape
    if n == 0 or features == 0:
        return _Seen(Moments.empty(features), np.zeros(features))
    if weights is not None or keep != 1:
        rows = rows.astype(np.float64, copy=False)  # so that weights keep their digits
    all_rows = moments(rows, weights=_weights(weights, keep, n), num_threads=threads)
    values = np.full(features, float(n))
    missed = np.isnan(all_rows.mean) if there is None else np.isnan(all_rows.mean) | ~there.all(axis=0)
    if not missed.any():
        return _Seen(all_rows, values)
    table, dof = np.array(all_rows._table), np.array(all_rows.importance_dof)
    for c in np.flatnonzero(missed):
        found = ~np.isnan(rows[:, c])
        if there is not None:
            found &= there[:, c]
        column, own = rows[found, c][:, None], None if weights is None else weights[found]
        values[c] = len(column)
        of = moments(column, weights=_weights(own, keep, len(column)), num_threads=threads)
        table[c], dof[c] = of._table[0], of.importance_dof[0]
    plain = weights is None and keep == 1
    return _Seen(Moments._from_table(table, None if plain else dof), values)


def _weights(weights: Array | None, keep: float, n: int) -> Array | None:
    """Give the weights of n values, oldest first."""
    if keep == 1:
        return weights
    ages = keep ** np.arange(n - 1, -1, -1.0)
    return ages if weights is None else ages * weights


def _faded(m: Moments, share: PerChannel) -> Moments:
    """Give moments whose weights count for a share of what they did."""
    table = np.array(m._table)
    table[:, [0, 3, 4]] *= share[:, None]
    table[table[:, 0] == 0] = 0  # of nothing
    return Moments._from_table(table, None if m._dof is None else m._dof * share)


def _known(m: Moments, ready: _Ready) -> _Known:
    return m._table, np.array(m.importance_dof) if ready.keep != 1 or m._dof is not None else None


def _line(ready: _Ready, table: PerChannel) -> PerChannel:
    """Give the moments by which y is normalized with an eps of 0."""
    settings = ready.settings
    return standardizing(table, settings.eps, settings.center, settings.scale)


def _arrays(m: Moments) -> dict[str, Array]:
    return {"moments": np.array(m._table), "importance_dof": np.array(m.importance_dof)}


# ---- checks ----------------------------------------------------------------------------------------------


def _not_finite(rows: Array, at: int) -> ValueError:
    """Give the error for observations that leave moments of feature `at`, the first of such, which are not finite."""
    bad = np.argwhere(np.isinf(rows))
    came = f"values of feature {at} whose moments leave float64"
    if len(bad):
        came = f"{rows[tuple(bad[0])]} in feature {bad[0][1]}"
    return ValueError(f"x must be finite or NaN, which is missing, got {came}")


def _as_array(values: ArrayLike | None) -> Array | None:
    return values if isinstance(values, np.ndarray) else None


def _mask(mask: ArrayLike, x: Array) -> Array:
    checked: Array = _where.on_host(_validate.numbers("mask", mask))
    if checked.dtype != np.bool_:
        raise TypeError(f"mask must have bools, True where there is a value, got dtype {checked.dtype}")
    if checked.shape != x.shape:
        raise ValueError(f"mask must have shape {x.shape}, that of x, got {checked.shape}")
    return checked
