"""Time one library's normalization, as batchnorm-bench times this one's: a server in a process of its own.

``python -P peer.py torch --threads 2`` reads lines such as ``32x64x112x112 15 batch`` (shape, rounds, norm) and answers
each with a line of JSON: a row for each pass, layout and form of call. Norms are batch; lines: layer and RMS norm of each
position over its channels; groups: group norm of 32 groups. It imports nothing of this package, unless the package is
what it times.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

EPS = 1e-5
GROUPS = 32
Array = NDArray[Any]


class Tensors:
    """The arrays of one case in one layout: float32, one block of memory, channels on `axis`."""

    def __init__(self, shape: Sequence[int], layout: str) -> None:
        rng = np.random.default_rng(0)
        self.layout = layout
        self.axis = -1 if layout == "nhwc" else 1
        self.channels = shape[1]
        self.count = math.prod(shape) // shape[1]
        in_memory = (shape[0], *shape[2:], shape[1]) if layout == "nhwc" else tuple(shape)
        self.x = rng.standard_normal(in_memory, np.float32)
        self.x += 0.5
        self.dy = rng.standard_normal(in_memory, np.float32)
        self.gamma, self.beta, self.running_mean, self.running_var = (
            rng.normal(mean, 0.1, self.channels).astype(np.float32) for mean in (1, 0, 0.5, 1)
        )

    def channel(self, array: Array, c: int) -> NDArray[np.float64]:
        """Give all values of one channel of an array in this layout."""
        return np.asarray(np.take(array, c, axis=self.axis), np.float64)

    def part(self, norm: str, array: Array, k: int) -> NDArray[np.float64]:
        """Give all values that share statistics: of channel k, of position k, or of group k of the first sample."""
        if norm == "":
            return self.channel(array, k)
        planes = np.moveaxis(array, self.axis, 1)  # (N, C, ...)
        if norm == "groups":
            return np.asarray(planes[0].reshape(GROUPS, -1)[k], np.float64)
        return np.asarray(np.moveaxis(planes, 1, -1).reshape(-1, self.channels)[k], np.float64)

    def parts(self, norm: str) -> int:
        """Count what `part` may be asked for."""
        return {"": self.channels, "groups": GROUPS}.get(norm, self.count)

    def affine(self, norm: str, k: int) -> tuple[Array, Array]:
        """Give gamma and beta of each value of a part."""
        gamma, beta = self.gamma, self.beta
        if norm == "groups":
            size = self.x[0].size // self.channels
            gamma, beta = (np.repeat(a.reshape(GROUPS, -1)[k], size) for a in (gamma, beta))
        return (gamma, beta) if norm else (gamma[k], beta[k])

    def expected(self, pass_name: str, k: int) -> NDArray[np.float64]:
        """Compute one part of a pass's result from its definition, in float64."""
        verb, _, norm = pass_name.partition("_")
        x, dy = self.part(norm, self.x, k), self.part(norm, self.dy, k)
        gamma, beta = self.affine(norm, k)
        mean, var = x.mean(), x.var()
        if verb == "infer":
            mean, var = np.float64(self.running_mean[k]), np.float64(self.running_var[k])
        if norm == "rms":
            mean, var = np.float64(0), (x * x).mean()
        rstd = 1 / np.sqrt(var + EPS)
        xhat = (x - mean) * rstd
        if verb == "backward":
            h = dy * gamma
            return np.asarray(rstd * (h - (norm != "rms") * h.mean() - xhat * (h * xhat).mean()))
        return np.asarray(xhat * gamma + (0 if norm == "rms" else beta))


@dataclass
class Call:
    """One way to run one pass. `run` gives the tensor that the pass computes, in whatever type the library has."""

    pass_name: str
    form: str
    run: Callable[[], Any]


class Peer(ABC):
    """A library. What it cannot do has no calls."""

    name: ClassVar[str]
    version: str

    @abstractmethod
    def __init__(self, threads: int) -> None: ...

    @abstractmethod
    def calls(self, t: Tensors) -> Iterator[Call]:
        """Give the calls that are timed; the best form of a pass counts."""

    def lines(self, t: Tensors) -> Iterator[Call]:
        """Give the calls of layer norm and of RMS norm, which has no beta."""
        yield from ()

    def groups(self, t: Tensors) -> Iterator[Call]:
        """Give the calls of group norm."""
        yield from ()

    def to_numpy(self, result: Any, t: Tensors) -> Array:
        """Give a result as an array in the layout of `t`."""
        return np.asarray(result)


