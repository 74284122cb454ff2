"""Batch normalization for NumPy arrays, with a stated error bound and the same bits everywhere."""

from batchnorm._core import __version__
from batchnorm.functional import (
    Gradients,
    GradSums,
    Saved,
    batch_norm,
    batch_norm_backward,
    grad_input,
    grad_sums,
    normalize,
    normalize_backward,
    update_running,
)
from batchnorm.info import active_isa, available_isas, explain, get_num_threads, set_num_threads, show_config
from batchnorm.layers import BatchNorm
from batchnorm.memory_modes import SavedOutput, batch_norm_inplace, batch_norm_inplace_backward
from batchnorm.moments import Moments, merge
from batchnorm.moments import moments as moments

__all__ = [
    "BatchNorm",
    "GradSums",
    "Gradients",
    "Moments",
    "Saved",
    "SavedOutput",
    "__version__",
    "active_isa",
    "available_isas",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inplace",
    "batch_norm_inplace_backward",
    "explain",
    "get_num_threads",
    "grad_input",
    "grad_sums",
    "merge",
    "moments",
    "normalize",
    "normalize_backward",
    "set_num_threads",
    "show_config",
    "update_running",
]
