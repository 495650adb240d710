# SPDX-License-Identifier: Apache-2.0
"""The lowered model: callable, compilable, and able to show its codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qgraph.backends.calling import flat_inputs, structured_outputs
from qgraph.backends.integer.emitter import Emitter
from qgraph.backends.integer.explain import Explanation, explain
from qgraph.backends.integer.values import Coded
from qgraph.backends.semantics import analyze
from qgraph.errors import unknown_name

Mode = Literal["onnxruntime", "fixed_point"]
MODES: tuple[str, ...] = ("onnxruntime", "fixed_point")
CodesObserver = Callable[[str, Tensor], Tensor]


class IntegerModel:
    """A quantized graph in integer arithmetic, callable with the model's own signature.

    Attributes:
        source: the quantized graph it stems from.
        graph_module: the lowered graph, torch ops and registered integer kernels.
    """

    def __init__(self, source: GraphModule, *, compile: bool = False) -> None:  # noqa: A002
        self.source = source
        self.semantics = analyze(source)
        self._emitter = Emitter(self.semantics, compiled=compile)
        self.graph_module = self._emitter.lower()
        self._run: Callable[..., Any] = self.graph_module
        if compile:
            self._run = torch.compile(self.graph_module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs in the structure of the model."""
        with torch.no_grad():
            return self._run(*args, **kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], observer: CodesObserver) -> Any:
        """The same, slowly; `observer(quantizer, codes)` sees, and may replace, all codes."""
        flat = flat_inputs(self.source, args, kwargs)
        watched = _Watched(self.graph_module, self._emitter.codes, observer)
        with torch.no_grad():
            outputs = watched.run(*flat, enable_io_processing=False)
        return structured_outputs(self.source, outputs)

    def explain(self) -> Explanation:
        """Kernel, accumulator width, or reason to stay in float, of every op."""
        return explain(self.semantics, self._emitter.choices)


class _Watched(Interpreter):
    def __init__(
        self, module: GraphModule, codes: dict[str, Coded], observer: CodesObserver
    ) -> None:
        super().__init__(module)
        self.observer = observer
        self.watched: dict[Node, list[tuple[str, Coded]]] = {}
        for name, coded in codes.items():
            self.watched.setdefault(coded.node, []).append((name, coded))

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        for name, coded in self.watched.get(n, ()):
            value = coded.storage.pack(self.observer(name, coded.storage.unpack(value)))
        return value


def lower(
    module: GraphModule,
    *,
    mode: Mode = "onnxruntime",
    compile: bool = False,  # noqa: A002
) -> IntegerModel:
    """Lower a quantized graph to integer arithmetic.

    Args:
        module: canonical ATen graph with quantize and dequantize nodes.
        mode: ``"onnxruntime"``: int32 accumulators, one fp32 multiply, half to even; ops that
            onnxruntime runs in float stay float.
        compile: fuse requantization and tables with torch.compile; codes stay the same.

    Raises:
        ConfigError: an unknown mode.
    """
    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    return IntegerModel(module, compile=compile)