class Batchnorm(Peer):
    """The library of this package, called from Python as the peers are."""

    name = "batchnorm in Python"

    def __init__(self, threads: int) -> None:
        self.bn: Any = importlib.import_module("batchnorm")
        self.version = self.bn.__version__
        self.threads = threads

    def calls(self, t: Tensors) -> Iterator[Call]:
        """Give training, inference and backward, each with ``out=``."""
        bn, out, options = self.bn, np.zeros_like(t.x), {"eps": EPS, "num_threads": self.threads}
        statistics_, affine = (t.running_mean, t.running_var), (t.gamma, t.beta)
        yield Call("infer", "out=", lambda: bn.normalize(t.x, *statistics_, *affine, axis=t.axis, out=out, **options))
        if t.count > 1:
            _, saved = bn.batch_norm(t.x, *affine, axis=t.axis, **options)
            yield Call("train", "out=", lambda: bn.batch_norm(t.x, *affine, axis=t.axis, out=out, **options)[0])
            backward = bn.backward
            yield Call("backward", "out=", lambda: backward(t.dy, saved, out=out, num_threads=self.threads).dx)

    def lines(self, t: Tensors) -> Iterator[Call]:
        """Give both passes of both, with ``out=``."""
        yield from self._both("lines", self.bn.layer_norm, t, (t.gamma, t.beta), axes=t.axis)
        yield from self._both("rms", self.bn.rms_norm, t, (t.gamma,), axes=t.axis)

    def groups(self, t: Tensors) -> Iterator[Call]:
        """Give both passes, with ``out=``."""
        return self._both("groups", self.bn.group_norm, t, (GROUPS, t.gamma, t.beta), axis=t.axis)

    def _both(self, name: str, norm: Any, t: Tensors, given: tuple[Any, ...], **options: Any) -> Iterator[Call]:
        out, threads, backward = np.zeros_like(t.x), {"num_threads": self.threads}, self.bn.backward
        options |= {"eps": EPS, **threads}
        _, saved = norm(t.x, *given, **options)
        yield Call(f"train_{name}", "out=", lambda: norm(t.x, *given, out=out, **options)[0])
        yield Call(f"backward_{name}", "out=", lambda: backward(t.dy, saved, out=out, **threads).dx)


class Numpy(Peer):
    """The formulas as one writes them, with ``out=`` where that is no trouble. One thread."""

    name = "NumPy"
    version = np.__version__

    def __init__(self, threads: int) -> None:
        pass

    def calls(self, t: Tensors) -> Iterator[Call]:
        """Give training, inference and backward."""
        axes = tuple(a for a in range(t.x.ndim) if a != t.axis % t.x.ndim)
        shape = [1] * t.x.ndim
        shape[t.axis] = -1
        gamma, beta, running_mean, running_var = (
            v.reshape(shape) for v in (t.gamma, t.beta, t.running_mean, t.running_var)
        )
        out = np.zeros_like(t.x)

        def normalize(mean: Array, var: Array) -> Array:
            np.subtract(t.x, mean, out=out)
            np.multiply(out, gamma / np.sqrt(var + np.float32(EPS)), out=out)
            np.add(out, beta, out=out)
            return out

        mean, var = t.x.mean(axes, keepdims=True), t.x.var(axes, keepdims=True)
        rstd = 1 / np.sqrt(var + np.float32(EPS))

        def backward() -> Array:
            xhat = (t.x - mean) * rstd
            dbeta, dgamma = t.dy.sum(axes, keepdims=True), (t.dy * xhat).sum(axes, keepdims=True)
            xhat *= dgamma / np.float32(t.count)
            np.subtract(t.dy, dbeta / np.float32(t.count), out=out)
            np.subtract(out, xhat, out=out)
            np.multiply(out, gamma * rstd, out=out)
            return out

        yield Call("infer", "out=", lambda: normalize(running_mean, running_var))
        if t.count > 1:
            yield Call(
                "train",
                "out=",
                lambda: normalize(t.x.mean(axes, keepdims=True), t.x.var(axes, keepdims=True)),
            )
            yield Call("backward", "out=", backward)


