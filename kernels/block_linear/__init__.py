"""Linear layers that train with blocks of zeros: `torch.ops.sparse_nas.block_linear`."""
