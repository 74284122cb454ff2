"""Normalization as objects that keep parameters, running statistics and what backward needs."""

from batchnorm.layers.batch import BatchNorm

__all__ = ["BatchNorm"]
