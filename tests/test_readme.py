"""README.md keeps its word: its Python runs, in order and in one namespace, and its figures are held or dated."""

import importlib.metadata
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text):
    """(line, code) of every block; code keeps its place in the file, so that a traceback names README's lines."""
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(1))
        yield line + 1, "\n" * line + match.group(1)


def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch):
    if not README.exists():
        pytest.skip("README.md is not here: these tests run outside the repository")
    monkeypatch.chdir(tmp_path)
    found = list(blocks(README.read_text(encoding="utf-8")))
    assert found, "README.md has no block marked python"
    namespace = {"__name__": "readme"}
    for line, code in found:
        # Blocks with prompts are doctests, which pytest collects by itself.
        if not code.lstrip().startswith(">>>"):
            try:
                exec(compile(code, str(README), "exec"), namespace)  # noqa: S102 - the repository's own README
            except Exception as error:
                raise AssertionError(f"README.md, block at line {line}: {error!r}") from error


def test_the_cpp_block_of_the_readme_is_part_of_the_example_that_is_compiled():
    found = re.findall(r"^```cpp\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    example = (README.parent / "tests" / "cpp" / "example" / "main.cpp").read_text(encoding="utf-8").splitlines()
    lines = {line.strip() for line in example}
    assert found
    for block in found:
        missing = [line for line in block.splitlines() if line.strip() not in lines]
        assert not missing


# ---- figures -------------------------------------------------------------------------------------------------

FIGURE = re.compile(r"\d[\d.]* ?(?:[KMG]B|[mnuµ]?s)\b|\w+ (?:seconds|minutes?|hours?)\b|\b(?:milli|micro)seconds?")
# What is promised, rather than measured on a day that stands beside it, and held by tests of this file.
HELD = ["1.7 MB", "5 MB"]


def test_every_size_and_time_is_held_by_a_test_or_dated():
    text = README.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```|^!\[.*?$|^\|.*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    promised = [
        " ".join(figure.split())
        for paragraph in prose.split("\n\n")
        if not re.search(
            r"(?:January|February|March|April|May|June|July|August|September|October|November|December) 20\d\d",
            paragraph,
        )
        for figure in FIGURE.findall(paragraph)
    ]
    assert promised == HELD


@pytest.fixture(scope="module")
def installed():
    """Give the paths of the files that pip has installed."""
    try:
        files = importlib.metadata.files("batchnorm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(file.locate()) for file in files if file.suffix != ".pyc"]
    if not any(path.name.startswith("_core") and path.exists() for path in paths):
        pytest.skip("batchnorm was not installed by pip, which makes the wheel whose size is told")
    return paths


def test_it_takes_no_more_megabytes_than_the_readme_says(installed):
    """A wheel is its files, deflated."""
    contents = [path.read_bytes() for path in installed]
    wheel, whole = (float(figure.split()[0]) * 1e6 for figure in HELD)
    assert sum(map(len, contents)) <= whole
    assert sum(len(zlib.compress(content, 6)) for content in contents) <= wheel


def test_importing_it_loads_the_modules_that_the_readme_names_and_no_others():
    named = re.search(r"`import batchnorm` loads NumPy, itself and (.*?)\.", README.read_text(encoding="utf-8"))
    known = set(re.findall(r"`(\w+)`", named[1])) | {"numpy", "batchnorm", "future"}
    code = "import sys, numpy; a = set(sys.modules); import batchnorm; print(*sorted(set(sys.modules) - a))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {module.split(".")[0].strip("_") for module in run.stdout.split()}
    assert "batchnorm" in loaded
    assert loaded <= known
