"""The settings of a layer that the numbers of its state depend on: one value, saved with the state, compared at load.

In a state they are one text, a JSON object of name and value, under the name ``settings``.

Not among them is what only says how a call behaves, and changes neither y nor running statistics of an ordinary batch:
`nonfinite`, `single_value` and `num_threads`. Nor is the mode (`train`, `eval`, `freeze`), which is neither settings nor state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np

from batchnorm import _validate

_MOST_SHOWN = 300  # characters of a message that come from elsewhere


@dataclass(frozen=True)
class Settings:
    """What a state's numbers mean, and what a layer does with them. All as in `BatchNorm`, in types that JSON has.

    One that comes to them later gets a default: what layers did before, and what a state without it means.
    """

    channels: int
    axis: int
    eps: float
    update_rate: float | None
    ddof: int
    gamma: bool
    beta: bool
    dtype: str
    debias: bool
    domains: int | None
    ghost_size: int | None
    renorm: Mapping[str, Any] | None  # the points of its schedule
    parity: str | None  # None without renorm, where it means nothing
    activation: str | None
    weights_are: str | None = None

    def text(self) -> str:
        """Give them as they are saved. Equal settings give equal text."""
        import json  # here and not above: it takes long to import, and most processes save nothing

        return json.dumps(vars(self))

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
                {repr(name)[1:-1]: repr(value) for name, value in json.loads(t).items()}
                for t in (text, self.text())
            )
            there = {f.name: repr(f.default) for f in fields(self) if f.default is not MISSING} | there
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(
                f"settings must be a JSON object of them, as state_dict gives it, got {_shown(repr(text))}"
            ) from None
        names = [name for name in here | there if here.get(name) != there.get(name)]
        if names:
            raise ValueError(
                f"state must have the settings of this layer, {_listed(here, names)}, got {_listed(there, names)}: make "
                "the layer with those, or pass strict=False to take the arrays as those of this layer"
            )


def _listed(values: Mapping[str, str], names: list[str]) -> str:
    return _shown(", ".join(f"{name}={values.get(name, 'nothing')}" for name in names))


def _shown(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
