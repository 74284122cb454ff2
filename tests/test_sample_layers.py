"""LayerNorm, RMSNorm, GroupNorm, InstanceNorm and GraphNorm: the functions with parameters, a state and a backward pass."""

import copy
import pickle
import re

import numpy as np
import pytest

import batchnorm as bn

SHAPE = (5, 6, 4)
LAYERS = {
    "layer": (lambda **o: bn.LayerNorm(4, **o), lambda x, g, b, **o: bn.layer_norm(x, g, b, **o), {"shape": (4,), "axes": (-1,)}),
    "maps": (lambda **o: bn.LayerNorm(6, axes=1, **o), lambda x, g, b, **o: bn.layer_norm(x, g, b, axes=1, **o), {"axes": (1,)}),
    "both": (lambda **o: bn.LayerNorm((6, 4), **o), lambda x, g, b, **o: bn.layer_norm(x, g, b, axes=(1, 2), **o), {"axes": (-2, -1)}),
    "rms": (lambda **o: bn.RMSNorm(4, **o), lambda x, g, b, **o: bn.rms_norm(x, g, b, **o), {"eps": 1e-6}),
    "group": (lambda **o: bn.GroupNorm(2, 6, **o), lambda x, g, b, **o: bn.group_norm(x, 2, g, b, **o), {"num_groups": 2, "channels": 6}),
    "instance": (lambda **o: bn.InstanceNorm(6, **o), lambda x, g, b, **o: bn.instance_norm(x, g, b, **o), {"channels": 6, "axis": 1}),
    "graph": (lambda **o: bn.GraphNorm(6, **{"alpha": False} | o), lambda x, g, b, **o: bn.graph_norm(x, g, b, **o), {"channels": 6, "axis": 1}),
}  # fmt: skip
each_layer = pytest.mark.parametrize("name", LAYERS)
rng = np.random.default_rng(0)
X, DY, RESIDUAL = rng.normal(2, 1, (3, *SHAPE)).astype(np.float32)
MASK = rng.random((5, 4)) < 0.7


def trained(name, **options):
    """Give a layer whose parameters are not what they began as."""
    layer, values = LAYERS[name][0](**options), np.random.default_rng(1)
    for parameter in (layer.gamma, layer.beta):
        if parameter is not None:
            parameter += values.normal(size=parameter.shape).astype(parameter.dtype)
    return layer


@each_layer
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda t: t.__name__)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_layer_gives_the_bits_of_the_function(name, dtype, mode):
    layer, x, dy = trained(name).train(mode == "training"), X.astype(dtype), DY.astype(dtype)
    y = layer(x)
    expected, saved = LAYERS[name][1](x, layer.gamma, layer.beta, eps=layer.eps)
    assert y.tobytes() == expected.tobytes()
    dx, wanted = layer.backward(dy), bn.backward(dy, saved)
    assert dx.tobytes() == wanted.dx.tobytes()
    assert layer.dgamma.tobytes() == wanted.dgamma.tobytes()
    assert layer.beta is None or layer.dbeta.tobytes() == wanted.dbeta.tobytes()


@each_layer
def test_a_layer_takes_what_the_function_takes(name):
    options = {"residual": RESIDUAL, "padding": "zero", "mask": MASK}
    if name in ("layer", "rms", "both"):
        options["mask"] = MASK[:, :1] if name == "both" else np.ones((5, 6), bool)
    if name == "both":
        options["mask"] = np.array([True, False, True, True, False])
    layer = trained(name, activation="relu", num_threads=1)
    y = layer(X, **options)
    expected, saved = LAYERS[name][1](X, layer.gamma, layer.beta, eps=layer.eps, activation="relu", **options)
    assert y.tobytes() == expected.tobytes()
    assert layer.backward(DY).tobytes() == bn.backward(DY, saved).dx.tobytes()
    assert layer.dresidual.tobytes() == bn.backward(DY, saved).dresidual.tobytes()


@each_layer
def test_backward_is_of_the_gamma_of_its_call(name):
    layer = trained(name)
    layer(X)
    before = layer.backward(DY)
    layer.gamma *= 2
    assert layer.backward(DY).tobytes() == before.tobytes()


@each_layer
@pytest.mark.parametrize("options", [{"keep": None}, {"out": "x"}], ids=str)
def test_nothing_is_kept_where_no_backward_can_follow(name, options):
    layer, x = trained(name), X.copy()
    layer(X)
    y = layer(x, **({"out": x} if "out" in options else options))
    assert y.tobytes() == LAYERS[name][1](X, layer.gamma, layer.beta, eps=layer.eps)[0].tobytes()
    with pytest.raises(RuntimeError, match=r"^backward must follow a call of the layer that left its x intact"):
        layer.backward(DY)


