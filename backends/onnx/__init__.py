# SPDX-License-Identifier: Apache-2.0
"""The ONNX backend: QDQ files that onnxruntime runs in integer kernels."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from qgraph.backends.onnx.export import ExportInfo, export
from qgraph.backends.onnx.kernels import Kernel, KernelTable, kernels
from qgraph.backends.onnx.session import Session

__all__ = [
    "ExportInfo",
    "Kernel",
    "KernelTable",
    "Session",
    "explain",
    "export",
    "kernels",
    "lower",
]

Sample = tuple[tuple[Any, ...], dict[str, Any]]


def lower(module: GraphModule, *, threads: int | None = None) -> Session:
    """Export into memory and start onnxruntime on it.

    Raises:
        ExportError: the graph cannot be expressed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(module, path, external_data=False)
        return Session(path.read_bytes(), threads=threads)


def explain(
    module: GraphModule, *, sample: Sample | None = None, threads: int | None = None
) -> KernelTable:
    """Kernel, time share and cure per node of what onnxruntime runs for this graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(module, path)
        feeds = None if sample is None else [Session(path).feed(*sample[0], **sample[1])]
        return kernels(path, feeds, threads=threads)
