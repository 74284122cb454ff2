"""``python -m batchnorm bench``: the library against a copy of the same bytes, and against other libraries."""

from batchnorm.bench.command import add_arguments, run

__all__ = ["add_arguments", "run"]
