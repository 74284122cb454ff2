"""What a layer has beside its forward pass: parameters and their gradients, modes, backward, a state to be saved."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self, Unpack

import numpy as np

from batchnorm import _keywords, _validate, _where, state_file
from batchnorm._arrays import Array
from batchnorm._keywords import NoOptions
from batchnorm._validate import MaybeNone
from batchnorm.derivatives import NEEDS, Gradient, backward
from batchnorm.layers import entries
from batchnorm.layers.place import Place, state_at
from batchnorm.layers.settings import Setting, Settings, flag, kind
from batchnorm.layers.statistics import Statistics
from batchnorm.saved import Saved

# What backward needs of a call: [x, what the function saved or what gives the gradients for a dy]; empty where there is
# no backward (any more). Each call makes one, so that it also tells calls apart. A class of its own takes four times as
# long to make.
Call = list[Any]
# What backward has given: dgamma, dbeta, dresidual and dalpha. Replaced by one assignment.
Results = list[Array | None]


class State(NamedTuple):
    """All that a call or a load changes, replaced by one assignment.

    So that nothing that ends a call in its midst, an error, a signal or a thread that looks, finds a part of it done.
    """

    gamma: Array | None
    beta: Array | None
    statistics: tuple[Statistics, ...]  # one per domain; replaced as a whole, never changed
    call: Call  # the last that was no mere evaluation
    # The last that normalized or updated: domain, moments (of each ghost), size of x. Never changed once it is here.
    batch: Any
    largest_size: int  # of an x that did
    alpha: Array | None = None  # of `GraphNorm`


class Default:
    """The default of an argument whose value depends on others."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return f"<{self._text}>"


_ALL: Any = Default("all")


class Parameter:
    """Gamma, beta or alpha of a layer. Assigning copies and checks."""

    def __init__(self, text: str) -> None:
        self.__doc__ = text

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: Any, kind: type) -> Array | MaybeNone:
        return self if layer is None else getattr(layer._state, self._name)

    def __set__(self, layer: Any, value: Array | None) -> None:
        now, name = getattr(layer._state, self._name), self._name
        if now is None:
            if value is not None:
                raise ValueError(f"{name} must be None in a layer built with {name}=False, got {kind(value)}")
            return
        checked = entries.parameter(name, value, layer.settings.parameter_shape, layer.settings.dtype)
        if value is not now:  # in-place operators assign the very array they have changed: it must stay the same array
            layer._state = layer._state._replace(**{name: checked})
            if layer._place is not None or not isinstance(checked, np.ndarray):
                layer._place = ()  # nowhere as a whole


# What a repr says of freeze() where anything is frozen: statistics, affine.
SHOWN_FROZEN = {(True, True): "", (True, False): "affine=False", (False, True): "statistics=False"}


