"""Graph norm as a layer: each graph by itself, about a learned share of its mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Unpack, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from batchnorm import _keywords, by_sample
from batchnorm._arrays import Array
from batchnorm._validate import Activation, MaybeNone
from batchnorm.layers import calls
from batchnorm.layers.by_sample import SampleLayer, SampleOptions
from batchnorm.layers.layer import Parameter
from batchnorm.layers.settings import Setting, Settings, flag


class GraphCallOptions(SampleOptions, total=False):
    """What a call of a `GraphNorm` may be told beside x and out."""

    segments: ArrayLike | None


@dataclass(frozen=True)
class GraphSettings(Settings):
    """Those of `GraphNorm`."""

    channels: int
    axis: int = 1
    eps: float = 1e-5
    alpha: bool = True
    gamma: bool = True
    beta: bool = True
    dtype: np.dtype[Any] = field(default=np.dtype(np.float32))
    activation: Activation | None = None
    num_threads: int | None = field(default=None, metadata={"saved": False})

    def __post_init__(self) -> None:
        self._check_channels()
        vars(self).update(alpha=flag("alpha", self.alpha))
        self._check_common()


class GraphNorm(SampleLayer):
    """Normalize each channel of each graph about a learned share of its mean: `graph_norm` with parameters.

    ``y = o/√(mean(o²) + eps)·gamma + beta, o = x - alpha·mean``      (Cai et al. 2021)

    Options are keywords here, and attributes to be read:

    ============== ========= ==================================================================================
    channels                 C >= 0, the size of x along `axis`
    axis           1         the channel axis of x, from -8 to 7
    eps            1e-5      what is added to mean(o²), >= 0; 1e-5 in PyTorch Geometric
    alpha          True      the share, (C,), which begins as 1. False: it is 1, as in `batch_norm` with segments
    gamma, beta, dtype, activation, num_threads: as in `LayerNorm`; gamma and beta are (C,)
    ============== ========= ==================================================================================

    All else as of `LayerNorm`; a call takes the `segments` of `graph_norm`, which say what rows are one graph.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import GraphNorm
    >>> layer = GraphNorm(1, eps=0)
    >>> layer.alpha[:] = 0.5
    >>> y = layer(np.array([[1.0], [3.0], [5.0]]), segments=[0, 0, 1])
    >>> y.round(4).ravel()
    array([0.    , 1.4142, 1.    ])
    >>> dx = layer.backward(np.ones((3, 1)))
    >>> layer.alpha -= 0.5 * layer.dalpha
    """

    settings: GraphSettings
    channels, axis = Setting[int](), Setting[int]()
    alpha = Parameter("Share of the mean that is taken away, as `gamma`.")

    @_keywords.keywords
    def __init__(
        self,
        channels: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        alpha: bool = True,
        gamma: bool = True,
        beta: bool = True,
        dtype: DTypeLike = np.float32,
        activation: Activation | None = None,
        num_threads: int | None = None,
    ) -> None:
        dtypes = cast("np.dtype[Any]", dtype)
        super().__init__(GraphSettings(channels, axis, eps, alpha, gamma, beta, dtypes, activation, num_threads))
        if self.settings.alpha:
            self._state = self._state._replace(alpha=np.ones(self.settings.channels, self.settings.dtype))

    @property
    def dalpha(self) -> Array | MaybeNone:
        """Gradient of alpha, as `dgamma`, with which it comes."""
        return self._results[3]

    def __call__(self, x: Array, *, out: Array | None = None, **options: Unpack[GraphCallOptions]) -> Array:
        """Return the normalized x, in training and evaluation alike.

        TypeError or ValueError for an argument that does not fit; nothing has changed or been written then.

        Parameters
        ----------
        segments : (N,) of int, ids from 0 that never fall: the graph of each row (axis 0). None: all rows are one.
        x, mask, weights, lengths, padding, residual, keep, out : as in a call of `LayerNorm`.

        Returns
        -------
        y : shape, dtype and memory order of x; `out` where given.

        >>> layer = GraphNorm(1, eps=0)
        >>> layer(np.array([[1.0], [3.0], [10.0], [30.0]]), segments=[0, 0, 1, 1]).ravel()
        array([-1.,  1., -1.,  1.])
        """
        if options and not options.keys() <= GraphCallOptions.__annotations__.keys():
            raise _keywords.unknown_keywords(GraphNorm.__call__, options)
        return self._called(x, out, options)

    def _normalized(self, x: Array, gamma: Array | None, beta: Array | None, told: Mapping[str, Any]) -> Any:
        x = calls.x_channels(x, self.settings.axis, self.settings.channels)
        # The function takes a copy of alpha.
        return by_sample.graph_norm(x, gamma, beta, self._state.alpha, axis=self.settings.axis, **told)


_keywords.options(GraphCallOptions, keep="x")(GraphNorm.__call__)
