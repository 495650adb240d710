# SPDX-License-Identifier: Apache-2.0
"""What onnxruntime really does with a file: the kernel of each node, its time, and the cure."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from qgraph.backends.onnx.capabilities import BORDERS, CAPABILITIES, INTEGER_KERNELS, MOVES
from qgraph.backends.onnx.safety import check_file
from qgraph.backends.onnx.session import session_options
from qgraph.errors import ArtifactError

_INTEGERS = frozenset({
    onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT16, onnx.TensorProto.UINT16,
    onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL,
})  # fmt: skip
# Ops that give codes for codes; a QGemm with fewer inputs than this gives floats.
_ON_CODES = frozenset({"Clip", "MaxPool", "Max", "Min"})
_QGEMM_INPUTS = 9
_TRAPS = {
    "MatMulNBits": "a weight-only product: without session.qdq_matmulnbits_accuracy_level=1 "
    "onnxruntime quantizes its activations to int8",
}
_CLIPPED = (
    "a float Clip before a quantizer keeps the product in float: let the quantizer's own bounds "
    "clip, or Clip the codes"
)
_TWO_BITS = (
    "; INT2 weights beside quantized activations make session creation fail: widen them by a Cast "
    "as qgraph's export does, or set session.disable_quant_qdq=1"
)
_INT2 = frozenset({
    getattr(onnx.TensorProto, name) for name in ("INT2", "UINT2") if hasattr(onnx.TensorProto, name)
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kernel:
    """One node of the graph that onnxruntime runs.

    Attributes:
        name, op: node name and kernel.
        kind: ``integer``, ``float``, ``border`` (quantize, dequantize) or ``move``.
        share: part of the time of one run, 0 to 1.
        microseconds: median time per run.
        cure: for a float node, the rewrite or setting that would help, or why none does.
        warning: a trap that this node steps into, or "".
    """

    name: str
    op: str
    kind: str
    share: float
    microseconds: float
    cure: str = ""
    warning: str = ""


@dataclass(frozen=True, slots=True)
class KernelTable:
    """All nodes in running order; prints as a table."""

    rows: tuple[Kernel, ...]

    def share(self, kind: str) -> float:
        """Part of the time spent in nodes of one kind."""
        return sum(r.share for r in self.rows if r.kind == kind)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The distinct warnings."""
        return tuple(dict.fromkeys(r.warning for r in self.rows if r.warning))

    def to_json(self) -> list[dict[str, object]]:
        """Rows as plain data."""
        return [{n: getattr(r, n) for n in Kernel.__slots__} for r in self.rows]

    def __str__(self) -> str:
        lines = [f"{'kernel':<24}{'kind':<9}{'share':>7}{'us':>10}  node / cure"]
        for row in self.rows:
            cure = f"  <- {row.cure}" if row.kind == "float" and row.cure else ""
            lines.append(
                f"{row.op:<24}{row.kind:<9}{row.share:>7.1%}{row.microseconds:>10.1f}  "
                f"{row.name}{cure}"
            )
        kinds = ("integer", "float", "border", "move")
        lines.append(", ".join(f"{k} {self.share(k):.1%}" for k in kinds))
        lines.extend(f"warning: {w}" for w in self.warnings)
        return "\n".join(lines)


