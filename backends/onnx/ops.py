# SPDX-License-Identifier: Apache-2.0
"""Private torch ops that a graph is lowered to on its way into ONNX, and their translation.

They exist only while a graph is exported: each maps onto one or a few standard ONNX nodes, and
none has a kernel. `mark` names the tensor that holds the codes of a quantize node, so that a
runtime's codes can be compared with the simulator's, node by node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnxscript
import torch
from onnxscript import opset21 as op
from torch import Tensor

MARK_DOMAIN = "qgraph"

_LIBRARY = torch.library.Library("qgraph_onnx", "DEF")
_LIBRARY.define(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, Tensor? low, Tensor? high, int? axis)"
    " -> Tensor"
)
_LIBRARY.define(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, int? axis, int? block) -> Tensor"
)
_LIBRARY.define("gemm(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define("mark(Tensor codes, str name) -> Tensor")
_LIBRARY.define(
    "rank(Tensor x, Tensor scale, Tensor thresholds, Tensor? offsets, int steps) -> Tensor"
)
_LIBRARY.define(
    "rank_cells(Tensor x, Tensor scale, Tensor width, Tensor zero, Tensor below, Tensor thresholds)"
    " -> Tensor"
)
_LIBRARY.define("lookup(Tensor ranks, Tensor values, Tensor? offsets) -> Tensor")
_LIBRARY.define(
    "rank_runs(Tensor x, Tensor scale, float[] ends, float[] steps, int[] counts) -> Tensor"
)
_LIBRARY.define(
    "lookup_runs(Tensor ranks, Tensor scale, float base, float[] steps, int[] counts) -> Tensor"
)
_LIBRARY.define("unpack_nibbles(Tensor packed, int offset) -> Tensor")

QUANTIZE = torch.ops.qgraph_onnx.quantize.default
DEQUANTIZE = torch.ops.qgraph_onnx.dequantize.default
GEMM = torch.ops.qgraph_onnx.gemm.default
MARK = torch.ops.qgraph_onnx.mark.default
RANK = torch.ops.qgraph_onnx.rank.default
RANK_CELLS = torch.ops.qgraph_onnx.rank_cells.default
LOOKUP = torch.ops.qgraph_onnx.lookup.default
RANK_RUNS = torch.ops.qgraph_onnx.rank_runs.default
LOOKUP_RUNS = torch.ops.qgraph_onnx.lookup_runs.default
UNPACK_NIBBLES = torch.ops.qgraph_onnx.unpack_nibbles.default


def _quantize_meta(x: Tensor, scale: Tensor, zero_point: Tensor, *_: Any) -> Tensor:
    del scale
    return torch.empty_like(x, dtype=zero_point.dtype)


def _dequantize_meta(codes: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _gemm_meta(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return x.new_empty((x.shape[0], weight.shape[0]))


def _mark_meta(codes: Tensor, name: str) -> Tensor:
    del name
    return torch.empty_like(codes)


def _rank_meta(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, dtype=torch.int32)


def _lookup_meta(ranks: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(ranks, dtype=torch.float32)


def _unpack_meta(packed: Tensor, offset: int) -> Tensor:
    del offset
    return packed.new_empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=torch.int8)


for _name, _meta in (
    ("quantize", _quantize_meta),
    ("dequantize", _dequantize_meta),
    ("gemm", _gemm_meta),
    ("mark", _mark_meta),
    ("rank", _rank_meta),
    ("lookup", _lookup_meta),
    ("rank_runs", _rank_meta),
    ("rank_cells", _rank_meta),
    ("lookup_runs", _lookup_meta),
    ("unpack_nibbles", _unpack_meta),
):
    torch.library.register_fake(f"qgraph_onnx::{_name}", _meta)


def _mark_op() -> onnxscript.values.Op:
    formal, schema = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema
    return onnxscript.values.Op(
        onnxscript.values.Opset(MARK_DOMAIN, 1),
        "Mark",
        schema(
            "Mark",
            MARK_DOMAIN,
            1,
            inputs=[formal("codes", "T")],
            outputs=[formal("marked", "T")],
            type_constraints=[("T", ["tensor(uint8)", "tensor(int8)", "tensor(int32)"], "")],
            attributes=[schema.Attribute("name", schema.AttrType.STRING, required=True)],
        ),
    )  # fmt: skip


def _quantize(
    x: Any, scale: Any, zero_point: Any, low: Any = None, high: Any = None, axis: int | None = None
) -> Any:
    given = {} if axis is None else {"axis": axis}
    codes = op.QuantizeLinear(x, scale, zero_point, **given)
    return codes if low is None and high is None else op.Clip(codes, low, high)


def _dequantize(
    codes: Any, scale: Any, zero_point: Any = None, axis: int | None = None,
    block: int | None = None,
) -> Any:  # fmt: skip
    given = {} if axis is None else {"axis": axis}
    if block is not None:
        given["block_size"] = block
    return op.DequantizeLinear(codes, scale, zero_point, **given)


def _gemm(x: Any, weight: Any, bias: Any = None) -> Any:
    return op.Gemm(x, weight, bias, transB=1)


def _mark(codes: Any, name: str) -> Any:
    return _mark_op()(codes, name=name)


def _rank(x: Any, scale: Any, thresholds: Any, offsets: Any = None, steps: int = 0) -> Any:
    """Binary search for the number of thresholds strictly below ``x / scale``.

    `thresholds` is padded with +inf to ``2**steps - 1`` entries per row; a row per channel
    starts at `offsets`. The comparisons are the simulator's, so the decisions are too.
    """
    units = _flat(op.Div(x, scale))
    starts = None if offsets is None else _flat(op.Expand(offsets, op.Shape(x)))
    position = None
    for step in (1 << k for k in reversed(range(steps))):
        probe = op.Constant(value=_int32(step - 1))
        if position is not None:
            probe = op.Add(position, probe)
        if starts is not None:
            probe = op.Add(probe, starts)
        entry = op.Gather if position is None and starts is None else op.GatherElements
        above = op.Greater(units, entry(thresholds, probe))
        gain = op.Where(above, op.Constant(value=_int32(step)), op.Constant(value=_int32(0)))
        position = gain if position is None else op.Add(position, gain)
    return op.Reshape(position, op.Shape(x))


def _rank_cells(x: Any, scale: Any, width: Any, zero: Any, below: Any, thresholds: Any) -> Any:
    """Ranks by a table over cells of equal width that hold at most one threshold each.

    QuantizeLinear is the number of the cell (saturated at both ends), `below` the number of
    thresholds under the cell, and one comparison with the next threshold decides. GatherElements
    on flat indices takes a sixth of the time of Gather.
    """
    units = op.Div(x, scale)
    cells = op.QuantizeLinear(units, width, zero)
    index = _flat(op.Cast(cells, to=onnx.TensorProto.INT32))
    rank = op.Cast(op.GatherElements(below, index), to=onnx.TensorProto.INT32)
    above = op.Greater(_flat(units), op.GatherElements(thresholds, rank))
    total = op.Add(rank, op.Cast(above, to=onnx.TensorProto.INT32))
    return op.Reshape(total, op.Shape(x))


def _flat(x: Any) -> Any:
    return op.Reshape(x, op.Constant(value_ints=[-1]))


def _lookup(ranks: Any, values: Any, offsets: Any = None) -> Any:
    """Entries of a flat table; a row per channel starts at `offsets`."""
    entries = ranks if offsets is None else op.Add(ranks, offsets)
    return op.Reshape(op.GatherElements(values, _flat(entries)), op.Shape(entries))


def _rank_runs(
    x: Any, scale: Any, ends: Sequence[float], steps: Sequence[float], counts: Sequence[int]
) -> Any:
    """Thresholds strictly below ``x / scale``, counted run by run.

    A run's thresholds are equally spaced; `ends` holds the one nearest zero. Subtracting that one
    is exact in fp32 wherever it matters (same sign, larger magnitude), the steps are powers of
    two, so each count is the one that comparisons would give.
    """
    units, total = op.Div(x, scale), None
    for end, step, count in zip(ends, steps, counts, strict=True):
        if end >= 0:
            steps_up = op.Mul(op.Sub(units, _constant(end)), _constant(1 / step))
            inside = op.Clip(op.Ceil(steps_up), _constant(0.0), _constant(count))
        else:
            steps_down = op.Mul(op.Sub(_constant(end), units), _constant(1 / step))
            above = op.Add(op.Floor(steps_down), _constant(1.0))
            inside = op.Clip(above, _constant(0.0), _constant(count))
            inside = op.Sub(_constant(count), inside)
        total = inside if total is None else op.Add(total, inside)
    return op.Cast(total, to=onnx.TensorProto.INT32)


def _lookup_runs(
    ranks: Any, scale: Any, base: float, steps: Sequence[float], counts: Sequence[int]
) -> Any:
    """``scale * level[rank]`` for levels that rise in runs of equal steps from `base`."""
    position, level, start = op.Cast(ranks, to=onnx.TensorProto.FLOAT), None, 0
    for step, count in zip(steps, counts, strict=True):
        moved = position if start == 0 else op.Sub(position, _constant(start))
        inside = op.Clip(moved, _constant(0.0), _constant(count))
        rise = inside if step == 1 else op.Mul(inside, _constant(step))
        level = rise if level is None else op.Add(level, rise)
        start += count
    if base != 0:
        level = op.Add(level, _constant(base))
    return op.Mul(level, scale)


def _constant(value: float) -> Any:
    return op.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [], [value]))


def _unpack_nibbles(packed: Any, offset: int) -> Any:
    """Two 4-bit codes per byte, the low nibble first, to int8 codes ``nibble + offset``."""
    low = op.BitwiseAnd(packed, op.Constant(value=_uint8(15)))
    high = op.BitShift(packed, op.Constant(value=_uint8(4)), direction="RIGHT")
    last = op.Constant(value_ints=[-1])
    pairs = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
    head = op.Shape(packed, end=-1)
    flat = op.Reshape(pairs, op.Concat(head, op.Constant(value_ints=[-1]), axis=0))
    shifted = op.Cast(flat, to=onnx.TensorProto.INT8)
    return op.Add(shifted, op.Constant(value=_int8(offset)))


def _int32(value: int) -> onnx.TensorProto:
    return onnx.helper.make_tensor("", onnx.TensorProto.INT32, [], [value])


def _uint8(value: int) -> onnx.TensorProto:
    return onnx.helper.make_tensor("", onnx.TensorProto.UINT8, [], [value])


def _int8(value: int) -> onnx.TensorProto:
    return onnx.helper.make_tensor("", onnx.TensorProto.INT8, [], [value])


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translation table for `torch.onnx.export`."""
    return {
        QUANTIZE: _quantize,
        DEQUANTIZE: _dequantize,
        GEMM: _gemm,
        MARK: _mark,
        RANK: _rank,
        LOOKUP: _lookup,
        RANK_RUNS: _rank_runs,
        RANK_CELLS: _rank_cells,
        LOOKUP_RUNS: _lookup_runs,
        UNPACK_NIBBLES: _unpack_nibbles,
    }
