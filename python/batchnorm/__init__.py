"""Batch normalization for NumPy arrays, with a stated error bound and the same bits everywhere."""

from batchnorm._core import __version__  # first, as it says where it cannot be imported

# isort: split
from batchnorm import convert
from batchnorm.derivatives import backward, double_backward, jvp
from batchnorm.forward import instance_norm
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
from batchnorm.ghost import GhostSaved, ghost_batch_norm, ghost_batch_norm_backward, ghost_update_running
from batchnorm.info import active_isa, available_isas, explain, get_num_threads, set_num_threads, show_config
from batchnorm.layers import BatchNorm
from batchnorm.memory_modes import SavedOutput, batch_norm_inplace, batch_norm_inplace_backward
from batchnorm.moments import Moments, merge
from batchnorm.moments import moments as moments
from batchnorm.relu import (
    ReluGradients,
    ReluMask,
    ReluOutput,
    SavedRelu,
    batch_norm_relu,
    batch_norm_relu_backward,
    normalize_relu,
    normalize_relu_backward,
)
from batchnorm.renorm import (
    RenormSaved,
    batch_renorm,
    batch_renorm_backward,
    renorm_update_running,
)
from batchnorm.report import Finding, Report
from batchnorm.running import Renorm, RenormLimits, RenormSchedule
from batchnorm.second import (
    SecondGradients,
    batch_norm_double_backward,
    batch_norm_jvp,
    normalize_double_backward,
    normalize_jvp,
)

__all__ = [
    "BatchNorm",
    "Finding",
    "GhostSaved",
    "GradSums",
    "Gradients",
    "Moments",
    "ReluGradients",
    "ReluMask",
    "ReluOutput",
    "Renorm",
    "RenormLimits",
    "RenormSaved",
    "RenormSchedule",
    "Report",
    "Saved",
    "SavedOutput",
    "SavedRelu",
    "SecondGradients",
    "__version__",
    "active_isa",
    "available_isas",
    "backward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_inplace",
    "batch_norm_inplace_backward",
    "batch_norm_jvp",
    "batch_norm_relu",
    "batch_norm_relu_backward",
    "batch_renorm",
    "batch_renorm_backward",
    "convert",
    "double_backward",
    "explain",
    "get_num_threads",
    "ghost_batch_norm",
    "ghost_batch_norm_backward",
    "ghost_update_running",
    "grad_input",
    "grad_sums",
    "instance_norm",
    "jvp",
    "merge",
    "moments",
    "normalize",
    "normalize_backward",
    "normalize_double_backward",
    "normalize_jvp",
    "normalize_relu",
    "normalize_relu_backward",
    "renorm_update_running",
    "set_num_threads",
    "show_config",
    "update_running",
]
