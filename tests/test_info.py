"""What this build and this machine are said to be."""

import json
import platform

import numpy as np
import pytest

import batchnorm as bn


def test_show_config_gives_dictionaries_that_json_holds_and_prints_nothing(capsys):
    facts = bn.show_config("dicts")
    assert json.loads(json.dumps(facts)) == facts
    assert capsys.readouterr().out == ""
    assert facts["batchnorm"]["version"] == bn.__version__
    assert facts["isa"]["available"] == bn.available_isas()
    assert facts["isa"]["active"] == bn.active_isa()
    assert set(bn.available_isas()) <= {*facts["isa"]["built"]}
    assert facts["threads"]["num_threads"] == bn.get_num_threads()
    assert (facts["python"]["version"], facts["python"]["numpy"]) == (
        platform.python_version(),
        np.__version__,
    )


def test_show_config_prints_each_fact_on_a_line_and_gives_nothing(capsys):
    assert bn.show_config() is None
    lines = capsys.readouterr().out.splitlines()
    expected = []
    for title, entries in bn.show_config("dicts").items():
        expected.append(f"{title}:")
        for name, value in entries.items():
            expected.append(f"  {name}: {', '.join(value) if isinstance(value, list) else value}")
    assert lines == expected


@pytest.mark.parametrize(
    ("shape", "axis", "sizes"),
    [
        ((4, 3, 8, 8), 1, "outer 4, channels 3, inner 64"),
        ((4, 8, 8, 3), -1, "outer 256, channels 3, inner 1"),
        ((7, 5), 0, "outer 1, channels 7, inner 5"),
    ],
)
def test_explain_tells_the_three_sizes_of_a_shape(shape, axis, sizes):
    assert bn.explain(shape, axis=axis).startswith(f"problem {{{sizes}}}")


def test_explain_tells_the_plan_for_the_dtype_and_threads_asked_for():
    shape = (32, 256, 14, 14)
    one, two = (bn.explain(shape, num_threads=n) for n in (1, 2))
    assert "threads 1" in one
    assert one != two
    assert bn.explain(shape, num_threads=1, dtype=np.float64) != one
