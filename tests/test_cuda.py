"""Arrays on a CUDA device, emulated: every function and layer has the bits that it has of NumPy arrays, and nothing waits.

The device is the machine that runs kernels on the CPU (tests/cpp/simt), the arrays are those of libraries that say they
are there (emulated.py). What a GPU alone can show, `bench/gpu_check` is for.
"""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.cuda import DeviceArray, driver, libraries
from batchnorm.cuda import stream as on_stream
from emulated import Foreign, Older, module, module_file, values_of

RNG = np.random.default_rng(5)
SHAPE = (6, 4, 3, 5)  # samples, channels, places
MASK = RNG.random((6, 3, 5)) < 0.7
WEIGHTS = RNG.random((6, 3, 5)).astype(np.float32) * 3
SEGMENTS = np.array([0, 0, 1, 1, 1, 3])
GAMMA, BETA = RNG.normal(1, 0.3, 4).astype(np.float32), RNG.normal(size=4).astype(np.float32)
X, DY, RESIDUAL = (RNG.normal(2, 3, SHAPE).astype(np.float32) for _ in range(3))


@pytest.fixture(autouse=True)
def device(request):
    """Give the emulated module, and count what waits."""
    file = module_file()
    if file is None:
        reason = "batchnorm._cuda of emulated kernels was not built: it comes with BATCHNORM_TESTS=ON"
        if request.config.getoption("no_absent_libraries"):
            pytest.fail(reason)
        pytest.skip(reason)
    with module(file) as found:
        yield found


@pytest.fixture
def waits(device, monkeypatch):
    """Give the list of copies to the host that were made, each of which waits for the device."""
    made, copies = [], device.copy_to_host
    monkeypatch.setattr(device, "copy_to_host", lambda *given: (made.append(given[0].shape), copies(*given))[1])
    return made


def there(a):
    """Give an array, or what an option has one in, on the device."""
    return Foreign(a) if isinstance(a, np.ndarray) else a


def same(here, on_device):
    """Tell whether results are the same bits of the same dtype; None is None."""
    if here is None or on_device is None:
        return here is on_device
    values = values_of(on_device)
    return here.dtype.name == values.dtype.name and here.shape == values.shape and here.tobytes() == values.tobytes()


NORMS = {
    "batch": (bn.batch_norm, {}),
    "layer": (bn.layer_norm, {"axes": 1}),
    "rms": (bn.rms_norm, {"axes": 1}),
    "group": (lambda x, *rest, **named: bn.group_norm(x, 2, *rest, **named), {}),
    "strided group": (lambda x, *rest, **named: bn.group_norm(x, 2, *rest, grouping="strided", **named), {}),
    "instance": (bn.instance_norm, {}),
    "graph": (lambda x, *rest, **named: bn.graph_norm(x, *rest, alpha=there_or_not(x, BETA), **named), {}),
}
COUNTED = {
    "all": {},
    "mask": {"mask": MASK},
    "mask, kept": {"mask": MASK, "padding": "keep"},
    "weights": {"weights": WEIGHTS, "weights_are": "importance"},
    "lengths": {"lengths": [2, 3, 1, 0, 2, 3]},
    "host mask": {"mask": MASK.tolist()},
}
TAILS = {
    "": {},
    "ReLU": {"activation": "relu"},
    "residual": {"residual": RESIDUAL},
    "residual and ReLU": {"residual": RESIDUAL, "activation": "relu"},
}


def there_or_not(x, a):
    return a if isinstance(x, np.ndarray) else Foreign(a)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("norm", NORMS)
