"""What pip installs: one library for Python, the benchmark and C++ projects, which find it."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm import _core

EXAMPLE = Path(__file__).parent / "cpp" / "example"
PACKAGE = Path(_core.__file__).parent


def printed(*command, **environment):
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


def option(name):
    return printed(sys.executable, "-m", "batchnorm", name)


@pytest.fixture(autouse=True)
def _installed_by_pip():
    if not (PACKAGE / "include").is_dir():
        pytest.skip("batchnorm was not installed by pip, which brings what these tests look at")


def test_the_options_for_cpp_print_where_headers_and_cmake_files_are():
    assert Path(option("--cmakedir"), "batchnormConfig.cmake").is_file()
    assert option("--includes").startswith("-I")
    assert Path(option("--includes")[2:], "batchnorm", "batchnorm.hpp").is_file()


def test_a_cmake_project_finds_and_runs_the_installed_library(tmp_path):
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("there is no cmake and c++ to build a project with")
    printed("cmake", "-S", str(EXAMPLE), "-B", str(tmp_path), f"-Dbatchnorm_DIR={option('--cmakedir')}")
    printed("cmake", "--build", str(tmp_path))
    assert printed(str(tmp_path / "example")).startswith("channel 0: mean 2, var 1")


def test_the_package_holds_the_library_once():
    files = importlib.metadata.files("batchnorm") or []
    libraries = [file.name for file in files if re.search(r"\.a$|^lib.*\.so", file.name)]
    minor = importlib.metadata.version("batchnorm").rpartition(".")[0]
    assert libraries == [f"libbatchnorm.so.{minor}"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the loader of Linux")
@pytest.mark.parametrize("file", [Path(_core.__file__), PACKAGE / "bench" / "batchnorm-bench"], ids=["module", "bench"])
def test_the_module_and_the_benchmark_load_the_library_of_the_package(file):
    loader = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); print(open('/proc/self/maps').read())"
    if file.suffix == ".so":
        loaded = printed(sys.executable, "-c", loader, str(file))
    else:
        loaded = printed(str(file), LD_TRACE_LOADED_OBJECTS="1")
    found = set(re.findall(r"(/\S*libbatchnorm\S*)", loaded))
    assert {Path(path).resolve().parent for path in found} == {(PACKAGE / "lib").resolve()}
