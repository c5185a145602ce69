"""Sparse linear: `torch.ops.sparse_nas.sparse_linear`."""