def test_each_norm_has_the_bits_of_the_host_with_each_option(norm, counted, tail):
    function, axes = NORMS[norm]
    options = {**axes, **COUNTED[counted], **TAILS[tail]}
    if norm != "batch":
        options.pop("weights_are", None)
    y, saved = function(X, GAMMA, BETA, **options)
    on_device = {name: there(value) for name, value in options.items()}
    yd, saved_there = function(Foreign(X), Foreign(GAMMA), Foreign(BETA), **on_device)
    assert isinstance(yd, DeviceArray)
    assert same(y, yd)
    assert saved_there.moments == saved.moments
    assert same(saved.part.weights, values_of(saved_there.part.weights))
    gradients, gradients_there = bn.backward(DY, saved), bn.backward(Foreign(DY), saved_there)
    for name in ("dx", "dgamma", "dbeta", "dresidual", "dalpha"):
        assert same(getattr(gradients, name, None), getattr(gradients_there, name, None)), name
    sums, sums_there = bn.grad_sums(DY, saved), bn.grad_sums(Foreign(DY), saved_there)
    assert np.array_equal(sums._table, sums_there._table)
    assert np.array_equal(sums.count, sums_there.count)
    dx = bn.grad_input(DY, saved, sums)
    assert same(dx, bn.grad_input(Foreign(DY), saved_there, sums_there))
    assert same(dx, bn.grad_input(Foreign(DY), saved_there, sums))  # added up on the host


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("gamma_dtype", ["float16", "float32", "float64", "int64"])
def test_each_dtype_of_x_and_of_gamma_comes_and_goes(dtype, gamma_dtype):
    dtypes = pytest.importorskip("ml_dtypes")
    x, dy = (a.astype(getattr(dtypes, dtype, dtype)) for a in (X, DY))
    gamma = (4 * GAMMA).astype(gamma_dtype)
    y, saved = bn.batch_norm(x, gamma)
    yd, saved_there = bn.batch_norm(Foreign(x), Foreign(gamma))
    assert same(y, yd)
    assert all(map(same, bn.backward(dy, saved), bn.backward(Foreign(dy), saved_there)))


def test_layouts_that_fill_a_block_are_read_in_place_and_others_are_copied():
    wide = np.repeat(X, 2, axis=3)
    for x in (X, X.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2), wide[..., ::2], X[::-1], X.T.copy().T):
        y, saved = bn.batch_norm(x, GAMMA, BETA)
        yd, saved_there = bn.batch_norm(Foreign(x), GAMMA, BETA)
        assert same(y, yd)
        assert yd.strides == y.strides
        assert same(bn.backward(DY, saved).dx, bn.backward(Foreign(DY), saved_there).dx)  # dy in an order of its own


def test_out_is_written_in_place_and_given_back():
    x, expected = X.copy(), bn.batch_norm(X, GAMMA)[0]
    given = Foreign(x)
    y, saved = bn.batch_norm(given, GAMMA, out=given)
    assert y is given
    assert np.array_equal(x, expected)
    assert saved.x is None
    out = Foreign(np.empty(SHAPE, np.float32).transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2))  # in another order
    assert bn.normalize(Foreign(X), BETA, GAMMA**2, out=out) is out
    assert np.array_equal(out.values, bn.normalize(X, BETA, GAMMA**2))
    dx = Foreign(np.empty_like(X))
    _, saved = bn.batch_norm(Foreign(X))
    assert bn.backward(Foreign(DY), saved, out=dx).dx is dx
    with pytest.raises(ValueError, match="out must be writeable"):
        read_only = Foreign(np.empty_like(X))
        original = libraries._OTHER.is_writeable
        libraries.Library.is_writeable = False
        try:
            bn.batch_norm(Foreign(X), out=read_only)
        finally:
            libraries.Library.is_writeable = original


def test_given_statistics_normalize_with_the_bits_of_the_host():
    mean, var = X.mean((0, 2, 3)), X.var((0, 2, 3))
    y, saved = bn.normalize(X, mean, var, GAMMA, BETA, save=True)
    yd, saved_there = bn.normalize(Foreign(X), Foreign(mean), Foreign(var), Foreign(GAMMA), BETA, save=True)
    assert same(y, yd)
    assert all(map(same, bn.backward(DY, saved), bn.backward(Foreign(DY), saved_there)))


@pytest.mark.parametrize("counted", ["all", "weights", "mask"])
def test_moments_and_running_statistics_have_the_bits_of_the_host(counted):
    options = {**COUNTED[counted], "segments": SEGMENTS}
    here = bn.moments(X, **options)
    on_device = bn.moments(Foreign(X), **{n: there(v) if n != "segments" else v for n, v in options.items()})
    assert here == on_device
    assert np.array_equal(here.importance_dof, on_device.importance_dof)
    options["weights_are"] = "counts" if counted == "weights" else None
    _, saved = bn.batch_norm(X, **options)
    _, saved_there = bn.batch_norm(Foreign(X), **options)
    for segments in ("each", "pooled"):
        running = bn.update_running(BETA, GAMMA**2, saved, segments=segments)
        by_there = bn.update_running(BETA, GAMMA**2, saved_there, segments=segments)
        assert all(map(np.array_equal, running, by_there))
        on_device = bn.update_running(Foreign(BETA), Foreign(GAMMA**2), saved_there, segments=segments)
        assert all(map(same, running, on_device))


