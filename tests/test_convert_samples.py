"""Layer, RMS, group and instance norm from other libraries and back: the same outputs, and what is refused by name."""

import re
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import convert

rng = np.random.default_rng(0)
X = rng.normal(2, 1, (3, 6, 4))
SCALE, SHIFT = rng.normal(size=(2, 6))
LINE_SCALE, LINE_SHIFT = rng.normal(size=(2, 4))


def same_output(layer, theirs, x=X, dtype="float64"):
    got = layer(np.ascontiguousarray(x))
    close = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(got, theirs, rtol=close, atol=close)


# ---- PyTorch ----


def torch_modules():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    nn, wide = torch.nn, {"dtype": torch.float64}
    return [
        (nn.LayerNorm(4, eps=1e-3, **wide), bn.LayerNorm),
        (nn.LayerNorm((6, 4), **wide), bn.LayerNorm),
        (nn.LayerNorm(4, bias=False, **wide), bn.LayerNorm),
        (nn.LayerNorm(4, elementwise_affine=False), bn.LayerNorm),
        (nn.RMSNorm(4, **wide), bn.RMSNorm),
        (nn.RMSNorm((6, 4), eps=1e-3, **wide), bn.RMSNorm),
        (nn.GroupNorm(3, 6, **wide), bn.GroupNorm),
        (nn.GroupNorm(2, 6, affine=False), bn.GroupNorm),
        (nn.InstanceNorm1d(6, affine=True, **wide), bn.InstanceNorm),
        (nn.InstanceNorm1d(6), bn.InstanceNorm),
    ]


def test_modules_of_pytorch_go_over_and_back():
    modules = torch_modules()
    import torch

    for module, kind in modules:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.tensor(rng.normal(size=tuple(parameter.shape))))
        layer = convert.from_torch(module, kind=kind)
        assert type(layer) is kind
        same_output(layer, module(torch.tensor(X)).detach().numpy())
        state = {name: torch.from_numpy(a) for name, a in convert.to_torch(layer).items()}
        assert {name: t.tolist() for name, t in module.state_dict().items()} == {
            n: t.tolist() for n, t in state.items()
        }
        module.load_state_dict(state)


def test_a_module_of_another_kind_is_refused():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(TypeError, match=r"^source must be a RMSNorm or a mapping of its arrays, got LayerNorm$"):
        convert.from_torch(torch.nn.LayerNorm(4), kind=bn.RMSNorm)


def test_an_instance_norm_of_pytorch_has_the_mode_and_rate_of_its_module():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    module = torch.nn.InstanceNorm1d(4, momentum=None, track_running_stats=True).eval()
    with pytest.raises(ValueError, match="update_rate must be given for a module with momentum=None"):
        convert.from_torch(module, kind=bn.InstanceNorm)
    layer = convert.from_torch(module, kind=bn.InstanceNorm, update_rate=0.25)
    assert (layer.training, layer.update_rate, layer.running) == (False, 0.25, True)
    assert convert.from_torch(module.state_dict(), kind=bn.InstanceNorm, momentum=0.3).update_rate == 0.3
    weight = {"weight": SCALE, "running_mean": None, "running_var": None}
    assert not convert.from_torch(weight, kind=bn.InstanceNorm).running


