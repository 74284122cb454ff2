"""What calls leave for those that follow, and what these return: values, which do not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from batchnorm import _core, _validate, _where
from batchnorm._arrays import Array, Axis, Layout, PerChannel
from batchnorm._parts import ALL, Part
from batchnorm._passes import ReluMask, two_sum
from batchnorm._validate import MaybeNone
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from batchnorm.running import Renorm


@dataclass(frozen=True, eq=False, init=False)
class Saved:
    """What `batch_norm` and its like leave for `backward`, `jvp`, `double_backward`, the halves and `update_running`.

    Attributes
    ----------
    x : the input, by reference (not copied): it must be unchanged when a derivative reads it. None where y is kept
        instead, or nothing (``keep=None``, or ``out=x``, which has overwritten it): there is no derivative then.
    moments : Moments of the batch: an entry for each channel; with segments and ghosts for each of these and channel,
        segment first (``moments.split(C)``); of `group_norm` for each sample and group, of `layer_norm` for each index of
        the axes that were not normalized. None where statistics were given (`normalize`).
    gamma : (C,) or None, by reference; a copy where y is kept.
    axis : int >= 0, the channel axis; of `layer_norm` and `rms_norm` a tuple, the axes that were normalized.
    eps : float.
    y : the output, by reference, where it is kept instead of x: it must be unchanged when a derivative reads it.
    beta : (C,) or None, a copy; only where y is kept.
    given : (mean, var), (C,), the statistics that were given (copies, float64). None where they are those of the batch.
    part : Part, what of x counted and what shared statistics.
    relu : ReluMask where ReLU followed, else None.
    has_residual : whether a residual was added, which has a gradient then.
    renorm : Renorm or None, what the batch was corrected towards.
    layout : how x lay in memory, which weights and mask follow; None where x is C-contiguous and none of the above
        was given.

    For statistics that were merged over several batches or ranks, use ``dataclasses.replace(saved, moments=merged)``:
    the verbs take mean, variance and count from `moments`; `rstd`, `r` and `d` follow them.
    """

    x: Array | None
    moments: Moments | MaybeNone
    gamma: Array | None
    axis: Axis
    eps: float
    y: Array | None = None
    beta: Array | None = None
    given: tuple[PerChannel, PerChannel] | None = None
    part: Part = ALL
    relu: ReluMask | None = None
    has_residual: bool = False
    renorm: Renorm | None = None
    layout: Layout | None = None

    def __init__(
        self, x: Array | None, moments: Moments | None, gamma: Array | None, axis: Axis, eps: float, **others: Any
    ) -> None:
        # A frozen dataclass's own __init__, which assigns past its own refusal, takes twice as long; what is not
        # assigned here is the default of the class.
        fields = self.__dict__
        fields["x"], fields["moments"], fields["gamma"] = x, moments, gamma
        fields["axis"], fields["eps"] = axis, eps
        if others:
            fields.update(others)

    __repr__ = _validate.summary

    @cached_property
    def rstd(self) -> PerChannel:
        """1/√(var + eps) with the biased variance of `moments`, or the one given: float64, of their shape.

        Of `rms_norm` 1/√(mean(x²) + eps), of `graph_norm` 1/√(mean((x - alpha·mean)²) + eps).
        """
        alpha: PerChannel | float = 0.0
        if self.part.alpha is not None and self.moments is not None:
            alpha = np.resize(_where.on_host(self.part.alpha), self.moments.channels).astype(np.float64)
        if self.moments is not None and (self.part.about == "zero" or self.part.alpha is not None):
            with np.errstate(all="ignore"):
                total = self.moments.var() + ((1 - alpha) * self.moments.mean) ** 2 + self.eps
                return np.where(total == 0, 0.0, 1.0 / np.sqrt(total))
        if self.moments is not None:
            return _core.rstd(self.moments._table, self.eps)
        assert self.given is not None
        with np.errstate(all="ignore"):
            total = _where.on_host(self.given[1]) + self.eps
            return np.where(total == 0, 0.0, 1.0 / np.sqrt(total))

    @property
    def r(self) -> PerChannel:
        """The correction of the spread by `renorm`, after clipping: float64, of each set and channel; 1 without."""
        return self._correction[0]

    @property
    def d(self) -> PerChannel:
        """The correction of the mean by `renorm`, after clipping: float64, of each set and channel; 0 without."""
        return self._correction[1]

    @cached_property
    def _correction(self) -> tuple[PerChannel, PerChannel]:
        if self.moments is not None and self.renorm is not None:
            return self.renorm.correction(self.moments, self.eps)
        of = len(self.given[0]) if self.given is not None else 0
        of = of if self.moments is None else self.moments.channels * self.part.sums_an_entry
        return np.ones(of), np.zeros(of)

    def affine(self) -> tuple[PerChannel, PerChannel]:
        """Scale and shift of y = x̂·scale + shift, of each set and channel, float64: gamma·r and beta + gamma·d."""
        gamma = _where.fetched(self.gamma)
        return affine(gamma, self.beta, (self.r, self.d))

    @property
    def saved_bytes(self) -> int:
        """Bytes of tensors that are kept beside y: those of x where it is kept, and of a mask of ReLU."""
        return (0 if self.x is None else self.x.nbytes) + (0 if self.relu is None else self.relu.nbytes)


class Gradients(NamedTuple):
    """Gradients of a loss: `dx` and `dresidual` like x, `dgamma` and `dbeta` (C,); None where not asked for."""

    dx: Array | MaybeNone
    dgamma: Array | MaybeNone
    dbeta: Array | MaybeNone
    dresidual: Array | MaybeNone = None

    def __repr__(self) -> str:
        return _validate.summary(self)


class _BesideAlpha:
    """What has dalpha beside the entries of a tuple."""

    dalpha: Array | MaybeNone = None

    @classmethod
    def beside(cls, others: Iterable[Array | MaybeNone], dalpha: Array | None) -> Self:
        """Give the entries with dalpha."""
        new = cls(*others)
        new.dalpha = dalpha
        return new

    def _replace(self, **fields: Any) -> Self:
        """Return one of which these fields, or dalpha, are others."""
        dalpha = fields.pop("dalpha", self.dalpha)
        return self.beside(super()._replace(**fields), dalpha)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, dalpha={_validate.shown(self.dalpha)})"


class GraphGradients(_BesideAlpha, Gradients):
    """Those of `graph_norm`: the same, and `dalpha`, (C,), float64 for an alpha of float64, else float32.

    None where that of gamma is not asked for. Beside the four, not among them: as a tuple it has four entries too.
    """


class SecondGradients(NamedTuple):
    """Gradients of gradients: `ddy` and `dx` like x, `dgamma` (C,); None where not asked for.

    They are the last order there is: a function of derivatives that is given one raises NotImplementedError.
    """

    ddy: Array | MaybeNone
    dx: Array | MaybeNone
    dgamma: Array | MaybeNone

    def __repr__(self) -> str:
        return _validate.summary(self)


class GraphSecondGradients(_BesideAlpha, SecondGradients):
    """Those of `graph_norm`: the same, and `dalpha`, (C,), as in `GraphGradients`; as a tuple it has three entries too."""


class GradSums:
    """The sums of the first half of the backward pass; those of several parts of a batch add up with ``+``.

    Attributes
    ----------
    count : float64, values that share the statistics (or the sum of their weights): one for each sum.
    sum_dy : float64, sum(dy).
    sum_dy_xmu : float64, sum(dy·(x - mean)), about the mean of the moments they were computed with (about alpha times
        it in `graph_norm`, about 0 in `rms_norm`). Where y is kept instead of x, sum(dy·(y - beta)), about what y has
        in the place of a mean.
    """

    __slots__ = ("_table", "at", "count")
    at: Any  # the table on a device, where it is there

    def __init__(self, count: PerChannel, table: PerChannel) -> None:
        # The table is (C, 4): sum_dy, its low part, sum_dy_xmu, its low part. Made by grad_sums, added here.
        self.at = None
        if type(table) is not np.ndarray or table.dtype != np.float64 or table.ndim != 2:
            raise TypeError(f"table must be a float64 array of 2 dimensions, got {_validate.kind(table)}")
        if table.shape[1] != 4:
            raise ValueError(f"table must have 4 columns, got {table.shape[1]}")
        self._table = np.ascontiguousarray(table)
        self.count = _validate.channel_values("count", count, len(self._table))

    @property
    def sum_dy(self) -> PerChannel:
        """sum(dy), which is dbeta."""
        return self._table[:, 0] + self._table[:, 1]

    @property
    def sum_dy_xmu(self) -> PerChannel:
        """sum(dy·(x - mean)), which is dgamma/rstd."""
        return self._table[:, 2] + self._table[:, 3]

    def __add__(self, other: GradSums) -> GradSums:
        if not isinstance(other, GradSums):
            return NotImplemented
        if other._table.shape != self._table.shape:
            raise ValueError(f"sums must have {self._table.shape[0]} channels to be added, got {other._table.shape[0]}")
        a, b = self._table, other._table
        table = np.empty_like(a)
        table[:, ::2], rounded_off = two_sum(a[:, ::2], b[:, ::2])
        table[:, 1::2] = a[:, 1::2] + b[:, 1::2] + rounded_off
        return GradSums(self.count + other.count, table)

    def __radd__(self, other: object) -> GradSums:
        """Let sum() begin with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __repr__(self) -> str:
        return f"GradSums(channels={self._table.shape[0]})"


