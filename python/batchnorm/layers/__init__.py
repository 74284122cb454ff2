"""Normalization as objects that keep parameters, running statistics and what backward needs."""

from batchnorm.layers.batch import BatchNorm
from batchnorm.layers.by_sample import GroupNorm, LayerNorm, RMSNorm
from batchnorm.layers.graph import GraphNorm
from batchnorm.layers.instance import InstanceNorm
from batchnorm.layers.standardizer import Standardizer

__all__ = ["BatchNorm", "GraphNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "Standardizer"]
