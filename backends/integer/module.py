# SPDX-License-Identifier: Apache-2.0
"""The lowered model: callable, compilable, and able to show its codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qgraph.backends.calling import flat_inputs, structured_outputs
from qgraph.backends.integer.dtypes import computed_dtypes, example_inputs
from qgraph.backends.integer.emitter import Emitter
from qgraph.backends.integer.explain import Explanation, explain
from qgraph.backends.integer.fixed_emitter import FixedEmitter
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
        mode: ``"onnxruntime"`` or ``"fixed_point"``.
    """

    def __init__(
        self, source: GraphModule, *, mode: Mode = "onnxruntime", compile: bool = False,  # noqa: A002
        exact_floats: bool = False,
    ) -> None:  # fmt: skip
        self.source = source
        self.mode = mode
        self.semantics = analyze(source)
        self._emitter = (
            Emitter(self.semantics, compiled=compile)
            if mode == "onnxruntime"
            else FixedEmitter(self.semantics, exact_floats=exact_floats)
        )
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

    @property
    def codes(self) -> frozenset[str]:
        """Names of the quantize nodes whose codes `run` shows."""
        return frozenset(self._emitter.codes)

    def explain(self) -> Explanation:
        """Kernel, accumulator width, or reason to stay in float, of every op."""
        if not isinstance(self._emitter, FixedEmitter):
            return explain(self.semantics, self._emitter.choices)
        found: dict[str, set[str]] = {}
        for node, dtypes in computed_dtypes(self.graph_module, example_inputs(self.source)).items():
            found.setdefault(str(node.meta.get("qgraph_source")), set()).update(dtypes)
        listed = {name: ", ".join(sorted(dtypes)) for name, dtypes in found.items()}
        islands = self._emitter.islands
        return explain(self.semantics, self._emitter.choices, islands=islands, dtypes=listed)


def fixed_point_reference(module: GraphModule) -> IntegerModel:
    """The fixed-point mode with exact float64 products: what its kernels are compared with."""
    return IntegerModel(module, mode="fixed_point", exact_floats=True)


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
            onnxruntime runs in float stay float. ``"fixed_point"``: 31-bit multiplier and shift,
            no float between the input's quantize and the output.
        compile: fuse requantization and tables with torch.compile; codes stay the same.

    Raises:
        ConfigError: an unknown mode.
    """
    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    return IntegerModel(module, mode=mode, compile=compile)
