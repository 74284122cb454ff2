"""What other libraries mean by the same words, by name: their defaults.

| | eps | running = | running variance | channels |
|---|---|---|---|---|
| PyTorch | 1e-5 | (1 - momentum)·running + momentum·batch | unbiased | axis 1 |
| Keras 3 | 1e-3 | momentum·running + (1 - momentum)·batch | biased | the last axis |
| Flax | 1e-5 | momentum·running + (1 - momentum)·batch | biased | the last axis |
| ONNX | 1e-5 | momentum·running + (1 - momentum)·batch | biased | axis 1 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from batchnorm import _validate

Library = Literal["torch", "keras", "flax", "onnx"]


@dataclass(frozen=True)
class Convention:
    """The defaults of a library: `eps`, `update_rate` and `ddof` of the running statistics, and the channel `axis`."""

    eps: float
    update_rate: float
    ddof: int
    axis: int


CONVENTIONS: dict[Library, Convention] = {
    "torch": Convention(1e-5, 0.1, 1, 1),
    "keras": Convention(1e-3, 0.01, 0, -1),
    "flax": Convention(1e-5, 0.01, 0, -1),
    "onnx": Convention(1e-5, 0.1, 0, 1),
}


# eps and the channel axis of the norms of samples. PyTorch's RMS norm has that of float32 where its eps is None; Keras'
# instance norm is GroupNormalization(groups=-1).
SampleNorm = Literal["layer", "rms", "group", "instance"]
_EPS: dict[Library, dict[SampleNorm, float]] = {
    "torch": {"layer": 1e-5, "rms": 2.0**-23, "group": 1e-5, "instance": 1e-5},
    "keras": {"layer": 1e-3, "rms": 1e-6, "group": 1e-3, "instance": 1e-3},
    "flax": {"layer": 1e-6, "rms": 1e-6, "group": 1e-6, "instance": 1e-6},
    "onnx": {"layer": 1e-5, "rms": 1e-5, "group": 1e-5, "instance": 1e-5},
}
_DEFAULT_EPS: dict[SampleNorm, float] = {"layer": 1e-5, "rms": 1e-6, "group": 1e-5, "instance": 1e-5}


def of_samples(name: object, norm: SampleNorm) -> tuple[float, int]:
    """Give eps and the channel axis of a norm of samples by the convention of that name; the function's for None."""
    if name is None:
        return _DEFAULT_EPS[norm], 1
    library: Library = _validate.choice("convention", name, tuple(CONVENTIONS))
    return _EPS[library][norm], CONVENTIONS[library].axis


def convention(name: object) -> Convention:
    """Give the convention of that name; that of PyTorch where none is named."""
    return CONVENTIONS["torch" if name is None else _validate.choice("convention", name, tuple(CONVENTIONS))]
