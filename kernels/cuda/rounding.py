"""How products are rounded: float32 perhaps to TF32, as PyTorch was told."""

from typing import Any

import torch

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}  # of the norm
TF32 = 2e-3


def precision() -> str:
    """Of products in float32: what PyTorch's own matrix products on a GPU use."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def narrowed(dtype: torch.dtype, conv: bool) -> str:
    """What of float32 is rounded to TF32: `matmul`, `conv`, both, or nothing."""
    if dtype is not torch.float32:
        return ""
    cudnn: Any = torch.backends.cudnn
    convs = conv and cudnn.conv.fp32_precision == "tf32"
    return " ".join(["matmul"] * (precision() == "tf32") + ["conv"] * convs)


def bound(dtype: torch.dtype, conv: bool) -> float:
    """How far a product may lie from the true one, of its norm."""
    return TF32 if narrowed(dtype, conv) else BOUNDS[dtype]