@pytest.mark.parametrize("affine", [False, True])
def test_running_statistics_of_an_instance_norm_of_pytorch_go_on(affine):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    module = torch.nn.InstanceNorm1d(4, momentum=0.3, affine=affine, track_running_stats=True, dtype=torch.float64)
    data = np.random.default_rng(0)
    x = [data.normal(3, 2, (5, 4, 7)) for _ in range(4)]
    module(torch.from_numpy(x[0]))
    layer = convert.from_torch(module, kind=bn.InstanceNorm)
    assert (layer.running, layer.update_rate, layer.update_count) == (True, 0.3, 0)  # PyTorch's count stays 0
    for batch in x[1:3]:
        y = module(torch.from_numpy(batch)).detach().numpy()
        np.testing.assert_allclose(layer(batch), y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.running_mean, module.running_mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, module.running_var, rtol=1e-12)
    module.eval(), layer.eval()
    given = torch.from_numpy(x[3]).requires_grad_()
    y = module(given)
    np.testing.assert_allclose(layer(x[3]), y.detach().numpy(), rtol=1e-12, atol=1e-12)
    y.backward(torch.from_numpy(x[0]))
    np.testing.assert_allclose(layer.backward(x[0]), given.grad.numpy(), rtol=1e-12, atol=1e-12)
    state = {name: torch.from_numpy(np.asarray(a)) for name, a in convert.to_torch(layer, dtype=np.float64).items()}
    module.load_state_dict(state)
    same = convert.from_torch(state, kind=bn.InstanceNorm)
    np.testing.assert_array_equal(same.running_var, layer.running_var)
    assert same.update_count == layer.update_count == 2


def test_running_statistics_of_an_instance_norm_are_for_pytorch_alone():
    layer = bn.InstanceNorm(4, running=True)
    with pytest.raises(ValueError, match="the layer must have running=False for onnx, got True"):
        convert.to_onnx(layer)
    with pytest.raises(ValueError, match="the layer must have ddof=1 for PyTorch"):
        convert.to_torch(bn.InstanceNorm(4, running=True, ddof=0))
    with pytest.raises(ValueError, match="source must have running_mean, as PyTorch's track_running_stats=True has"):
        convert.from_torch({"running_var": np.ones(4)}, kind=bn.InstanceNorm, channels=4)


@pytest.mark.parametrize(("dtype", "eps"), [("float32", 2.0**-23), ("float16", 2.0**-23), ("float64", 2.0**-52)])
def test_an_rms_norm_of_pytorch_without_eps_has_that_of_what_it_computes_in(dtype, eps):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    module = torch.nn.RMSNorm(4, dtype=getattr(torch, dtype))
    assert convert.from_torch(module, kind=bn.RMSNorm).eps == eps


def test_arrays_alone_need_the_settings_that_they_do_not_tell():
    state = {"weight": SCALE, "bias": SHIFT}
    layer = convert.from_torch(state, kind=bn.GroupNorm, num_groups=2, eps=1e-3)
    expected, _ = bn.group_norm(X, 2, SCALE, SHIFT, eps=1e-3)
    same_output(layer, expected)
    with pytest.raises(ValueError, match=r"^num_groups must be given where source does not tell it, got none$"):
        convert.from_torch(state, kind=bn.GroupNorm)
    with pytest.raises(ValueError, match=r"^shape must be given where source has neither scale nor bias, got none$"):
        convert.from_torch({}, kind=bn.LayerNorm)
    assert convert.from_torch({}, kind=bn.LayerNorm, shape=(6, 4)).shape == (6, 4)


# ---- Keras ----


