"""The three networks of the demonstration, forward and backward, with or without batch norm.

Every layer is called on a batch (first axis: samples), keeps what its ``backward`` needs, and gives back the
gradient of its input. The gradient of a parameter ``weight`` is left beside it as ``dweight``, as
:class:`batchnorm.BatchNorm` does with ``gamma`` and ``dgamma``. Images are channels-last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import DTypeLike, NDArray

import batchnorm as bn

SHALLOW = ("MLP", "conv net")
NETWORKS = (*SHALLOW, "deep net")
CLASSES = 10
DEPTH, WIDTH = 12, 48  # of the deep net: weight layers, and units of each but the last
EPS = 1e-5

Array = NDArray[Any]


class Layer(Protocol):
    """What this module's layers and batch norm have in common."""

    def __call__(self, x: Array, /) -> Array:
        """Return y, and keep what ``backward`` needs."""

    def backward(self, dy: Array, /) -> Array | None:
        """Return dx, and leave the gradients of the parameters in the layer."""


class Linear:
    """y = x @ weight + bias, with x (N, inputs), weight (inputs, outputs) and bias (outputs,) or None.

    With ``needs_dx=False`` (the first layer) ``backward`` gives None: nothing needs the gradient of the data.
    """

    def __init__(self, weight: Array, bias: Array | None, *, needs_dx: bool = True) -> None:
        self.weight, self.bias, self.needs_dx = weight, bias, needs_dx

    def __call__(self, x: Array) -> Array:
        """Return y (N, outputs)."""
        self.x = x
        y: Array = x @ self.weight
        return y if self.bias is None else y + self.bias

    def backward(self, dy: Array) -> Array | None:
        """Return dx = dy @ weight.T; dweight = x.T @ dy, dbias = sum of dy over the samples."""
        self.dweight = self.x.T @ dy
        if self.bias is not None:
            self.dbias = dy.sum(axis=0)
        return dy @ self.weight.T if self.needs_dx else None


