"""The backend for NVIDIA GPUs; see :mod:`.backend`."""

from quantkit.ops.gpu.backend import GPU as GPU
