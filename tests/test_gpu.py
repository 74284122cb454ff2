"""On a GPU: tensors of PyTorch have the bits of NumPy arrays, calls follow its streams, and none waits.

Skipped where there is none; `test_cuda.py` has the same of an emulated device. `bench/gpu_check` runs this.
"""

import numpy as np
import pytest

import batchnorm as bn

SHAPE = (16, 24, 14, 14)
RNG = np.random.default_rng(11)
GAMMA, BETA = RNG.normal(1, 0.3, 24).astype(np.float32), RNG.normal(size=24).astype(np.float32)
X, DY = (RNG.normal(2, 3, SHAPE).astype(np.float32) for _ in range(2))
NORMS = {
    "batch": (bn.batch_norm, {}),
    "ReLU": (bn.batch_norm, {"activation": "relu"}),
    "mask": (bn.batch_norm, {"mask": RNG.random((16, 14, 14)) < 0.7}),
    "layer": (bn.layer_norm, {"axes": 1}),
    "rms": (bn.rms_norm, {"axes": 1}),
    "group": (lambda x, *rest, **named: bn.group_norm(x, 4, *rest, **named), {}),
    "instance": (bn.instance_norm, {}),
    "graph": (bn.graph_norm, {"segments": np.arange(16) // 3}),
}


@pytest.fixture
def torch():
    """Give PyTorch where it has a device and this build has functions for it."""
    found = pytest.importorskip("torch")
    if not bn.show_config("dicts")["cuda"]["built"]:
        pytest.skip("this batchnorm was built without CUDA")
    if not found.cuda.is_available():
        pytest.skip("no CUDA device is there for PyTorch")
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("norm", NORMS)
def test_tensors_have_the_bits_of_arrays_in_both_layouts(norm, dtype, torch):
    dtypes, (function, options) = pytest.importorskip("ml_dtypes"), NORMS[norm]
    there_too = {name: torch.tensor(a, device="cuda") if name == "mask" else a for name, a in options.items()}
    for order in ("contiguous_format", "channels_last"):
        form = {"memory_format": getattr(torch, order)}
        x, dy = (torch.tensor(a, device="cuda").to(getattr(torch, dtype)).contiguous(**form) for a in (X, DY))
        here, dy_here = (_array(a, dtypes, X.shape) for a in (x, dy))
        y, saved = function(here, GAMMA, BETA, **options)
        yd, saved_there = function(x, torch.tensor(GAMMA, device="cuda"), BETA, **there_too)
        assert type(yd) is torch.Tensor
        assert _array(yd, dtypes, X.shape).tobytes() == y.tobytes()
        assert saved_there.moments == saved.moments
        gradients, on_device = bn.backward(dy_here, saved), bn.backward(dy, saved_there)
        for a, b in zip(gradients[:3], on_device[:3], strict=True):
            assert a.tobytes() == _array(b, dtypes, a.shape).tobytes()


def _array(tensor, dtypes, shape):
    """Give a tensor as an array in its memory order."""
    bits = tensor.cpu()
    if str(bits.dtype) == "torch.bfloat16":
        values = bits.view(dtype=__import__("torch").int16).numpy().view(dtypes.bfloat16)
    else:
        values = bits.numpy()
    assert values.shape == tuple(shape)
    return values


def test_a_training_step_is_captured_in_a_graph(torch):
    x, dy = (torch.tensor(a, device="cuda") for a in (X, DY))
    layer = bn.BatchNorm(24, activation="relu")
    layer(x)  # whose state goes to the device outside
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        dx = layer.backward(dy)
    other = X * 2 - 1
    x.copy_(torch.tensor(other))
    graph.replay()
    y_here, saved = bn.batch_norm(other, layer.gamma.cpu().numpy(), layer.beta.cpu().numpy(), activation="relu")
    assert y.cpu().numpy().tobytes() == y_here.tobytes()
    assert dx.cpu().numpy().tobytes() == bn.backward(DY, saved).dx.tobytes()


def test_a_hundred_runs_on_two_streams_have_the_same_bits(torch):
    x, wanted = torch.tensor(X, device="cuda"), bn.batch_norm(X, GAMMA, BETA)[0]
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    torch.cuda.synchronize()
    for run in range(100):
        with torch.cuda.stream(streams[run % 2]):
            results.append(bn.batch_norm(x, GAMMA, BETA)[0])
    torch.cuda.synchronize()
    assert all(y.cpu().numpy().tobytes() == wanted.tobytes() for y in results)


def test_a_layer_learns_on_the_device_what_it_learns_on_the_host(torch, tmp_path):
    here, on_device = bn.BatchNorm(24), bn.BatchNorm(24)
    for step in range(5):
        here(X + step)
        on_device(torch.tensor(X + step, device="cuda"))
    assert np.array_equal(here.running_mean, on_device.running_mean)
    assert np.array_equal(here.running_var, on_device.running_var)
    on_device.save(tmp_path / "layer.npz")
    again = bn.BatchNorm(24)
    again.load(tmp_path / "layer.npz")
    assert np.array_equal(again.eval()(X), here.eval()(X))