def test_running_statistics_of_functions_do_not_wait(waits):
    _, saved = bn.batch_norm(Foreign(X), ghost_size=3)
    running = bn.update_running(Foreign(BETA), Foreign(GAMMA**2), saved)
    assert waits == []
    assert all(map(same, bn.update_running(BETA, GAMMA**2, bn.batch_norm(X, ghost_size=3)[1]), running))


@pytest.mark.parametrize(
    "options", [{"keep": "y"}, {"renorm": bn.Renorm(BETA, GAMMA**2, 1.5, 0.5)}], ids=["y", "renorm"]
)
def test_what_is_computed_from_statistics_on_the_host_has_its_bits_too(options):
    y, saved = bn.batch_norm(X, GAMMA, BETA, **options)
    yd, saved_there = bn.batch_norm(Foreign(X), Foreign(GAMMA), Foreign(BETA), **options)
    assert same(y, yd)
    assert all(map(same, bn.backward(DY, saved), bn.backward(Foreign(DY), saved_there)))
    running = bn.update_running(BETA, GAMMA**2, saved)
    assert all(map(same, running, bn.update_running(Foreign(BETA), Foreign(GAMMA**2), saved_there)))


def test_nothing_waits_in_a_training_step(waits):
    layer = bn.BatchNorm(4, activation="relu")
    layer(Foreign(X))
    waits.clear()
    layer(Foreign(X), mask=Foreign(MASK), residual=Foreign(RESIDUAL))
    layer.backward(Foreign(DY))
    layer.eval()(Foreign(X))
    for norm, (function, axes) in NORMS.items():
        if norm != "graph":  # whose alpha has a gradient made of the statistics
            _, saved = function(Foreign(X), Foreign(GAMMA), **axes)
            bn.backward(Foreign(DY), saved)
            bn.grad_input(Foreign(DY), saved, bn.grad_sums(Foreign(DY), saved))
    bn.normalize(Foreign(X), Foreign(BETA), Foreign(GAMMA))
    assert waits == []


# ---- layers ----

LAYERS = {
    "batch": lambda: bn.BatchNorm(4),
    "pooling": lambda: bn.BatchNorm(4, update_rate=None),
    "debiased ghosts": lambda: bn.BatchNorm(4, debias=True, ghost_size=3, ddof=0),
    "renorm": lambda: bn.BatchNorm(4, renorm=bn.RenormSchedule.paper(), nonfinite="propagate"),
    "domains": lambda: bn.BatchNorm(4, domains=2),
    "layer": lambda: bn.LayerNorm(4, axes=1),
    "rms": lambda: bn.RMSNorm(4, axes=1),
    "group": lambda: bn.GroupNorm(2, 4),
    "instance": lambda: bn.InstanceNorm(4, running=True),
    "graph": lambda: bn.GraphNorm(4),
}


@pytest.mark.parametrize("made", LAYERS)
def test_layers_train_on_a_device_with_the_bits_of_the_host(made, tmp_path):
    here, on_device = LAYERS[made](), LAYERS[made]()
    told = {"domain": 1} if made == "domains" else {}
    for step in range(3):
        x, dy = X + step, DY * (step + 1)
        assert same(here(x, **told), on_device(Foreign(x), **told))
        assert same(here.backward(dy), on_device.backward(Foreign(dy)))
        assert same(here.dgamma, on_device.dgamma)
        here.gamma = here.gamma - 0.25 * here.dgamma
        on_device.gamma = Foreign(values_of(on_device.gamma) - 0.25 * values_of(on_device.dgamma))
    for name, value in here.state_dict().items():
        assert np.array_equal(value, on_device.state_dict()[name]), name
    assert str(here.report()) == str(on_device.report())
    on_device.save(tmp_path / "state.npz")
    again = LAYERS[made]()
    again.load(tmp_path / "state.npz")
    for other in (again, copy.deepcopy(on_device), pickle.loads(pickle.dumps(on_device)), on_device):
        assert same(here.eval()(X, **told), other.eval()(Foreign(X), **told))
        assert same(here(X, **told), other(X, **told))  # back on the host


