"""A run of fused layers in one call: `torch.ops.sparse_nas.sparse_chain`."""

from kernels.network.program import Layer, chain, validate

__all__ = ["Layer", "chain", "validate"]
