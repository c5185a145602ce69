"""CUDA C++ compiled by NVRTC, which torch ships, into a cache, and launched on torch's stream."""

import ctypes
import hashlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.native.build import cache_folder

SOURCES = Path(__file__).parent
_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# CU_TENSOR_MAP_ DATA_TYPE_UINT16, L2_PROMOTION_L2_256B, and SWIZZLE_64B, SWIZZLE_128B by columns
_SHORT, _PROMOTED, _SWIZZLED = 1, 3, {32: 2, 64: 3}
_MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class _Attribute(ctypes.Structure):
    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    ]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class CompileError(Exception):
    """NVRTC is missing or refused the source; says why."""


class Function:
    """A kernel of one device, ready to be launched.

    Attributes:
        early: whether its launches may begin before the kernel before them has ended (compute
            capability 9.0 and newer; the kernel itself waits for what it reads).
    """

    def __init__(self, handle: ctypes.c_void_p, context: ctypes.c_void_p, early: bool) -> None:
        self.handle = handle
        self.context = context
        self.early = early

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        tensors: Sequence[Tensor | None],
        numbers: Sequence[int],
        shared: int = 0,
        maps: Sequence[ctypes.Array[ctypes.c_uint64]] = (),
    ) -> None:
        """Launch on torch's stream.

        Args:
            grid: thread blocks.
            threads: of a thread block.
            tensors: the arguments behind `maps`, of which the first is no None; None is a null
                pointer.
            numbers: those behind them, ints.
            shared: bytes of dynamic shared memory.
            maps: the first arguments, of `tensor_map`.

        Raises:
            RuntimeError: the driver refused, with its number.
        """
        assert tensors[0] is not None
        device = tensors[0].device
        addresses = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
        arguments: list[Any] = [*maps, *addresses, *map(ctypes.c_int, numbers)]
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            config = _Config((*grid, 1), (threads, 1, 1), shared, stream, None, 0)
            if self.early:
                attribute = _Attribute(_PROGRAMMATIC, b"", 1)
                config.attributes, config.count = ctypes.pointer(attribute), 1
            _ok(_cuda().cuCtxSetCurrent(self.context), "context")  # a thread may have none yet
            status = _cuda().cuLaunchKernelEx(ctypes.byref(config), self.handle, pointers, None)
            _ok(status, "launch")


@cache
def function(
    source: str,
    name: str,
    device: int,
    defines: tuple[tuple[str, int], ...],
    dynamic: bool = False,
) -> Function:
    """The kernel `name` of a file beside this one, compiled for a device with these macros.

    Args:
        source: the file.
        name: of the kernel.
        device: index of the GPU.
        defines: macros and their values.
        dynamic: whether it takes as much shared memory as it is launched with, and no other.

    Raises:
        CompileError: there is no NVRTC, or it refused.
        RuntimeError: a graph is being captured, during which nothing can be loaded.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name}: call it once with the same arguments before a graph is captured"
        )
    major, minor = capability(device)
    target = f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    code = image(source, target, dict(defines))
    module, handle, context = (ctypes.c_void_p() for _ in range(3))
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the device's context current
        _ok(_cuda().cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
        _ok(_cuda().cuModuleGetFunction(ctypes.byref(handle), module, name.encode()), name)
        if dynamic:
            _ok(_cuda().cuFuncSetAttribute(handle, _MOST_SHARED, most_shared(device)), name)
        _ok(_cuda().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    return Function(handle, context, major >= 9)


def tensor_map(matrix: Tensor, rows: int, columns: int) -> ctypes.Array[ctypes.c_uint64]:
    """How the copy engine brings tiles of a contiguous matrix of 16 bits, zeros where it ends.

    Args:
        matrix: (rows, columns), from a multiple of 16 bytes on, columns a multiple of 8.
        rows: of a tile, 256 at most.
        columns: of a tile, 32 or 64: its lines of 64 or 128 bytes are swizzled.

    Raises:
        RuntimeError: the driver refused, with its number.
    """
    words = (ctypes.c_uint64 * 24)()
    made = (ctypes.c_uint64 * 16).from_buffer(words, -ctypes.addressof(words) % 64)
    long, short = ctypes.c_uint64, ctypes.c_uint32
    sizes, pitch = (long * 2)(*reversed(matrix.shape)), (long * 1)(2 * matrix.shape[1])
    tile, every = (short * 2)(columns, rows), (short * 2)(1, 1)
    address = ctypes.c_void_p(matrix.data_ptr())
    status = _cuda().cuTensorMapEncodeTiled(
        made, _SHORT, 2, address, sizes, pitch, tile, every, 0, _SWIZZLED[columns], _PROMOTED, 0
    )
    _ok(status, "cuTensorMapEncodeTiled")
    return made


def most_shared(device: int) -> int:
    """Bytes of shared memory that a thread block may ask for."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@cache
