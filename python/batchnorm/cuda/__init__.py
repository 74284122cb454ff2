"""Arrays on NVIDIA GPUs: all functions and layers take them, and give the same kind back.

x may be a tensor of PyTorch, an array of CuPy or JAX, or anything else that speaks DLPack or version 3 of
``__cuda_array_interface__``, in builds with ``-DBATCHNORM_CUDA=ON``. Results have the bits that NumPy arrays of the same
values give. What this package has for it is `DeviceArray`, memory that no other library knows of, and `stream`.
"""

from batchnorm.cuda.array import DeviceArray
from batchnorm.cuda.launch import stream

__all__ = ["DeviceArray", "stream"]
