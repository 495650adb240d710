# SPDX-License-Identifier: Apache-2.0
"""Formats given by a table, in standard ops that take the simulator's decisions bit for bit.

* tables of a few equally spaced runs, such as dual regions: a clamped count per run
* any table for the whole tensor: the cell of a uniform grid (QuantizeLinear), thresholds below
  that cell (GatherElements), and one comparison with the next threshold
* any sorted table, one per channel too: a binary search over the thresholds (GatherElements,
  Greater, Where, Add per bit)

and GatherElements to decode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.backends.onnx import ops
from qgraph.formats import LevelEncoding
from qgraph.formats.base import along
from qgraph.formats.levels import rank_dtype
from qgraph.graph import dialect
from qgraph.graph.build import insert_buffer, insert_call

MAX_RUNS = 4
# Halves below this are exact in fp32.
_EXACT = 2.0**22


@dataclass(frozen=True, slots=True)
class Runs:
    """A sorted table as runs of equal steps.

    Attributes:
        ends: of each run the entry nearest zero (the first, or the last of a negative run).
        steps: powers of two.
        counts: entries per run.
    """

    ends: tuple[float, ...]
    steps: tuple[float, ...]
    counts: tuple[int, ...]


def threshold_runs(thresholds: Tensor) -> Runs | None:
    """The runs of a table of thresholds, or None if there are many or they are not exact."""
    values = [float(v) for v in thresholds]
    if any(abs(v) > _EXACT or v * 2 != round(v * 2) for v in values):
        return None
    runs: list[list[float]] = []
    for value in values:
        run = runs[-1] if runs else []
        same_sign = bool(run) and (run[0] < 0) == (value < 0)
        if same_sign and (len(run) == 1 or value - run[-1] == run[1] - run[0]):
            run.append(value)
        else:
            runs.append([value])
    steps = [r[1] - r[0] if len(r) > 1 else 1.0 for r in runs]
    if len(runs) > MAX_RUNS or any(math.frexp(s)[0] != 0.5 for s in steps):
        return None
    ends = tuple(r[-1] if r[0] < 0 else r[0] for r in runs)
    return Runs(ends, tuple(steps), tuple(len(r) for r in runs))


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """A uniform grid of cells ``round(u / width) + zero`` with at most one threshold in each.

    Attributes:
        width: a power of two, so that the division is exact.
        zero: the number of the cell around 0; its dtype is that of cell numbers.
        below: thresholds under each cell; cells at the ends stand for all beyond them.
    """

    width: float
    zero: Tensor
    below: Tensor


def threshold_cells(thresholds: Tensor) -> Cells | None:
    """The widest grid for a table of thresholds, or None if it would need over 2^16 cells."""
    cuts = thresholds.double()
    gap = float(cuts.diff().min()) if cuts.numel() > 1 else 1.0
    width = 2.0 ** math.floor(math.log2(gap)) if gap > 0 else 0.0
    if not 2.0**-40 < width < 2.0**40:
        return None
    first, last = float(cuts[0]) / width, float(cuts[-1]) / width
    for dtype in (torch.uint8, torch.uint16):
        count = torch.iinfo(dtype).max + 1
        zero = 0 if first > 1 else count // 2
        if first + zero > 1 and last + zero < count - 2:
            starts = (torch.arange(count, dtype=torch.float64) - zero - 0.5) * width
            below = torch.searchsorted(cuts, starts).to(rank_dtype(cuts.numel() + 1))
            return Cells(width, torch.tensor(zero, dtype=dtype), below)
    return None


def level_runs(levels: Tensor) -> Runs | None:
    """The runs of a table of levels by the steps between them, or None if there are many.

    Levels are added up from the lowest one, so fp32 must hold the whole span.
    """
    first, last = int(levels[0]), int(levels[-1])
    if max(-first, last, last - first) >= 2**24:
        return None
    steps, counts = torch.unique_consecutive(levels.diff(), return_counts=True)
    if len(steps) > MAX_RUNS:
        return None
    given = tuple(float(s) for s in steps), tuple(int(c) for c in counts)
    return Runs((float(first),), *given)


def lower_level_nodes(module: GraphModule) -> None:
    """Replace quantize_levels and dequantize_levels by rank search and table lookup."""
    for node in list(module.graph.nodes):
        if node.target is dialect.QUANTIZE_LEVELS:
            _lower_rank(module, node)
        elif node.target is dialect.DEQUANTIZE_LEVELS:
            _lower_lookup(module, node)


def _encoding(module: GraphModule, node: Node) -> LevelEncoding:
    encoding = dialect.encoding_of(module, node)
    assert isinstance(encoding, LevelEncoding)
    return encoding


def _lower_rank(module: GraphModule, node: Node) -> None:
    encoding = _encoding(module, node)
    ndim = node.meta["val"].ndim
    runs = threshold_runs(encoding.thresholds) if encoding.thresholds.ndim == 1 else None
    if runs is not None:
        scale = insert_buffer(
            module, f"{node.name}_scale", along(encoding.scale, encoding.axis, ndim), before=node
        )
        ranks = insert_call(
            module, ops.RANK_RUNS, node.args[0], scale, list(runs.ends), list(runs.steps),
            list(runs.counts), like=node, before=node,
        )  # fmt: skip
        node.replace_all_uses_with(ranks)
        module.graph.erase_node(node)
        return
    scale = insert_buffer(
        module, f"{node.name}_scale", along(encoding.scale, encoding.axis, ndim), before=node
    )
    cells = threshold_cells(encoding.thresholds) if encoding.thresholds.ndim == 1 else None
    if cells is not None:
        tables = {
            "width": torch.tensor(cells.width), "zero": cells.zero, "below": cells.below,
            "next": torch.cat([encoding.thresholds, torch.tensor([float("inf")])]),
        }  # fmt: skip
        given = [
            insert_buffer(module, f"{node.name}_{name}", table, before=node)
            for name, table in tables.items()
        ]
        ranks = insert_call(
            module, ops.RANK_CELLS, node.args[0], scale, *given, like=node, before=node
        )
        node.replace_all_uses_with(ranks)
        module.graph.erase_node(node)
        return
    thresholds, steps = padded(encoding.thresholds)
    offsets = _offsets(module, node, thresholds, encoding, ndim)
    table = insert_buffer(module, f"{node.name}_thresholds", thresholds.flatten(), before=node)
    ranks = insert_call(
        module, ops.RANK, node.args[0], scale, table, offsets, steps, like=node, before=node
    )
    node.replace_all_uses_with(ranks)
    module.graph.erase_node(node)


def _lower_lookup(module: GraphModule, node: Node) -> None:
    encoding = _encoding(module, node)
    ndim = node.meta["val"].ndim
    runs = level_runs(encoding.levels) if encoding.levels.ndim == 1 else None
    if runs is not None:
        scale = insert_buffer(
            module, f"{node.name}_scale", along(encoding.scale, encoding.axis, ndim), before=node
        )
        new = insert_call(
            module, ops.LOOKUP_RUNS, node.args[0], scale, runs.ends[0], list(runs.steps),
            list(runs.counts), like=node, before=node,
        )  # fmt: skip
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        return
    values = encoding.levels.to(torch.float32)
    if encoding.scale.ndim and values.ndim == 1:
        values = values.unsqueeze(0).expand(encoding.scale.shape[0], -1)
    values = values * (encoding.scale.unsqueeze(-1) if encoding.scale.ndim else encoding.scale)
    offsets = _offsets(module, node, values, encoding, ndim)
    table = insert_buffer(module, f"{node.name}_values", values.flatten(), before=node)
    ranks = insert_call(
        module, torch.ops.aten._to_copy.default, node.args[0], like=node, before=node,
        dtype=torch.int32,
    )  # fmt: skip
    new = insert_call(module, ops.LOOKUP, ranks, table, offsets, like=node, before=node)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def padded(thresholds: Tensor) -> tuple[Tensor, int]:
    """Thresholds padded with +inf to ``2**steps - 1`` per row, and `steps`."""
    count = thresholds.shape[-1]
    steps = count.bit_length()
    missing = (1 << steps) - 1 - count
    return torch.nn.functional.pad(thresholds, (0, missing), value=float("inf")), steps


def _offsets(
    module: GraphModule, node: Node, table: Tensor, encoding: LevelEncoding, ndim: int
) -> Node | None:
    """Where the row of each channel starts in the flattened table."""
    if table.ndim == 1:
        return None
    rows = torch.arange(table.shape[0], dtype=torch.int32) * table.shape[1]
    starts = along(rows, encoding.axis, ndim)
    return insert_buffer(module, f"{node.name}_rows", starts, before=node)
