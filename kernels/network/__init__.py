"""Many layers in one call: `sparse_chain` runs a program, which is written from a graph."""

from kernels.network import lanes
from kernels.network.graph import Graph, Step, X, Y
from kernels.network.op import step_s
from kernels.network.program import validate, weighted_steps, write

__all__ = ["Graph", "Step", "X", "Y", "lanes", "step_s", "validate", "weighted_steps", "write"]
