"""The settings of a layer: one value that never changes, checked as it is made, saved with the state and compared at load.

In a state they are one text, a JSON object of name and value, under the name ``settings``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cached_property
from math import inf
from numbers import Real
from operator import index
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar, cast, get_args

import numpy as np

from batchnorm import _validate
from batchnorm._validate import Activation, Parity, WeightsAre
from batchnorm.running import RenormSchedule

Nonfinite = Literal["raise", "skip", "warn", "propagate"]
SingleValue = Literal["raise", "use_running", "skip"]

_PARAMETER_DTYPES = ("float16", "float32", "float64")
_MOST_SHOWN = 300  # characters of a message that come from elsewhere

T_co = TypeVar("T_co", covariant=True)

_UNSAVED = {"saved": False}
_LATER = {"later": True}


class Settings:
    """What the settings of all layers, frozen dataclasses, have in common. Checked as they are made; the first are given by place.

    A field marked as unsaved only says how a call behaves, and changes neither y nor running statistics of an ordinary
    batch: it is not in a state. One marked as later came when there were states: its default is what layers did before,
    and what a state without it means.
    """

    by_place: ClassVar[int] = 1  # fields that a call gives by place
    if TYPE_CHECKING:
        channels: int  # of most
        axis: int
        eps: float
        gamma: bool
        beta: bool
        dtype: np.dtype[Any]
        activation: Activation | None
        num_threads: int | None

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the parameters: a value for each channel, where there is no other."""
        return (self.channels,)

    def _check_channels(self) -> None:
        # Whether x has that axis is only known when x comes.
        vars(self).update(
            channels=int_within("channels", self.channels, ">= 0", 0),
            axis=int_within("axis", self.axis, "from -8 to 7", -8, 7),
        )

    def _check_common(self) -> None:
        vars(self).update(
            eps=_validate.eps(self.eps),
            gamma=flag("gamma", self.gamma),
            beta=flag("beta", self.beta),
            dtype=parameter_dtype(self.dtype),
            activation=_activation(self.activation),
            num_threads=_validate.num_threads(self.num_threads) or None,
        )

    def saved(self) -> dict[str, Any]:
        """Give what the numbers of a state depend on, in types that JSON has."""
        values = {f.name: getattr(self, f.name) for f in self._fields() if f.metadata.get("saved", True)}
        return values | {"dtype": self.dtype.name}

    def shown(self) -> Iterator[str]:
        """Give what a call that makes such a layer has to say."""
        for f in self._fields()[: self.by_place]:
            yield f"{getattr(self, f.name)}"
        for f in self._fields()[self.by_place :]:
            value = getattr(self, f.name)
            if f.default is MISSING or value != f.default:
                yield f"{f.name}={(value.name if isinstance(value, np.dtype) else value)!r}"

    def _fields(self) -> tuple[Field[Any], ...]:
        return fields(self)  # type: ignore[arg-type]  # which every settings that there are is

    def text(self) -> str:
        """Give them as they are saved. Equal settings give equal text."""
        import json  # here and not above: it takes long to import, and most processes save nothing

        return json.dumps(self.saved())

    def require(self, came: object) -> None:
        """Refuse settings of a state, as a text or an array of one, that are not these; None for none.

        TypeError for what is no text; ValueError for a text that is no settings, and for settings that differ, naming each,
        what is needed, and what came.
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


class LearningSettings(Protocol):
    """What running statistics ask of settings."""

    @property
    def channels(self) -> int: ...  # noqa: D102
    @property
    def update_rate(self) -> float | None: ...  # noqa: D102
    @property
    def ddof(self) -> int: ...  # noqa: D102
    @property
    def debias(self) -> bool: ...  # noqa: D102
    @property
    def weights_are(self) -> WeightsAre | None: ...  # noqa: D102


@dataclass(frozen=True)
class BatchSettings(Settings):
    """Those of a `BatchNorm`, which says what they mean."""

    channels: int
    axis: int
    eps: float
    update_rate: float | None
    ddof: int
    gamma: bool = True
    beta: bool = True
    dtype: np.dtype[Any] = field(default=np.dtype(np.float32))
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
        are = self.weights_are
        self._check_channels()
        vars(self).update(
            update_rate=_update_rate(self.update_rate),
            ddof=int_within("ddof", self.ddof, "0 (biased) or 1 (unbiased)", 0, 1),
            debias=flag("debias", self.debias),
            nonfinite=_validate.choice("nonfinite", self.nonfinite, get_args(Nonfinite)),
            single_value=_validate.choice("single_value", self.single_value, get_args(SingleValue)),
            parity=_validate.choice("parity", self.parity, _validate.PARITIES),
            domains=None if self.domains is None else int_within("domains", self.domains, ">= 1 or None", 1),
            ghost_size=None if self.ghost_size is None else _validate.int_at_least("ghost_size", self.ghost_size, 1),
            weights_are=None if are is None else _validate.choice("weights_are", are, _validate.WEIGHTS_ARE),
        )
        self._check_common()
        if self.renorm is not None and not isinstance(self.renorm, RenormSchedule):
            raise TypeError(f"renorm must be a RenormSchedule or None, got {kind(self.renorm)}")
        if self.update_rate is None and self.debias:
            raise ValueError("debias must be False where update_rate is None, whose statistics have no bias")
        if self.update_rate is None and self.renorm is not None:
            raise ValueError(
                "renorm must be None where update_rate is None: it corrects towards an exponential average"
            )

    @cached_property
    def follows_plainly(self) -> bool:
        """Whether running statistics follow each batch at `update_rate`, and in no other way."""
        return self.update_rate is not None and not self.debias and self.renorm is None

    def saved(self) -> dict[str, Any]:
        """Give what the numbers of a state depend on, in types that JSON has; no parity without a schedule."""
        schedule = None if self.renorm is None else {n: getattr(self.renorm, n) for n in ("r_max", "d_max", "weight")}
        parity = None if schedule is None else self.parity
        return super().saved() | {"renorm": schedule, "parity": parity}


class Setting(Generic[T_co]):
    """A setting as an attribute of its layer, to be read only."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: Any, kind: type) -> T_co:
        return cast("T_co", self if layer is None else getattr(layer.settings, self._name))

    def __set__(self, layer: Any, value: object) -> None:
        raise AttributeError(
            f"{self._name} must be given to {type(layer).__name__}(), as settings are fixed, got {value!r}"
        )


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


def int_within(name: str, value: Any, needed: str, least: int, most: float = inf) -> int:
    """Give an int within bounds, which `needed` tells, and refuse a bool."""
    is_integer = not isinstance(value, (bool, np.bool_))
    try:
        number = index(value) if is_integer else 0
    except TypeError:
        is_integer = False
    if not is_integer:
        raise TypeError(f"{name} must be an int, got {kind(value)}")
    if not least <= number <= most:
        raise ValueError(f"{name} must be {needed}, got {number}")
    return number


def _update_rate(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"update_rate must be a number from 0 to 1, or None, got {kind(value)}")
    if not 0 <= value <= 1:  # type: ignore[operator]  # all real numbers compare with int
        raise ValueError(f"update_rate must be from 0 to 1, or None, got {value}")
    return float(value)


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