class _DeviceGradSums(GradSums):
    """Sums on a device, where they are until somebody looks at them."""

    __slots__ = ("_on_host", "_total")

    def __init__(self, total: Callable[[], PerChannel], table: Any) -> None:
        self.at, self._total = table, total
        self._on_host: PerChannel | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return GradSums, (self.count, self._table)

    @property
    def _table(self) -> PerChannel:  # type: ignore[override]
        if self._on_host is None:
            self._on_host = self.at.to_numpy()
        known: PerChannel = self._on_host
        return known

    @property
    def count(self) -> PerChannel:  # type: ignore[override]
        """As `GradSums` has it."""
        return self._total()


def grad_sums_of(total: Callable[[], PerChannel], table: Any) -> GradSums:
    """Give the sums of a table, of which total() tells the counts."""
    return _DeviceGradSums(total, table) if _where.on_device(table) else GradSums(total(), table)


def affine(
    gamma: Array | None, beta: Array | None, correction: tuple[PerChannel, PerChannel]
) -> tuple[PerChannel, PerChannel]:
    """Give gamma·r and beta + gamma·d, of each set and channel; None stands for 1 and 0."""
    r, d = correction
    with np.errstate(all="ignore"):  # NaN and infinity stay in their channel
        a = 1.0 if gamma is None else np.resize(gamma, r.shape).astype(np.float64)
        b = 0.0 if beta is None else np.resize(beta, r.shape).astype(np.float64)
        return r * a, d * a + b
