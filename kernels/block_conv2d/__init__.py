"""Convolutions that train with blocks of zeros: `torch.ops.sparse_nas.block_conv2d`."""
