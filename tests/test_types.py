"""What a user's type checker says: nothing about README's code, and about each mistake what is wrong with it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm as bn

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="mypy is not installed: it comes with '.[lint]'"
)

RIGHT = """
import numpy as np
import batchnorm as bn
from numpy.typing import NDArray


def step(layer: bn.BatchNorm, x: NDArray[np.float32], rate: float) -> None:
    y = layer(x, mask=np.ones(len(x), bool), padding="keep", keep="x")
    dx = layer.backward(np.ones_like(y), needs=["x", "gamma"])
    x -= rate * dx
    layer.gamma -= rate * layer.dgamma
    if layer.beta is not None:
        layer.beta[0] = 3
    layer.eval()(x, use_stats="batch", update_stats=False)


def functions(x: NDArray[np.float64]) -> float:
    y, saved = bn.batch_norm(x, [1, 2, 3], None, weights=[1.0] * len(x), padding="zero", activation="relu")
    z, other = bn.normalize(x, [0.0], [1.0], save=True)
    mean, var = bn.update_running([0.0], [1.0], saved, weights_are="counts")
    gradients = bn.backward(y, saved, needs=("x",))
    if gradients.dx is None:
        return 0.0
    return float(gradients.dx.sum() + bn.normalize(x, [0.0], [1.0], lengths=[3]).sum())


class Mine(bn.BatchNorm):
    pass


layer: Mine = Mine(3, convention="keras", renorm=bn.RenormSchedule.paper(), parity="keras").train().freeze()
other: bn.BatchNorm = bn.convert.from_keras([np.ones(3)] * 4, ddof=1, nonfinite="raise", update_rate=0.5)
other = bn.convert.from_onnx(bn.convert.to_onnx(layer, any_ddof=True)[0], axis=-1, num_threads=2)
"""

# Each line is wrong, and has one error.
WRONG = """
bn.BatchNorm(3, banana=1)
bn.BatchNorm(3, momentum=0.1)
bn.BatchNorm()
bn.convert.from_torch({}, banana=1)
bn.convert.from_keras([], nonfinite="ignore")
bn.convert.from_flax({}, domains=2)
bn.convert.from_onnx({}, padding="same")
bn.BatchNorm(3, nonfinite="ignore")
bn.BatchNorm(3, single_value="zero")
bn.BatchNorm(3, convention="pytorch")
bn.BatchNorm(3, activation="gelu")
bn.BatchNorm(3, parity="torch")
bn.BatchNorm(3, weights_are="probabilities")
layer(x, banana=1)
layer(x, padding="zeros")
layer(x, use_stats="moving")
layer(x, training=True)
layer.backward(x, needs=["dx"])
layer.backward(x, banana=1)
bn.batch_norm(x, banana=1)
bn.batch_norm(x, epsilon=anything)
bn.batch_norm(x, padding="zeros")
bn.backward(x, saved, needs=("weight",))
bn.backward(x, saved, banana=1)
bn.backward(x, saved.moments)
bn.normalize(x, [0], [1], padding="zeros")
bn.normalize(x, [0], [1], segments=[0])
bn.moments(x, padding="zero")
bn.update_running(x, x, saved, momentum=0.1)
bn.update_running(x, x, saved, segments="all")
bn.batch_norm(x, activation="gelu")
bn.batch_norm(x, keep="z")
bn.batch_norm(x, renorm=bn.RenormSchedule.paper())
bn.Renorm(x, x, 1, 0, parity="pytorch")
bn.batch_norm(x, ghost_size=2, banana=1)
bn.grad_sums(x, saved, out=x)
bn.double_backward(x, x, saved, needs=("beta",))
bn.show_config("json")
"""
HEAD = """from typing import Any

import numpy as np
import batchnorm as bn

anything: Any = 1
x = np.ones((4, 3))
layer = bn.BatchNorm(3)
saved = bn.batch_norm(x)[1]
"""


@pytest.fixture(scope="module")
def errors(request, tmp_path_factory):
    """Give the errors of `mypy --strict` by file: (line of that file, text)."""
    folder = tmp_path_factory.mktemp("types")
    texts = {"right.py": RIGHT, "wrong.py": HEAD + WRONG}
    if README.exists():
        texts["readme.py"] = "".join(BLOCK.findall(README.read_text(encoding="utf-8")))
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    above = Path(bn.__file__).parents[1]
    path = {} if above.name in ("site-packages", "dist-packages") else {"MYPYPATH": str(above)}
    cache = request.config.cache.mkdir("mypy")  # the types of NumPy take most of the time
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        os.devnull,
        "--cache-dir",
        cache,
        *texts,
    ]
    run = subprocess.run(command, cwd=folder, env=os.environ | path, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stderr
    found = {name: [] for name in texts}
    for name, line, text in re.findall(r"^(\w+\.py):(\d+): error: (.*)$", run.stdout, re.MULTILINE):
        found[name].append((int(line), text))
    return found


def test_the_readme_passes_a_strict_type_checker(errors):
    if "readme.py" not in errors:
        pytest.skip("README.md is not here: these tests run outside the repository")
    assert errors["readme.py"] == []


def test_ordinary_use_passes_a_strict_type_checker(errors):
    assert errors["right.py"] == []


def test_a_strict_type_checker_finds_each_mistake(errors):
    lines = (HEAD + WRONG).splitlines()
    first = len(HEAD.splitlines()) + 2
    found = {line for line, _ in errors["wrong.py"]}
    assert [lines[line - 1] for line in range(first, len(lines) + 1) if line not in found] == []
    assert min(found) >= first


def test_an_unknown_keyword_is_called_one(errors):
    lines = (HEAD + WRONG).splitlines()
    first = {}  # of overloaded functions more is said
    for line, text in errors["wrong.py"]:
        if "banana" in lines[line - 1]:
            first.setdefault(line, text)
    assert len(first) == WRONG.count("banana")
    assert all(text.startswith('Unexpected keyword argument "banana"') for text in first.values())
