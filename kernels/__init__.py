"""Sparse kernels: weights packed as bytes, and `torch.ops.sparse_nas` that runs them."""

import kernels.block_conv2d.op
import kernels.block_linear.op
import kernels.network.op
import kernels.sparse_conv2d.op
import kernels.sparse_linear.op  # noqa: F401  the imports register the operators
from kernels import network
from kernels.block_conv2d.layer import BlockConv2d
from kernels.block_linear.layer import BlockLinear
from kernels.packed import Packed, dense, pack_conv2d, pack_linear, tune, validate

__all__ = [
    "BlockConv2d",
    "BlockLinear",
    "Packed",
    "dense",
    "network",
    "pack_conv2d",
    "pack_linear",
    "tune",
    "validate",
]
