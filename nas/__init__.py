"""Neural architecture search for sparse networks, with costs measured by real sparse kernels.

Names are imported when they are used, so that checking arguments needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.choices import Choice, Subset, When
    from nas.costs import Flops, Latency, NonZeros, Parameters, PeakMemory
    from nas.evaluate import Evaluate
    from nas.graph import INPUT, Graph
    from nas.loop import search
    from nas.module_space import sparsify
    from nas.packing import pack
    from nas.run import Run, load
    from nas.space import Architecture, GraphSpace, Space
    from nas.sparsity import NM, Block, Channel, Dense, Unstructured
    from nas.tasks import Metric, Split, Task
    from nas.training import Training
    from nas.trial import Objective, Problem, Result, Strategy, Trial

_HOMES = {
    "nas.choices": ("Choice", "Subset", "When"),
    "nas.costs": ("Flops", "Latency", "NonZeros", "Parameters", "PeakMemory"),
    "nas.evaluate": ("Evaluate",),
    "nas.graph": ("INPUT", "Graph"),
    "nas.packing": ("pack",),
    "nas.run": ("Run", "load"),
    "nas.loop": ("search",),
    "nas.space": ("Architecture", "GraphSpace", "Space"),
    "nas.module_space": ("sparsify",),
    "nas.sparsity": ("NM", "Block", "Channel", "Dense", "Unstructured"),
    "nas.tasks": ("Metric", "Split", "Task"),
    "nas.training": ("Training",),
    "nas.trial": ("Objective", "Problem", "Result", "Strategy", "Trial"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "INPUT",
    "NM",
    "Architecture",
    "Block",
    "Channel",
    "Choice",
    "Dense",
    "Evaluate",
    "Flops",
    "Graph",
    "GraphSpace",
    "Latency",
    "Metric",
    "NonZeros",
    "Objective",
    "Parameters",
    "PeakMemory",
    "Problem",
    "Result",
    "Run",
    "Space",
    "Split",
    "Strategy",
    "Subset",
    "Task",
    "Training",
    "Trial",
    "Unstructured",
    "When",
    "load",
    "pack",
    "search",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nas' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
