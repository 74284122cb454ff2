"""The settings of a layer: one value that never changes, checked as it is made, saved with the state and compared at load.

In a state they are one text, a JSON object of name and value, under the name ``settings``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cached_property
from numbers import Real
from operator import index
from typing import Any, Generic, Literal, Protocol, Self, TypeVar, get_args, overload

import numpy as np

from batchnorm import _validate
from batchnorm._validate import Activation, Parity, WeightsAre
from batchnorm.running import RenormSchedule

Nonfinite = Literal["raise", "skip", "warn", "propagate"]
SingleValue = Literal["raise", "use_running", "skip"]

_PARAMETER_DTYPES = ("float16", "float32", "float64")
_MOST_SHOWN = 300  # characters of a message that come from elsewhere

T_co = TypeVar("T_co", covariant=True)


_FLOAT32 = np.dtype(np.float32)


_UNSAVED = {"saved": False}
_LATER = {"later": True}


class Settings:
    """What the settings of all layers have and can do. Each kind is a frozen dataclass that checks its values as it is made.

    Its first field is given to the layer by place. A field marked as unsaved only says how a call behaves, and changes
    neither y nor running statistics of an ordinary batch: it is not in a state. One marked as later came when there were
    states: its default is what layers did before, and what a state without it means.
    """

    channels: int
    eps: float
    gamma: bool
    beta: bool
    dtype: np.dtype[Any]
    activation: Activation | None
    num_threads: int | None

    def saved(self) -> dict[str, Any]:
        """Give what the numbers of a state depend on, in types that JSON has."""
        names = (f.name for f in self._fields() if f.metadata.get("saved", True))
        return {name: getattr(self, name) for name in names} | {"dtype": self.dtype.name}

    def shown(self) -> Iterator[str]:
        """Give what a call that makes such a layer has to say."""
        first, *others = self._fields()
        yield f"{getattr(self, first.name)}"
        for f in others:
            value = getattr(self, f.name)
            if f.default is MISSING or value != f.default:
                yield f"{f.name}={(value.name if isinstance(value, np.dtype) else value)!r}"

    def _fields(self) -> tuple[Field[Any], ...]:
        return fields(self)  # type: ignore[arg-type]  # each kind is a dataclass

    def text(self) -> str:
        """Give them as they are saved. Equal settings give equal text."""
        import json  # here and not above: it takes long to import, and most processes save nothing

        return json.dumps(self.saved())

    def require(self, came: object) -> None:
        """Refuse settings of a state, as a text or an array of one, that are not these; None for none.

        Raises
        ------
        TypeError
            For what is no text.
        ValueError
            For a text that is no settings; and for settings that differ, naming each, what is needed, and what came.
        """
        import json

        text = came.item() if isinstance(came, np.ndarray) and came.shape == () else came
        if text is None:
            raise ValueError(
                "state must have the settings that its arrays belong to, got none: pass strict=False to take the arrays "
                "as those of this layer"
            )
        if not isinstance(text, str):
            raise TypeError(f"settings must be a text, as state_dict gives it, got {_validate.kind(came)}")
        if text == self.text():
            return
        try:
            # Each value as text, so that True is not 1; names too, as one from elsewhere may hold anything.
            there, here = (
                {repr(name)[1:-1]: repr(value) for name, value in json.loads(t).items()} for t in (text, self.text())
            )
            there = {f.name: repr(f.default) for f in self._fields() if "later" in f.metadata} | there
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(
                f"settings must be a JSON object of them, as state_dict gives it, got {_cut(repr(text))}"
            ) from None
        names = [name for name in here | there if here.get(name) != there.get(name)]
        if names:
            raise ValueError(
                f"state must have the settings of this layer, {_listed(here, names)}, got {_listed(there, names)}: make "
                "the layer with those, or pass strict=False to take the arrays as those of this layer"
            )


class _HasSettings(Protocol):
    @property
    def settings(self) -> Settings: ...


class Setting(Generic[T_co]):
    """A setting as an attribute of its layer, to be read only."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, layer: None, kind: type) -> Self: ...
    @overload
    def __get__(self, layer: _HasSettings, kind: type) -> T_co: ...
    def __get__(self, layer: _HasSettings | None, kind: type) -> Self | T_co:
        return self if layer is None else getattr(layer.settings, self._name)

    def __set__(self, layer: _HasSettings, value: object) -> None:
        raise AttributeError(
            f"{self._name} must be given to {type(layer).__name__}(), as settings are fixed, got {value!r}"
        )


