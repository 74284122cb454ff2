"""Instance norm as a layer: each sample by itself, in evaluation by running statistics where it keeps them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import DTypeLike

from batchnorm import _keywords, _validate, _where, by_sample, conventions
from batchnorm._arrays import Array, PerChannel
from batchnorm._validate import Activation, MaybeNone, WeightsAre
from batchnorm.conventions import Library
from batchnorm.forward import normalize
from batchnorm.layers import calls
from batchnorm.layers.by_sample import SampleLayer
from batchnorm.layers.layer import SHOWN_FROZEN, Default, is_x
from batchnorm.layers.place import beside, follow, statistics_at
from batchnorm.layers.settings import Setting, Settings, flag, int_within
from batchnorm.layers.statistics import MOST_UPDATES, Statistics
from batchnorm.saved import Saved

_BY_CONVENTION: Any = Default("by convention")
_LATER = {"later": True}


@dataclass(frozen=True)
class InstanceSettings(Settings):
    """Those of `InstanceNorm`."""

    # What statistics ask of settings, and these have not.
    debias: ClassVar[bool] = False
    weights_are: ClassVar[WeightsAre | None] = None

    channels: int
    axis: int
    eps: float
    gamma: bool = True
    beta: bool = True
    dtype: np.dtype[Any] = field(default=np.dtype(np.float32))
    activation: Activation | None = None
    running: bool = field(default=False, metadata=_LATER)
    update_rate: float = field(default=0.1, metadata=_LATER)
    ddof: int = field(default=1, metadata=_LATER)
    num_threads: int | None = field(default=None, metadata={"saved": False})

    def __post_init__(self) -> None:
        self._check_channels()
        self._check_common()
        vars(self).update(
            running=flag("running", self.running),
            update_rate=_validate.share("update_rate", self.update_rate),
            ddof=int_within("ddof", self.ddof, "0 (biased) or 1 (unbiased)", 0, 1),
        )


class InstanceNorm(SampleLayer):
    """Normalize each channel of each sample by its own statistics: `instance_norm` with parameters.

    ``y = (x - mean)/√(var + eps)·gamma + beta``      (Ulyanov, Vedaldi & Lempitsky 2016), var biased

    With `running` it keeps running statistics too, by which it normalizes in evaluation, and where they are frozen. A
    training call takes the means over its samples of their mean and of their variance m2/(n - ddof) into them, in float64,
    as PyTorch's track_running_stats does; samples of which nothing counts are left out:

    ``running = (1 - update_rate)·running + update_rate·batch``

    Options are keywords here, and attributes to be read:

    ============== ========= ==================================================================================
    channels                 C >= 0, the size of x along `axis`
    axis           1         the channel axis of x, from -8 to 7, but not that of the samples
    eps            1e-5      what is added to var, >= 0
    convention     None      whose axis and eps these are where they are not given: "torch" and "onnx" (1, 1e-5), "keras"
                             (-1, 1e-3), "flax" (-1, 1e-6)
    running        False     whether it keeps running statistics
    update_rate    0.1       share of the new batch in them, from 0 to 1: PyTorch's momentum
    ddof           1         1: running variances are unbiased, as PyTorch's; 0: biased
    gamma, beta, dtype, activation, num_threads: as in `LayerNorm`; gamma and beta are (C,). PyTorch's has neither
    ============== ========= ==================================================================================

    A batch that would leave running statistics that are not finite is not learned, with a RuntimeWarning. Weights other
    than 0 and 1 need ddof=0. With `out`, a training call that learns takes the memory of y once more. All else as of
    `LayerNorm`.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import InstanceNorm
    >>> layer = InstanceNorm(1, eps=0, running=True)
    >>> layer(np.array([[[1.0, 3.0]], [[10.0, 30.0]]])).ravel()
    array([-1.,  1., -1.,  1.])
    >>> layer.running_mean, layer.running_var       # 0.1·(2 + 20)/2, 0.9·1 + 0.1·(2 + 200)/2
    (array([1.1]), array([11.]))
    """

    settings: InstanceSettings
    channels, axis = Setting[int](), Setting[int]()
    running, update_rate, ddof = Setting[bool](), Setting[float](), Setting[int]()

    @_keywords.keywords
    def __init__(
        self,
        channels: int,
        *,
        axis: int = _BY_CONVENTION,
        convention: Library | None = None,
        eps: float = _BY_CONVENTION,
        running: bool = False,
        update_rate: float = 0.1,
        ddof: int = 1,
        gamma: bool = True,
        beta: bool = True,
        dtype: DTypeLike = np.float32,
        activation: Activation | None = None,
        num_threads: int | None = None,
    ) -> None:
        whose = conventions.of_samples(convention, "instance")
        eps = whose[0] if eps is _BY_CONVENTION else eps
        axis = whose[1] if axis is _BY_CONVENTION else axis
        dtypes = cast("np.dtype[Any]", dtype)
        super().__init__(
            InstanceSettings(
                channels, axis, eps, gamma, beta, dtypes, activation, running, update_rate, ddof, num_threads
            )
        )

    # ---- running statistics ----

    @property
    def running_mean(self) -> PerChannel | MaybeNone:
        """Running mean, float64 (C,), read-only; None without `running`."""
        return self._of_statistics("mean")

    @property
    def running_var(self) -> PerChannel | MaybeNone:
        """Running variance (unbiased for ddof=1, biased for 0), as `running_mean`."""
        return self._of_statistics("var")

    @property
    def update_count(self) -> int:
        """Training calls that updated the running statistics since the start or `reset_statistics`."""
        return self._state.statistics[0].update_count if self.settings.running else 0

    @property
    def frozen_statistics(self) -> bool:
        """Whether training calls use the running statistics and leave them alone."""
        return self._frozen[0]

    def reset_statistics(self) -> None:
        """Forget all batches: running mean 0, running variance 1, update count 0. Parameters stay."""
        self._state = self._state._replace(statistics=self._initial_statistics())

    def freeze(self, *, statistics: bool = True, affine: bool = True) -> Self:
        """Freeze what is True, until `unfreeze`, through ``train()`` and ``eval()``; return the layer.

        Frozen running statistics normalize training calls too, and learn nothing. Frozen affine: backward gives dx alone.
        TypeError if not bools.
        """
        return self._set_frozen(True, statistics, affine)

    def unfreeze(self, *, statistics: bool = True, affine: bool = True) -> Self:
        """Undo `freeze` for what is True; return the layer. TypeError if not bools."""
        return self._set_frozen(False, statistics, affine)

    def _shown_frozen(self) -> str:
        return SHOWN_FROZEN[self._frozen] if self.settings.running else ""

    def _of_statistics(self, name: str) -> PerChannel | None:
        if not self.settings.running:
            return None
        values: PerChannel = _where.on_host(getattr(self._state.statistics[0], name))
        values.flags.writeable = False
        return values

    def _initial_statistics(self) -> tuple[Statistics, ...]:
        return (Statistics.initial(self.settings),) if self.settings.running else ()

    def _statistics_arrays(self, statistics: tuple[Statistics, ...]) -> dict[str, Array]:
        return statistics[0].arrays(self.settings) if self.settings.running else {}

    def _statistics_of(self, arrays: Mapping[str, Array], strict: bool) -> tuple[Statistics, ...]:
        return (Statistics.of_arrays(arrays, self.settings, strict),) if self.settings.running else ()

    # ---- calls ----

    def _called(self, x: Array, out: Array | None, options: Mapping[str, Any]) -> Array:
        if not self.settings.running:
            return super()._called(x, out, options)
        if type(x) is not np.ndarray or self._place is not None:
            x = follow(self, x)
        if not self._learns():
            y, saved = self._of_call(x, out, options)
            before = (
                self._state.call
            )  # the state itself stays: training calls of other threads may have learned meanwhile
            self._evaluation = [] if saved.x is None and saved.y is None else [x, saved], before
            before.clear()  # backward does not look there any more
            return y
        if out is not None:  # which is written last, as what comes before may fail
            x, out = _validate.array("x", x), _where.recognized_or_same("out", out)
            others = {"x": x} if options.get("residual") is None else {"x": x, "residual": options["residual"]}
            apart = {name: _where.recognized_or_same(name, getattr(self, name)) for name in ("gamma", "beta")}
            _validate.output(out, x, others, apart)
        y, saved = self._of_call(x, None, options)
        statistics = self._learned(saved)
        is_kept = saved.x is not None and not is_x(out, x)
        after = self._state._replace(call=[x, saved] if is_kept else [], statistics=(statistics,))
        if out is not None:
            _where.copy_into(out, _where.recognized_or_same("y", y))
        self._state, self._evaluation = after, None
        return y if out is None else _where.given_back(out, x)

    def _learns(self) -> bool:
        return self.settings.running and self._training and not self._frozen[0]

    def _normalized(self, x: Array, gamma: Array | None, beta: Array | None, told: Mapping[str, Any]) -> Any:
        settings = self.settings
        x = calls.x_channels(x, settings.axis, settings.channels)
        if not settings.running or self._learns():
            return by_sample.instance_norm(x, gamma, beta, axis=settings.axis, **told)
        now = self._state.statistics[0]
        return normalize(x, now.mean, now.var, gamma, beta, axis=settings.axis, save=True, **told)

    def _learned(self, saved: Saved) -> Statistics:
        """Give the running statistics after a batch."""
        before, seen, settings = self._state.statistics[0], saved.moments, self.settings
        now = statistics_at(before, None)
        assert seen is not None
        samples = len(seen.count) // settings.channels if settings.channels else 0
        counts, mean, var = (
            a.reshape(samples, settings.channels) for a in (seen.count > 0, seen.mean, seen.var(settings.ddof))
        )
        if not counts.any():
            return before
        with np.errstate(all="ignore"):
            new = [_blend(old, a, counts, settings.update_rate) for old, a in ((now.mean, mean), (now.var, var))]
        bad = ~(np.isfinite(new[0]) & np.isfinite(new[1]))
        if bad.any():
            warnings.warn(
                f"x must leave finite running statistics, got a mean or variance that is not in channel {bad.argmax()}: "
                "nothing was learned of it",
                RuntimeWarning,
                stacklevel=calls.stacklevel_of_caller(),
            )
            return before
        return beside(before, Statistics(new[0], new[1], min(now.update_count + 1, MOST_UPDATES), None))


def _blend(old: PerChannel, values: Array, counts: Array, rate: float) -> PerChannel:
    """Give the running statistic after the mean over those samples that count; channels without any stay."""
    found = counts.sum(axis=0)
    mean = np.where(counts, values, 0.0).sum(axis=0) / np.maximum(found, 1)
    new = mean if rate == 1 else (1 - rate) * old + rate * mean
    return np.where((found > 0) & (rate > 0), new, old)
