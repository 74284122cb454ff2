"""Record what batch norms of PyTorch, Keras and Flax do in twenty steps.

`python record_conventions.py` rewrites conventions.npz beside it, with the versions it was recorded with. Needs torch,
keras (on torch) and flax.
"""

import os
from pathlib import Path

import numpy as np

os.environ["KERAS_BACKEND"] = "torch"

STEPS, SHAPE = 20, (6, 4)


def torch_steps(x):
    import torch

    layer = torch.nn.BatchNorm1d(SHAPE[1])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    for k in range(STEPS):
        layer.train()(torch.tensor(x[k]))
        state = {name: value.numpy().copy() for name, value in layer.state_dict().items()}
        with torch.no_grad():
            yield {**state, "y": layer.eval()(torch.tensor(x[0])).numpy()}


def keras_steps(x):
    import keras

    layer = keras.layers.BatchNormalization()
    layer.build(SHAPE)
    layer.set_weights([np.array([1.0, -2.0, 0.5, 3.0]), np.array([0.0, 1.0, -1.0, 2.0]), np.zeros(4), np.ones(4)])
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    for k in range(STEPS):
        layer(x[k], training=True)
        state = dict(zip(names, (w.copy() for w in layer.get_weights()), strict=True))
        yield {**state, "y": keras.ops.convert_to_numpy(layer(x[0], training=False))}


def flax_steps(x):
    import flax.linen as nn

    layer = nn.BatchNorm()
    variables = {
        "params": {
            "scale": np.array([1.0, -2.0, 0.5, 3.0], "f"),
            "bias": np.array([0.0, 1.0, -1.0, 2.0], "f"),
        },
        "batch_stats": {"mean": np.zeros(4, "f"), "var": np.ones(4, "f")},
    }
    for k in range(STEPS):
        _, changed = layer.apply(variables, x[k], use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, "batch_stats": changed["batch_stats"]}
        y = layer.apply(variables, x[0], use_running_average=True)
        stats = {name: np.asarray(value) for name, value in variables["batch_stats"].items()}
        yield {**variables["params"], **stats, "y": np.asarray(y)}


def main():
    import flax
    import keras
    import torch

    x = np.random.default_rng(0).normal(3, 2, (STEPS, *SHAPE)).astype(np.float32)
    recorded = {
        "x": x,
        "versions": f"torch {torch.__version__}, keras {keras.__version__}, flax {flax.__version__}",
    }
    for library, steps in {"torch": torch_steps, "keras": keras_steps, "flax": flax_steps}.items():
        states = list(steps(x))
        recorded |= {f"{library}/{name}": np.stack([state[name] for state in states]) for name in states[0]}
    np.savez_compressed(Path(__file__).with_name("conventions.npz"), **recorded)


if __name__ == "__main__":
    main()
