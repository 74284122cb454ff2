"""Layers from other libraries, and back to them. None of those is imported."""

from batchnorm.convert.flax import from_flax, to_flax
from batchnorm.convert.keras import from_keras, to_keras
from batchnorm.convert.onnx import from_onnx, to_onnx
from batchnorm.convert.torch import from_torch, to_torch

__all__ = ["from_flax", "from_keras", "from_onnx", "from_torch", "to_flax", "to_keras", "to_onnx", "to_torch"]
