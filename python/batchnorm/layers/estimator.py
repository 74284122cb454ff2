"""scikit-learn's protocol for transformers, kept without importing it: parameters, tables, names of features, tags.

Source: scikit-learn's developer guide, "Developing scikit-learn estimators"; where its own checks want words of errors,
they are there. Only methods that scikit-learn calls import it.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike

from batchnorm import _validate, _where
from batchnorm._arrays import Array, PerChannel

Container = Literal["default", "pandas", "polars"]
_CONTAINERS = ("default", "pandas", "polars")


class NotFittedError(ValueError, AttributeError):
    """Nothing has been seen that a table could be transformed by."""


class Estimator:
    """What scikit-learn asks of a transformer, on what a `Standardizer` does with arrays."""

    _output: Container | None = None
    if TYPE_CHECKING:
        features: int | None
        moments: Any
        _known: Any
        _checked: Callable[[], Any]
        _of: Callable[..., Any]
        _learned: Callable[..., Any]
        _applied: Callable[..., Array]
        inverse: Callable[..., Array]
        reset: Callable[[], Self]

    # ---- parameters ----

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        parameters = inspect.signature(cls.__init__).parameters
        return {name: p.default for name, p in parameters.items() if name != "self"}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name. There is nothing deeper."""
        return {name: getattr(self, name) for name in self._defaults()}

    def set_params(self, **parameters: Any) -> Self:
        """Set parameters; return the object. ValueError for others, and then none is set."""
        known = self._defaults()
        others = [name for name in parameters if name not in known]
        if others:
            raise ValueError(f"parameters must be of {', '.join(known)}, got {', '.join(others)}")
        for name, value in parameters.items():
            setattr(self, name, value)
        return self

    # ---- tables ----

    def fit(self, X: Any, y: object = None, sample_weight: ArrayLike | None = None) -> Self:
        """Forget what has been seen, learn of a table X (N, F), and return the object.

        X : anything that is a table of numbers: an array, a DataFrame, lists; NaN is missing. Not sparse. sample_weight :
        (N,) of float >= 0, or None. y is not looked at. TypeError or ValueError for what does not fit; what has been
        seen stays then.
        """
        return self._learn_table(X, sample_weight, True)

    def partial_fit(self, X: Any, y: object = None, sample_weight: ArrayLike | None = None) -> Self:
        """Learn of a table more, as `fit` does, beside what has been seen; return the object."""
        return self._learn_table(X, sample_weight, False)

    def transform(self, X: Any) -> Any:
        """Return a table normalized by what has been seen: float, of what kind `set_output` says. Learns nothing.

        NotFittedError (scikit-learn's where it is loaded, always a ValueError) where nothing has been seen.
        """
        self._require_fitted()
        table, names = _table(X, self)
        self._check_names(names, self.__dict__.get("feature_names_in_"))
        ready, known = self._of(*_of_features(table, self))
        return self._contained(self._applied(ready, known, table, None, None), X)

    def fit_transform(self, X: Any, y: object = None, sample_weight: ArrayLike | None = None) -> Any:
        """Return ``fit(X).transform(X)``."""
        return self.fit(X, y, sample_weight).transform(X)

    def inverse_transform(self, X: Any) -> Any:
        """Return the table that `transform` has made X of: mean + X·√(var + eps)."""
        self._require_fitted()
        table, names = _table(X, self)
        own = self.__dict__.get("feature_names_in_")
        if names is not None and own is not None:
            self._check_names(names, own)
        self._of(*_of_features(table, self))
        return self._contained(self.inverse(table), X)

    def get_feature_names_out(self, input_features: Sequence[str] | None = None) -> Array:
        """Return the names of the columns of y, which are those of x: of fit, or given, or "x0", "x1" and so on."""
        self._require_fitted()
        own, features = self.__dict__.get("feature_names_in_"), self.n_features_in_
        if input_features is None:
            return np.array([f"x{c}" for c in range(features)], object) if own is None else np.array(own)
        given = np.asarray(input_features, object)
        if own is not None and not np.array_equal(given, own):
            raise ValueError("input_features is not equal to feature_names_in_, the names that fit came with")
        if given.shape != (features,):
            raise ValueError(f"input_features should have length equal to the features, {features}, got {given.size}")
        return given

    def set_output(self, *, transform: Container | None = None) -> Self:
        """Say what `transform` returns: "default", an array; "pandas" or "polars", a DataFrame. None: as it was."""
        if transform is not None:
            self._output = _validate.choice("transform", transform, _CONTAINERS)  # type: ignore[assignment]
        return self

    # ---- what scikit-learn's own StandardScaler tells ----

    @property
    def n_features_in_(self) -> int:
        """F, once it is known of data."""
        return len(self._fitted("n_features_in_")[0])

    @property
    def mean_(self) -> PerChannel:
        """The mean of each feature, (F,) float64; NaN where nothing has been seen."""
        return self._told("mean_", lambda m: np.where(m.count > 0, m.mean, np.nan))

    @property
    def var_(self) -> PerChannel:
        """The biased variance of each feature, (F,) float64; NaN where nothing has been seen."""
        return self._told("var_", lambda m: np.where(m.count > 0, m.var(), np.nan))

    @property
    def scale_(self) -> PerChannel:
        """What a feature is divided by: √(var_ + eps), (F,) float64; 1 where that is 0 or nothing has been seen."""
        scale = np.sqrt(self.var_ + self._checked().settings.eps)
        return np.where(np.isnan(scale) | (scale == 0), 1.0, scale)

    @property
    def n_samples_seen_(self) -> int | PerChannel:
        """Values seen, or the sum of their weights: one number, (F,) where features differ."""
        count = self._told("n_samples_seen_", lambda m: m.count)
        if count.size and (count == count[0]).all():
            return int(count[0]) if count[0].is_integer() else float(count[0])  # type: ignore[return-value]
        return count

    # ---- scikit-learn ----

    def __sklearn_is_fitted__(self) -> bool:
        return self._known is not None

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type="transformer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32", "float16"]),
            input_tags=InputTags(allow_nan=True),
        )

    # ---- how ----

    def _learn_table(self, X: Any, sample_weight: ArrayLike | None, anew: bool) -> Self:
        table, names = _table(X, self)
        first = anew or self._known is None
        if not first:
            self._check_names(names, self.__dict__.get("feature_names_in_"))
        ready, known = self._of(*_of_features(table, self), anew=anew)
        weights = None if sample_weight is None else _sample_weight(sample_weight, len(table))
        known = self._learned(ready, known, table, None, weights)
        self.__dict__.update(_ready=ready, _known=known)
        if first:
            self.__dict__.pop("feature_names_in_", None)
            if names is not None:
                self.__dict__["feature_names_in_"] = names
        return self

    def _fitted(self, name: str) -> Any:
        if self._known is None:
            raise AttributeError(f"{type(self).__name__} must have seen data to have {name}, got none")
        return self._known

    def _told(self, name: str, of: Callable[[Any], PerChannel]) -> PerChannel:
        self._fitted(name)
        return of(self.moments)

    def _require_fitted(self) -> None:
        if self._known is None:
            exceptions = sys.modules.get("sklearn.exceptions")
            error = NotFittedError if exceptions is None else exceptions.NotFittedError
            raise error(f"{type(self).__name__} must have seen data, got none: call fit or partial_fit before")

    def _check_names(self, came: Array | None, own: Array | None) -> None:
        """Warn where names are on one side alone, as scikit-learn does, and refuse others than those of fit."""
        name = type(self).__name__
        if came is None or own is None:
            if came is not None:
                warnings.warn(f"X has feature names, but {name} was fitted without feature names", stacklevel=4)
            elif own is not None:
                text = f"X does not have valid feature names, but {name} was fitted with feature names"
                warnings.warn(text, stacklevel=4)
            return
        if not np.array_equal(came, own):
            lines = ["The feature names should match those that were passed during fit."]
            new, gone = [n for n in came if n not in own], [n for n in own if n not in came]
            lines += ["Feature names unseen at fit time:", *(f"- {n}" for n in new)] if new else []
            lines += ["Feature names seen at fit time, yet now missing:", *(f"- {n}" for n in gone)] if gone else []
            if not new and not gone:
                lines.append("Feature names must be in the same order as they were in fit.")
            raise ValueError("\n".join(lines) + "\n")

    def _contained(self, y: Array, X: Any) -> Any:
        """Give y as what `set_output`, or else scikit-learn's configuration, asks for."""
        sklearn, output = sys.modules.get("sklearn"), self._output
        if output is None and sklearn is not None:
            output = sklearn.get_config().get("transform_output", "default")
        if output == "pandas":
            import pandas

            index = X.index if isinstance(X, pandas.DataFrame) else None
            return pandas.DataFrame(y, index=index, columns=self.get_feature_names_out(), copy=False)
        if output == "polars":
            import polars

            return polars.DataFrame(y, schema=list(self.get_feature_names_out()), orient="row")
        return y


