# SPDX-License-Identifier: Apache-2.0
"""What the private ops on the way into ONNX mean, as torch kernels: prepared graphs then run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qgraph.backends.onnx.ops import MARK
from qgraph.backends.onnx.prepare import Prepared, prepare

_LIBRARY = torch.library.Library("qgraph_onnx", "IMPL")


def _along(values: Tensor, axis: int | None, ndim: int) -> Tensor:
    shape = [1] * ndim
    if axis is not None and values.ndim:
        shape[axis] = -1
    return values.reshape(shape) if values.ndim else values


def _quantize(
    x: Tensor, scale: Tensor, zero: Tensor, low: Tensor | None, high: Tensor | None,
    axis: int | None,
) -> Tensor:  # fmt: skip
    units = torch.round(x / _along(scale, axis, x.ndim)) + _along(zero, axis, x.ndim).float()
    limits = torch.iinfo(zero.dtype)
    codes = units.clamp(limits.min, limits.max)
    codes = codes if low is None else codes.clamp_min(int(low))
    codes = codes if high is None else codes.clamp_max(int(high))
    return codes.to(zero.dtype)


def _dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, axis: int | None, block: int | None
) -> Tensor:
    if block is not None:
        assert axis is not None
        sizes = codes.shape[axis]
        scale = scale.repeat_interleave(block, axis).narrow(axis, 0, sizes)
        zero = None if zero is None else zero.repeat_interleave(block, axis).narrow(axis, 0, sizes)
        axis = None
    else:
        scale = _along(scale, axis, codes.ndim)
        zero = None if zero is None else _along(zero, axis, codes.ndim)
    if zero is not None:
        assert zero.dtype == codes.dtype
    levels = codes.to(torch.int32) - (0 if zero is None else zero.to(torch.int32))
    return levels.float() * scale


def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert x.ndim == 2
    return torch.nn.functional.linear(x, weight, bias)


def _rank(x: Tensor, scale: Tensor, table: Tensor, offsets: Tensor | None, steps: int) -> Tensor:
    units = (x / scale).unsqueeze(-1)
    length = 2**steps - 1
    starts = torch.zeros((), dtype=torch.int64) if offsets is None else offsets.long()
    rows = table[starts.unsqueeze(-1) + torch.arange(length)]
    return (units > rows).sum(-1).to(torch.int32)


def _rank_cells(
    x: Tensor, scale: Tensor, width: Tensor, zero: Tensor, below: Tensor, thresholds: Tensor
) -> Tensor:
    units, limits = x / scale, torch.iinfo(zero.dtype)
    cells = (torch.round(units / width) + float(zero)).clamp(limits.min, limits.max).long()
    rank = below[cells].long()
    return (rank + (units > thresholds[rank])).to(torch.int32)


def _lookup(ranks: Tensor, table: Tensor, offsets: Tensor | None) -> Tensor:
    assert ranks.dtype is torch.int32
    entries = ranks if offsets is None else ranks + offsets
    return table[entries.long()]


def _rank_runs(
    x: Tensor, scale: Tensor, ends: Sequence[float], steps: Sequence[float], counts: Sequence[int]
) -> Tensor:
    cuts: list[float] = []
    for end, step, count in zip(ends, steps, counts, strict=True):
        direction = 1 if end >= 0 else -1
        cuts += [end + direction * step * k for k in range(count)]
    return torch.bucketize(x / scale, torch.tensor(sorted(cuts))).to(torch.int32)


def _lookup_runs(
    ranks: Tensor, scale: Tensor, base: float, steps: Sequence[float], counts: Sequence[int]
) -> Tensor:
    levels = [base]
    for step, count in zip(steps, counts, strict=True):
        levels += [levels[-1] + step * (k + 1) for k in range(count)]
    return torch.tensor(levels)[ranks.long()] * scale


def _unpack(packed: Tensor, offset: int) -> Tensor:
    pairs = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return (pairs.to(torch.int32) + offset).to(torch.int8)


_KERNELS: dict[str, Any] = {
    "quantize": _quantize, "dequantize": _dequantize, "gemm": _gemm,
    "mark": lambda codes, name: codes.clone(), "rank": _rank, "rank_cells": _rank_cells,
    "lookup": _lookup, "rank_runs": _rank_runs, "lookup_runs": _lookup_runs,
    "unpack_nibbles": _unpack,
}  # fmt: skip
for _name, _kernel in _KERNELS.items():
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")


def flat(module: GraphModule, *inputs: Any, container: str = "int8") -> tuple[Prepared, list[Any]]:
    """The prepared graph, and what it gives."""
    prepared = prepare(module, container=container)
    prepared.module.recompile()
    with torch.no_grad():
        return prepared, list(prepared.module(*inputs))


def same(module: GraphModule, *inputs: Any, container: str = "int8") -> Prepared:
    """Check that the prepared graph means what the graph means, bit for bit, shapes too."""
    prepared, found = flat(module, *inputs, container=container)
    with torch.no_grad():
        wanted = module(*inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
    _check_metadata(prepared.module, inputs)
    return prepared


def _check_metadata(module: GraphModule, inputs: Sequence[Any]) -> None:
    """Whether each node's recorded value has the dtype and shape that running it gives."""

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value, recorded = super().run_node(n), n.meta.get("val")
            if n.op == "call_function" and isinstance(value, Tensor):
                assert isinstance(recorded, Tensor)
                assert value.dtype == recorded.dtype or n.target is MARK, n
                assert value.shape == recorded.shape, n
            return value

    with torch.no_grad():
        Watch(module).run(*inputs)