def test_values_that_are_not_finite_are_not_learned():
    bad = X.copy()
    bad[0, 1, 0, 0] = np.inf
    layer = bn.BatchNorm(4)
    layer(Foreign(X))
    before = layer.running_mean, layer.running_var
    layer(Foreign(bad))
    assert np.array_equal(before, (layer.running_mean, layer.running_var))
    assert [f.kind for f in layer.report()] == [f.kind for f in _after(bad).report()]
    with pytest.raises(ValueError, match="x must have finite statistics"):
        bn.BatchNorm(4, nonfinite="raise")(Foreign(bad))
    layer = bn.BatchNorm(4, nonfinite="propagate")
    layer(Foreign(bad))
    assert not np.isfinite(layer.running_mean).all()


def _after(x):
    layer = bn.BatchNorm(4, nonfinite="skip")
    layer(X)
    layer(x)
    return layer


def test_a_layer_follows_x_to_another_device_and_library():
    here, on_device = bn.BatchNorm(4), bn.BatchNorm(4)
    for x in (Foreign(X), Foreign(X, device=1), Older(X), Foreign(X)):
        dy = Foreign(DY, device=getattr(x, "device", 0))
        assert same(here(X), on_device(x))
        assert same(here.backward(DY), on_device.backward(dy))
    assert np.array_equal(here.running_var, on_device.running_var)


def test_converters_take_a_layer_whose_state_is_on_a_device():
    here, on_device = bn.BatchNorm(4), bn.BatchNorm(4)
    here(X), on_device(Foreign(X))
    state, there_too = bn.convert.to_torch(here), bn.convert.to_torch(on_device)
    assert all(np.array_equal(state[name], there_too[name]) for name in state)


# ---- protocols ----


def test_an_array_of_the_older_protocol_is_taken_on_its_stream(device, monkeypatch):
    waited = []
    monkeypatch.setattr(device, "wait_for", lambda other, where: waited.append((other, where[1])))
    y, _ = bn.batch_norm(Older(X, stream=7), GAMMA)
    assert same(bn.batch_norm(X, GAMMA)[0], y)
    assert y.stream == 7
    assert waited == [(7, 7)] or waited == []
    bn.batch_norm(Older(X, stream=7), Older(GAMMA, stream=9))
    assert (9, 7) in waited  # what makes gamma comes before
    assert (7, 9) in waited  # and what is done to it next, after
    with pytest.raises(ValueError, match="stream 0"):
        bn.batch_norm(Older(X, stream=0))


def test_calls_of_a_context_are_launched_on_its_stream(device, monkeypatch):
    launched, call = [], device.batch_norm
    monkeypatch.setattr(device, "batch_norm", lambda *given: (launched.append(given[-1]), call(*given))[1])
    bn.batch_norm(Foreign(X))
    with on_stream(5):
        y, _ = bn.batch_norm(Foreign(X))
    assert launched == [(0, 1), (0, 5)]
    assert y.stream == 5
    with pytest.raises(TypeError, match="stream must be an int"), on_stream("5"):
        pass


def test_results_of_no_library_go_out_by_both_protocols():
    y, _ = bn.batch_norm(Foreign(X))
    again = bn.batch_norm(y)[0]
    assert same(bn.batch_norm(values_of(y))[0], again)
    interface = y.__cuda_array_interface__
    assert interface["shape"] == SHAPE
    assert interface["version"] == 3
    assert y.__dlpack_device__() == (2, 0)
    assert "dltensor_versioned" in repr(y.__dlpack__(stream=1, max_version=(1, 0)))
    assert "dltensor" in repr(y.__dlpack__())
    with pytest.raises(ValueError, match="stream must not be 0"):
        y.__dlpack__(stream=0)
    with pytest.raises(BufferError, match="must stay there"):
        y.__dlpack__(dl_device=(1, 0))
    assert np.array_equal(np.asarray(y), y.to_numpy())


def test_memory_is_given_back_when_nobody_holds_it(device, monkeypatch):
    held = set()
    allocate, release = device.allocate, device.release

    def counted(size, where):
        address = allocate(size, where)
        held.add(address)
        return address

    monkeypatch.setattr(device, "allocate", counted)
    monkeypatch.setattr(device, "release", lambda address, where: (held.discard(address), release(address, where))[1])
    y, saved = bn.batch_norm(Foreign(X), GAMMA, mask=Foreign(MASK), activation="relu")
    gradients = bn.backward(Foreign(DY), saved)
    capsule = y.__dlpack__(stream=1)
    assert held
    del y, saved, gradients
    assert len(held) == 1  # what the capsule keeps
    del capsule
    assert not held


