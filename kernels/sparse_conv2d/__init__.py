"""Sparse 2-d convolution: `torch.ops.sparse_nas.sparse_conv2d`."""
