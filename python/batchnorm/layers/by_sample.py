"""Norms of each sample by itself as layers: they keep parameters and what backward needs, and learn of no batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Self, Unpack, cast

import numpy as np
from numpy.typing import DTypeLike

from batchnorm import _keywords, _validate, by_sample, conventions
from batchnorm._arrays import Array
from batchnorm._parts import GROUPINGS, About, Grouping
from batchnorm._validate import Activation, Keep
from batchnorm._where import DeviceArray
from batchnorm.conventions import Library
from batchnorm.layers import calls
from batchnorm.layers.layer import Default, Layer, snapshot
from batchnorm.layers.place import follow
from batchnorm.layers.settings import Setting, Settings, int_within
from batchnorm.report import Report, parameter_findings
from batchnorm.saved import Saved

_BY_CONVENTION: Any = Default("by convention")
_UNSAVED = {"saved": False}


class SampleOptions(_keywords.Counted, total=False):
    """What a call of such a layer may be told beside x and out."""

    residual: Array | None
    keep: Keep | None


class SampleLayer(Layer):
    """What layers that normalize each sample by itself have in common."""

    def __call__(self, x: Array, *, out: Array | None = None, **options: Unpack[SampleOptions]) -> Array:
        """Return the normalized x, in training and evaluation alike.

        TypeError or ValueError for an argument that does not fit; nothing has changed or been written then.

        Parameters
        ----------
        x : ndarray of float16, bfloat16 (ml_dtypes), float32 or float64. Kept by reference: it must be unchanged when
            `backward` reads it.
        mask, weights, lengths, padding, residual : as in the function of the same name.
        out : where to put y: shape and dtype of x. It may be x itself; then there is no backward.
        keep : "x", or None where no backward follows: nothing is kept, nor of the call before.

        Returns
        -------
        y : shape, dtype and memory order of x; `out` where given.

        >>> layer = LayerNorm(2, eps=0)
        >>> layer(np.array([[1.0, 3.0]]))
        array([[-1.,  1.]])
        """
        if options and not options.keys() <= SampleOptions.__annotations__.keys():
            raise _keywords.unknown_keywords(SampleLayer.__call__, options)
        return self._called(x, out, options)

    def _called(self, x: Array, out: Array | None, options: Mapping[str, Any]) -> Array:
        if type(x) is not np.ndarray or self._place is not None:
            x = follow(self, x)
        y, saved = self._of_call(x, out, options)
        # One assignment once y is written; what backward has not is an empty call.
        self._state = self._state._replace(call=[] if saved.x is None and saved.y is None else [x, saved])
        return y

    def _of_call(self, x: Array, out: Array | None, options: Mapping[str, Any]) -> tuple[Array, Saved]:
        """Give y and what is saved."""
        state, settings = self._state, self.settings
        keep = options.get("keep", "x")
        gamma = state.gamma if keep is None else snapshot(state.gamma)
        told: dict[str, Any] = {"eps": settings.eps, "num_threads": settings.num_threads, "out": out, **options}
        if settings.activation is not None:
            told["activation"] = settings.activation
        return self._normalized(x, gamma, state.beta, told)  # type: ignore[no-any-return]

    def _normalized(self, x: Array, gamma: Array | None, beta: Array | None, told: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def freeze(self, *, affine: bool = True) -> Self:
        """Freeze gamma, beta and alpha until `unfreeze`: backward gives dx alone. Returns the layer; TypeError if not a bool."""
        return self._set_frozen(True, False, affine)

    def unfreeze(self, *, affine: bool = True) -> Self:
        """Undo `freeze`; return the layer. TypeError if not a bool."""
        return self._set_frozen(False, False, affine)

    def report(self) -> Report:
        """Return what is wrong, or may be, in gamma, beta and alpha; changes nothing. What is looked for is told by `Report`.

        >>> layer = GroupNorm(1, 3)
        >>> layer.gamma[1] = 0
        >>> print(layer.report())
        warning dead: gamma is 0 or below 0.001 of the median abs(gamma), 0.0 at the least, in channel 1
        """
        with np.errstate(all="ignore"):
            state = self._on_host()
            return Report(parameter_findings(state.gamma, state.beta, state.alpha))


_keywords.options(SampleOptions, keep="x")(SampleLayer.__call__)


# ---- layer and RMS norm ----


@dataclass(frozen=True)
class LineSettings(Settings):
    """Those of `LayerNorm`."""

    about: ClassVar[About] = "mean"

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    eps: float
    gamma: bool = True
    beta: bool = True
    dtype: np.dtype[Any] = field(default=np.dtype(np.float32))
    activation: Activation | None = None
    num_threads: int | None = field(default=None, metadata=_UNSAVED)

    def __post_init__(self) -> None:
        shape = _shape(self.shape)
        axes = tuple(range(-len(shape), 0)) if self.axes is _BY_CONVENTION else _axes(self.axes, len(shape))
        vars(self).update(shape=shape, axes=axes)
        self._check_common()

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of gamma and beta."""
        return self.shape

    def saved(self) -> dict[str, Any]:
        """Give what the numbers of a state depend on, in types that JSON has."""
        return super().saved() | {"shape": list(self.shape), "axes": list(self.axes), "about": self.about}


