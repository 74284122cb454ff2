"""The conventions of other libraries: their defaults, and their states carried over and back."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import conventions

# What PyTorch, Keras and Flax did in twenty steps (data/record_conventions.py).
RECORDED = np.load(Path(__file__).parent / "data" / "conventions.npz")
X = RECORDED["x"]
LIBRARIES = ["torch", "keras", "flax"]
STATISTICS = {
    "torch": ("running_mean", "running_var"),
    "keras": ("moving_mean", "moving_variance"),
    "flax": ("mean", "var"),
}


def recorded(library, step):
    """Give what the library had after so many steps."""
    prefix = f"{library}/"
    return {name[len(prefix) :]: RECORDED[name][step - 1] for name in RECORDED.files if name.startswith(prefix)}


def source_of(library, state):
    """Give a recorded state as the library gives it."""
    state = {name: value for name, value in state.items() if name != "y"}
    if library == "flax":
        params = {name: state[name] for name in ("scale", "bias")}
        return {"params": params, "batch_stats": {name: state[name] for name in ("mean", "var")}}
    return state


def imported(library, state, **options):
    return getattr(bn.convert, f"from_{library}")(source_of(library, state), **options)


def assert_float32(got, expected):
    """Check that values agree to a few float32 roundings, relative to the largest."""
    np.testing.assert_allclose(got, expected, rtol=4e-6, atol=4e-6 * np.abs(expected).max())


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_layer_carried_over_after_ten_steps_gives_the_same_inference_output(library):
    state = recorded(library, 10)
    assert_float32(imported(library, state).eval()(X[0]), state["y"])


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_layer_carried_over_stays_in_step_for_ten_more_steps(library):
    layer = imported(library, recorded(library, 10))
    for step in range(10, 20):
        layer.train()(X[step])
        state = recorded(library, step + 1)
        for mine, name in zip((layer.running_mean, layer.running_var), STATISTICS[library], strict=True):
            assert_float32(mine, state[name])
        assert_float32(layer.eval()(X[0]), state["y"])


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_state_carried_over_and_back_is_the_same(library):
    source = source_of(library, recorded(library, 10))
    back = getattr(bn.convert, f"to_{library}")(imported(library, recorded(library, 10)))
    parts = [(source, back)] if library != "flax" else [(source[k], back[k]) for k in ("params", "batch_stats")]
    for before, after in parts:
        assert set(before) == set(after)
        for name, value in before.items():
            assert after[name].dtype == (np.float32 if value.dtype == np.float32 else np.int64)
            assert (after[name] == value).all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_layer_trained_here_is_what_the_library_would_have_trained(library):
    layer = bn.BatchNorm(4, convention=library, axis=1)
    state = recorded(library, 1)
    names = {"torch": ("weight", "bias"), "keras": ("gamma", "beta"), "flax": ("scale", "bias")}[library]
    layer.gamma, layer.beta = (state[name].astype(np.float32) for name in names)
    for step in range(20):
        layer(X[step])
    for mine, name in zip((layer.running_mean, layer.running_var), STATISTICS[library], strict=True):
        assert_float32(mine, recorded(library, 20)[name])


def nnx_module(state, **changes):
    """Give a recorded state as an nnx.BatchNorm of Flax has it."""
    settings = {"epsilon": 1e-5, "momentum": 0.99, "axis": -1, "use_running_average": False}
    arrays = {name: state[name] for name in ("scale", "bias", "mean", "var")}
    return SimpleNamespace(**(settings | arrays | changes))


def test_an_nnx_module_is_read_as_the_variables_of_linen_are():
    state = recorded("flax", 10)
    layer = bn.convert.from_flax(nnx_module(state))
    assert (layer.eps, layer.update_rate, layer.axis, layer.ddof) == (1e-5, 0.01, -1, 0)
    for step in range(10, 20):
        layer(X[step])
    assert_float32(layer.running_var, recorded("flax", 20)["var"])
    assert_float32(layer.eval()(X[0]), recorded("flax", 20)["y"])
    flat = {name: value for name, value in state.items() if name != "y"}
    other = bn.convert.from_flax(flat)
    assert all(
        (other.state_dict()[name] == value).all() for name, value in imported("flax", state).state_dict().items()
    )


def test_the_settings_of_an_nnx_module_are_taken_unless_others_are_given():
    module = nnx_module(recorded("flax", 1), epsilon=1e-2, momentum=0.75, axis=(0,), scale=None)
    layer = bn.convert.from_flax(module)
    assert (layer.eps, layer.update_rate, layer.axis, layer.gamma) == (1e-2, 0.25, 0, None)
    layer = bn.convert.from_flax(module, epsilon=1e-4, momentum=0.5, axis=1)
    assert (layer.eps, layer.update_rate, layer.axis) == (1e-4, 0.5, 1)


# ---- the mode ----------------------------------------------------------------------------------------------


class BatchNormOfTorch:
    """What is read of a module of PyTorch."""

    eps, momentum = 1e-5, 0.1

    def __init__(self, training, state):
        self.training, self.state_dict = training, lambda: state


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_in_the_mode_of_the_module_it_came_from(training):
    state = source_of("torch", recorded("torch", 10))
    assert bn.convert.from_torch(BatchNormOfTorch(training, state)).training is training
    module = nnx_module(recorded("flax", 10), use_running_average=not training)
    assert bn.convert.from_flax(module).training is training


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_layer_from_bare_arrays_is_in_training_mode(library):
    assert imported(library, recorded(library, 10)).training


def test_an_nnx_module_that_leaves_the_mode_to_its_calls_is_in_training_mode():
    assert bn.convert.from_flax(nnx_module(recorded("flax", 1), use_running_average=None)).training


def keras_layer(**changes):
    state = source_of("keras", recorded("keras", 10))
    return SimpleNamespace(**(state | {"epsilon": 1e-3, "momentum": 0.99, "axis": -1} | changes))


@pytest.mark.parametrize("trainable", [True, False])
def test_a_layer_of_keras_that_is_not_trainable_is_frozen(trainable):
    layer = bn.convert.from_keras(keras_layer(trainable=trainable))
    assert layer.training
    assert (layer.frozen_statistics, layer.frozen_affine) == (not trainable, not trainable)
    y = layer(X[0])
    agrees = np.allclose(y, recorded("keras", 10)["y"], rtol=4e-6, atol=4e-6)
    assert agrees is (not trainable)


@pytest.mark.parametrize("said", [{"center": False}, {"scale": True}, {"scale": True, "center": False}])
def test_three_arrays_of_keras_are_read_with_what_is_said_of_them(said):
    gamma, mean, var = (recorded("keras", 10)[name] for name in ("gamma", "moving_mean", "moving_variance"))
    layer = bn.convert.from_keras([gamma, mean, var], **said)
    assert layer.beta is None
    assert (layer.gamma == gamma).all()
    assert (layer.running_mean == mean).all()
    without_scale = bn.convert.from_keras([gamma, mean, var], **{n: not v for n, v in said.items()})
    assert without_scale.gamma is None
    assert (without_scale.beta == gamma).all()


def test_weights_of_the_fused_kernels_go_on_unbiased():
    arrays = list(source_of("keras", recorded("keras", 10)).values())
    layer = bn.convert.from_keras(arrays, ddof=1)
    layer(X[10])
    expected = 0.99 * arrays[3].astype(np.float64) + 0.01 * X[10].astype(np.float64).var(0, ddof=1)
    np.testing.assert_allclose(layer.running_var, expected, rtol=1e-12)


def test_variables_that_give_an_array_by_a_method_are_read_by_it():
    class Variable:  # as one of TensorFlow is
        def __init__(self, value):
            self.value = value

        def numpy(self):
            return self.value

    state = source_of("keras", recorded("keras", 10))
    layer = bn.convert.from_keras({name: Variable(value) for name, value in state.items()})
    assert (layer.gamma == state["gamma"]).all()
    assert (layer.running_var == state["moving_variance"]).all()


def test_two_arrays_of_keras_are_the_statistics():
    mean, var = (recorded("keras", 10)[name] for name in ("moving_mean", "moving_variance"))
    layer = bn.convert.from_keras([mean, var])
    assert (layer.gamma, layer.beta) == (None, None)
    assert (layer.running_var == var).all()


# ---- the libraries themselves ------------------------------------------------------------------------------


def test_a_live_module_of_pytorch_goes_on_in_step_over_and_back():
    torch = pytest.importorskip("torch", reason="compares with PyTorch where it is installed")
    rng = np.random.default_rng(1)
    module = torch.nn.BatchNorm2d(3, eps=1e-4, momentum=0.2)
    x = rng.normal(2, 3, (30, 5, 3, 4, 4)).astype(np.float32)
    with torch.no_grad():
        module.weight.uniform_(-1, 1)
        for k in range(10):
            module(torch.tensor(x[k]))
        layer = bn.convert.from_torch(module)
        assert (layer.eps, layer.update_rate, layer.ddof, layer.update_count) == (1e-4, 0.2, 1, 10)
        assert_float32(layer.eval()(x[0]), module.eval()(torch.tensor(x[0])).numpy())
        assert not bn.convert.from_torch(module).training
        for k in range(10, 20):
            layer.train()(x[k])
            module.train()(torch.tensor(x[k]))
        assert_float32(layer.running_var, module.running_var.numpy())
        other = torch.nn.BatchNorm2d(3, eps=layer.eps, momentum=layer.update_rate)
        other.load_state_dict({name: torch.from_numpy(value) for name, value in bn.convert.to_torch(layer).items()})
        assert other.num_batches_tracked == 20
        assert_float32(other.eval()(torch.tensor(x[0])).numpy(), layer.eval()(x[0]))
        for k in range(20, 30):
            layer.train()(x[k])
            other.train()(torch.tensor(x[k]))
        assert_float32(layer.running_mean, other.running_mean.numpy())


def test_a_synchronized_module_of_pytorch_is_read_as_any_other():
    torch = pytest.importorskip("torch", reason="compares with PyTorch where it is installed")
    module = torch.nn.SyncBatchNorm(3, eps=1e-4, momentum=0.2).eval()
    layer = bn.convert.from_torch(module)
    assert (layer.eps, layer.update_rate, layer.ddof, layer.training) == (1e-4, 0.2, 1, False)
    x = np.random.default_rng(0).normal(2, 3, (5, 3)).astype(np.float32)
    with torch.no_grad():
        assert_float32(layer(x), module(torch.tensor(x)).numpy())
    assert set(bn.convert.to_torch(layer)) == set(module.state_dict())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras's own variables
def test_a_live_layer_of_keras_goes_on_in_step_over_and_back(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="compares with Keras where it is installed")
    layer = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-2, center=False)
    layer.build((6, 4))
    for k in range(10):
        layer(X[k], training=True)
    mine = bn.convert.from_keras(layer)
    assert (mine.eps, mine.axis, mine.beta) == (1e-2, -1, None)
    for k in range(10, 20):
        mine(X[k])
        layer(X[k], training=True)
    assert_float32(mine.running_var, np.asarray(layer.moving_variance))
    layer.set_weights(list(bn.convert.to_keras(mine).values()))
    y = keras.ops.convert_to_numpy(layer(X[0], training=False))
    assert_float32(mine.eval()(X[0]), y)


def test_live_variables_of_flax_go_on_in_step():
    nn = pytest.importorskip("flax.linen", reason="compares with Flax where it is installed")
    layer = nn.BatchNorm(use_running_average=False, momentum=0.9)
    mine = bn.BatchNorm(4, convention="flax", update_rate=1 - 0.9, axis=-1)
    variables = bn.convert.to_flax(mine)
    for k in range(20):
        _, changed = layer.apply(variables, X[k], mutable=["batch_stats"])
        variables = {**variables, "batch_stats": changed["batch_stats"]}
        mine(X[k])
    assert_float32(mine.running_var, np.asarray(variables["batch_stats"]["var"]))
    again = bn.convert.from_flax(variables, momentum=0.9)
    assert_float32(again.eval()(X[0]), mine.eval()(X[0]))


def test_a_live_module_of_nnx_goes_on_in_step_over_and_back():
    nnx = pytest.importorskip("flax.nnx", reason="compares with Flax where it is installed")
    module = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-4, use_bias=False, rngs=nnx.Rngs(0))
    for k in range(10):
        module(X[k])
    layer = bn.convert.from_flax(module)
    assert (layer.eps, layer.update_rate, layer.beta, layer.training) == (1e-4, 0.1, None, True)
    for k in range(10, 20):
        module(X[k])
        layer(X[k])
    assert_float32(layer.running_var, np.asarray(module.var[...]))
    module.eval()
    assert_float32(layer.eval()(X[0]), np.asarray(module(X[0])))
    assert not bn.convert.from_flax(module).training
    other = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-4, use_bias=False, rngs=nnx.Rngs(0))
    variables = bn.convert.to_flax(layer)
    nnx.update(other, variables["params"] | variables["batch_stats"])
    (other.train if layer.training else other.eval)()
    assert_float32(np.asarray(other(X[0])), layer(X[0]))
    assert_float32(bn.convert.from_flax(nnx.state(module), epsilon=1e-4).eval()(X[0]), layer(X[0]))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras's own variables
def test_live_layers_of_keras_are_read_as_lists_and_frozen_where_not_trainable(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="compares with Keras where it is installed")
    layer = keras.layers.BatchNormalization(scale=False)
    layer.build((6, 4))
    layer.set_weights([np.arange(4.0), np.arange(4.0), np.arange(1.0, 5.0)])
    layer.trainable = False
    from_list = bn.convert.from_keras(layer.get_weights(), scale=False).eval()
    frozen = bn.convert.from_keras(layer)
    expected = keras.ops.convert_to_numpy(layer(X[0], training=True))
    assert_float32(from_list(X[0]), expected)
    assert_float32(frozen(X[0]), expected)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("InstanceNorm1d", {"num_features": 4}),
        ("InstanceNorm2d", {"num_features": 4}),
        ("InstanceNorm3d", {"num_features": 4}),
        ("LazyInstanceNorm2d", {}),
        ("GroupNorm", {"num_groups": 2, "num_channels": 4}),
        ("LayerNorm", {"normalized_shape": 4}),
        ("RMSNorm", {"normalized_shape": 4}),
        ("LocalResponseNorm", {"size": 2}),
    ],
)
def test_live_modules_of_pytorch_that_are_no_batch_norm_are_refused_by_name(name, arguments):
    torch = pytest.importorskip("torch", reason="reads modules of PyTorch where it is installed")
    keeps = {"affine": True, "track_running_stats": True} if "Instance" in name else {}
    module = getattr(torch.nn, name)(**arguments, **keeps)
    with pytest.raises(TypeError) as caught:
        bn.convert.from_torch(module)
    assert str(caught.value) == f"source must be a batch norm module of PyTorch or its state_dict, got {name}"


def test_a_lazy_module_of_pytorch_is_taken_once_it_has_its_channels():
    torch = pytest.importorskip("torch", reason="reads modules of PyTorch where it is installed")
    module = torch.nn.LazyBatchNorm1d(dtype=torch.float64)
    for source in (module, module.state_dict()):
        with pytest.raises(ValueError, match="as a lazy module has after its first input, got Uninit"):
            bn.convert.from_torch(source)
    module(torch.tensor(X[0].astype(np.float64)))
    layer = bn.convert.from_torch(module)
    assert (layer.channels, layer.dtype) == (4, np.float64)
    assert_float32(layer.running_mean, module.running_mean.numpy())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float64", "float64"), ("float32", "float32"), ("float16", "float16"), ("bfloat16", "float32")],
)
def test_a_live_module_of_pytorch_keeps_its_dtype(dtype, expected):
    torch = pytest.importorskip("torch", reason="reads modules of PyTorch where it is installed")
    module = torch.nn.BatchNorm1d(3).to(getattr(torch, dtype))
    with torch.no_grad():
        for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
            tensor.uniform_(0.5, 2)
    layer = bn.convert.from_torch(module)
    assert layer.dtype == expected
    for mine, tensor in (
        (layer.gamma, module.weight),
        (layer.beta, module.bias),
        (layer.running_mean, module.running_mean),
        (layer.running_var, module.running_var),
    ):
        np.testing.assert_array_equal(mine, tensor.detach().double().numpy())
    other = torch.nn.BatchNorm1d(3).to(getattr(torch, dtype))
    other.load_state_dict({name: torch.from_numpy(value) for name, value in bn.convert.to_torch(layer).items()})
    assert all((other.state_dict()[name] == value).all() for name, value in module.state_dict().items())
    assert bn.convert.from_torch(module, dtype=np.float32).dtype == np.float32


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras's own variables
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("float64", "float64"),
        ("float16", "float16"),
        ("bfloat16", "float32"),
        ("mixed_float16", "float32"),
        ("mixed_bfloat16", "float32"),
    ],
)
def test_a_live_layer_of_keras_keeps_its_dtype(monkeypatch, policy, expected):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="reads layers of Keras where it is installed")
    layer = keras.layers.BatchNormalization(dtype=policy)
    layer.build((6, 4))
    layer.set_weights([np.arange(4) + k / 4 for k in range(4)])
    mine = bn.convert.from_keras(layer)
    assert mine.dtype == expected
    np.testing.assert_array_equal(mine.gamma, np.arange(4.0))
    np.testing.assert_array_equal(mine.running_var, np.arange(4) + 0.75)


@pytest.mark.parametrize("name", ["LayerNormalization", "GroupNormalization", "UnitNormalization"])
def test_live_layers_of_keras_that_are_no_batch_norm_are_refused_by_name(monkeypatch, name):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="reads layers of Keras where it is installed")
    layer = getattr(keras.layers, name)(**({"groups": 2} if name == "GroupNormalization" else {}))
    layer.build((6, 4))
    with pytest.raises(TypeError, match=f"source must be a BatchNormalization of Keras .* got {name}$"):
        bn.convert.from_keras(layer)


@pytest.mark.parametrize(("dtype", "expected"), [("float16", "float16"), ("bfloat16", "float32")])
def test_a_live_module_of_nnx_keeps_its_dtype(dtype, expected):
    nnx = pytest.importorskip("flax.nnx", reason="reads modules of Flax where it is installed")
    module = nnx.BatchNorm(4, param_dtype=dtype, rngs=nnx.Rngs(0))
    assert bn.convert.from_flax(module).dtype == expected


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "RMSNorm"])
def test_live_modules_of_nnx_that_are_no_batch_norm_are_refused_by_name(name):
    nnx = pytest.importorskip("flax.nnx", reason="reads modules of Flax where it is installed")
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    module = getattr(nnx, name)(4, rngs=nnx.Rngs(0), **options)
    with pytest.raises(TypeError, match=f"variables must be a BatchNorm of Flax's nnx, .* got {name}$"):
        bn.convert.from_flax(module)


# ---- dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("library", [*LIBRARIES, "onnx"])
def test_a_source_keeps_its_dtype_unless_another_is_given(library, dtype):
    source = {
        "torch": lambda a: {"weight": a, "bias": a, "running_mean": a, "running_var": a},
        "keras": lambda a: [a] * 4,
        "flax": lambda a: {"params": {"scale": a}, "batch_stats": {"mean": a, "var": a}},
        "onnx": lambda a: {"scale": a, "B": a, "input_mean": a, "input_var": a},
    }[library](np.array([1 / 3, 2 / 3], dtype))
    read = getattr(bn.convert, f"from_{library}")
    layer = read(source)
    assert layer.dtype == dtype
    assert (layer.gamma == np.array([1 / 3, 2 / 3], dtype)).all()
    assert read(source, dtype=np.float32).dtype == np.float32


def test_a_source_of_two_dtypes_is_read_in_the_wider():
    layer = bn.convert.from_torch(state(bias=np.array([1 / 3, 2 / 3])))
    assert (layer.dtype, layer.beta[0]) == (np.float64, 1 / 3)


def test_a_source_in_bfloat16_is_read_in_float32():
    bfloat16 = pytest.importorskip("ml_dtypes", reason="reads bfloat16 where ml_dtypes is").bfloat16
    layer = bn.convert.from_keras([np.array([1 / 3, 2 / 3], bfloat16)] * 4)
    assert layer.dtype == np.float32
    assert (layer.gamma == np.array([1 / 3, 2 / 3], bfloat16).astype(np.float32)).all()


@pytest.mark.parametrize(("dtype", "expected"), [("float16", "float32"), ("float64", "float64")])
def test_an_export_holds_all_digits_of_the_parameters_unless_told_otherwise(dtype, expected):
    layer = bn.BatchNorm(2, ddof=0, dtype=dtype)
    layer.gamma[:] = 1 / 3
    exports = (
        bn.convert.to_torch(layer, any_ddof=True)["weight"],
        bn.convert.to_keras(layer)["gamma"],
        bn.convert.to_flax(layer)["params"]["scale"],
        bn.convert.to_onnx(layer)[0]["scale"],
    )
    for gamma in exports:
        assert gamma.dtype == expected
        assert (gamma == layer.gamma).all()
    assert bn.convert.to_keras(layer, dtype=np.float16)["gamma"].dtype == np.float16


# ---- what is said by name ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "eps", "rate", "ddof", "axis"),
    [
        (None, 1e-5, 0.1, 1, 1),
        ("torch", 1e-5, 0.1, 1, 1),
        ("keras", 1e-3, 0.01, 0, -1),
        ("flax", 1e-5, 0.01, 0, -1),
        ("onnx", 1e-5, 0.1, 0, 1),
    ],
)
def test_a_convention_sets_the_defaults_and_what_is_given_goes_first(name, eps, rate, ddof, axis):
    layer = bn.BatchNorm(3, convention=name)
    assert (layer.eps, layer.update_rate, layer.ddof, layer.axis) == (eps, rate, ddof, axis)
    layer = bn.BatchNorm(3, convention=name, eps=0.5, update_rate=None)
    assert (layer.eps, layer.update_rate, layer.ddof, layer.axis) == (0.5, None, ddof, axis)
    assert f"axis={axis}," in repr(layer)
    assert f"ddof={ddof}" in repr(layer)
    assert bn.BatchNorm(3, convention=name, axis=2).axis == 2


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_convention_has_the_axis_of_what_is_carried_over(library):
    assert bn.BatchNorm(4, convention=library).axis == imported(library, recorded(library, 1)).axis


def test_an_unknown_convention_is_refused_with_the_list_of_known_ones():
    with pytest.raises(ValueError, match="convention must be 'torch', 'keras', 'flax' or 'onnx', got 'caffe'"):
        bn.BatchNorm(3, convention="caffe")


@pytest.mark.parametrize(("momentum", "rest"), [(0.99, "0.01"), (0.9, "0.1"), (0.1, "0.9")])
def test_momentum_is_told_what_to_write_instead(momentum, rest):
    with pytest.raises(TypeError) as caught:
        bn.BatchNorm(3, momentum=momentum)
    assert str(caught.value) == (
        "update_rate must be given instead of momentum, whose meaning differs between frameworks: write "
        f"update_rate={momentum} for PyTorch's momentum={momentum}, update_rate={rest} for that of Keras, Flax or ONNX, "
        f"got momentum={momentum}"
    )


def test_onnx_goes_over_and_back():
    rng = np.random.default_rng(0)
    inputs = {name: rng.uniform(0.5, 2, 4).astype(np.float32) for name in ("scale", "B", "input_mean", "input_var")}
    layer = bn.convert.from_onnx(inputs, epsilon=1e-3, momentum=0.75)
    assert (layer.eps, layer.update_rate, layer.ddof, layer.axis) == (1e-3, 0.25, 0, 1)
    x = rng.normal(size=(5, 4)).astype(np.float32)
    y = (x - inputs["input_mean"]) / np.sqrt(inputs["input_var"] + 1e-3) * inputs["scale"] + inputs["B"]
    assert_float32(layer.eval()(x), y)
    back, attributes = bn.convert.to_onnx(layer)
    assert all((back[name] == inputs[name]).all() for name in inputs)
    assert attributes == {"epsilon": 1e-3, "momentum": 0.75}


def state(**changes):
    one = np.ones(2, np.float32)
    plain = {"weight": one, "bias": one, "running_mean": one, "running_var": one}
    return {name: value for name, value in (plain | changes).items() if value is not None}


def test_a_running_variance_of_zero_is_taken():
    layer = bn.convert.from_torch(state(running_var=np.array([0.0, 2.0])))
    assert layer.running_var.tolist() == [0, 2]


def test_a_state_without_a_counter_or_parameters_is_taken():
    layer = bn.convert.from_torch(state(weight=None, bias=None))
    assert layer.gamma is None
    assert layer.beta is None
    assert layer.update_count == 0
    assert (bn.convert.to_torch(layer)["weight"] == 1).all()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: bn.convert.from_torch(3), TypeError, "source must be a batch norm module of PyTorch"),
        (
            lambda: bn.convert.from_torch(state(running_mean=None)),
            ValueError,
            "source must have running_mean, as PyTorch's track_running_stats=True has, got none",
        ),
        (
            lambda: bn.convert.from_torch(state(running_var=np.array([1, -2.0]))),
            ValueError,
            "source must have running variances >= 0, got -2.0 in channel 1",
        ),
        (
            lambda: bn.convert.from_torch(state(running_mean=np.array([1, np.nan]))),
            ValueError,
            "source must have a finite running mean in every channel, got infinity or NaN",
        ),
        (
            lambda: bn.convert.from_torch(state(weight=np.ones(3))),
            ValueError,
            "source must have a gamma of 2 floats, got shape (3,) of float64",
        ),
        (
            lambda: bn.convert.from_torch(state(gamma=np.ones(2))),
            ValueError,
            "source must have names of PyTorch (weight, bias, running_mean, running_var, num_batches_tracked), got gamma",
        ),
        (
            lambda: bn.convert.from_keras([np.ones(2)] * 3),
            ValueError,
            "source must be the arrays of get_weights(): 4, or 2 without gamma and beta, or 3 with scale=False or center=False given to tell which of them is absent, got 3 with scale=None and center=None",
        ),
        (
            lambda: bn.convert.from_keras([np.ones(2)] * 4, center=False),
            ValueError,
            "source must be the arrays of get_weights(): 4,",
        ),
        (
            lambda: bn.convert.from_keras([np.ones(2)] * 3, scale=0),
            TypeError,
            "scale must be True or False, got int",
        ),
        (
            lambda: bn.convert.from_keras({"moving_mean": np.ones(2)}, scale=False),
            ValueError,
            "scale and center must be None where source is no list: it has its names",
        ),
        (
            lambda: bn.convert.from_keras("gamma"),
            TypeError,
            "source must be a BatchNormalization of Keras that is built, its get_weights(), or a mapping",
        ),
        (
            lambda: bn.convert.from_torch(state(), gamma=False),
            TypeError,
            "gamma must not be given for a layer from elsewhere, as source has it or not, got False",
        ),
        (
            lambda: bn.convert.from_torch(state(), domains=2),
            TypeError,
            "domains must not be given for a layer from elsewhere, as source has one set of statistics, got 2",
        ),
        (
            lambda: bn.convert.from_torch(state(), debias=True),
            TypeError,
            "debias must not be given for a layer from elsewhere, as the statistics of source have a share",
        ),
        (
            lambda: bn.convert.from_keras([np.ones(2)] * 4, update_rate=None),
            TypeError,
            "update_rate must be a number for a layer from elsewhere, which has no moments, got None",
        ),
        (
            lambda: bn.convert.from_keras([np.ones(2)] * 4, momentum=1.5),
            ValueError,
            "momentum must be from 0 to 1, got 1.5",
        ),
        (
            lambda: bn.convert.from_flax({"params": {}}),
            TypeError,
            "variables must be a BatchNorm of Flax's nnx, its state (mean, var, scale, bias), or a mapping with 'batch_stats' (mean, var) and 'params' (scale, bias), got ['params']",
        ),
        (
            lambda: bn.convert.from_flax(np.ones(2)),
            TypeError,
            "variables must be a BatchNorm of Flax's nnx, its state",
        ),
        (
            lambda: bn.convert.from_flax(nnx_module(recorded("flax", 1), axis=(1, 2))),
            TypeError,
            "axis must be an int, got tuple",
        ),
        (
            lambda: bn.convert.from_onnx([np.ones(2)] * 4),
            TypeError,
            "inputs must be a mapping of names to arrays, got list",
        ),
        (
            lambda: bn.convert.to_keras(bn.BatchNorm(2)),
            ValueError,
            "the layer must have ddof=0 for Keras, whose running variances are biased, got ddof=1: pass any_ddof=True",
        ),
        (
            lambda: bn.convert.to_onnx(bn.BatchNorm(2, ddof=0, update_rate=None)),
            ValueError,
            "the layer must have an update_rate for ONNX's momentum, got None",
        ),
        (
            lambda: bn.convert.to_torch(bn.BatchNorm(2, renorm=bn.RenormSchedule.paper())),
            ValueError,
            "the layer must have no renorm for PyTorch, whose running variances are unbiased, got renorm with parity='paper', whose are biased: pass any_ddof=True",
        ),
        (
            lambda: bn.convert.to_keras(bn.BatchNorm(2, ddof=0, renorm=bn.RenormSchedule.paper(), parity="torchrl")),
            ValueError,
            "the layer must have no renorm for Keras, whose running variances are biased, got renorm with parity='torchrl', whose are unbiased: pass any_ddof=True",
        ),
        (
            lambda: bn.convert.from_onnx({"scale": np.ones(2), "B": np.ones(2)}),
            ValueError,
            "source must have input_mean, as ONNX's BatchNormalization has, got none",
        ),
        (
            lambda: bn.convert.to_torch(bn.BatchNorm(2, domains=2)),
            ValueError,
            "the layer must have one set of statistics for PyTorch, got 2 domains",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_over_is_named(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(text)


def test_a_module_that_averages_variances_alike_needs_an_update_rate():
    class BatchNorm1d:
        eps, momentum = 1e-5, None

        def state_dict(self):
            return state()

    with pytest.raises(ValueError, match="update_rate must be given for a module with momentum=None"):
        bn.convert.from_torch(BatchNorm1d())
    assert bn.convert.from_torch(BatchNorm1d(), update_rate=0.3).update_rate == 0.3


def test_a_layer_with_renorm_goes_where_its_variance_is_of_the_same_kind():
    biased = bn.BatchNorm(2, renorm=bn.RenormSchedule.paper())
    unbiased = bn.BatchNorm(2, renorm=bn.RenormSchedule.torchrl(), parity="torchrl")
    assert set(bn.convert.to_keras(biased)) == set(bn.convert.to_keras(unbiased, any_ddof=True))
    assert set(bn.convert.to_torch(unbiased)) == set(bn.convert.to_torch(biased, any_ddof=True))


def test_an_export_with_another_ddof_is_for_inference():
    layer = bn.BatchNorm(2)
    assert list(bn.convert.to_keras(layer, any_ddof=True)) == [
        "gamma",
        "beta",
        "moving_mean",
        "moving_variance",
    ]


@pytest.mark.parametrize("momentum, rate", [(0.99, 0.01), (0.9, 0.1), (0.999, 0.001), (0.3, 0.7), (0, 1), (1, 0)])
def test_the_rest_of_a_momentum_has_no_digits_of_rounding(momentum, rate):
    layer = bn.convert.from_keras([np.ones(2)] * 4, momentum=momentum)
    assert layer.update_rate == rate
    assert bn.convert.to_onnx(layer)[1]["momentum"] == momentum


def test_a_frozen_module_without_a_momentum_is_taken_and_never_updates():
    class FrozenBatchNorm2d:
        eps = 1e-5

        def state_dict(self):
            return {name: value for name, value in state().items() if name != "num_batches_tracked"}

    layer = bn.convert.from_torch(FrozenBatchNorm2d())
    assert layer.update_rate == 0
    assert layer.frozen_statistics
    assert layer.frozen_affine
    before = layer.running_mean.copy(), layer.running_var.copy()
    layer(np.random.default_rng(0).normal(size=(8, layer.channels)))
    assert np.array_equal((layer.running_mean, layer.running_var), before)


@pytest.mark.parametrize("count", [np.array([1, 2]), np.array(np.nan), np.array(-1), 1.5])
def test_a_counter_that_counts_nothing_is_named(count):
    with pytest.raises(ValueError, match="num_batches_tracked that is one integer >= 0"):
        bn.convert.from_torch(state() | {"num_batches_tracked": count})


@pytest.mark.parametrize("name", ["params", "batch_stats"])
def test_a_group_of_flax_that_is_no_mapping_is_named(name):
    variables = {"params": {}, "batch_stats": {"mean": np.zeros(2), "var": np.ones(2)}} | {name: None}
    with pytest.raises(TypeError, match=f"{name} must be a mapping of names to arrays"):
        bn.convert.from_flax(variables)


@pytest.mark.parametrize("name", ["Linear", "InstanceNorm2d", "GroupNorm", "BatchRenorm1d", "InPlaceABN"])
def test_a_module_that_is_no_batch_norm_is_refused(name):
    # All that a module of that name may have in common with a batch norm: the arrays tell nothing.
    members = {"eps": 1e-5, "momentum": 0.1, "training": True, "state_dict": lambda _: state()}
    with pytest.raises(TypeError) as caught:
        bn.convert.from_torch(type(name, (), members)())
    assert str(caught.value) == f"source must be a batch norm module of PyTorch or its state_dict, got {name}"


@pytest.mark.parametrize(("name", "is_one"), [("BatchNorm2d", True), ("InstanceNorm2d", False)])
def test_a_compiled_module_is_told_by_its_original_name(name, is_one):
    members = {"eps": 1e-5, "momentum": 0.1, "training": True, "state_dict": lambda _: state()}
    module = type("RecursiveScriptModule", (), members | {"original_name": name})()
    if is_one:
        assert bn.convert.from_torch(module).channels == 2
    else:
        with pytest.raises(TypeError, match=r"got RecursiveScriptModule$"):
            bn.convert.from_torch(module)


@pytest.mark.parametrize("base", ["BatchNorm1d", "SyncBatchNorm", "FrozenBatchNorm2d"])
def test_what_derives_from_a_batch_norm_is_one(base):
    members = {"eps": 1e-5, "momentum": 0.1, "training": True, "state_dict": lambda _: state()}
    derived = type("Norm", (type(base, (), members),), {})
    assert bn.convert.from_torch(derived()).channels == 2


def test_a_layer_of_keras_with_renorm_is_refused():
    class Renorm:
        renorm, gamma, beta, moving_mean, moving_variance = True, None, None, np.zeros(2), np.ones(2)

    with pytest.raises(ValueError, match="source must be a layer without renorm"):
        bn.convert.from_keras(Renorm())


# ---- the pages ---------------------------------------------------------------------------------------------

PAGES = Path(__file__).parent.parent / "docs" / "conventions"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Each row that the table must have, on its own: the batch norms of others, and what they can do.
OF_LIBRARIES = (
    "PyTorch BatchNorm1d, 2d, 3d",
    "PyTorch SyncBatchNorm",
    "Keras 3 BatchNormalization",
    "tf.keras, fused kernels",
    "tf.keras, other kernels",
    "Flax BatchNorm, linen and nnx",
    "Haiku BatchNorm",
    "Equinox BatchNorm",
    "MLX BatchNorm",
    "ONNX BatchNormalization",
    "oneDNN",
    "cuDNN",
    "tinygrad BatchNorm",
    "numpy-ml BatchNorm1D, 2D",
    "apex SyncBatchNorm",
    "detectron2 NaiveSyncBatchNorm",
    "InPlaceABN",
    "PyTorch Geometric BatchNorm",
    "batchrenorm (PyTorch package)",
    "torchrl BatchRenorm1d",
)
ABILITIES = 23
COLUMNS = ("kind", "row", "shown by")


class Formula(NamedTuple):
    """What a library does in training: its eps and the share of the old, of a variance with that ddof."""

    settings: dict  # of BatchNorm, as the table says
    eps: float
    keep: float
    ddof: int
    is_debiased: bool = False


FORMULAS = {
    "PyTorch BatchNorm1d, 2d, 3d": Formula({"convention": "torch"}, 1e-5, 0.9, 1),
    "Keras 3 BatchNormalization": Formula({"convention": "keras"}, 1e-3, 0.99, 0),
    "tf.keras, fused kernels": Formula({"convention": "keras", "ddof": 1}, 1e-3, 0.99, 1),
    "tf.keras, other kernels": Formula({"convention": "keras"}, 1e-3, 0.99, 0),
    "Flax BatchNorm, linen and nnx": Formula({"convention": "flax"}, 1e-5, 0.99, 0),
    "Haiku BatchNorm": Formula({"update_rate": 1 - 0.8, "debias": True, "ddof": 0}, 1e-5, 0.8, 0, True),
    "Equinox BatchNorm": Formula({"convention": "flax"}, 1e-5, 0.99, 0),
    "MLX BatchNorm": Formula({"convention": "torch", "axis": -1}, 1e-5, 0.9, 1),
    "ONNX BatchNormalization": Formula({"convention": "onnx"}, 1e-5, 0.9, 0),
    "cuDNN": Formula({"eps": 1e-4, "update_rate": 0.3, "ddof": 1}, 1e-4, 0.7, 1),
    "tinygrad BatchNorm": Formula({"convention": "torch"}, 1e-5, 0.9, 1),
    "numpy-ml BatchNorm1D, 2D": Formula({"convention": "onnx", "axis": -1}, 1e-5, 0.9, 0),
    "apex SyncBatchNorm": Formula({"convention": "torch"}, 1e-5, 0.9, 1),
    "detectron2 NaiveSyncBatchNorm": Formula({"convention": "torch", "ddof": 0}, 1e-5, 0.9, 0),
    "InPlaceABN": Formula({"convention": "torch"}, 1e-5, 0.9, 1),
    "PyTorch Geometric BatchNorm": Formula({"convention": "torch", "single_value": "use_running"}, 1e-5, 0.9, 1),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_settings_in_the_table_follow_the_formula_of_the_library(name):
    settings, eps, keep, ddof, is_debiased = FORMULAS[name]
    layer = bn.BatchNorm(4, **settings)
    start = 0.0 if is_debiased else 1.0
    mean, var = np.zeros(4), np.full(4, start)
    for k, x in enumerate(X.astype(np.float64), 1):
        y = layer.train()(x)
        assert_within_digits(y, (x - x.mean(0)) / np.sqrt(x.var(0) + eps))
        mean = keep * mean + (1 - keep) * x.mean(0)
        var = keep * var + (1 - keep) * x.var(0, ddof=ddof)
        share = 1 - keep**k if is_debiased else 1.0
        assert_within_digits(layer.running_mean, mean / share)
        assert_within_digits(layer.running_var, var / share)
        assert_within_digits(layer.eval()(x), (x - mean / share) / np.sqrt(var / share + eps))


def assert_within_digits(got, expected):
    """Check that float64 values agree to some hundred roundings, which the twenty steps of a formula may add up to."""
    np.testing.assert_allclose(got, expected, rtol=2e-14, atol=2e-14 * np.abs(expected).max())


def cells(page):
    """Give the rows of the tables of a page."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def rows():
    """Give what is shown by tests, as mappings of the columns."""
    table = cells(PAGES / "tests.md")
    assert table[0] == COLUMNS
    return [dict(zip(COLUMNS, row, strict=True)) for row in table[2:]]