@each_layer
def test_a_state_comes_back_bit_for_bit(name, tmp_path):
    layer, other = trained(name, dtype="float64"), LAYERS[name][0](dtype="float64")
    layer.save(tmp_path / "state")
    other.load(tmp_path / "state")
    for copied in (other, pickle.loads(pickle.dumps(layer)), copy.copy(layer), copy.deepcopy(layer)):
        assert repr(copied) == repr(layer)
        assert copied(X).tobytes() == layer(X).tobytes()
        assert copied.gamma is not layer.gamma


@each_layer
def test_a_state_of_other_settings_is_refused(name):
    layer, other = LAYERS[name][0](), LAYERS[name][0](eps=0.5)
    with pytest.raises(ValueError, match=r"^state must have the settings of this layer, eps="):
        other.load_state_dict(layer.state_dict())
    other.load_state_dict(layer.state_dict(), strict=False)


def test_a_state_of_another_kind_of_layer_is_refused():
    with pytest.raises(ValueError, match=r"^state must have the settings of this layer"):
        bn.InstanceNorm(6).load_state_dict(bn.GroupNorm(6, 6).state_dict())


@each_layer
def test_settings_are_attributes_and_repr_is_python(name):
    layer, wanted = LAYERS[name][0](), LAYERS[name][2]
    assert {attribute: getattr(layer, attribute) for attribute in wanted} == wanted
    assert repr(eval(repr(layer), vars(bn))) == repr(layer)
    with pytest.raises(AttributeError, match=r"^eps must be given to"):
        layer.eps = 1


@each_layer
def test_frozen_parameters_have_no_gradients(name):
    layer = trained(name).freeze()
    assert repr(layer).endswith(".freeze()")
    layer(X)
    layer.backward(DY)
    assert layer.dgamma is None
    layer.unfreeze()
    layer(X)
    layer.backward(DY)
    assert layer.dgamma is not None
    assert not layer.frozen_affine


@each_layer
def test_a_layer_without_parameters_is_the_function_without(name):
    layer = LAYERS[name][0](gamma=False, beta=False)
    assert layer(X).tobytes() == LAYERS[name][1](X, None, None, eps=layer.eps)[0].tobytes()
    assert list(layer.state_dict()) == ["settings"]
    assert not layer.report()


@each_layer
def test_a_report_finds_what_gamma_and_beta_tell(name):
    layer = trained(name)
    assert [f.kind for f in layer.report().findings if f.severity == "error"] == []
    layer.gamma.flat[0] = np.nan
    assert [f.kind for f in layer.report().findings if f.severity == "error"] == ["nonfinite"]


CONVENTIONS = {
    "torch": (1e-5, 2.0**-23, 1),
    "keras": (1e-3, 1e-6, -1),
    "flax": (1e-6, 1e-6, -1),
    "onnx": (1e-5, 1e-5, 1),
}


