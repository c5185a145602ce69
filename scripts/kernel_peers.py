"""Other ways to compute a layer on this machine, for the benchmark of the kernels."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """A linear layer on x (batch, in), or a convolution that keeps the size but for its stride."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    stride: int = 1
    groups: int = 1

    @property
    def _padding(self) -> int:
        return self.weight.shape[-1] // 2

    def dense(self) -> list[Call]:
        """PyTorch's dense ways: as it comes, channels last, and oneDNN in its own layout."""
        x, weight, bias = self.x, self.weight, self.bias
        onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if weight.dim() == 2:
            return [lambda: F.linear(x, weight, bias), *([self._prepacked_linear()] * onednn)]
        walk = (self.stride, self._padding, 1, self.groups)
        last = torch.channels_last
        pairs = [(x, weight), (x.to(memory_format=last), weight.to(memory_format=last))]
        calls: list[Call] = [partial(F.conv2d, *pair, bias, *walk) for pair in pairs]
        return [*calls, *([self._prepacked_conv()] * onednn)]

    def _prepacked_linear(self) -> Call:
        held = torch.ops.mkldnn._reorder_linear_weight(self.weight, self.x.shape[0])
        run = torch.ops.mkldnn._linear_pointwise
        return lambda: run(self.x, held, self.bias, "none", [], "")

    def _prepacked_conv(self) -> Call:
        """As `torch.compile` may call it."""
        walk: list[Any] = [[self._padding] * 2, [self.stride] * 2, [1, 1], self.groups]
        held = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *walk, list(self.x.shape))
        run = torch.ops.mkldnn._convolution_pointwise
        xs = self.x.to(memory_format=torch.channels_last)
        return lambda: run(xs, held, self.bias, *walk, "none", [], "")

    def csr(self) -> list[Call]:
        """PyTorch's CSR product, of linear layers and 1x1 convolutions; activations are turned."""
        if self.weight.shape[2:].numel() > 1 or self.groups > 1:
            return []
        with warnings.catch_warnings(action="ignore"):  # that CSR is in beta
            held = self.weight.flatten(1).to_sparse_csr()
        turned = self.x.transpose(0, 1).flatten(1).contiguous()
        return [lambda: held @ turned]

    def onnxruntime(self) -> list[Call]:
        """ONNX Runtime's dense layer, its input and output bound, where it is installed.

        On one thread alone: its own team of threads would stand in the way of torch's.
        """
        installed = all(map(importlib.util.find_spec, ("onnx", "onnxruntime")))
        if not installed or torch.get_num_threads() > 1:
            return []
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            self._onnx(), options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        binding.bind_cpu_input("x", self.x.numpy())
        binding.bind_output("y")
        return [lambda: session.run_with_iobinding(binding)]

    def _onnx(self) -> bytes:
        from onnx import TensorProto, helper, numpy_helper

        walk: dict[str, Any] = {"transB": 1}
        if self.weight.dim() == 4:
            pads = [self._padding] * 4
            walk = {"strides": [self.stride] * 2, "pads": pads, "group": self.groups}
        kind = "Conv" if self.weight.dim() == 4 else "Gemm"
        node = helper.make_node(kind, ["x", "w", "b"], ["y"], **walk)
        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(self.x.shape))
        gives = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        held = [
            numpy_helper.from_array(tensor.numpy(), name)
            for tensor, name in ((self.weight, "w"), (self.bias, "b"))
        ]
        graph = helper.make_graph([node], "layer", [given], [gives], held)
        opset = helper.make_opsetid("", 17)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        return bytes(model.SerializeToString())