class Torch(Peer):
    """PyTorch on the CPU; NHWC is its channels_last."""

    name = "PyTorch"

    def __init__(self, threads: int) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.version = self.torch.__version__
        self.torch.set_num_threads(threads)
        self.torch.set_grad_enabled(False)

    def tensor(self, array: Array, t: Tensors) -> Any:
        """View an array as N, C, ...; one with one spatial axis as an image, since only those have channels_last."""
        if t.layout == "nhwc":
            array = np.moveaxis(array, -1, 1)
        if array.ndim == 3:
            array = array[..., None]
        return self.torch.from_numpy(array)

    def calls(self, t: Tensors) -> Iterator[Call]:
        """Give each pass with outputs given, and as a function that allocates them."""
        torch = self.torch
        x, dy, y = (self.tensor(a, t) for a in (t.x, t.dy, np.zeros_like(t.x)))
        w, b, mean, var = map(torch.from_numpy, (t.gamma, t.beta, t.running_mean, t.running_var))
        saved = (torch.empty(t.channels), torch.empty(t.channels))
        none = (torch.empty(0), torch.empty(0))
        norm, aten = torch.native_batch_norm, torch.ops.aten

        yield Call("infer", "out=", lambda: norm(x, w, b, mean, var, False, 0.0, EPS, out=(y, *none))[0])
        function = torch.nn.functional.batch_norm
        yield Call("infer", "function", lambda: function(x, mean, var, w, b, False, 0.0, EPS))
        if t.count == 1:
            return
        yield Call("train", "out=", lambda: norm(x, w, b, None, None, True, 0.0, EPS, out=(y, *saved))[0])
        yield Call("train", "function", lambda: norm(x, w, b, None, None, True, 0.0, EPS)[0])
        norm(x, w, b, None, None, True, 0.0, EPS, out=(y, *saved))
        arguments = (dy, x, w, None, None, *saved, True, EPS, [True, True, True])
        dw, db = torch.empty(t.channels), torch.empty(t.channels)
        backward = aten.native_batch_norm_backward
        yield Call("backward", "out=", lambda: backward.out(*arguments, out0=y, out1=dw, out2=db)[0])
        yield Call("backward", "function", lambda: backward(*arguments)[0])

    def lines(self, t: Tensors) -> Iterator[Call]:
        """Give layer norm in both forms; RMS norm as the function, and its backward by autograd: there is no other."""
        torch, aten, sizes = self.torch, self.torch.ops.aten, (t.channels,)
        x, dy, w, b = map(torch.from_numpy, (t.x, t.dy, t.gamma, t.beta))
        given = (x, sizes, w, b, EPS)
        _, *kept = aten.native_layer_norm(*given)
        yield from self._both_forms("train_lines", aten.native_layer_norm, given)
        given = (dy, x, sizes, *kept, w, b, [True, True, True])
        yield from self._both_forms("backward_lines", aten.native_layer_norm_backward, given)
        rms = torch.nn.functional.rms_norm
        yield Call("train_rms", "function", lambda: rms(x, sizes, w, EPS))
        with torch.enable_grad():
            leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
            of = rms(leaves[0], sizes, leaves[1], EPS)
        yield Call("backward_rms", "autograd", lambda: torch.autograd.grad(of, leaves, dy, retain_graph=True)[0])

    def groups(self, t: Tensors) -> Iterator[Call]:
        """Give both passes in both forms."""
        aten, (x, dy) = self.torch.ops.aten, (self.tensor(a, t) for a in (t.x, t.dy))
        w, b = map(self.torch.from_numpy, (t.gamma, t.beta))
        sizes = (len(t.x), t.channels, t.x[0].size // t.channels, GROUPS)
        given = (x, w, b, *sizes, EPS)
        _, *kept = aten.native_group_norm(*given)
        yield from self._both_forms("train_groups", aten.native_group_norm, given)
        given = (dy, x, *kept, w, *sizes, [True, True, True])
        yield from self._both_forms("backward_groups", aten.native_group_norm_backward, given)

    def _both_forms(self, name: str, run: Any, given: tuple[Any, ...]) -> Iterator[Call]:
        outs = {f"out{k}": self.torch.empty_like(a) for k, a in enumerate(run(*given))}
        yield Call(name, "out=", lambda: run.out(*given, **outs)[0])
        yield Call(name, "function", lambda: run(*given)[0])

    def to_numpy(self, result: Any, t: Tensors) -> Array:
        """Undo `tensor`."""
        array = result.numpy()[..., 0] if t.x.ndim == 3 else result.numpy()
        return np.asarray(np.moveaxis(array, 1, -1) if t.layout == "nhwc" else array)


class OnnxRuntime(Peer):
    """ONNX Runtime: inference, channels first; a model of one BatchNormalization node, its output given."""

    name = "ONNX Runtime"

    def __init__(self, threads: int) -> None:
        self.ort: Any = importlib.import_module("onnxruntime")
        self.onnx: Any = importlib.import_module("onnx")
        importlib.import_module("onnx.helper")
        importlib.import_module("onnx.numpy_helper")
        self.version = self.ort.__version__
        self.options = self.ort.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1

    def model(self, t: Tensors) -> bytes:
        """Serialize the model."""
        helper, from_array = self.onnx.helper, self.onnx.numpy_helper.from_array
        parameters = {"gamma": t.gamma, "beta": t.beta, "mean": t.running_mean, "var": t.running_var}
        node = helper.make_node("BatchNormalization", ["x", *parameters], ["y"], epsilon=EPS)
        tensor = self.onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            [node],
            "batch_norm",
            [helper.make_tensor_value_info("x", tensor, t.x.shape)],
            [helper.make_tensor_value_info("y", tensor, t.x.shape)],
            [from_array(value, name) for name, value in parameters.items()],
        )
        # Old enough for any runtime of the last years.
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        return bytes(model.SerializeToString())

    def calls(self, t: Tensors) -> Iterator[Call]:
        """Give inference, with memory bound beforehand."""
        if t.layout == "nhwc":
            return
        session = self.ort.InferenceSession(self.model(t), self.options, providers=["CPUExecutionProvider"])
        y = np.zeros_like(t.x)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", self.ort.OrtValue.ortvalue_from_numpy(t.x))
        binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)

        def infer() -> Array:
            session.run_with_iobinding(binding)
            return y

        yield Call("infer", "bound output", infer)


