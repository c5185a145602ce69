"""A compiled core without Python around it: cases for driver.cpp, and what must come back."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

import kernels
from kernels.calls import ACTIVATIONS, geometry
from kernels.network import Graph, Y, write
from kernels.sparse_conv2d.reference import sparse_conv2d
from kernels.sparse_linear.reference import sparse_linear
from tests.kernels import draws
from tests.kernels.test_network import assert_equals_reference

SOURCE = Path(__file__).with_suffix(".cpp")
LINEAR, CONV2D, PROGRAM = range(3)


@dataclass(frozen=True, eq=False)
class Case:
    """One call of the core.

    Attributes:
        out: shape of the result.
        numbers: sizes, as the operation's C function takes them.
        check: raises AssertionError for a wrong result.
    """

    operation: int
    x: Tensor = field(repr=False)
    blob: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    out: tuple[int, ...]
    numbers: tuple[int, ...]
    check: Callable[[Tensor], None] = field(repr=False)
    activation: str = "none"
    threads: int = 1

    def to_bytes(self) -> bytes:
        """The case as driver.cpp reads it."""
        arrays = [t.numpy().tobytes() for t in (self.x, self.blob)]
        bias = None if self.bias is None else self.bias.numpy().tobytes()
        sizes = [*map(len, arrays), -1 if bias is None else len(bias), 4 * prod(self.out)]
        rest = [ACTIVATIONS[self.activation], self.threads, *self.numbers]
        head = np.array([self.operation, *sizes, *rest, *[0] * (16 - len(self.numbers))], "<i8")
        return head.tobytes() + b"".join(arrays) + (bias or b"")


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, threads: int = 1
) -> Case:
    """A call of `sn_linear`."""
    blob, out = kernels.pack_linear(weight).data, (len(x), len(weight))
    check = _close(sparse_linear, x, weight, bias, activation)
    numbers = (*x.shape, len(weight))
    return Case(LINEAR, x, blob, bias, out, numbers, check, activation, threads)


def conv2d(
    conv: draws.Conv,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    threads: int = 1,
) -> Case:
    """A call of `sn_conv2d`."""
    blob = kernels.pack_conv2d(weight, conv.groups).data
    walk = (conv.stride, conv.padding, conv.dilation)
    where = geometry(tuple(x.shape), len(weight), conv.kernel, *walk, conv.groups)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        return sparse_conv2d(x, weight, bias, *walk, conv.groups, activation)

    check = _close(plain, x, weight, bias, activation)
    return Case(CONV2D, x, blob, bias, where.out, tuple(where.numbers), check, activation, threads)


def _close(
    plain: Callable[[Tensor, Tensor, Tensor | None, str], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
) -> Callable[[Tensor], None]:
    wide = None if bias is None else bias.double()
    true = plain(x.double(), weight.double(), wide, activation)
    size = None if wide is None else wide.abs()
    scale = plain(x.double().abs(), weight.double().abs(), size, "none")
    return partial(draws.assert_close, true=true, scale=scale)


def program(graph: Graph, x: Tensor, threads: int = 1, parts: int = 0) -> Case:
    """A call of `sn_program`."""
    out, tail = (len(x), *graph.shapes[Y]), graph.shapes[Y]
    check = partial(assert_equals_reference, x=x, graph=graph)
    numbers = (*x.shape, *tail)
    blob = write(graph, parts)
    return Case(PROGRAM, x, blob, None, out, numbers, check, threads=threads)


class DriverError(Exception):
    """The driver did not come to its end; says what it said."""


@dataclass(frozen=True)
class Driver:
    """The compiled driver.cpp.

    Attributes:
        command: that runs it.
        cores: the core that is called for each place of the arrays: "heap", or the "end" or
            "begin" of a page beside a forbidden one.
    """

    command: list[str]
    cores: dict[str, Path]

    def run(self, place: str, cases: list[Case]) -> list[Tensor]:
        """The results.

        Raises:
            DriverError: the core refused a case, or touched what it may not.
        """
        with tempfile.TemporaryDirectory() as name:
            given, results = Path(name) / "cases", Path(name) / "results"
            given.write_bytes(b"".join(case.to_bytes() for case in cases))
            words = [str(self.cores[place]), place, str(given), str(results)]
            done = subprocess.run([*self.command, *words], capture_output=True, text=True)
            if done.returncode:
                number, _, said = done.stderr.rpartition("driver: case ")[2].partition("\n")
                raise DriverError(f"{place}: {cases[int(number)]}: exit {done.returncode}\n{said}")
            with results.open("rb") as file:
                return [_read(file, case.out) for case in cases]

    def check(self, cases: list[Case]) -> None:
        """Raises AssertionError for a wrong result, and what `run` raises; at every place."""
        for place in self.cores:
            for case, y in zip(cases, self.run(place, cases), strict=True):
                try:
                    case.check(y)
                except AssertionError as error:
                    error.add_note(f"{place}: {case}")
                    raise


def _read(file: BinaryIO, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.fromfile(file, "<f4", prod(shape))).reshape(shape)


def compile_driver(compiler: list[str], folder: Path) -> str:
    """Compiles driver.cpp into a folder; returns the program's path."""
    made = str(folder / "driver")
    flags = ["-std=c++17", "-O1", "-g", "-ldl", "-pthread"]
    subprocess.run([*compiler, str(SOURCE), *flags, "-o", made], check=True)
    return made