@pytest.mark.parametrize("library", CONVENTIONS)
def test_a_convention_sets_eps_and_the_channel_axis(library):
    eps, of_rms, axis = CONVENTIONS[library]
    assert bn.LayerNorm(3, convention=library).eps == eps
    assert bn.RMSNorm(3, convention=library).eps == of_rms
    for layer in (bn.GroupNorm(1, 3, convention=library), bn.InstanceNorm(3, convention=library)):
        assert (layer.eps, layer.axis) == (eps, axis)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: bn.LayerNorm(4)(np.ones((2, 5))),
            ValueError,
            "x must have shape (4,) on axes (-1,), got shape (2, 5)",
        ),
        (lambda: bn.GroupNorm(2, 4)(np.ones((2, 6))), ValueError, "x must have 4 channels on axis 1, got shape (2, 6)"),
        (lambda: bn.GroupNorm(3, 4), ValueError, "num_groups must divide the channels, 4, got 3"),
        (lambda: bn.LayerNorm(()), ValueError, "shape must have at least 1 size, got ()"),
        (lambda: bn.LayerNorm(2.0), TypeError, "shape must be an int, got float"),
        (
            lambda: bn.LayerNorm((2, 3), axes=1),
            ValueError,
            "axes must be as many as shape has sizes, 2, rising, and all >= 0 or all below 0, got 1",
        ),
        (lambda: bn.RMSNorm(2, convention="jax"), ValueError, None),
        (lambda: bn.LayerNorm(4, epsilon=1e-3), TypeError, None),
        (lambda: bn.LayerNorm(4)(np.ones((2, 4)), training=True), TypeError, None),
        (lambda: bn.InstanceNorm(4).backward(np.ones((2, 4, 3))), RuntimeError, None),
        (lambda: bn.GroupNorm(2, 4)([[1.0]]), TypeError, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(call, error, text):
    with pytest.raises(error, match=None if text is None else f"^{re.escape(text)}$"):
        call()


@each_layer
def test_an_error_changes_nothing(name):
    layer = trained(name)
    layer(X)
    before = layer.backward(DY)
    with pytest.raises(ValueError, match=r"^residual must have shape"):
        layer(X, residual=RESIDUAL[:, :, :1])
    assert layer.backward(DY).tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: bn.LayerNorm(normalized_shape=4), None),
        (lambda: bn.LayerNorm(4, normalized_shape=4), "shape must be given instead of normalized_shape: write LayerNorm(4), got normalized_shape=4"),
        (lambda: bn.GroupNorm(2, 4, affine=False), "gamma and beta must be given instead of affine: write gamma=False, beta=False, got affine=False"),
        (lambda: bn.LayerNorm(4, elementwise_affine=False), "gamma and beta must be given instead of elementwise_affine: write gamma=False, beta=False, got elementwise_affine=False"),
        (lambda: bn.GroupNorm(2, 4, momentum=0.1), "momentum must be left out: each sample is normalized by itself, in training and evaluation alike, got momentum=0.1"),
        (lambda: bn.InstanceNorm(4)(X, training=True), "training must be left out: each sample is normalized by itself, in training and evaluation alike, got training=True"),
        (lambda: bn.RMSNorm(4)(X, epsilon=1e-3), "eps must be given to the layer as it is made, not to its calls, got epsilon=0.001"),
        (lambda: bn.GraphNorm(6)(X, bogus=1), "keywords of a layer's call must be of x, mask, weights, lengths, padding, residual, keep, segments, out, got bogus"),
    ],
)  # fmt: skip
def test_keywords_of_other_libraries_are_answered_by_the_ones_here(call, text):
    with pytest.raises(TypeError, match=None if text is None else f"^{re.escape(text)}$"):
        call()


@pytest.mark.parametrize("kind", [bn.LayerNorm, bn.RMSNorm, bn.GraphNorm], ids=lambda kind: kind.__name__)
def test_settings_of_another_kind_are_refused_by_a_converter(kind):
    state = {"weight": np.ones(4)}
    with pytest.raises(TypeError, match=r"num_groups must be left out for a "):
        bn.convert.from_torch(state, kind=kind, num_groups=2)


def test_channels_are_not_given_beside_a_state_that_has_them():
    state = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), np.ones(2))
    with pytest.raises(
        TypeError, match=r"^channels must not be given for a layer from elsewhere, as source tells them"
    ):
        bn.convert.from_torch(state, channels=2)


def test_a_state_of_a_layer_norm_is_none_of_an_rms_norm():
    with pytest.raises(
        ValueError, match=r"^state must have the settings of this layer, about='mean', got about='zero'"
    ):
        bn.LayerNorm(3, eps=1e-6, beta=False).load_state_dict(bn.RMSNorm(3).state_dict())


@pytest.mark.parametrize("beta", [False, True])
def test_the_repr_of_an_rms_norm_tells_beta_where_it_has_one(beta):
    layer = bn.RMSNorm(3, beta=beta)
    assert ("beta=True" in repr(layer)) == beta
    assert (eval(repr(layer), vars(bn)).beta is None) == (not beta)


@pytest.mark.parametrize("layer", [bn.InstanceNorm(6), bn.GroupNorm(6, 6)], ids=lambda layer: type(layer).__name__)
def test_y_may_be_kept_where_each_channel_is_by_itself(layer):
    layer(X)
    wanted = layer.backward(DY)
    layer(X, keep="y")
    np.testing.assert_allclose(layer.backward(DY), wanted, atol=1e-5)


def test_more_sizes_than_an_array_has_are_refused():
    with pytest.raises(ValueError, match=r"^shape must have at most 8 sizes, got 9$"):
        bn.LayerNorm((1,) * 9)


@pytest.mark.parametrize("options", [{}, {"gamma": [1.0] * 6}], ids=["ordinary", "of a list"])
@pytest.mark.parametrize("counted", ["mask", "weights"])
def test_one_value_of_a_sample_that_counts_is_refused_however_it_is_called(counted, options):
    mask = np.ones((5, 4), bool)
    mask[0, 1:] = False
    given = {counted: mask if counted == "mask" else mask.astype(np.float32)}
    for call in (lambda: bn.instance_norm(X, **given, **options), lambda: bn.group_norm(X, 6, **given, **options)):
        with pytest.raises(ValueError, match=f"^{counted} must be "):
            call()