def test_arrays_are_held_until_calls_that_read_them_are_done(device, monkeypatch):
    past = []
    monkeypatch.setattr(device, "is_past", lambda mark: bool(past))
    x = Foreign(X.copy())
    gone = weakref.ref(x)
    bn.normalize(x, BETA, GAMMA**2)
    del x
    gc.collect()
    assert gone() is not None
    past.append(True)
    bn.normalize(Foreign(X), BETA, GAMMA**2)
    gc.collect()
    assert gone() is None


class Torch:
    """What the package asks of PyTorch, of tensors that say they are on a device."""

    def __init__(self):
        self.cuda, self.float32, self.float64, self.uint8 = self, "float32", "float64", "uint8"
        self.cuda_stream = 3
        self.made = []

    def current_stream(self, device):
        return self

    def empty_strided(self, shape, steps, *, dtype, device):
        item = np.dtype(dtype).itemsize
        memory = np.empty(int(np.prod(shape)), dtype)
        tensor = Tensor(np.lib.stride_tricks.as_strided(memory, shape, [s * item for s in steps]))
        self.made.append(tensor)
        return tensor


class Tensor(Foreign):
    def data_ptr(self):
        return self.values.__array_interface__["data"][0]


Tensor.__module__ = "torch"


def test_tensors_of_pytorch_are_launched_on_its_stream_and_given_back(device, monkeypatch):
    torch = Torch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    x = X.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
    given = Tensor(x)
    y, saved = bn.batch_norm(given, Tensor(GAMMA))
    assert type(y) is Tensor
    assert given.streams == [3]
    assert y.values.strides == x.strides
    assert np.array_equal(y.values, bn.batch_norm(x, GAMMA)[0])
    assert saved.x is given
    gradients = bn.backward(Tensor(DY), saved)
    assert {type(gradients.dx), type(gradients.dgamma), type(gradients.dbeta)} == {Tensor}
    layer = bn.BatchNorm(4)
    layer(given)
    assert type(layer.gamma) is Tensor
    assert torch.made
    # On another current stream all is launched there, and nothing is made to wait for the one before: a graph that is
    # captured could not have it.
    launched, call = [], device.batch_norm
    monkeypatch.setattr(device, "batch_norm", lambda *given: (launched.append(given[-1]), call(*given))[1])
    monkeypatch.setattr(device, "wait_for", lambda *given: pytest.fail(f"waits: {given}"))
    torch.cuda_stream = 8
    layer(given)
    layer.backward(Tensor(DY))
    assert launched == [(0, 8)]


def test_copies_have_memory_of_their_own_and_pickles_are_refused_or_of_the_host():
    y, saved = bn.batch_norm(Foreign(X), GAMMA, activation="relu")
    wanted = y.to_numpy()
    for made in (copy.copy, copy.deepcopy):
        other = made(y)
        assert other._address() != y._address()
        assert same(wanted, other)
    again = copy.deepcopy(saved)
    assert same(bn.backward(DY, bn.batch_norm(X, GAMMA, activation="relu")[1]).dx, bn.backward(Foreign(DY), again).dx)
    with pytest.raises(TypeError, match="a DeviceArray must be copied to the host to be pickled"):
        pickle.dumps(y)
    sums = bn.grad_sums(Foreign(DY), saved)
    assert np.array_equal(pickle.loads(pickle.dumps(sums)).sum_dy, sums.sum_dy)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("gamma", [True, False])
def test_gradients_of_layers_have_the_dtype_of_parameters(dtype, gamma):
    for made in (bn.BatchNorm, bn.GraphNorm):
        here, on_device = (made(4, dtype=dtype, gamma=gamma) for _ in range(2))
        here(X), on_device(Foreign(X))
        here.backward(DY), on_device.backward(Foreign(DY))
        assert same(here.dbeta, on_device.dbeta)
        assert same(here.dgamma, on_device.dgamma)
        if made is bn.GraphNorm:
            assert same(here.dalpha, on_device.dalpha)


@pytest.mark.parametrize("policy", ["skip", "use_running"])
def test_one_value_a_channel_is_what_the_layer_says(policy):
    one = X[:1, :, :1, :1].copy()
    here, on_device = (bn.BatchNorm(4, single_value=policy) for _ in range(2))
    for x in (X, one):
        assert same(here(x), on_device(Foreign(x)))
    assert np.array_equal(here.running_mean, on_device.running_mean)


# ---- errors ----