@dataclass(frozen=True)
class RMSSettings(LineSettings):
    """Those of `RMSNorm`."""

    about: ClassVar[About] = "zero"

    beta: bool = False


class _LineLayer(SampleLayer):
    settings: LineSettings
    shape, axes = Setting[tuple[int, ...]](), Setting[tuple[int, ...]]()

    def _normalized(self, x: Array, gamma: Array | None, beta: Array | None, told: Mapping[str, Any]) -> Any:
        self._fits(x)
        axes, norm = self.settings.axes, by_sample.layer_norm if self.settings.about == "mean" else by_sample.rms_norm
        return norm(x, gamma, beta, axes=axes[0] if len(axes) == 1 else axes, **told)

    def _fits(self, x: Any) -> None:
        """Refuse an x whose axes are of other sizes; what else is wrong is the function's to say."""
        shape, axes = self.settings.shape, self.settings.axes
        if not isinstance(x, np.ndarray | DeviceArray) or not all(-x.ndim <= d < x.ndim for d in axes):
            return
        if tuple(x.shape[d] for d in axes) != shape:
            raise ValueError(f"x must have shape {shape} on axes {axes}, got shape {x.shape}")


class LayerNorm(_LineLayer):
    """Normalize over some axes by their own statistics, for each index of the others: `layer_norm` with parameters.

    ``y = (x - mean)/√(var + eps)·gamma + beta``      (Ba, Kiros & Hinton 2016), var biased

    Options are keywords here, and attributes to be read:

    ============== ========= ==================================================================================
    shape                    int or tuple, the sizes of the axes that are normalized, and the shape of gamma and beta
    axes           the last  as many as `shape` has, rising, all from 0 on or all counted from the end (1 for the channels
                             of (N, C, H, W))
    eps            1e-5      what is added to var, >= 0
    convention     None      whose eps it is where that is not given: "torch" (1e-5), "keras" (1e-3), "flax" (1e-6), "onnx"
                             (1e-5)
    gamma, beta    True      False leaves that parameter out
    dtype          float32   of gamma and beta: or float16, float64. x has its own
    activation     None      "relu": max(y + residual, 0), the residual being given to the call
    num_threads    None      threads of each call; None: those of the process
    ============== ========= ==================================================================================

    TypeError and ValueError are raised for options that do not fit. A call that raises changes nothing. Memory: a
    reference to the x of the last call, 40 bytes for each of its lines. State, copies, pickles, threads: as `BatchNorm`.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import LayerNorm
    >>> layer = LayerNorm(3)
    >>> layer
    LayerNorm((3,), axes=(-1,), eps=1e-05)
    >>> x = np.array([[1, 2, 3], [4, 4, 10]], np.float32)
    >>> y = layer(x)
    >>> dx = layer.backward(np.ones_like(x))
    >>> layer.beta -= 0.5 * layer.dbeta
    """

    @_keywords.keywords
    def __init__(
        self,
        shape: int | tuple[int, ...],
        *,
        axes: int | tuple[int, ...] = _BY_CONVENTION,
        convention: Library | None = None,
        eps: float = _BY_CONVENTION,
        gamma: bool = True,
        beta: bool = True,
        dtype: DTypeLike = np.float32,
        activation: Activation | None = None,
        num_threads: int | None = None,
    ) -> None:
        whose, _ = conventions.of_samples(convention, "layer")
        eps = whose if eps is _BY_CONVENTION else eps
        given = cast("tuple[int, ...]", shape), cast("tuple[int, ...]", axes)
        super().__init__(LineSettings(*given, eps, gamma, beta, cast("np.dtype[Any]", dtype), activation, num_threads))


class RMSNorm(_LineLayer):
    """Divide by the root mean square over some axes, for each index of the others: `rms_norm` with parameters.

    ``y = x/√(mean(x²) + eps)·gamma + beta``      (Zhang & Sennrich 2019)

    Options and all else as of `LayerNorm`, but:

    ============== ========= ==================================================================================
    eps            1e-6      what is added to the mean square, >= 0
    convention     None      whose eps it is where that is not given: "torch" (2⁻²³, that of float32), "keras" (1e-6),
                             "flax" (1e-6), "onnx" (1e-5)
    beta           False     True gives it a shift
    ============== ========= ==================================================================================

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import RMSNorm
    >>> RMSNorm(2, eps=0)(np.array([[3.0, 4.0]])).round(4)
    array([[0.8485, 1.1314]])
    """

    @_keywords.keywords
    def __init__(
        self,
        shape: int | tuple[int, ...],
        *,
        axes: int | tuple[int, ...] = _BY_CONVENTION,
        convention: Library | None = None,
        eps: float = _BY_CONVENTION,
        gamma: bool = True,
        beta: bool = False,
        dtype: DTypeLike = np.float32,
        activation: Activation | None = None,
        num_threads: int | None = None,
    ) -> None:
        whose, _ = conventions.of_samples(convention, "rms")
        eps = whose if eps is _BY_CONVENTION else eps
        given = cast("tuple[int, ...]", shape), cast("tuple[int, ...]", axes)
        super().__init__(RMSSettings(*given, eps, gamma, beta, cast("np.dtype[Any]", dtype), activation, num_threads))