def capability(device: int) -> tuple[int, int]:
    """The compute capability of a device."""
    return torch.cuda.get_device_capability(device)


@cache
def available(device: int) -> bool:
    """Whether CUDA C++ can be compiled for a device, which needs to be of 8.0 or newer."""
    major, minor = capability(device)
    return major >= 8 and _why_not(10 * major + minor) == ""


@cache
def has_triton() -> bool:
    """Whether Triton, which torch for CUDA needs on Linux, is installed."""
    return find_spec("triton") is not None


@cache
def _why_not(architecture: int) -> str:
    try:
        known = _architectures(_nvrtc())
        _cuda()
        if architecture not in known:
            raise CompileError(f"NVRTC knows {known}, not {architecture}")
    except CompileError as error:
        logging.getLogger("kernels").warning("no GPU kernels in CUDA C++: %s", error)
        return str(error)
    return ""


def _architectures(nvrtc: ctypes.CDLL) -> list[int]:
    """For which GPUs NVRTC compiles, ten times their compute capability."""
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(found)
    return list(found)


def image(source: str, target: str, defines: Mapping[str, int]) -> bytes:
    """The machine code of a file for a target such as sm_90, from the cache or compiled into it.

    Raises:
        CompileError: there is no NVRTC, or it refused.
    """
    text, options = source_text(source), [f"--gpu-architecture={target}", "--std=c++17"]
    options += [f"-D{key}={value}" for key, value in sorted(defines.items())]
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    words = "\n".join([*options, f"{major.value}.{minor.value}"]).encode()
    digest = hashlib.sha256(words + text).hexdigest()[:16]
    path = cache_folder() / f"{Path(source).stem}-{target}-{digest}.cubin"
    if not path.exists():
        code, _ = compile_text(text, source, options)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
            partial.write_bytes(code)
            partial.replace(path)
        except OSError as error:  # what cannot be kept is compiled again by the next process
            logging.getLogger("kernels").warning("no cache for GPU kernels: %s", error)
        return code
    return path.read_bytes()


def source_text(source: str) -> bytes:
    """A file beside this one with what it includes."""
    text = (SOURCES / source).read_bytes()
    for header in ("hopper.cuh", "common.cuh"):
        text = text.replace(f'#include "{header}"'.encode(), (SOURCES / header).read_bytes())
    return text


def compile_text(text: bytes, name: str, options: Sequence[str]) -> tuple[bytes, str]:
    """The machine code of a source, and what the compiler said.

    Raises:
        CompileError: there is no NVRTC, or it refused.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), 0, None, None)
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), words)
    said = _taken(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    log = said.decode(errors="replace")
    if status:
        raise CompileError(log)
    return _taken(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log


def _taken(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


@cache
def _nvrtc() -> ctypes.CDLL:
    name = f"libnvrtc.so.{(torch.version.cuda or '13').split('.')[0]}"
    installed = find_spec("nvidia")  # of the packages that a torch for CUDA needs
    folders = installed.submodule_search_locations if installed else None
    found = [path for folder in folders or () for path in Path(folder).glob(f"*/lib/{name}")]
    for path in (name, *map(str, found)):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise CompileError(f"{name} was not found, neither by the loader nor among {len(found)} files")


@cache
def _cuda() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CompileError(str(error)) from error


def _ok(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"CUDA driver: {what} gave error {status}")
