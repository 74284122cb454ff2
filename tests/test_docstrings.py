"""Every example of every docstring of the installed package runs and shows what it says."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import batchnorm as bn

PACKAGE = Path(bn.__file__).parent
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_examples_show_what_they_say(path):
    name = ".".join(["batchnorm", *path.relative_to(PACKAGE).with_suffix("").parts])
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


def public():
    return [value for value in (getattr(bn, name) for name in bn.__all__) if callable(value)]


@pytest.mark.parametrize("value", public(), ids=lambda v: v.__name__)
def test_everything_public_has_a_docstring(value):
    assert inspect.getdoc(value)


def functions():
    return [f for f in public() if inspect.isfunction(f) and f is not bn.get_num_threads]


@pytest.mark.parametrize("function", functions(), ids=lambda f: f.__name__)
def test_every_public_function_has_an_example(function):
    assert ">>> " in inspect.getdoc(function)