class Jax(Peer):
    """JAX on the CPU, jitted; XLA fuses what it can. It has no outputs that are given."""

    name = "JAX"

    def __init__(self, threads: int) -> None:
        # Its thread pool has a thread for each processor that the process may use, and no other setting.
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        os.environ["JAX_PLATFORMS"] = "cpu"
        self.jax: Any = importlib.import_module("jax")
        self.version = self.jax.__version__

    def calls(self, t: Tensors) -> Iterator[Call]:
        """Give training with both formulas for the variance that are in use, inference and backward."""
        jax, jnp = self.jax, self.jax.numpy
        axes = tuple(a for a in range(t.x.ndim) if a != t.axis % t.x.ndim)
        shape = [1] * t.x.ndim
        shape[t.axis] = -1
        x, dy = jnp.asarray(t.x), jnp.asarray(t.dy)
        gamma, beta, running_mean, running_var = (
            jnp.asarray(v.reshape(shape)) for v in (t.gamma, t.beta, t.running_mean, t.running_var)
        )

        def normalize(x: Any, mean: Any, var: Any, gamma: Any, beta: Any) -> Any:
            return (x - mean) * (gamma * jax.lax.rsqrt(var + EPS)) + beta

        def train(x: Any, gamma: Any, beta: Any) -> Any:
            mean, var = jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)
            return normalize(x, mean, var, gamma, beta), mean, var

        def train_fast(x: Any, gamma: Any, beta: Any) -> Any:
            mean, square = jnp.mean(x, axes, keepdims=True), jnp.mean(x * x, axes, keepdims=True)
            var = jnp.maximum(square - mean * mean, 0)
            return normalize(x, mean, var, gamma, beta), mean, var

        def backward(dy: Any, x: Any, mean: Any, var: Any, gamma: Any) -> Any:
            rstd = jax.lax.rsqrt(var + EPS)
            xhat = (x - mean) * rstd
            dbeta, dgamma = jnp.sum(dy, axes, keepdims=True), jnp.sum(dy * xhat, axes, keepdims=True)
            dx = gamma * rstd * (dy - dbeta / t.count - xhat * (dgamma / t.count))
            return dx, dgamma, dbeta

        infer, ready = jax.jit(normalize), jax.block_until_ready
        yield Call("infer", "jit", lambda: ready(infer(x, running_mean, running_var, gamma, beta)))
        if t.count == 1:
            return
        plain, fast, gradients = jax.jit(train), jax.jit(train_fast), jax.jit(backward)
        yield Call("train", "jit, var", lambda: ready(plain(x, gamma, beta))[0])
        yield Call("train", "jit, E[x^2] - E[x]^2", lambda: ready(fast(x, gamma, beta))[0])
        _, mean, var = plain(x, gamma, beta)
        yield Call("backward", "jit", lambda: ready(gradients(dy, x, mean, var, gamma))[0])


