# SPDX-License-Identifier: Apache-2.0
"""The result of compile(): one graph, and the backends that run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from qgraph.backends import integer, onnx, parity, reference
from qgraph.calibration.loader import Signature
from qgraph.errors import CalibrationError, InputError, unknown_name
from qgraph.graph.verify import Sample
from qgraph.report.report import Report

Backend = Literal["reference", "integer", "onnx"]
BACKENDS: tuple[str, ...] = ("reference", "integer", "onnx")


class QuantizedModel:
    """A quantized model: call it, lower it, verify it, export it.

    Attributes:
        graph_module: the quantized graph, self-contained.
        report: what was decided and where accuracy went.
        sample: inputs that checks use when none are given.

    Example:
        >>> q = qgraph.compile(model, loader)          # doctest: +SKIP
        >>> q(images)                                  # doctest: +SKIP
        >>> print(q.verify())                          # doctest: +SKIP
        >>> q.to_onnx("model.onnx")                    # doctest: +SKIP
    """

    def __init__(self, graph_module: GraphModule, report: Report, sample: Sample) -> None:
        self.graph_module = graph_module
        self.report = report
        self.sample = sample
        self._signature = Signature.of(graph_module)
        self._lowered: dict[str, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the integer backend; inputs and output structure are the model's own.

        Raises:
            InputError: inputs that do not fit the signature.
        """
        try:
            self._signature.check(args, kwargs, batch=0)
        except CalibrationError as error:
            raise InputError(str(error).removeprefix("batch 0: ")) from None
        return self.lower("integer")(*args, **kwargs)

    def lower(self, backend: Backend) -> Callable[..., Any]:
        """A callable with the model's signature that runs on one backend.

        Raises:
            ConfigError: an unknown backend.
        """
        if backend not in BACKENDS:
            raise unknown_name("backend", backend, BACKENDS)
        if backend not in self._lowered:
            self._lowered[backend] = self._lower(backend)
        return self._lowered[backend]

    def _lower(self, backend: Backend) -> Callable[..., Any]:
        match backend:
            case "reference":
                return reference.lower(self.graph_module)
            case "integer":
                return integer.lower(self.graph_module)
            case "onnx":
                return onnx.lower(self.graph_module, sample=(self.sample.args, self.sample.kwargs))

    def verify(self, inputs: Any = None) -> parity.ParityReport:
        """Compare reference, integer and onnxruntime code by code, node by node.

        Args:
            inputs: a tensor, a tuple of positional inputs, or a mapping of keyword inputs;
                default: the sample kept from compilation.
        """
        args, kwargs = self._call_of(inputs)
        session = self.lower("onnx")
        return parity.compare(self.graph_module, (args, kwargs), session=session)

    def _call_of(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs is None:
            return self.sample.args, self.sample.kwargs
        if isinstance(inputs, dict):
            return (), dict(inputs)
        return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})

    def explain(self, runtime: Literal["onnxruntime"] | None = None) -> Any:
        """Per node: format, bits, kernel and float islands with the rewrite that cures them."""
        if runtime is None:
            return integer.lower(self.graph_module).explain()
        if runtime != "onnxruntime":
            raise unknown_name("runtime", runtime, ("onnxruntime",))
        return onnx.explain(self.graph_module, sample=(self.sample.args, self.sample.kwargs))

    def to_onnx(
        self, path: str | Path, container: Literal["int8", "native"] = "int8"
    ) -> onnx.ExportInfo:
        """Write a QDQ ONNX file.

        Args:
            path: of the file.
            container: ``"int8"`` (fastest on CPUs) or ``"native"`` (INT4/INT2, smallest).

        Raises:
            ExportError: the graph cannot be written in this form, or the path not be written to.
        """
        sample = (self.sample.args, self.sample.kwargs)
        return onnx.export(self.graph_module, path, container=container, sample=sample)

    def inputs(self) -> list[Any]:
        """The sample's leaves in the order of the graph's placeholders."""
        return pytree.tree_leaves((self.sample.args, self.sample.kwargs))