# ---- group norm ----


@dataclass(frozen=True)
class GroupSettings(Settings):
    """Those of `GroupNorm`."""

    by_place: ClassVar[int] = 2

    num_groups: int
    channels: int
    axis: int
    eps: float
    gamma: bool = True
    beta: bool = True
    dtype: np.dtype[Any] = field(default=np.dtype(np.float32))
    activation: Activation | None = None
    num_threads: int | None = field(default=None, metadata=_UNSAVED)
    grouping: Grouping = "contiguous"

    def __post_init__(self) -> None:
        _validate.choice("grouping", self.grouping, GROUPINGS)
        vars(self).update(num_groups=int_within("num_groups", self.num_groups, ">= 1", 1))
        self._check_channels()
        if self.channels % self.num_groups:
            raise ValueError(f"num_groups must divide the channels, {self.channels}, got {self.num_groups}")
        self._check_common()


class GroupNorm(SampleLayer):
    """Normalize groups of channels of each sample by their own statistics: `group_norm` with parameters.

    ``y = (x - mean)/√(var + eps)·gamma + beta``      (Wu & He 2018), var biased

    Options are keywords here, and attributes to be read:

    ============== ============ ===============================================================================
    num_groups                  int >= 1 that divides the channels
    channels                    C >= 0, the size of x along `axis`
    axis           1            the channel axis of x, from -8 to 7, but not that of the samples
    eps            1e-5         what is added to var, >= 0
    convention     None         whose axis and eps these are where they are not given: "torch" and "onnx" (1, 1e-5),
                                "keras" (-1, 1e-3), "flax" (-1, 1e-6)
    grouping       "contiguous" whose channels make a group: "contiguous", neighbours; "strided", every num_groups-th, as
                                in MLX
    gamma, beta, dtype, activation, num_threads: as in `LayerNorm`; gamma and beta are (C,)
    ============== ============ ===============================================================================

    All else as of `LayerNorm`.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import GroupNorm
    >>> layer = GroupNorm(2, 4)
    >>> layer
    GroupNorm(2, 4, axis=1, eps=1e-05)
    >>> layer(np.arange(16.0).reshape(2, 4, 2))[0, :2].round(3)
    array([[-1.342, -0.447],
           [ 0.447,  1.342]])
    """

    settings: GroupSettings
    num_groups, channels, axis = Setting[int](), Setting[int](), Setting[int]()
    grouping = Setting[Grouping]()

    @_keywords.keywords
    def __init__(
        self,
        num_groups: int,
        channels: int,
        *,
        axis: int = _BY_CONVENTION,
        convention: Library | None = None,
        eps: float = _BY_CONVENTION,
        grouping: Grouping = "contiguous",
        gamma: bool = True,
        beta: bool = True,
        dtype: DTypeLike = np.float32,
        activation: Activation | None = None,
        num_threads: int | None = None,
    ) -> None:
        whose = conventions.of_samples(convention, "group")
        eps = whose[0] if eps is _BY_CONVENTION else eps
        axis = whose[1] if axis is _BY_CONVENTION else axis
        dtypes = cast("np.dtype[Any]", dtype)
        given = num_groups, channels, axis, eps, gamma, beta, dtypes, activation, num_threads, grouping
        super().__init__(GroupSettings(*given))

    def _normalized(self, x: Array, gamma: Array | None, beta: Array | None, told: Mapping[str, Any]) -> Any:
        settings = self.settings
        x = calls.x_channels(x, settings.axis, settings.channels)
        whose: Any = {"grouping": settings.grouping, "axis": settings.axis}
        return by_sample.group_norm(x, settings.num_groups, gamma, beta, **whose, **told)


# ---- checks ----


def _shape(value: Any) -> tuple[int, ...]:
    sizes = value if isinstance(value, tuple | list) else (value,)
    if not sizes:
        raise ValueError(f"shape must have at least 1 size, got {value!r}")
    if len(sizes) > 8:
        raise ValueError(f"shape must have at most 8 sizes, got {len(sizes)}")
    return tuple(int_within("shape", size, ">= 0", 0) for size in sizes)


def _axes(value: Any, count: int) -> tuple[int, ...]:
    given = value if isinstance(value, tuple | list) else (value,)
    axes = tuple(int_within("axes", axis, "from -8 to 7", -8, 7) for axis in given)
    rises = all(a < b for a, b in pairwise(axes))
    if len(axes) != count or not rises or (axes[0] < 0) != (axes[-1] < 0):
        raise ValueError(
            f"axes must be as many as shape has sizes, {count}, rising, and all >= 0 or all below 0, got {value}"
        )
    return axes
