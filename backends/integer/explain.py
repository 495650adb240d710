# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs each op, how wide its accumulator gets, and what stayed in float and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.fx import Node

from qgraph.backends.products import shifted_weight
from qgraph.backends.semantics import Role, Semantics
from qgraph.graph.dialect import is_quantize
from qgraph.graph.ops import OpKind, kind
from qgraph.graph.provenance import module_path, source_line

if TYPE_CHECKING:
    from qgraph.backends.integer.values import KernelChoice
    from qgraph.backends.products import ProductForm

aten = torch.ops.aten
# AVX2 without VNNI sums two products with bytes in 16 bits: 128 * 255 < 2**15 <= 129 * 255.
PAIR_LIMIT = 128

_CURES = {
    OpKind.SOFTMAX: "mode='fixed_point' has an integer softmax",
    OpKind.NORM: "mode='fixed_point' has integer norms",
    OpKind.ELEMENTWISE: "quantize input and output: it becomes a table",
    OpKind.ADD: "quantize both operands and the result",
    OpKind.MUL: "quantize both operands and the result",
    OpKind.CAT: "quantize all parts with one encoding: it then moves codes",
    OpKind.POOL: "quantize input and result",
    OpKind.RESIZE: "quantize the input; nearest interpolation then moves codes",
    OpKind.EMBEDDING: "quantize the table",
}
_PRODUCTS = {OpKind.LINEAR, OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.MATMUL}


@dataclass(frozen=True, slots=True)
class ExplainRow:
    """One op of the quantized graph.

    Attributes:
        node, module_path, source: where it comes from.
        op: its kind.
        data, weight: formats of its operands, '' where they are floats.
        kernel: what runs it.
        accumulator_bits: signed bits that every partial sum fits, proven; None without one.
        saturates_pairs: whether 16-bit pair sums (AVX2 without VNNI) could saturate; 7-bit
            weights cure it.
        dtypes: what it computes in, recorded op by op (fixed-point mode only).
        island: whether it runs in float.
        reason: why this kernel, or why in float.
        cure: what would bring a float island into integers, '' if nothing is known.
    """

    node: str
    module_path: str
    source: str
    op: str
    data: str
    weight: str
    kernel: str
    accumulator_bits: int | None
    saturates_pairs: bool
    dtypes: str
    island: bool
    reason: str
    cure: str


class Explanation(list[ExplainRow]):
    """Rows in graph order; prints as a table, serialises to JSON."""

    @property
    def islands(self) -> list[ExplainRow]:
        """Ops that run in float."""
        return [row for row in self if row.island]

    def to_json(self) -> str:
        """All rows."""
        return json.dumps([dataclasses.asdict(row) for row in self], indent=1)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{'node':22} {'op':14} {'data':18} {'weight':18} {'acc':>4} kernel"
        for row in self:
            bits = "" if row.accumulator_bits is None else str(row.accumulator_bits)
            yield (
                f"{row.node[-22:]:22} {row.op[:14]:14} {row.data[:18]:18} {row.weight[:18]:18}"
                f" {bits:>4} {row.kernel}"
            )[:100]
        for row in self.islands:
            yield f"float: {row.node}: {row.reason}{f'; {row.cure}' if row.cure else ''}"[:100]


def explain(
    semantics: Semantics,
    choices: dict[Node, KernelChoice],
    *,
    islands: dict[Node, str] | None = None,
    dtypes: dict[str, str] | None = None,
) -> Explanation:
    """Rows of all ops that compute something.

    Args:
        semantics: the decisions for the graph.
        choices: kernels of its products.
        islands: fixed-point mode: what stayed in float, and why; None in onnxruntime mode.
        dtypes: of each source node, where they were recorded.
    """
    rows = Explanation()
    for node in semantics.module.graph.nodes:
        if node.op != "call_function" or node in semantics.fixed:
            continue
        row = _row(semantics, choices, node)
        if row is not None and islands is not None:
            row = _fixed(row, islands.get(node))
        if row is not None:
            rows.append(dataclasses.replace(row, dtypes=(dtypes or {}).get(node.name, "")))
    return rows


def _row(
    semantics: Semantics, choices: dict[Node, KernelChoice], node: Node
) -> ExplainRow | None:  # fmt: skip
    match semantics.roles[node]:
        case Role.PRODUCT:
            form, choice = semantics.products[node], choices[node]
            return _make(
                node, kernel=choice.kernel, reason=choice.reason, form=form,
                saturates=_saturates(form),
            )  # fmt: skip
        case Role.TABLE:
            return _make(node, kernel=f"table of {_entries(semantics, node)}", reason="exact table")
        case Role.CLAMP:
            return _make(node, kernel="folded", reason="becomes limits of the requantization")
        case Role.FLOAT | Role.RESAMPLE if _computes(node):
            return _make(node, kernel="float32", island=True, reason=_why(semantics, node))
        case _:
            return None


def _fixed(row: ExplainRow, reason: str | None) -> ExplainRow:
    if reason is not None:
        return dataclasses.replace(row, island=True, kernel="float32", reason=reason, cure="")
    if not row.island:
        return row
    return dataclasses.replace(row, island=False, kernel="fixed point", reason="24 bits", cure="")


def _computes(node: Node) -> bool:
    value = node.meta.get("val")
    moves = kind(node) is OpKind.MOVE
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not moves


def _why(semantics: Semantics, node: Node) -> str:
    if node in semantics.reasons:
        return semantics.reasons[node]
    floats = [n.name for n in node.all_input_nodes if n not in semantics.levels and _computes(n)]
    if floats:
        return f"reads floats: {', '.join(floats[:2])}"
    readers = [u.name for u in node.users if not is_quantize(u) and u.op != "output"]
    if readers and kind(node) is OpKind.ELEMENTWISE:
        return f"read in float by {', '.join(readers[:2])}"
    return "onnxruntime runs it in float"


def _make(
    node: Node, *, kernel: str, reason: str, form: ProductForm | None = None,
    island: bool = False, saturates: bool = False,
) -> ExplainRow:  # fmt: skip
    what = kind(node)
    name = what.value if what is not OpKind.OTHER else str(node.target).removeprefix("aten.")
    cure = ""
    if island:
        quantize = "bring it into the plan's scope, or out of `ignore`"
        cure = quantize if what in _PRODUCTS else _CURES.get(what, "")
    return ExplainRow(
        node=node.name, module_path=module_path(node), source=source_line(node), op=name,
        data="" if form is None else form.data.encoding.describe(),
        weight="" if form is None else form.weight.encoding.describe(),
        kernel=kernel, accumulator_bits=None if form is None else form.bound.bit_length() + 1,
        dtypes="", saturates_pairs=saturates, island=island, reason=reason, cure=cure,
    )  # fmt: skip


def _entries(semantics: Semantics, node: Node) -> int:
    low, high = semantics.levels[node].codes()
    return high - low + 1


def _saturates(form: ProductForm) -> bool:
    """Whether two neighbouring products could leave 16 bits (weights [N, K], uint8 data)."""
    weight = form.weight_levels
    if weight is None:
        return False
    if form.shift is not None:
        weight = shifted_weight(form.node, weight, form.shift)
    weight = weight.to(torch.int64)
    if kind(form.node) is not OpKind.LINEAR:
        return 2 * int(weight.abs().max()) > PAIR_LIMIT
    pairs = F.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
    sums = torch.maximum(pairs.clamp_min(0).sum(2), -pairs.clamp_max(0).sum(2))
    return int(sums.max()) > PAIR_LIMIT