class Layer:
    """What a layer has beside its forward pass, and what is learned of batches."""

    settings: Settings
    num_threads = Setting[int | None]()
    eps, dtype = Setting[float](), Setting[np.dtype[Any]]()
    activation = Setting[_validate.Activation | None]()
    gamma = Parameter(
        "Scale, of `dtype`, or None: (C,), or of the shape that is normalized. ``gamma -= g`` works in place."
    )
    beta = Parameter("Shift, as `gamma`.")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        gamma = np.ones(settings.parameter_shape, settings.dtype) if settings.gamma else None
        beta = np.zeros(settings.parameter_shape, settings.dtype) if settings.beta else None
        # Each of these is replaced by one assignment. Evaluation calls write _evaluation alone, so that those of other
        # threads never take back what a training call has learned meanwhile.
        self._state = State(gamma, beta, self._initial_statistics(), [], None, 0)
        # The last, and the call of _state that it came after.
        self._evaluation: tuple[Call, Call] | None = None
        self._results: Results = [None, None, None, None]
        self._place: Place | tuple[()] | None = None  # where the state is: that of the last x
        self._training = True
        self._frozen = False, False  # statistics, affine

    # ---- parameters, gradients, modes ----

    @property
    def dgamma(self) -> Array | MaybeNone:
        """Gradient of gamma from the last backward, like it; None before it or if not asked for."""
        return self._results[0]

    @property
    def dbeta(self) -> Array | MaybeNone:
        """Gradient of beta, as `dgamma`."""
        return self._results[1]

    @property
    def dresidual(self) -> Array | MaybeNone:
        """Gradient of the residual from the last backward, like x; None where there was none, or it was not asked for."""
        return self._results[2]

    @property
    def training(self) -> bool:
        """True: batch statistics, and updates. False: running statistics. Without these it changes nothing."""
        return self._training

    def train(self, mode: bool = True) -> Self:
        """Switch to training (or, with False, to evaluation); return the layer. TypeError if not a bool."""
        self._training = flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation: running statistics, no updates. Returns the layer."""
        return self.train(False)

    @property
    def frozen_affine(self) -> bool:
        """Whether backward leaves out the gradients of gamma and beta."""
        return self._frozen[1]

    def _set_frozen(self, frozen: bool, statistics: bool, affine: bool) -> Self:
        which = flag("statistics", statistics), flag("affine", affine)
        before = self._frozen
        self._frozen = frozen if which[0] else before[0], frozen if which[1] else before[1]
        return self

    # ---- backward ----

    @_keywords.options(NoOptions)
    def backward(
        self, dy: Array, *, needs: Iterable[Gradient] = _ALL, out: Array | None = None, **others: Unpack[NoOptions]
    ) -> Array | MaybeNone:
        """Return dx for the last call of the layer, and set `dgamma`, `dbeta` and `dresidual`: `backward` of functions.

        It belongs to that call whatever has happened since: gamma, statistics and mode are those of then. After a call
        that normalized by running statistics, these are constants. It may be called again. RuntimeError without such a
        call, or where it had ``out=x`` or ``keep=None``; TypeError or ValueError for an argument that does not fit: nothing
        has changed or been written then.

        Parameters
        ----------
        dy : gradient of y: shape and dtype of that x.
        needs : which of "x", "gamma", "beta" and "residual" to compute; the others become None. Default: all.
        out : where to put dx. It may be dy itself; or x itself, for the last backward.

        Returns
        -------
        dx : shape, dtype and memory order of x; None without "x" in `needs`.

        >>> from batchnorm import BatchNorm
        >>> layer = BatchNorm(1)
        >>> y = layer(np.array([[1.0], [2.0], [6.0]]))
        >>> dx = layer.backward(np.array([[1.0], [1.0], [1.0]]))
        >>> layer.dbeta
        array([3.], dtype=float32)
        """
        if others:
            _keywords.no_options("Layer.backward", others)
        call, evaluation = self._state.call, self._evaluation
        if evaluation is not None and evaluation[1] is call:
            call = evaluation[0]
        try:
            x, saved = call
        except ValueError:
            raise RuntimeError(
                "backward must follow a call of the layer that left its x intact, got no such call: "
                "call the layer first, and without out=x or keep=None"
            ) from None
        names: Sequence[Gradient] = NEEDS
        overwrites = is_x(out[0] if isinstance(out, tuple) and out else out, x)
        if needs is not _ALL or self._frozen[1]:
            asked = zip(NEEDS, _validate.needs_among(NEEDS, NEEDS if needs is _ALL else needs), strict=True)
            left_out = ("gamma", "beta") if self._frozen[1] else ()
            names = tuple(n for n, wanted in asked if wanted and n not in left_out)
        results: Results = [None, None, None, None]  # before anything is written, as `out` may be
        if overwrites and "x" in names:
            call.clear()  # before its first value is gone: from there on a signal may end the call at any time
        try:
            how: Any = {"needs": names, "out": out, "num_threads": self.settings.num_threads}
            of = saved()[1] if callable(saved) else saved
            given: Any = backward(dy, of, **how) if isinstance(of, Saved) else of.backward(dy, **how)
        except (TypeError, ValueError, MemoryError):  # which come before anything is written
            call[:] = x, saved
            raise
        state = self._state
        results[0] = self._as_gradient(given[1], state.gamma)
        results[1] = self._as_gradient(given[2], state.beta)
        results[2] = given[3]
        if state.alpha is not None:
            results[3] = self._as_gradient(given.dalpha, state.alpha)
        self._results = results
        dx: Array | None = given[0]
        return dx

    def _as_gradient(self, gradient: Array | None, parameter: Array | None) -> Array | None:
        if gradient is None or parameter is None:
            return None
        there = _where.recognized_or_same("a gradient", gradient)
        if there.dtype == self.settings.dtype:
            return gradient
        if _where.on_device(there):
            rounded: Array = _where.given_back(_where.copy(there, self.settings.dtype), there)
            return rounded
        with np.errstate(all="ignore"):  # a float16 gradient may well over- or underflow; dx is written already
            return gradient.astype(self.settings.dtype)

    # ---- saved state ----

    def _initial_statistics(self) -> tuple[Statistics, ...]:
        return ()

    def _statistics_arrays(self, statistics: tuple[Statistics, ...]) -> dict[str, Array]:
        return {}

    def _on_host(self) -> State:
        """Give the state with all arrays on the host, copied where they are on a device."""
        return self._state if self._place is None else state_at(self._state, None)

    def _take(self, state: State) -> None:
        """Take over a state of the host; the next call brings it to where its x is."""
        self._state, self._place = state, None

    def _statistics_of(self, arrays: Mapping[str, Array], strict: bool) -> tuple[Statistics, ...]:
        return ()

    def _arrays(self) -> dict[str, Array]:
        """Give the state without its settings, in fresh arrays."""
        state = self._on_host()
        given = {"gamma": state.gamma, "beta": state.beta, "alpha": state.alpha}
        arrays = {name: value.copy() for name, value in given.items() if value is not None}
        return arrays | self._statistics_arrays(state.statistics)

    def _of_arrays(self, arrays: Mapping[str, Array], strict: bool) -> State:
        """Give the state of such arrays, which fit, after refusing values that cannot be."""
        own = dict(arrays)
        names = "gamma", "beta", "alpha"
        gamma, beta, alpha = parameters = [own.pop(name, None) for name in names]
        statistics = self._statistics_of(own, strict)
        for name, a in zip(names, parameters, strict=True):
            if a is not None:
                _validate.each_channel(name, a, np.isfinite(a), "be finite")
        return self._state._replace(gamma=gamma, beta=beta, alpha=alpha, statistics=statistics)

    def state_dict(self) -> dict[str, Array]:
        """Return what a layer of the same settings needs to go on bit for bit, in fresh arrays.

        gamma, beta, alpha : of `dtype`, where the layer has them.
        settings : str, JSON: those that y and the statistics depend on, all but nonfinite, single_value, num_threads.
        Mode and gradients are not state. Of `BatchNorm` also what it has learned:
        running_mean, running_var : float64 (C,); update_count : int64.
        running_moments : float64 (C, 5), only with ``update_rate=None``: count, mean and m2 = Σ(x - mean)² of all that has
            been seen, the latter in two parts each; with weights_are="importance" also running_importance_dof, (C,).
        set_count : int64, only with `debias`: the batches, ghosts and segments that updated.
        With K domains all that is learned has a first axis of K.

        >>> from batchnorm import BatchNorm
        >>> sorted(BatchNorm(2, beta=False).state_dict())
        ['gamma', 'running_mean', 'running_var', 'settings', 'update_count']
        """
        return self._arrays() | {"settings": np.array(self.settings.text())}

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take over a state as `state_dict` gives it, all or nothing; the arrays are copied.

        Raises TypeError or ValueError, before anything is assigned, for other settings than this layer's, and for an entry
        that does not fit or cannot be. ``strict=False`` takes the arrays whatever settings they come with. Gradients, mode
        and what is kept for backward stay.

        >>> from batchnorm import BatchNorm
        >>> a, b = BatchNorm(2), BatchNorm(2)
        >>> y = a(np.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> b.load_state_dict(a.state_dict())
        >>> b.running_mean
        array([0.2, 0.3])
        """
        is_strict = flag("strict", strict)
        if isinstance(state, Mapping):  # anything else is told below
            if is_strict:
                self.settings.require(state.get("settings"))
            state = {name: value for name, value in state.items() if name != "settings"}
        self._take(self._of_arrays(entries.checked(state, entries.of(self._arrays())), is_strict))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to the file `path` (.npz, no pickle, no suffix added), all or nothing (`write_state`).

        Raises ValueError for what `load` would refuse, such as NaN, and for a path of what is no file; OSError where the
        file cannot be written. The old file is as it was then. `load` has an example.
        """
        arrays = self._arrays()
        self._of_arrays(arrays, True)
        # The settings first, where they are found in a file that is too large for the layer that reads it.
        state_file.write_state(path, {"settings": np.array(self.settings.text())} | arrays)

    def load(self, path: str | os.PathLike[str], *, strict: bool = True) -> None:
        """Read from the file `path` what `save` wrote, all or nothing, as `load_state_dict` takes it.

        Safe on files from anywhere: nothing in them is executed, and they can ask for no more memory than a few times
        the layer's own state. Raises ValueError for other settings and for any file that is not such a state, naming what
        is wrong with it; OSError where it cannot be read.

        >>> import os, tempfile
        >>> from batchnorm import BatchNorm
        >>> a, b = BatchNorm(2, beta=False), BatchNorm(2, beta=False)
        >>> a.gamma[0] = 3
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     a.save(os.path.join(folder, "layer.npz"))
        ...     b.load(os.path.join(folder, "layer.npz"))
        >>> b.gamma
        array([3., 1.], dtype=float32)
        """
        is_strict, settings = flag("strict", strict), self.settings
        text = state_file.Text("settings", 4 * len(settings.text()), settings.require if is_strict else lambda _: None)
        needed = entries.of(self._arrays())
        arrays = state_file.read_state(path, needed, text)
        self._take(self._of_arrays(entries.checked(arrays, needed), is_strict))

    # ---- as a Python object ----

    def __repr__(self) -> str:
        frozen = f".freeze({self._shown_frozen()})" if any(self._frozen) else ""
        mode = "" if self._training else ".eval()"
        return f"{type(self).__name__}({', '.join(self.settings.shown())}){frozen}{mode}"

    def _shown_frozen(self) -> str:
        return ""

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # layers that share gamma but not running statistics would help nobody

    def __getstate__(self) -> dict[str, Any]:
        results = [_where.fetched(a) for a in self._results]
        own = {"_state": self._on_host()._replace(call=[]), "_evaluation": None, "_results": results, "_place": None}
        return self.__dict__ | own


def is_x(out: Array | None, x: Array) -> bool:
    """Tell whether a call with this `out` leaves nothing of x."""
    if out is None or not (isinstance(x, np.ndarray) or _where.on_device(x)) or not x.size:
        return False
    there = _where.recognized_or_same("out", out)
    return type(there) is type(x) and _where.same_memory(there, x)


def snapshot(parameter: Array | None) -> Array | None:
    """Give a copy of gamma or beta."""
    if parameter is None or isinstance(parameter, np.ndarray):
        return None if parameter is None else parameter.copy()
    own: Array = _where.copy(_where.recognized_or_same("gamma", parameter))
    return own
