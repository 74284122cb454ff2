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


@dataclass(frozen=True)
class Convention:
    """The defaults of a library: `eps`, `update_rate` and `ddof` of the running statistics, and the channel `axis`."""

    eps: float
    update_rate: float
    ddof: int
    axis: int


CONVENTIONS = {
    "torch": Convention(1e-5, 0.1, 1, 1),
    "keras": Convention(1e-3, 0.01, 0, -1),
    "flax": Convention(1e-5, 0.01, 0, -1),
    "onnx": Convention(1e-5, 0.1, 0, 1),
}
Library = Literal["torch", "keras", "flax", "onnx"]


def convention(name: object) -> Convention:
    """Give the convention of that name; that of PyTorch where none is named."""
    return CONVENTIONS["torch" if name is None else _validate.choice("convention", name, tuple(CONVENTIONS))]