def optimized(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The graph that onnxruntime runs, at its default optimisation level.

    Raises:
        ArtifactError: onnxruntime refuses the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = session_options()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if type(error).__module__.startswith("onnxruntime"):
                msg = f"onnxruntime refuses the file: {error}"
                raise ArtifactError(msg) from error
            raise
        return onnx.load(options.optimized_model_filepath)


def kernels(
    path: str | os.PathLike[str], feeds: Sequence[dict[str, np.ndarray]] | None = None,
    *, runs: int = 5, threads: int | None = None,
) -> KernelTable:  # fmt: skip
    """Load a file, profile some runs, and say per node what ran and what would be better.

    Args:
        path: an ONNX file.
        feeds: inputs to profile with; default: zeros, symbolic sizes taken as 2.
        runs: profiled runs after one to warm up.
        threads: as for `Session`.

    Raises:
        ArtifactError: the file is hostile, or onnxruntime refuses it.
    """
    declared = check_file(Path(path))
    try:
        model = optimized(path)
    except ArtifactError as error:
        raise ArtifactError(f"{error}{_TWO_BITS if _decodes_int2(declared) else ''}") from error
    inputs = list(feeds) if feeds is not None else [example_feed(declared)]
    times = _profile(path, inputs, runs, threads)
    total = sum(times.values()) or 1.0
    rows, integers, clipped = [], _integer_values(model), _clipped_before_quantizers(model)
    for node in model.graph.node:
        spent = times.get(node.name, 0.0)
        kind = _kind(integers, node)
        cure = _cure(node) if kind == "float" else ""
        trap = _CLIPPED if node.name in clipped else _TRAPS.get(node.op_type, "")
        rows.append(Kernel(node.name, node.op_type, kind, spent / total, spent, cure, trap))
    return KernelTable(tuple(rows))


def example_feed(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Zeros for every input."""
    feed = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else 2 for d in tensor.shape.dim]
        feed[value.name] = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return feed


def _profile(
    path: str | os.PathLike[str], feeds: list[dict[str, np.ndarray]], runs: int, threads: int | None
) -> dict[str, float]:
    """Median microseconds per run of each node."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads=threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        for feed in [feeds[0], *(feeds * runs)[:runs]]:
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"])
    return {name: float(np.median(durations[1:] or durations)) for name, durations in spent.items()}


def _integer_values(model: onnx.ModelProto) -> set[str]:
    """Names of values that hold integers; fused kernels' outputs carry no declared type."""
    graph = model.graph
    found = {t.name for t in graph.initializer if t.data_type in _INTEGERS}
    declared = (*graph.value_info, *graph.input)
    found |= {v.name for v in declared if v.type.tensor_type.elem_type in _INTEGERS}
    for node in graph.node:
        is_open = node.op_type == "QGemm" and len(node.input) < _QGEMM_INPUTS
        codes = node.op_type == "QuantizeLinear" or (
            node.op_type in INTEGER_KERNELS and "ToFloat" not in node.op_type and not is_open
        )
        follows = node.op_type in MOVES | _ON_CODES and node.input[0] in found
        if codes or (follows and node.op_type != "Cast"):
            found.update(node.output)
    return found


def _kind(integers: set[str], node: onnx.NodeProto) -> str:
    if node.op_type in INTEGER_KERNELS:
        return "integer"
    if node.op_type in BORDERS:
        return "border"
    if node.op_type in MOVES:
        return "move"
    return "integer" if set(node.output) <= integers else "float"


def _cure(node: onnx.NodeProto) -> str:
    plain = node.op_type.removeprefix("Fused")
    known = CAPABILITIES.get(plain)
    if known is None:
        return "no integer kernel is known for it"
    return known.cure or known.needs


def _clipped_before_quantizers(model: onnx.ModelProto) -> set[str]:
    """Names of float nodes that end in a Clip which a quantizer reads."""
    read = {n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    found = set()
    for node in model.graph.node:
        fused = any(a.name == "activation" and a.s == b"Clip" for a in node.attribute)
        if (fused or node.op_type == "Clip") and read & set(node.output):
            found.add(node.name)
    return found


def _decodes_int2(model: onnx.ModelProto) -> bool:
    packed = {t.name for t in model.graph.initializer if t.data_type in _INT2}
    return any(n.op_type == "DequantizeLinear" and n.input[0] in packed for n in model.graph.node)


def shares(table: KernelTable) -> dict[str, Any]:
    """Time shares by kind and the slowest float kernels, for reports."""
    floats = sorted((r for r in table.rows if r.kind == "float"), key=lambda r: -r.share)
    return {
        "by_kind": {k: table.share(k) for k in ("integer", "float", "border", "move")},
        "islands": [{"name": r.name, "op": r.op, "share": r.share, "cure": r.cure} for r in floats],
    }