# ---- tables ----------------------------------------------------------------------------------------------


def _table(X: Any, to: Estimator) -> tuple[Array, Array | None]:
    """Give a table as an array of floats, and the names of its columns where all are texts."""
    if type(X).__module__.startswith("scipy.sparse"):
        raise TypeError("X must be dense, got a sparse matrix: its zeros would not stay zeros (write X.toarray())")
    names = None
    columns = getattr(X, "columns", None)
    if columns is not None and hasattr(X, "to_numpy"):
        names = _names(columns)
        values = X.to_numpy()
        if values.dtype == object and type(X).__module__.startswith("pandas"):
            values = X.to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        values = np.asarray(X)  # of lists of unlike lengths it says so itself
    if isinstance(X, np.ma.MaskedArray):
        raise TypeError("X must have NaN where values are missing, got a MaskedArray (write X.filled(np.nan))")
    values = _as_floats(values)
    if values.ndim != 2:
        raise ValueError(
            f"X must have 2 dimensions, observations and features, got {values.ndim}. Reshape your data: X.reshape(-1, 1) "
            f"if it is one feature, X.reshape(1, -1) if it is one observation; or call {type(to).__name__} itself"
        )
    for d, of in enumerate(("sample(s)", "feature(s)")):
        if values.shape[d] == 0:
            raise ValueError(f"Found array with 0 {of} (shape={values.shape}) while a minimum of 1 is required.")
    return values, names