PEERS: dict[str, type[Peer]] = {
    "batchnorm": Batchnorm,
    "numpy": Numpy,
    "torch": Torch,
    "onnxruntime": OnnxRuntime,
    "jax": Jax,
}


def layouts_of(shape: Sequence[int]) -> tuple[str, ...]:
    """List the layouts of a case, named as batchnorm-bench names them."""
    return ("nc",) if math.prod(shape[2:]) == 1 else ("nchw", "nhwc")


def verify(peer: Peer, call: Call, t: Tensors) -> None:
    """Raise AssertionError where the first or last part is not what the pass is to compute, as float32 goes."""
    result, norm = peer.to_numpy(call.run(), t), call.pass_name.partition("_")[2]
    for k in {0, t.parts(norm) - 1}:
        expected = t.expected(call.pass_name, k)
        got = t.part(norm, result, k).reshape(expected.shape)
        # A channel of few values may have next to no spread, which multiplies what rounds.
        np.testing.assert_allclose(
            got, expected, rtol=1e-3, atol=1e-3 * max(1.0, np.abs(expected).max()), err_msg=call.pass_name
        )


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """Time one call, as the mean of `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def repeats_of(run: Callable[[], Any]) -> int:
    """Count the calls of one sample, which lasts at least 100 us: far above the clock's resolution."""
    seconds_of(run, 1)
    repeats = 1
    while (once := max(seconds_of(run, repeats), 1e-9)) * repeats < 100e-6:
        repeats = max(repeats + 1, math.ceil(1.2 * 100e-6 / once))
    return repeats


def time_in_turns(calls: Sequence[Call], rounds: int) -> list[list[float]]:
    """Sample each call once a round: as many calls that are not timed, then at once the timed ones.

    A case that is slow gets fewer rounds, but three at least: 20 s are enough for it.
    """
    repeats = [repeats_of(call.run) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > 20:
            break
        for call, times, count in zip(calls, samples, repeats, strict=True):
            seconds_of(call.run, count)
            times.append(seconds_of(call.run, count))
    return samples


def measure(peer: Peer, shape: Sequence[int], rounds: int, norm: str) -> list[dict[str, Any]]:
    """Verify and time one case in each of its layouts."""
    rows = []
    for layout in layouts_of(shape):
        t = Tensors(shape, layout)
        calls = list({"batch": peer.calls, "lines": peer.lines, "groups": peer.groups}[norm](t))
        for call in calls:
            verify(peer, call, t)
        for call, seconds in zip(calls, time_in_turns(calls, rounds), strict=True):
            median = statistics.median(seconds)
            mad = statistics.median(abs(s - median) for s in seconds)
            row = {"pass": call.pass_name, "layout": layout, "form": call.form, "seconds": median, "mad": mad}
            rows.append(row)
    return rows


def answer(peer: Peer, request: str) -> dict[str, Any]:
    """Do what one line asks for."""
    try:
        shape, rounds, norm = request.split()
        return {"rows": measure(peer, [int(size) for size in shape.split("x")], int(rounds), norm)}
    except Exception as error:  # noqa: BLE001 - of any library: the driver tells it, and goes on with the next case
        first_line = str(error).strip().partition("\n")[0]
        return {"error": f"{type(error).__name__}: {first_line}"}


def main() -> int:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(prog=Path(__file__).name, description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    try:
        peer = PEERS[arguments.peer](arguments.threads)
    except ImportError as error:
        print(json.dumps({"absent": str(error)}), flush=True)
        return 0
    print(json.dumps({"peer": peer.name, "version": peer.version}), flush=True)
    for request in sys.stdin:
        print(json.dumps(answer(peer, request)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
