"""The Python of README.md runs: every block, in order, in one namespace, as a reader would type it."""

import re
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
    example = (
        (README.parent / "tests" / "cpp" / "example" / "main.cpp").read_text(encoding="utf-8").splitlines()
    )
    lines = {line.strip() for line in example}
    assert found
    for block in found:
        missing = [line for line in block.splitlines() if line.strip() not in lines]
        assert not missing
