"""What the operators of kept blocks share: checks of their arguments, and their gradients."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels import calls
from kernels.block_index import BlockIndex, blocks_of, is_whole, whole_shape

INDEX = "Tensor lists, Tensor groups"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def index(
    name: str,
    x: Tensor,
    lists: Tensor,
    groups: Tensor,
    sizes: tuple[int, int],
    block: Sequence[int],
    taps: int = 1,
) -> BlockIndex:
    """The index, whose shape fits a weight and whose tensors lie on x's device.

    Args:
        name: of the operator.
        x: a tensor of floats.
        lists: of a `BlockIndex`, as `groups`.
        groups: see there.
        sizes: rows of the weight, and columns of one tap.
        block: rows and columns of a block.
        taps: of the weight.

    Raises:
        ValueError: names what does not fit, the rule and what was given.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name}: x must be one of {_DTYPES}, got {x.dtype}")
    for part, dims in ((lists, 1), (groups, 2)):
        kind = (part.dtype, part.device, part.dim(), part.is_contiguous())
        if kind != (torch.int32, x.device, dims, True):
            raise ValueError(
                f"{name}: lists and groups must be contiguous int32 on {x.device}, as of a "
                f"BlockIndex, got {part.dtype} {tuple(part.shape)} on {part.device}"
            )
    whole = len(block) == 2 and min(*sizes, *block) > 0
    if whole and not sizes[0] % block[0] and not sizes[1] % block[1]:
        rows, columns = sizes[0] // block[0], sizes[1] // block[1]
        count = blocks_of(lists, rows, columns)
        if count >= 0 and len(lists) == 3 * count + 2 * (rows + columns + 1):
            shape = (sizes[0], taps * sizes[1], (block[0], block[1]))
            return BlockIndex(*shape, lists, groups, taps)
    raise ValueError(
        f"{name}: the index, of {len(lists)} numbers, does not fit a weight of out={sizes[0]}, "
        f"in={sizes[1]} in blocks of {tuple(block)}"
    )


def check_values(name: str, values: Tensor, x: Tensor, index: BlockIndex) -> None:
    """Checks that values are those of an index, its blocks or `whole`; raises as `check`."""
    blocks = (len(index.columns), *index.block)
    check(name, "values", values, x, whole_shape(index) if is_whole(values) else blocks)


def check(name: str, part: str, tensor: Tensor, x: Tensor, shape: Sequence[int]) -> None:
    """Checks a part of the arguments of an operator.

    Raises:
        ValueError: it has not this shape, or not the dtype and device of x.
    """
    found = (tensor.dtype, tensor.device, tuple(tensor.shape))
    if found != (x.dtype, x.device, tuple(shape)):
        raise ValueError(
            f"{name}: {part} must be {x.dtype} {tuple(shape)} on {x.device}, as x and the index "
            f"are, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def define(
    schema: str, run: Any, fake: Any, save: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Adds an operator that has a gradient to `torch.ops.sparse_nas`.

    Args:
        schema: of the operator.
        run: computes it, a tensor or several, on the CPU and on GPUs; autocast, a backward pass
            within it, changes no dtype in there.
        fake: gives empty tensors like its result.
        save: keeps what its gradient needs, see `torch.library.register_autograd`.
        backward: its gradient.
    """

    def uncast(x: Tensor, *rest: object) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *rest)

    calls.define(schema, uncast, fake, uncast)
    name = schema.split("(")[0]
    torch.library.register_autograd(
        f"sparse_nas::{name}", backward, setup_context=save, lib=calls.FRAGMENT
    )


def gradients(
    of_values: Callable[[], Tensor] | None,
    of_x: Callable[[], Tensor] | None,
    x: Tensor,
    room: Callable[[], bool],
    both: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of values and of x, None where there is no call.

    By one call where there is one, else one after the other, that of values first, as of PyTorch's
    linear layers: it reads x, which the forward pass may have left in a cache. While a CUDA graph
    is captured, where there is room, on two streams: a replay does not wait for the host, which
    takes longer to launch small products than a GPU to compute them. (`torch.compile` traces them
    one after the other, or as one call.)

    Args:
        of_values: gives that of values.
        of_x: gives that of x.
        x: of the layer.
        room: whether they take the least time beside each other.
        both: gives both, not beside each other.
    """
    if of_values is None or of_x is None:
        return of_values and of_values(), of_x and of_x()
    if not x.is_cuda or not torch.cuda.is_current_stream_capturing() or not room():
        return both() if both else (of_values(), of_x())
    here, beside = torch.cuda.current_stream(x.device), _beside(x.device)
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        to_values = of_values()
    to_x = of_x()
    here.wait_stream(beside)
    return to_values, to_x


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def autocast(name: str) -> None:
    """Under autocast an operator's tensors get its dtype, as those of PyTorch's dense layers."""
    for device in ("cpu", "cuda"):
        calls.autocast(name, device, lambda *_, at=device: torch.get_autocast_dtype(at))
