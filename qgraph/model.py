# SPDX-License-Identifier: Apache-2.0
"""The result of compile(): one graph, and the backends that run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from qgraph import artifact
from qgraph.backends import integer, onnx, parity, reference
from qgraph.calibration.loader import Signature, bind
from qgraph.errors import CalibrationError, InputError, unknown_name
from qgraph.graph.verify import Sample
from qgraph.report.report import Report

Backend = Literal["reference", "integer", "onnx"]
BACKENDS: tuple[str, ...] = ("reference", "integer", "onnx")


def bound(
    signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call in the form the graph was traced with: arguments may be given by name or place.

    Raises:
        InputError: the inputs do not fit; shows them and the signature.
    """
    call = bind(signature, args, kwargs) or (args, kwargs)
    try:
        signature.check(*call, batch=0)
    except CalibrationError as error:
        raise InputError(str(error).removeprefix("batch 0: ")) from None
    return call


class Lowered:
    """One backend behind the model's signature.

    Attributes:
        runner: the backend's own object.
    """

    def __init__(self, runner: Callable[..., Any], signature: Signature) -> None:
        self.runner = runner
        self._signature = signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run; `InputError` for inputs that do not fit."""
        args, kwargs = bound(self._signature, args, kwargs)
        return self.runner(*args, **kwargs)


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
        self._lowered: dict[str, Lowered] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the integer backend; inputs and output structure are the model's own.

        Raises:
            InputError: inputs that do not fit the signature.
        """
        return self.lower("integer")(*args, **kwargs)

    def lower(self, backend: Backend) -> Lowered:
        """A callable with the model's signature that runs on one backend.

        Raises:
            ConfigError: an unknown backend.
        """
        if backend not in BACKENDS:
            raise unknown_name("backend", backend, BACKENDS)
        if backend not in self._lowered:
            self._lowered[backend] = Lowered(self._lower(backend), self._signature)
        return self._lowered[backend]

    def _lower(self, backend: Backend) -> Callable[..., Any]:
        match backend:
            case "reference":
                return reference.lower(self.graph_module)
            case "integer":
                return integer.lower(self.graph_module)
            case "onnx":
                return onnx.lower(self.graph_module)

    def verify(self, inputs: Any = None) -> parity.ParityReport:
        """Compare reference, integer and onnxruntime code by code, node by node.

        Args:
            inputs: a tensor, a tuple of positional inputs, a mapping of keyword inputs, or a
                `Sample` of both; default: the sample kept from compilation.
        """
        args, kwargs = self._call_of(inputs)
        session = self.lower("onnx").runner
        assert isinstance(session, onnx.Session)
        call = bound(self._signature, args, kwargs)
        return parity.compare(self.graph_module, call, session=session, lower_runtime=onnx.lower)

    def _call_of(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs is None or isinstance(inputs, Sample):
            sample = self.sample if inputs is None else inputs
            return sample.args, sample.kwargs
        if isinstance(inputs, dict):
            return (), dict(inputs)
        return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})

    def explain(self, runtime: Literal["onnxruntime"] | None = None) -> Any:
        """Per node: format, bits, kernel and float islands with the rewrite that cures them."""
        if runtime is None:
            runner = self.lower("integer").runner
            assert isinstance(runner, integer.IntegerModel)
            return runner.explain()
        if runtime != "onnxruntime":
            raise unknown_name("runtime", runtime, ("onnxruntime",))
        return onnx.explain(self.graph_module, sample=(self.sample.args, self.sample.kwargs))

    def to_onnx(
        self, path: str | Path, container: Literal["int8", "native"] = "int8"
    ) -> onnx.ExportInfo:
        """Write a QDQ ONNX file.

        Args:
            path: of the file.
            container: ``"int8"`` (fastest on CPUs) or ``"native"`` (INT4/INT2, smallest; needs
                onnxruntime 1.23 or later).

        Raises:
            ExportError: the graph cannot be written in this form, or the path not be written to.
        """
        return onnx.export(self.graph_module, path, container=container)

    def save(self, path: str | Path) -> int:
        """Write one safe file: tensors, graph, report and the sample inputs; return its size.

        `qgraph.load` reads it, without the model's source and without running any code of the
        file's. The same model gives the same bytes; an older file is only replaced by a whole one.

        Raises:
            ExportError: something cannot be saved, or the path not be written to.
        """
        return artifact.write(path, self.graph_module, self.report, self.sample)

    def inputs(self) -> list[Any]:
        """The sample's leaves in the order of the graph's placeholders."""
        return pytree.tree_leaves((self.sample.args, self.sample.kwargs))


def load(path: str | Path, *, device: torch.device | str = "cpu") -> QuantizedModel | onnx.Session:
    """Read a saved model: a ``.qgraph`` file, or an ``.onnx`` file that qgraph wrote.

    Args:
        path: of the file.
        device: where the tensors of a ``.qgraph`` file go.

    Returns:
        a `QuantizedModel`, or for ONNX a session that is called like the model.

    Raises:
        ArtifactError: missing, damaged, foreign or hostile; every flipped bit of a ``.qgraph``
            file is noticed.
    """
    if Path(path).suffix == ".onnx":
        return onnx.Session(path)
    found = artifact.read(path, device)
    return QuantizedModel(found.graph_module, found.report, found.sample)