def test_a_build_without_cuda_says_so():
    program = (
        "import sys; sys.path.insert(0, 'tests'); sys.modules['batchnorm._cuda'] = None\n"
        "import numpy as np, batchnorm as bn\n"
        "class Array:\n"
        "    def __dlpack_device__(self): return 2, 0\n"
        "    def __dlpack__(self, **_): raise AssertionError\n"
        "print(bn.show_config('dicts')['cuda'])\n"
        "try: bn.batch_norm(Array())\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "{'built': False}",
        driver.NOT_BUILT.format("x"),
    ]


@pytest.mark.parametrize("text", ["no NVIDIA driver was found on this machine", "the NVIDIA driver is too old"])
def test_what_is_missing_on_this_machine_is_said(text, device, monkeypatch):
    def missing():
        raise RuntimeError(text)

    monkeypatch.setattr(device, "count_devices", missing)
    with pytest.raises(RuntimeError, match=text):
        bn.batch_norm(Foreign(X))
    assert bn.show_config("dicts")["cuda"] == {"built": True, "missing": text}


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: bn.batch_norm(Foreign(X), Foreign(GAMMA, device=1)), r"gamma must be on the device of x \(cuda:0\), got cuda:1"),
        (lambda: bn.batch_norm(X, Foreign(GAMMA)), "gamma must be on the host, as x is, got one on cuda:0"),
        (lambda: bn.batch_norm(X, mask=Foreign(MASK)), "mask must be on the host"),
        (lambda: bn.batch_norm(Foreign(X), segments=Foreign(SEGMENTS)), "segments must be on the host, got one on cuda:0"),
        (lambda: bn.batch_norm(Foreign(X), lengths=Foreign(SEGMENTS)), "lengths must be on the host"),
        (lambda: bn.batch_norm(Foreign(X), residual=Foreign(X[:1])), "residual must have shape"),
        (lambda: bn.batch_norm(Foreign(X), out=np.empty_like(X)), "out must be on the device of x"),
        (lambda: bn.backward(DY, bn.batch_norm(Foreign(X))[1]), "dy must be on the device of x"),
        (lambda: bn.backward(Foreign(DY), bn.batch_norm(X)[1]), "dy must be on the host, as x is"),
        (lambda: bn.batch_norm(Foreign(X[:1, :, :1, :1])), "at least 2 values"),
        (lambda: bn.backward(Foreign(DY), bn.batch_norm(Foreign(X))[1], out=X.copy()), "out must be on the device of x"),
        (lambda: bn.backward(DY, bn.batch_norm(X)[1], out=Foreign(X.copy())), "out must be on the host, as x is"),
        (lambda: bn.InstanceNorm(4, running=True)(Foreign(X), out=X.copy()), "out must be on the device of x"),
        (lambda: bn.update_running(BETA, Foreign(GAMMA), bn.moments(X)), "running_var must be on the host"),
    ],
)  # fmt: skip
def test_what_is_elsewhere_is_refused_by_name(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: bn.batch_norm(Foreign(X.astype(np.int32))), r"x must have dtype .*got int32"),
        (
            lambda: bn.batch_norm(Foreign(X), mask=Foreign(MASK.astype(np.int32))),
            "mask must have a bool dtype on a device",
        ),
    ],
)
def test_a_dtype_that_does_not_fit_is_refused(call, text):
    with pytest.raises(TypeError, match=text):
        call()


def test_derivatives_that_there_are_on_the_host_alone_say_so():
    _, saved = bn.batch_norm(Foreign(X))
    with pytest.raises(NotImplementedError, match="jvp must have x on the host, got one on cuda:0"):
        bn.jvp(Foreign(X), saved)
    with pytest.raises(NotImplementedError, match="jvp must have x_dot on the host"):
        bn.jvp(Foreign(X), bn.batch_norm(X)[1])
    with pytest.raises(NotImplementedError, match="Standardizer must have x on the host"):
        bn.Standardizer(4)(Foreign(X[:, :, 0, 0].copy()))
    with pytest.raises(NotImplementedError, match="double_backward must have x on the host"):
        bn.double_backward(Foreign(X), Foreign(DY), saved)


def test_an_array_that_its_library_does_not_hand_over_is_refused_with_its_words():
    class Refuses(Foreign):
        def __dlpack__(self, **_):
            raise BufferError("use tensor.detach()")

    with pytest.raises(ValueError, match=r"x must be an array that DLPack hands over, got: use tensor.detach\(\)"):
        bn.batch_norm(Refuses(X))
