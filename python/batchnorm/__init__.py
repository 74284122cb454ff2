"""Batch normalization for NumPy arrays, with a stated error bound and the same bits everywhere."""

from batchnorm._core import __version__  # before NumPy, whose error would not tell why it cannot be imported

# isort: split
from batchnorm import convert, cuda
from batchnorm.by_sample import graph_norm, group_norm, instance_norm, layer_norm, rms_norm
from batchnorm.derivatives import backward, double_backward, grad_input, grad_sums, jvp
from batchnorm.forward import batch_norm, normalize
from batchnorm.info import active_isa, available_isas, explain, get_num_threads, set_num_threads, show_config
from batchnorm.layers import BatchNorm, GraphNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, Standardizer
from batchnorm.moments import Moments, merge
from batchnorm.moments import moments as moments
from batchnorm.report import Finding, Report
from batchnorm.running import Renorm, RenormSchedule, update_running
from batchnorm.saved import Gradients, GradSums, GraphGradients, GraphSecondGradients, Saved, SecondGradients

__all__ = [
    "BatchNorm", "Finding", "GradSums", "Gradients", "GraphGradients", "GraphNorm", "GraphSecondGradients", "GroupNorm", "InstanceNorm", "LayerNorm", "Moments", "RMSNorm",
    "Renorm", "RenormSchedule", "Report", "Saved", "SecondGradients", "Standardizer", "__version__", "active_isa", "available_isas", "backward", "batch_norm", "convert",
    "cuda", "double_backward", "explain", "get_num_threads", "grad_input", "grad_sums", "graph_norm", "group_norm", "instance_norm",
    "jvp", "layer_norm", "merge", "moments", "normalize", "rms_norm", "set_num_threads", "show_config", "update_running",
]  # fmt: skip
