"""The script of faults that were dangerous finds none."""

import pytest

import reproductions


@pytest.mark.parametrize("name", [case.__name__ for case in reproductions.CASES])
def test_the_fault_does_not_come_back(name):
    assert reproductions.outcome(name) == "held"
