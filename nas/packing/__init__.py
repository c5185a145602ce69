"""Packing: from a masked module to the fastest network that computes the same."""

from nas.packing.ours import check_kernels

check_kernels()

from nas.packing.network import PackedNetwork
from nas.packing.pack import pack
from nas.packing.report import PackedLayer, PackedRun
from nas.packing.store import load, save

__all__ = ["PackedLayer", "PackedNetwork", "PackedRun", "load", "pack", "save"]