class Conv3x3:
    """Cross-correlation with windows of 3x3 pixels, one pixel of zero padding, stride 1 or 2.

    y[n, p, q, k] = bias[k] + sum over i, j, c of padded[n, s*p + i, s*q + j, c] * weight[i, j, c, k]

    with s the stride, padded (N, H+2, W+2, C) from x (N, H, W, C), weight (3, 3, C, K), bias (K,) or None and
    y (N, ceil(H/s), ceil(W/s), K). The windows are copied into the rows of a matrix, so that one product of
    matrices does the arithmetic.
    """

    def __init__(self, weight: Array, bias: Array | None, *, stride: int = 1, needs_dx: bool = True) -> None:
        self.weight, self.bias, self.stride, self.needs_dx = weight, bias, stride, needs_dx

    def __call__(self, x: Array) -> Array:
        """Return y."""
        self.x_shape = x.shape
        self.windows = windows_as_rows(x, self.stride)
        y: Array = self.windows @ self.weight.reshape(self.windows.shape[1], -1)
        if self.bias is not None:
            y += self.bias
        samples, height, width, _ = x.shape
        return y.reshape(samples, -(-height // self.stride), -(-width // self.stride), -1)

    def backward(self, dy: Array) -> Array | None:
        """Return dx, the cross-correlation of dy with the weight after half a turn, its channels exchanged.

        Where the stride is 2, zeros stand between the values of dy. dweight and dbias as in :class:`Linear`.
        """
        rows = dy.reshape(len(self.windows), -1)
        self.dweight = (self.windows.T @ rows).reshape(self.weight.shape)
        if self.bias is not None:
            self.dbias = rows.sum(axis=0)
        if not self.needs_dx:
            return None
        spread = np.zeros((*self.x_shape[:3], dy.shape[-1]), dy.dtype)
        spread[:, :: self.stride, :: self.stride] = dy
        turned = self.weight[::-1, ::-1].transpose(0, 1, 3, 2)
        dx: Array = windows_as_rows(spread, stride=1) @ turned.reshape(-1, turned.shape[-1])
        return dx.reshape(self.x_shape)


def windows_as_rows(x: Array, stride: int) -> Array:
    """Copy the 3x3 windows of zero-padded x (N, H, W, C) into rows (N * windows, 9 * C), channel fastest."""
    samples, height, width, channels = x.shape
    padded = np.zeros((samples, height + 2, width + 2, channels), x.dtype)
    padded[:, 1:-1, 1:-1] = x
    windows = sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 9 * channels)


class ReLU:
    """y = max(x, 0); the slope at 0 is 0."""

    def __call__(self, x: Array) -> Array:
        """Return y, of x's shape."""
        self.y: Array = np.maximum(x, 0)
        return self.y

    def backward(self, dy: Array) -> Array:
        """Return dx = dy where x > 0, else 0."""
        dx: Array = dy * (self.y > 0)
        return dx


class Sigmoid:
    """y = 1/(1 + exp(-x))."""

    def __call__(self, x: Array) -> Array:
        """Return y, of x's shape."""
        self.y: Array = 1 / (1 + np.exp(-x))
        return self.y

    def backward(self, dy: Array) -> Array:
        """Return dx = dy * y * (1 - y)."""
        dx: Array = dy * self.y * (1 - self.y)
        return dx


class Flatten:
    """(N, H, W, C) to (N, H*W*C)."""

    def __call__(self, x: Array) -> Array:
        """Return x with one axis for all but the samples."""
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        """Return dy with the axes of x."""
        return dy.reshape(self.shape)


class Network:
    """Layers in order: images (N, 8, 8, 1) in, logits (N, 10) out."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers

    def __call__(self, x: Array) -> Array:
        """Return the logits."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dlogits: Array) -> None:
        """Leave the gradient of every parameter in its layer. Follows a call in training mode."""
        dy: Array | None = dlogits
        for layer in reversed(self.layers):
            if dy is not None:
                dy = layer.backward(dy)

    def parameters(self) -> Iterator[tuple[Array, Array]]:
        """Give every parameter with its gradient: the arrays in the layers, not copies."""
        for layer in self.layers:
            for name in ("weight", "bias", "gamma", "beta"):
                value = getattr(layer, name, None)
                if value is not None:
                    yield value, getattr(layer, f"d{name}")

    def train(self, mode: bool = True) -> None:
        """Use batch statistics (True) or running statistics (False) in the batch norm layers."""
        for layer in self.layers:
            if isinstance(layer, bn.BatchNorm):
                layer.train(mode)


def build(
    network: str,
    normalized: bool,
    rng: np.random.Generator,
    *,
    init_scale: float = 1.0,
    dtype: DTypeLike = np.float32,
) -> Network:
    """Build the MLP 64-96-96-10, the conv net with 8 and then 16 channels, or the deep net.

    ReLU comes after each hidden layer. The deep net has 12 weight layers, 64-48-...-48-10, and sigmoids, as the
    network of the article that does not train without batch norm (section 4.2.2).

    With ``normalized``, batch norm stands between each hidden layer and what follows it, and takes over the bias: it
    subtracts the mean of the channel, so a bias before it would have no effect. Weights are normal with
    deviation init_scale * sqrt(2 / fan_in) (He et al. 2015), in the deep net init_scale * sqrt(1 / fan_in) (LeCun et
    al. 1998), biases and beta 0, gamma 1. The same ``rng`` state gives the same weights with and without batch norm.
    """
    squared, activation = (1, Sigmoid) if network == "deep net" else (2, ReLU)

    def weight(*shape: int) -> Array:
        deviation = init_scale * np.sqrt(squared / np.prod(shape[:-1]))
        return np.asarray(deviation * rng.standard_normal(shape), dtype)

    def hidden(layer: type[Linear | Conv3x3], *shape: int, **options: Any) -> list[Layer]:
        channels = shape[-1]
        if not normalized:
            return [layer(weight(*shape), np.zeros(channels, dtype), **options), activation()]
        norm = bn.BatchNorm(channels, axis=-1, eps=EPS, dtype=dtype, num_threads=1)
        return [layer(weight(*shape), None, **options), norm, activation()]

    if network == "MLP":
        layers = [Flatten(), *hidden(Linear, 64, 96, needs_dx=False), *hidden(Linear, 96, 96)]
        features = 96
    elif network == "conv net":
        first = hidden(Conv3x3, 3, 3, 1, 8, stride=2, needs_dx=False)
        layers = [*first, *hidden(Conv3x3, 3, 3, 8, 16), Flatten()]
        features = 4 * 4 * 16
    elif network == "deep net":
        layers = [Flatten(), *hidden(Linear, 64, WIDTH, needs_dx=False)]
        for _ in range(DEPTH - 2):
            layers += hidden(Linear, WIDTH, WIDTH)
        features = WIDTH
    else:
        raise ValueError(f"network must be one of {NETWORKS}, got {network!r}")
    return Network([*layers, Linear(weight(features, CLASSES), np.zeros(CLASSES, dtype))])


def cross_entropy(logits: Array, digits: Array) -> tuple[float, Array]:
    """Return the mean over the samples of -log softmax(logits)[digit], and its gradient (N, 10)."""
    samples = np.arange(len(logits))
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(axis=1, keepdims=True)
    loss = (np.log(total[:, 0]) - shifted[samples, digits]).mean()
    gradient = exponentials / total
    gradient[samples, digits] -= 1
    gradient /= len(logits)
    return float(loss), gradient