def told():
    """Give what the other pages say is here, by row."""
    pages = [page for page in PAGES.glob("*.md") if page.stem not in ("tests", "README")]
    return {row[0]: row[2] for page in pages for row in cells(page)}


def test_every_library_and_every_ability_has_a_row_of_its_own():
    names = [row["row"] for row in rows()]
    assert len(set(names)) == len(names)
    assert tuple(row["row"] for row in rows() if row["kind"] == "library") == OF_LIBRARIES
    assert sum(row["kind"] == "ability" for row in rows()) == ABILITIES
    assert {row["kind"] for row in rows()} == {"library", "ability", "added"}
    assert set(FORMULAS) <= set(OF_LIBRARIES)


def test_every_row_of_the_table_names_a_test_or_says_not_yet():
    for row in rows():
        tests = re.findall(r"`(test_\w+)::(test_\w+)`", row["shown by"])
        assert bool(tests) != told()[row["row"]].startswith("not yet"), row["row"]
        assert ", ".join(f"`{file}::{test}`" for file, test in tests) == row["shown by"], row["row"]
        for file, test in tests:
            text = (Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8")
            assert f"def {test}(" in text, f"{row['row']}: {file} has no {test}"


def test_a_row_that_names_the_formula_has_one():
    named = {row["row"] for row in rows() if "the_formula_of_the_library`" in row["shown by"]}
    assert named <= set(FORMULAS)


@pytest.mark.parametrize("name", conventions.CONVENTIONS)
def test_a_convention_that_is_known_has_a_page_whose_code_runs(name):
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert f'convention="{name}"' in (PAGES / "README.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert blocks
    for code in blocks:
        exec(code, {})  # noqa: S102


def test_a_layer_from_elsewhere_has_the_convention_of_its_source():
    ones = np.ones(2, np.float32)
    state = {"weight": ones, "bias": ones, "running_mean": ones, "running_var": ones}
    with pytest.raises(TypeError, match="convention must not be given for a layer from elsewhere"):
        bn.convert.from_torch(state, convention="keras")
