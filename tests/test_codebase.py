"""The shape of the source tree: who may use what, which flags are never given, one version."""

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import batchnorm as bn

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent
SOURCES = (".cpp", ".hpp", ".h", ".cu", ".cuh", ".inc")

pytestmark = pytest.mark.skipif(
    not (ROOT / "cpp").is_dir(), reason="the source tree is not here: these tests run outside the repository"
)


def sources(*folders):
    for folder in folders:
        yield from (p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in SOURCES)


def build_files():
    yield from (ROOT / name for name in ("CMakeLists.txt", "CMakePresets.json", "pyproject.toml"))
    for folder in ("cpp", "python", "tests", "bench", "cmake", ".ci", ".github"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.name == "CMakeLists.txt" or path.suffix in (".cmake", ".yml", ".yaml") or path.parent.name == ".ci":
                yield path


def without_comments(path):
    """Give the text of a C++ or build file without comments, so that a comment may name what is forbidden."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in SOURCES:
        return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    return text if path.suffix == ".json" else re.sub(r"#[^\n]*", "", text)


def places(files, pattern):
    """List files, relative to the repository, in which the pattern occurs outside comments."""
    return sorted(str(p.relative_to(ROOT)) for p in files if re.search(pattern, without_comments(p)))


def test_the_core_knows_nothing_of_python():
    assert places(sources("cpp"), r"pybind11|nanobind|Python\.h|PyObject|\bpy::|numpy/") == []


def test_there_are_no_openmp_pragmas():
    assert places(sources("cpp", "python"), r"#\s*pragma\s+omp|_Pragma\(\"omp") == []


def test_the_openmp_header_is_included_in_one_file():
    assert places(sources("cpp", "python"), r"#\s*include\s*<omp\.h>") in ([], ["cpp/src/parallel.cpp"])


def test_public_headers_show_no_simd_and_no_openmp():
    assert places(sources("cpp/include"), r"immintrin|arm_neon|__m(128|256|512)|\bomp_|vector_size") == []


def test_only_kernels_use_vectors():
    # Reading and setting a thread's MXCSR is no vector work; two float64 side by side (pair.hpp) need no instruction
    # set that is not everywhere.
    files = [p for p in sources("cpp") if "kernels" not in p.parts and p.name != "pair.hpp"]
    assert places(files, r"arm_neon|__m(128|256|512)|vector_size|\b_mm(256|512)?_(?!getcsr|setcsr)") == []


def test_kernels_do_not_include_what_brings_shared_inline_functions():
    # The linker keeps one copy of a std:: template, perhaps the one compiled for a newer machine.
    files = [p for p in sources("cpp/src/kernels") if p.stem.endswith("-inl") or p.parent.name == "vec"]
    assert files, "no kernel files found"
    headers = "algorithm|array|functional|memory|numeric|optional|span|string|tuple|utility|vector|cmath|complex"
    assert places(files, rf"#\s*include\s*<({headers})>|\bthrow\b|\bnew\b|\bstatic\s+thread_local\b") == []


def test_no_flag_relaxes_arithmetic_or_ties_a_build_to_its_machine():
    flags = r"-ffast-math|-Ofast|-march=native|-mtune=native|-funsafe-math|-fassociative-math|-freciprocal-math"
    assert places(build_files(), flags + r"|-ffinite-math-only|-ffp-contract=(fast|on)|-mdaz-ftz|/fp:fast") == []


def test_no_source_relaxes_arithmetic():
    pattern = r"fast-math|#\s*pragma\s+GCC\s+optimize|_MM_SET_FLUSH_ZERO_MODE\(_MM_FLUSH_ZERO_ON|float_control"
    assert places(sources("cpp", "python"), pattern) == []


def test_contraction_is_off():
    assert places(build_files(), r"-ffp-contract=off") == ["cpp/CMakeLists.txt"]


def test_versions_are_equal():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert bn.__version__ == project["version"]
    assert importlib.metadata.version("batchnorm") == project["version"]


def imports(path):
    """List all modules a Python file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", ["reference", "tolerances", "adversarial", "differences"])
def test_the_oracle_never_imports_the_package(name):
    assert not [module for module in imports(TESTS / f"{name}.py") if module.split(".")[0] == "batchnorm"]


def test_layers_do_not_reach_past_the_functions():
    files = sorted((ROOT / "python/batchnorm/layers").glob("*.py"))
    assert len(files) > 1
    assert not [module for file in files for module in imports(file) if "_core" in module]


def test_the_package_needs_only_numpy():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[A-Za-z0-9_.-]+", requirement).group() for requirement in project["dependencies"]]
    assert names == ["numpy"]


def test_every_public_name_has_a_docstring():
    assert not [name for name in bn.__all__ if not (getattr(bn, name).__doc__ or "").strip()]


def test_a_table_has_at_most_twenty_entries_a_type():
    table = without_comments(ROOT / "cpp/src/kernels/table.hpp")
    of_a_type = table.partition("struct Kernels {")[2].partition("};")[0]
    entries = re.findall(r"\(\*(\w+)\)\(", of_a_type)
    assert {"runs_moments", "rows_grad_input"} <= set(entries), "the contract is written in another way"
    assert len(entries) <= 20


def test_no_file_is_longer_than_five_hundred_lines():
    files = [*(ROOT / "cpp").rglob("*.[hc]pp"), *(ROOT / "python").rglob("*.py"), *(ROOT / "python").rglob("*.[hc]pp")]
    assert len(files) > 100
    lengths = {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    assert {name: length for name, length in lengths.items() if length > 500} == {}
