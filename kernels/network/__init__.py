"""Many layers in one call: `sparse_chain` runs a program, which is written from a graph."""

from kernels.network.graph import Graph, Step, X, Y
from kernels.network.op import step_s
from kernels.network.program import validate, write

__all__ = ["Graph", "Step", "X", "Y", "step_s", "validate", "write"]