@dataclass(frozen=True)
class BatchNormSettings(Settings):
    """Those of a `BatchNorm`, which says what they mean."""

    channels: int
    axis: int
    eps: float
    update_rate: float | None
    ddof: int
    gamma: bool = True
    beta: bool = True
    dtype: np.dtype[Any] = _FLOAT32
    debias: bool = False
    domains: int | None = None
    ghost_size: int | None = None
    renorm: RenormSchedule | None = None
    parity: Parity = "paper"
    activation: Activation | None = None
    weights_are: WeightsAre | None = field(default=None, metadata=_LATER)
    nonfinite: Nonfinite = field(default="warn", metadata=_UNSAVED)
    single_value: SingleValue = field(default="raise", metadata=_UNSAVED)
    num_threads: int | None = field(default=None, metadata=_UNSAVED)

    def __post_init__(self) -> None:
        rate = _update_rate(self.update_rate)
        ghost_size = None if self.ghost_size is None else _validate.int_at_least("ghost_size", self.ghost_size, 1)

        are = self.weights_are
        vars(self).update(
            channels=_at_least(0, "channels", self.channels),
            axis=_axis(self.axis),
            eps=_validate.eps(self.eps),
            update_rate=rate,
            ddof=_ddof(self.ddof),
            gamma=flag("gamma", self.gamma),
            beta=flag("beta", self.beta),
            dtype=parameter_dtype(self.dtype),
            debias=_debias(self.debias, rate),
            nonfinite=_validate.choice("nonfinite", self.nonfinite, get_args(Nonfinite)),
            single_value=_validate.choice("single_value", self.single_value, get_args(SingleValue)),
            domains=None if self.domains is None else _at_least(1, "domains", self.domains, " or None"),
            ghost_size=ghost_size,
            renorm=_renorm(self.renorm, rate),
            parity=_validate.choice("parity", self.parity, _validate.PARITIES),
            activation=_activation(self.activation),
            weights_are=None if are is None else _validate.choice("weights_are", are, _validate.WEIGHTS_ARE),
            num_threads=_validate.num_threads(self.num_threads) or None,
        )

    @cached_property
    def follows_plainly(self) -> bool:
        """Whether running statistics follow each batch at `update_rate`, and in no other way."""
        return self.update_rate is not None and not self.debias and self.renorm is None

    def saved(self) -> dict[str, Any]:
        """Give what the numbers of a state depend on; of a schedule its points, and no parity without one."""
        schedule = self.renorm
        points = None if schedule is None else {name: getattr(schedule, name) for name in ("r_max", "d_max", "weight")}
        parity = None if schedule is None else self.parity
        return super().saved() | {"renorm": points, "parity": parity}


# ---- checks ----------------------------------------------------------------------------------------------


def flag(name: str, value: object) -> bool:
    """Give a bool, and refuse what merely looks like one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {kind(value)}")
    return bool(value)


def parameter_dtype(value: Any) -> np.dtype[Any]:
    """Give a dtype for parameters."""
    try:
        # np.dtype(None) is float64: nobody who writes None means that.
        parsed: np.dtype[Any] | None = None if value is None else np.dtype(value)
    except (TypeError, ValueError, SyntaxError):  # all mean the same: np.dtype cannot make sense of it
        parsed = None
    if parsed is None or not parsed.isnative or parsed.name not in _PARAMETER_DTYPES:
        raise TypeError(f"dtype must be float16, float32 or float64, got {value!r}")
    return parsed


def integer(name: str, value: Any) -> int:
    """Give an int, and refuse a bool."""
    if not isinstance(value, (bool, np.bool_)):
        try:
            return index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an int, got {kind(value)}")


def _at_least(least: int, name: str, value: object, or_none: str = "") -> int:
    number = integer(name, value)
    if number < least:
        raise ValueError(f"{name} must be >= {least}{or_none}, got {number}")
    return number


def _axis(value: object) -> int:
    """Accept an axis that some array could have; whether x has it is only known when x comes."""
    number = integer("axis", value)
    if not -8 <= number <= 7:
        raise ValueError(f"axis must be from -8 to 7, got {number}")
    return number


def _update_rate(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"update_rate must be a number from 0 to 1, or None, got {kind(value)}")
    if not 0 <= value <= 1:  # type: ignore[operator]  # all real numbers compare with int
        raise ValueError(f"update_rate must be from 0 to 1, or None, got {value}")
    return float(value)


def _ddof(value: object) -> int:
    number = integer("ddof", value)
    if number not in (0, 1):
        raise ValueError(f"ddof must be 0 (biased) or 1 (unbiased), got {number}")
    return number


def _debias(value: object, rate: float | None) -> bool:
    wanted = flag("debias", value)
    if wanted and rate is None:
        raise ValueError("debias must be False where update_rate is None, whose statistics have no bias")
    return wanted


def _renorm(value: object, rate: float | None) -> RenormSchedule | None:
    if value is None:
        return None
    if not isinstance(value, RenormSchedule):
        raise TypeError(f"renorm must be a RenormSchedule or None, got {kind(value)}")
    if rate is None:
        raise ValueError("renorm must be None where update_rate is None: it corrects towards an exponential average")
    return value


def _activation(value: object) -> Activation | None:
    if value is not None and (not isinstance(value, str) or value != "relu"):
        raise ValueError(f"activation must be None or 'relu', got {value!r}")
    return "relu" if value is not None else None


def kind(value: object) -> str:
    """Say what came, in short whatever it is; of an array its dtype."""
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else _validate.kind(value)


def _listed(values: Mapping[str, str], names: list[str]) -> str:
    return _cut(", ".join(f"{name}={values.get(name, 'nothing')}" for name in names))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
