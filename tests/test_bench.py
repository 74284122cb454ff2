"""The benchmark: its list is a list, what it times is right, its files hold what is documented. No time is asserted."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.bench import findings, peer, programs, session
from batchnorm.bench.process import OthersLoad

README = Path(__file__).parents[1] / "bench" / "README.md"
PASSES = ("train", "infer", "backward", "moments", "normalize", "grad_sums", "grad_input")
COUNTED = ("train_masked", "infer_masked", "backward_masked", "train_weighted", "backward_weighted")
COUNTED += ("train_segments", "backward_segments", "train_graphs", "backward_graphs")
DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes of a value
TINY = "tiny-2x8x4x4"


def bench(*arguments):
    """Run batchnorm-bench, three rounds unless told, and give the finished process."""
    program = programs.find("batchnorm-bench", None)
    assert program is not None, "batchnorm-bench is not in the package"
    command = [str(program), "--rounds", "3", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def command(*arguments, **environment):
    """Run ``python -m batchnorm bench``."""
    words = [sys.executable, "-m", "batchnorm", "bench", *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, env=env)


@pytest.fixture(scope="module")
def cases():
    return programs.run_bench(None, ["--list"])["cases"]


@pytest.fixture(scope="module")
def report():
    """Every pass of a tiny case, in every dtype."""
    dtypes = [word for dtype in DTYPES for word in ("--dtype", dtype)]
    return programs.run_bench(None, ["--case", TINY, *dtypes, "--rounds", "3"])


# ---- the list ----


def test_every_case_is_listed_once(cases):
    names = [case["case"] for case in cases]
    shapes = [tuple(case["shape"]) for case in cases]
    assert len(set(names)) == len(names)
    assert len(set(shapes)) == len(shapes)


def test_a_case_says_its_shape_and_where_it_comes_from(cases):
    for case in cases:
        assert case["case"].split("-")[1] == "x".join(map(str, case["shape"]))
        assert case["origin"]


def test_the_list_has_every_kind_of_case(cases):
    count = {group: sum(case["case"].startswith(group) for case in cases) for group in ("onednn", "resnet50")}
    assert count == {"onednn": 264, "resnet50": 12}
    assert {len(case["shape"]) for case in cases} == {2, 3, 4, 5}
    assert any(case["shape"][1] % 16 for case in cases)


def test_images_come_in_two_layouts_and_tables_in_one(cases):
    for case in cases:
        planes = math.prod(case["shape"][2:]) > 1
        assert case["layouts"] == (["nchw", "nhwc"] if planes else ["nc"])


def test_the_quick_cases_are_in_the_list(cases):
    from batchnorm.bench.command import QUICK

    assert set(QUICK) <= {case["case"] for case in cases}


# ---- batchnorm-bench ----


def test_every_pass_is_measured_in_both_layouts_and_every_dtype(report):
    found = {(row["layout"], row["dtype"], row["pass"]) for row in report["rows"]}
    expected = {
        (layout, dtype, name) for layout in ("nchw", "nhwc") for dtype in DTYPES for name in (*PASSES, "copy", "stream")
    }
    assert found == expected
    assert len(report["rows"]) == len(expected)


def test_the_json_has_the_documented_fields(report):
    if not README.exists():
        pytest.skip("bench/README.md is not here: these tests run outside the repository")
    documented = re.findall(r"^\| `(\w+)`", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(documented) == sorted(report["rows"][0])
    assert {"format", "date", "library", "machine", "rows"} == set(report)
    assert {"cpu", "cores", "caches"} <= set(report["machine"])
    assert report["library"]["version"] == bn.__version__


def test_bytes_are_those_of_the_tensors_that_must_move(report):
    tensors = {"train": 2, "infer": 2, "backward": 3, "moments": 1, "normalize": 2, "grad_sums": 2}
    tensors |= {"grad_input": 3, "copy": 2, "stream": 3}
    for row in report["rows"]:
        value = DTYPES[row["dtype"]]
        assert row["bytes"] == tensors[row["pass"]] * value * math.prod(row["shape"])


def test_passes_over_parts_of_a_tensor_are_measured_by_name():
    words = [word for name in COUNTED for word in ("--pass", name)]
    rows = programs.run_bench(None, ["--case", TINY, *words, "--rounds", "1"])["rows"]
    assert {row["pass"] for row in rows} == {*COUNTED, "copy", "stream"}


@pytest.mark.parametrize("pass_name", (*PASSES, *COUNTED))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_result_is_refused(pass_name, dtype):
    done = bench("--case", TINY, "--pass", pass_name, "--dtype", dtype, "--spoil", pass_name)
    assert done.returncode == 1
    assert f"{pass_name} is wrong" in done.stderr
    assert TINY in done.stderr
    assert " us " not in done.stdout


def test_a_large_tensor_is_skipped_with_a_line():
    done = bench("--case", TINY, "--max-mb", 0)
    assert done.returncode == 0
    assert f"{TINY} float32: skipped" in done.stdout


def test_one_value_a_channel_is_not_trained_on():
    rows = programs.run_bench(None, ["--case", "onednn-1x3x1x1", "--rounds", "1"])["rows"]
    assert {row["pass"] for row in rows} == {"copy", "infer", "moments", "normalize"}


def test_a_full_name_picks_its_case_only(cases):
    names = [case["case"] for case in cases]
    name = "onednn-4x256x128"
    assert sum(name in other for other in names) > 1
    assert [case["case"] for case in programs.run_bench(None, ["--list", "--case", name])["cases"]] == [name]


def test_cases_of_other_samples_are_named_so():
    rows = programs.run_bench(None, ["--case", TINY, "--samples", "5", "--rounds", "1"])["rows"]
    assert {(row["case"], tuple(row["shape"])) for row in rows} == {("tiny-5x8x4x4", (5, 8, 4, 4))}


def test_what_of_a_gpu_is_not_measured_is_told(tmp_path):
    check, file = README.with_name("gpu_check"), tmp_path / "table.json"
    words = [sys.executable, str(check), "--only", "clean", "fast", "verdict", "--out", str(file)]
    environment = {**os.environ, "PATH": str(tmp_path)}  # without nvidia-smi
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(file.read_text())["table"]
    assert ["machine", "no device: what needs one is not measured"] in told
    assert [part for part, text in told if "not measured" in text] == ["machine", "clean", "fast", *4 * ["verdict"]]


def test_fresh_outputs_are_measured_and_named():
    arguments = ["--case", TINY, "--pass", "train", "--out", "fresh", "--rounds", "1"]
    assert {row["out"] for row in programs.run_bench(None, arguments)["rows"]} == {"fresh"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "nothing-like-it"], "no case has such a name"),
        (["--pass", "nothing"], "--pass must be one of train, infer"),
        (["--threads", "0"], "--threads must be >= 1, got 0"),
        (["--isa", "nothing"], "BATCHNORM_ISA must be one of"),
        (["--samples", "0"], "--samples must be >= 1, got 0"),
        (["--device", "tpu"], "--device must be one of cpu, cuda, got tpu"),
        (["--device", "cuda"], "--device cuda needs a batchnorm-bench that was built with -DBATCHNORM_CUDA=ON"),
        (["stray"], "stray"),
    ],
)
def test_a_mistaken_option_is_told(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 1
    assert message in done.stderr


# ---- python -m batchnorm bench ----


def test_help_is_printed():
    done = command("--help")
    assert done.returncode == 0
    assert "--peers" in done.stdout


def test_a_run_writes_rows_of_every_library(tmp_path):
    file = tmp_path / "out.json"
    done = command("--cases", TINY, "--peers", "numpy", "--turns", 2, "--rounds", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text(encoding="utf-8"))
    found = {(row["peer"], row["pass"]) for row in written["rows"] if row["pass"] in session.TENSORS}
    libraries = ("batchnorm", "batchnorm in Python", "NumPy")
    assert found == {(library, name) for library in libraries for name in session.PASSES["batch"]}
    assert {row["turns"] for row in written["rows"]} == {2}
    assert written["peers"]["NumPy"] == np.__version__
    assert "geometric means" in done.stdout

    again = command("--from", file, "--baseline", file)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(done.stdout.rstrip())
    assert "1.00 x the baseline" in again.stdout


def test_an_absent_peer_is_skipped_with_a_line(tmp_path):
    (tmp_path / "torch.py").write_text('raise ImportError("no such luck")')
    done = command("--cases", TINY, "--peers", "torch", "--turns", 1, "--rounds", 1, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "torch: skipped, no such luck" in done.stderr
    assert "PyTorch" not in done.stdout


def test_a_peer_that_fails_is_told_and_the_rest_goes_on(tmp_path):
    (tmp_path / "torch.py").write_text("__version__ = '0'\nset_num_threads = set_grad_enabled = lambda value: None")
    done = command("--cases", TINY, "--peers", "torch", "--turns", 1, "--rounds", 1, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "PyTorch failed: AttributeError" in done.stderr
    assert "batchnorm" not in done.stderr.split("PyTorch failed")[1]


def test_a_plot_is_one_file(tmp_path, report):
    pytest.importorskip("matplotlib")
    from batchnorm.bench.plot import draw

    draw(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# ---- peers ----


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 3, 7), (2, 3, 4, 5, 6), (9, 3), (1, 3, 1, 1)])
@pytest.mark.parametrize("library", [peer.Batchnorm, peer.Numpy])
def test_what_a_peer_computes_is_verified(library, shape):
    one = library(1)
    for layout in peer.layouts_of(shape):
        t = peer.Tensors(shape, layout)
        calls = list(one.calls(t))
        assert {call.pass_name for call in calls} == ({"infer"} if t.count == 1 else set(session.PASSES["batch"]))
        for call in calls:
            peer.verify(one, call, t)


@pytest.mark.parametrize(("norm", "shape"), [("lines", (9, 33)), ("groups", (2, 64, 3, 5)), ("groups", (2, 64, 3))])
def test_what_this_library_computes_of_other_norms_is_verified(norm, shape):
    verify_all(peer.Batchnorm(1), norm, shape)


def verify_all(one, norm, shape):
    for layout in peer.layouts_of(shape):
        t = peer.Tensors(shape, layout)
        calls = list(getattr(one, norm)(t))
        assert {call.pass_name for call in calls} == set(session.PASSES[norm])
        for call in calls:
            peer.verify(one, call, t)


@pytest.mark.parametrize(("norm", "shape"), [("lines", (9, 33)), ("groups", (2, 64, 3, 5))])
def test_what_pytorch_computes_of_other_norms_is_verified(norm, shape):
    torch = pytest.importorskip("torch", reason="torch is not installed; it is only a peer here")
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        verify_all(peer.Torch(1), norm, shape)
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)


def test_a_case_is_of_the_norm_that_its_shape_comes_from(cases):
    norms = {case["case"].partition("-")[0]: session.norm_of(case) for case in cases}
    assert norms["tokens"] == "lines"
    assert norms["diffusion"] == "groups"
    assert norms["resnet50"] == norms["instance"] == "batch"


@pytest.mark.parametrize("pass_name", session.TENSORS)
def test_a_wrong_result_of_a_peer_is_refused(pass_name):
    t = peer.Tensors((4, 64, 5, 6), "nchw")
    with pytest.raises(AssertionError, match=pass_name):
        peer.verify(peer.Numpy(1), peer.Call(pass_name, "", lambda: np.zeros_like(t.x)), t)


# ---- what the rows say ----


def row(library, seconds, *, layout="nchw", case="a", pass_name="train", **more):
    common = {"case": case, "layout": layout, "dtype": "float32", "pass": pass_name, "bytes": 8e6, "mad": 0.0}
    return {**common, "peer": library, "seconds": seconds, "ratio": 2.0, "ratio_mad": 0.01, **more}


PLACE = findings.Place("a", "nchw", "float32", "train")


def test_onednn_is_compared_at_its_best_layout_and_at_the_same():
    rows = [row("batchnorm", 2.0), row("oneDNN", 6.0), row("oneDNN", 1.0, layout="blocks of 16")]
    times = findings.Times(rows)
    assert times.over_ours(findings.ONEDNN, PLACE) == 0.5
    assert times.over_ours(findings.ONEDNN_SAME, PLACE) == 3.0


def test_peers_in_python_are_compared_with_calls_from_python():
    rows = [row("batchnorm", 1.0), row("batchnorm in Python", 4.0), row("PyTorch", 8.0)]
    assert findings.Times(rows).over_ours("PyTorch", PLACE) == 2.0


def test_the_best_form_of_a_peer_counts():
    rows = [row("batchnorm", 1.0), row("PyTorch", 3.0, form="out="), row("PyTorch", 2.0, form="function")]
    assert findings.Times(rows).over_ours("PyTorch", PLACE) == 2.0


def test_the_summary_names_where_a_peer_is_faster():
    rows = [
        row("batchnorm", 2.0),
        row("JAX", 8.0),
        row("batchnorm", 2.0, case="b"),
        row("JAX", 1.0, case="b"),
    ]
    lines = findings.summary(rows)
    assert any("JAX" in line and "1.41 x ours" in line for line in lines)
    assert [line for line in lines if line.endswith(" b")] == [
        "   0.50 JAX                      train           nchw b"
    ]


def test_a_change_within_the_spreads_is_none():
    old = [row("batchnorm", 1.0, case=case) for case in "abc"]
    new = [row("batchnorm", 1.0, case=case, ratio=ratio) for case, ratio in zip("abc", (2.01, 3, 1), strict=True)]
    verdicts = [line.split()[-1] for line in findings.changes(new, old) if line[:1] in "abc" and line[1:2] == " "]
    assert verdicts[1:] == ["slower", "faster"]
    assert verdicts[0] not in ("slower", "faster")


def test_rows_taken_beside_other_processes_are_told():
    alone, beside = row("batchnorm", 1.0, others=0.05), row("batchnorm", 1.0, case="b", others=0.9)
    assert not any("NOT ALONE" in line for line in findings.summary([alone]))
    assert any("during 1 of 2 rows" in line for line in findings.summary([alone, beside]))


def test_the_load_of_others_counts_all_processes_but_one():
    stat = Path("/proc/stat")
    if not stat.exists() or not any(map(int, stat.read_text().split()[1:4])):
        pytest.skip("this system does not tell")
    mine, everyone = OthersLoad(os.getpid()), OthersLoad(1)
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    assert everyone.processors() > mine.processors()