# It is Keras that makes arrays of its own variables in a way that NumPy is about to leave.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_layers_of_keras_go_over_and_back(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    for theirs, kind in [
        (keras.layers.LayerNormalization(dtype="float64"), bn.LayerNorm),
        (keras.layers.LayerNormalization(axis=(1, 2), dtype="float64"), bn.LayerNorm),
        (keras.layers.LayerNormalization(center=False, dtype="float64"), bn.LayerNorm),
        (keras.layers.RMSNormalization(dtype="float64"), bn.RMSNorm),
        (keras.layers.GroupNormalization(2, dtype="float64"), bn.GroupNorm),
        (keras.layers.GroupNormalization(3, axis=1, dtype="float64"), bn.GroupNorm),
        (keras.layers.GroupNormalization(-1, dtype="float64"), bn.InstanceNorm),
    ]:
        theirs.build(X.shape)
        theirs.set_weights([rng.normal(size=w.shape) for w in theirs.get_weights()])
        layer = convert.from_keras(theirs, kind=kind)
        same_output(layer, keras.ops.convert_to_numpy(theirs(X)), dtype="float32")  # that is what Keras computes in
        back = convert.to_keras(layer)
        for got, want in zip(back.values(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(got, want)


def test_rms_scaling_of_keras_is_refused_with_what_it_does():
    layer = type("LayerNormalization", (), {"epsilon": 1e-3, "axis": -1, "rms_scaling": True, "gamma": SCALE})()
    with pytest.raises(ValueError, match=r"^source must have rms_scaling=False, got True: that divides by the spread"):
        convert.from_keras(layer, kind=bn.LayerNorm)


# ---- Flax ----


def test_modules_of_nnx_go_over_and_back():
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    narrow = X.astype(np.float32)
    rngs = nnx.Rngs(0)
    for module, kind in [
        (nnx.LayerNorm(4, use_fast_variance=False, rngs=rngs), bn.LayerNorm),
        (nnx.LayerNorm(4, use_bias=False, use_fast_variance=False, rngs=rngs), bn.LayerNorm),
        (nnx.RMSNorm(4, rngs=rngs), bn.RMSNorm),
        (nnx.GroupNorm(4, num_groups=2, use_fast_variance=False, rngs=rngs), bn.GroupNorm),
        (nnx.InstanceNorm(4, use_fast_variance=False, rngs=rngs), bn.InstanceNorm),
    ]:
        for name, value in (("scale", LINE_SCALE), ("bias", LINE_SHIFT)):
            if getattr(module, name, None) is not None:
                getattr(module, name)[...] = value.astype(np.float32)
        layer = convert.from_flax(module, kind=kind)
        same_output(layer, np.asarray(module(narrow)), narrow, "float32")
        params = convert.to_flax(layer)["params"]
        assert params["scale"].tolist() == np.asarray(module.scale[...]).tolist()


def test_params_of_linen_are_read():
    layer = convert.from_flax({"params": {"scale": LINE_SCALE, "bias": LINE_SHIFT}}, kind=bn.LayerNorm)
    assert layer.eps == 1e-6
    same_output(layer, bn.layer_norm(X, LINE_SCALE, LINE_SHIFT, eps=1e-6)[0])


def test_a_scale_of_other_axes_than_those_that_are_normalized_is_refused():
    module = type(
        "LayerNorm", (), {"epsilon": 1e-6, "reduction_axes": (1, 2), "feature_axes": -1, "scale": LINE_SCALE}
    )()
    with pytest.raises(
        ValueError, match=r"^source must have a scale of the axes that it normalizes, \(1, 2\), got one of"
    ):
        convert.from_flax(module, kind=bn.LayerNorm)


# ---- ONNX ----


def test_nodes_of_onnx_go_over_and_back():
    for kind, inputs, settings in [
        (bn.LayerNorm, {"Scale": LINE_SCALE, "B": LINE_SHIFT}, {}),
        (bn.LayerNorm, {"Scale": rng.normal(size=(6, 4))}, {}),
        (bn.RMSNorm, {"scale": LINE_SCALE}, {}),
        (bn.GroupNorm, {"scale": SCALE, "bias": SHIFT}, {"num_groups": 3}),
        (bn.InstanceNorm, {"scale": SCALE, "B": SHIFT}, {}),
    ]:
        layer = convert.from_onnx(inputs, kind=kind, epsilon=1e-3, **settings)
        back, attributes = convert.to_onnx(layer)
        assert {name: a.tolist() for name, a in back.items()} == {name: a.tolist() for name, a in inputs.items()}
        assert attributes["epsilon"] == 1e-3
        assert attributes.get("num_groups", 3) == 3


def test_scales_of_groups_before_opset_21_are_repeated():
    inputs = {"scale": np.array([2.0, 3.0]), "bias": np.array([0.0, 1.0])}
    layer = convert.from_onnx(inputs, kind=bn.GroupNorm, opset=18, num_groups=2, channels=6)
    assert layer.gamma.tolist() == [2, 2, 2, 3, 3, 3]
    assert layer.beta.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(
        ValueError, match=r"^channels and num_groups must be given for GroupNormalization before opset 21"
    ):
        convert.from_onnx(inputs, kind=bn.GroupNorm, opset=18, num_groups=2)


NODES = re.compile(r"^test_(layer_normalization|rms_normalization|group_normalization|instancenorm|mvn)(?!.*expanded)")


def onnx_vectors():
    loader = pytest.importorskip("onnx.backend.test.loader", reason="onnx is not installed")
    import onnx
    from onnx import numpy_helper

    with np.errstate(all="ignore"):  # of vectors of other operators
        cases = loader.load_model_tests(kind="node")
    for case in cases:
        if not NODES.match(case.name):
            continue
        model = case.model or onnx.load(f"{case.model_dir}/model.onnx")
        yield case, model.graph.node[0], numpy_helper


def test_every_vector_of_onnx_has_its_output():
    """Within float32 of the expected values, which are float32 themselves: 2e-6 of the largest."""
    count = {}
    for case, node, numpy_helper in onnx_vectors():
        attributes = {a.name: a.f if a.type == 1 else a.i for a in node.attribute}
        for inputs, outputs in case.data_sets or [_vectors_of(case, numpy_helper)]:
            x, *parameters = inputs
            eps, kind = attributes.get("epsilon", 1e-5), node.op_type
            if kind in ("LayerNormalization", "RMSNormalization"):
                axis = attributes.get("axis", -1) % x.ndim
                function = bn.layer_norm if kind == "LayerNormalization" else bn.rms_norm
                y, saved = function(x, *parameters, axes=tuple(range(axis, x.ndim)), eps=eps)
                if len(outputs) == 3:
                    np.testing.assert_allclose(saved.moments.mean, outputs[1].ravel(), rtol=2e-6, atol=2e-6)
                    np.testing.assert_allclose(saved.rstd, outputs[2].ravel(), rtol=2e-6)
            elif kind == "GroupNormalization":
                y, _ = bn.group_norm(x, attributes["num_groups"], *parameters, eps=eps)
            elif kind == "MeanVarianceNormalization":  # which adds 1e-9 to the root, not to the variance
                y, _ = bn.batch_norm(x, eps=0.0)
            else:
                y, _ = bn.instance_norm(x, *parameters, eps=eps)
            np.testing.assert_allclose(y, outputs[0], rtol=2e-6, atol=2e-6 * np.abs(outputs[0]).max())
            count[kind] = count.get(kind, 0) + 1
    assert count == {
        "LayerNormalization": 19,
        "RMSNormalization": 19,
        "GroupNormalization": 2,
        "InstanceNormalization": 2,
        "MeanVarianceNormalization": 1,
    }


def _vectors_of(case, numpy_helper):
    import onnx

    def tensors(kind):
        paths = sorted((Path(case.model_dir) / "test_data_set_0").glob(f"{kind}_*.pb"))
        return [numpy_helper.to_array(onnx.load_tensor(path)) for path in paths]

    return tensors("input"), tensors("output")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: convert.from_torch({}, kind=int),
            TypeError,
            "kind must be one of BatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm, GraphNorm, got <class 'int'>",
        ),
        (
            lambda: convert.from_torch({"weight": SCALE}, kind=bn.LayerNorm, momentum=0.1),
            TypeError,
            "momentum must be left out for a LayerNorm, got 0.1",
        ),
        (
            lambda: convert.from_onnx({"scale": SCALE, "Bias": SHIFT}, kind=bn.InstanceNorm),
            ValueError,
            "source must have names of such a layer (scale, B), got Bias",
        ),
        (
            lambda: convert.from_torch({"weight": np.array([np.nan])}, kind=bn.LayerNorm),
            ValueError,
            "source must have a finite weight, got infinity or NaN",
        ),
        (
            lambda: convert.to_torch(bn.RMSNorm(4, beta=True)),
            ValueError,
            "the layer must have beta=False for RMSNorm, which has no shift, got beta=True",
        ),
        (
            lambda: convert.to_onnx(bn.GroupNorm(2, 4, axis=-1)),
            ValueError,
            "the layer must have axis=1 for ONNX, got axis=-1",
        ),
        (
            lambda: convert.to_onnx(bn.LayerNorm(4, axes=1)),
            ValueError,
            "the layer must have the last axes for ONNX, got axes=(1,)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_carried_over_is_named(call, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        call()


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (bn.LayerNorm(3, axes=1), "the layer must have the last axes for PyTorch, got axes=(1,)"),
        (bn.InstanceNorm(3, axis=-1), "the layer must have axis=1 for PyTorch, got axis=-1"),
        (bn.GroupNorm(1, 3, axis=2), "the layer must have axis=1 for PyTorch, got axis=2"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_axes_that_pytorch_has_not_are_refused(layer, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        convert.to_torch(layer)


@pytest.mark.parametrize("option", ["convention", "gamma", "beta"])
def test_what_the_source_decides_is_not_given(option):
    with pytest.raises(TypeError, match=f"^{option} must not be given for a layer from elsewhere"):
        convert.from_torch({"weight": LINE_SCALE}, kind=bn.LayerNorm, **{option: "keras"})


def test_an_rms_norm_has_one_eps_however_pytorch_hands_it_over():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for module in (torch.nn.RMSNorm(3), torch.nn.RMSNorm(3).double()):
        by_state = convert.from_torch(module.state_dict(), kind=bn.RMSNorm)
        assert by_state.eps == convert.from_torch(module, kind=bn.RMSNorm).eps


@pytest.mark.parametrize("has", [{}, {"gamma": False}, {"beta": False}, {"gamma": False, "beta": False}], ids=str)
def test_what_goes_to_pytorch_loads_there(has):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    affine = has != {"gamma": False, "beta": False}
    for layer, module in (
        (bn.GroupNorm(3, 6, **has), torch.nn.GroupNorm(3, 6, affine=affine)),
        (bn.InstanceNorm(6, **has), torch.nn.InstanceNorm1d(6, affine=affine)),
        (bn.LayerNorm(4, **has), torch.nn.LayerNorm(4, elementwise_affine=affine, bias=has.get("beta", True))),
    ):
        module.load_state_dict({name: torch.from_numpy(a) for name, a in convert.to_torch(layer).items()})
        np.testing.assert_allclose(layer(X), module(torch.tensor(X).float()).detach().numpy(), atol=1e-5)
    assert sorted(convert.to_torch(bn.GraphNorm(2, alpha=False, **has))) == ["bias", "mean_scale", "weight"]


def test_a_class_derived_from_a_norm_is_refused_as_it_may_do_anything():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    derived = type("LayerNorm2d", (torch.nn.LayerNorm,), {})
    with pytest.raises(TypeError, match=r"^source must be a LayerNorm or a mapping of its arrays, got"):
        convert.from_torch(type("Mine", (torch.nn.LayerNorm,), {})(4), kind=bn.LayerNorm)
    assert convert.from_torch(torch.nn.LayerNorm(4), kind=bn.LayerNorm).shape == (4,)
    with pytest.raises(TypeError, match=r"^source must be a LayerNorm"):
        convert.from_torch(derived(4), kind=bn.LayerNorm)
    other = type("RMSNorm", (), {"weight": LINE_SCALE, "variance_epsilon": 1e-6})()
    with pytest.raises(TypeError, match=r"^source must be the RMSNorm of torch, with its eps"):
        convert.from_torch(other, kind=bn.RMSNorm)


@pytest.mark.parametrize("options", [{"num_groups": 0}, {"num_groups": "3"}, {"opset": "18"}], ids=str)
def test_settings_of_an_older_group_norm_of_onnx_are_looked_at(options):
    given = {"num_groups": 3, "channels": 6, "opset": 18} | options
    with pytest.raises((TypeError, ValueError), match=r"^(num_groups|opset) must be an int >= 1, got"):
        convert.from_onnx({"scale": np.ones(3), "bias": np.ones(3)}, kind=bn.GroupNorm, **given)
