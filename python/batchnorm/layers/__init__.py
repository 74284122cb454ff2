"""Normalization as objects that keep parameters, running statistics and what backward needs."""

from batchnorm.layers.batch import BatchNorm
from batchnorm.layers.by_sample import GroupNorm, InstanceNorm, LayerNorm, RMSNorm

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]
