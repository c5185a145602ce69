"""`torch.ops.sparse_nas.sparse_linear`: act(x W^T + b) with a packed weight.

`sparse_linear.residual` adds a tensor of the result's shape before the activation.
"""

from functools import lru_cache, partial

from torch import Size, Tensor, bfloat16, get_num_threads

from kernels import calls
from kernels.blob import LINEAR, shape_of
from kernels.native.library import library
from kernels.packed import check_blob, unpack
from kernels.reference import activate
from kernels.sparse_linear import reference

SCHEMA = (
    "sparse_linear(Tensor x, Tensor weight, Tensor? bias, int out_features, "
    'str activation="none") -> Tensor'
)

ADDED = (
    "sparse_linear.residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual, "
    'int out_features, str activation="none") -> Tensor'
)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str = "none"
) -> Tensor:
    if x.dtype is bfloat16:
        return calls.in_float32(_run, x, weight, bias, out_features, activation)
    code = calls.activation_code("sparse_linear", activation)
    calls.check_tensors("sparse_linear", x, weight, bias, out_features)
    if not x.dim():
        raise ValueError("sparse_linear: x must be (..., in), got a scalar")
    lib = library()
    if lib is None:
        return _plain(x, weight, bias, out_features, activation)
    batch, shape = _shape(x.shape, out_features)
    x, y = x.contiguous(), x.new_empty(*shape)
    arguments = (
        x.data_ptr(),
        batch,
        x.shape[-1],
        weight.data_ptr(),
        weight.numel(),
        calls.pointer(bias),
        y.data_ptr(),
        out_features,
        code,
        get_num_threads(),
    )
    if lib.linear(*arguments):
        refusal = partial(_mismatch, x, weight, out_features)
        calls.settle(lib, lib.linear, arguments, weight, check_blob, refusal)
    return y


@lru_cache(maxsize=4096)
def _shape(x: Size, out_features: int) -> tuple[int, tuple[int, ...]]:
    """Number of samples, and the output's shape."""
    return x[:-1].numel(), (*x[:-1], out_features)


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str
) -> Tensor:
    check_blob(weight)
    dense = unpack(weight)
    if shape_of(weight.numpy()).operation != LINEAR or dense.shape != (out_features, x.shape[-1]):
        raise ValueError(_mismatch(x, weight, out_features))
    return reference.sparse_linear(x.contiguous(), dense, bias, activation)


def _mismatch(x: Tensor, weight: Tensor, out_features: int) -> str:
    packed = shape_of(weight.numpy()).weight_shape
    return (
        f"sparse_linear: the weight was packed as {packed}; "
        f"it does not fit in={x.shape[-1]}, out_features={out_features}"
    )


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str = "none"
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _run_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str = "none"
) -> Tensor:
    from kernels.cuda import linear  # not at the top: nobody without a GPU needs it

    return linear.run(x, weight, bias, out_features, activation)


def _added(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    calls.activation_code("sparse_linear", activation)
    calls.check_residual("sparse_linear", residual, x, (*x.shape[:-1], out_features))
    return activate(_run(x, weight, bias, out_features).add_(residual), activation)


def _added_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    return _fake(x, weight, bias, out_features)


def _added_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    from kernels.cuda import linear

    calls.check_residual("sparse_linear", residual, x, (*x.shape[:-1], out_features))
    return linear.run(x, weight, bias, out_features, activation, residual)


calls.define(SCHEMA, _run, _fake, _run_cuda)
calls.define(ADDED, _added, _added_fake, _added_cuda)
for _name in ("sparse_linear", "sparse_linear.residual"):
    calls.autocast(_name, "cuda", calls.packed_dtype)