def _names(columns: Any) -> Array | None:
    names = list(columns)
    texts = [isinstance(name, str) for name in names]
    if any(texts) and not all(texts):
        raise TypeError("X must have names of columns that are all texts, or none of them, got both")
    return np.array(names, object) if names and all(texts) else None


def _of_features(table: Array, to: Estimator) -> tuple[int, str]:
    """Give the features of a table, and the error for another number of them, as scikit-learn puts it."""
    features = table.shape[1]
    return features, f"X has {features} features, but {type(to).__name__} is expecting {{}} features as input"


def row_weights(name: str, weights: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Give a weight of each observation, of that shape, flat."""
    given: Array = _where.on_host(_validate.numbers(name, weights))
    if given.dtype.kind not in "biuf" and not _validate.is_bfloat16(given.dtype):
        raise TypeError(f"{name} must be numbers, got dtype {given.dtype}")
    if given.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, one of each observation, got {given.shape}")
    checked = given.astype(np.float64).ravel()
    good = (checked >= 0) & np.isfinite(checked)
    if not good.all():
        at = int(good.argmin())
        raise ValueError(f"{name} must be finite and >= 0, got {checked[at]} of observation {at}")
    return checked


def _sample_weight(weights: ArrayLike, rows: int) -> Array:
    given = row_weights("sample_weight", weights, (rows,))
    if not given.any():
        raise ValueError(
            "sample_weight must not be 0 throughout. Sample weights must contain at least one non-zero number."
        )
    return given


def _as_floats(values: Array) -> Array:
    """Give a table of whatever numbers as one of a dtype that floats."""
    if values.dtype.kind == "c":
        raise ValueError(f"X must have real numbers, got {values.dtype}. Complex data not supported")
    if values.dtype.kind in "SUMm":
        raise ValueError(f"X must have numbers, got dtype {values.dtype}")
    if _validate.is_of_core(values.dtype):
        return values
    native = values.dtype.newbyteorder("=")
    try:
        return values.astype(native if _validate.is_of_core(native) else np.float64)
    except (TypeError, ValueError) as error:
        raise type(error)(f"X must have numbers, got a value that is none: {error}") from None
