# SPDX-License-Identifier: Apache-2.0
"""How large an accumulator can get: proven from the weights, never measured.

The bound holds for every partial sum in every order, so a product whose bound is below 2^24
is exact in float32, below 2^53 in float64, below 2^31 in int32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

FLOAT32_EXACT = 2**24
INT32_LIMIT = 2**31
FLOAT64_EXACT = 2**53
# Stands for the length of a contraction whose size the export range leaves open.
OPEN_LENGTH = 2**20


def largest(size: Any) -> int:
    """Upper end of a size: itself, or the end of its export range."""
    if isinstance(size, int):
        return size
    node = size.node
    upper = node.shape_env.bound_sympy(node.expr).upper
    return (
        int(upper) if upper.is_number and upper.is_finite and upper < OPEN_LENGTH else OPEN_LENGTH
    )


def magnitude(levels: tuple[int, int]) -> int:
    """Largest absolute level."""
    return max(abs(levels[0]), abs(levels[1]))


def static_bound(weight: Tensor, axis: int, data: tuple[int, int], bias: Tensor | None) -> int:
    """Largest absolute partial sum of a product with constant weight levels.

    Args:
        weight: integer levels.
        axis: its output-channel axis; all others are summed over.
        data: range of the data levels.
        bias: int32 codes [C_out] that start the accumulator, or None.
    """
    sums = weight.to(torch.float64).abs().movedim(axis, 0).flatten(1).sum(1)
    total = sums * magnitude(data)
    if bias is not None:
        room = bias.to(torch.float64).abs().flatten()
        # Grouped transposed convolutions repeat their weight channels over the groups.
        total = total + (room if room.numel() == total.numel() else room.max())
    return int(total.max())


def total_range(weight: Tensor, axis: int, data: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Smallest and largest complete sum of each output channel (float64, exact).

    Tighter than a bound on partial sums: for kernels that add up in int32 and round only the
    result. Data levels must include 0, which padding contributes.
    """
    channels = weight.to(torch.float64).movedim(axis, 0).flatten(1)
    positive, negative = channels.clamp_min(0).sum(1), channels.clamp_max(0).sum(1)
    low, high = min(data[0], 0), max(data[1], 0)
    return positive * low + negative * high, positive * high + negative * low


def dynamic_bound(length: Any, first: tuple[int, int], second: tuple[int, int]) -> int:
    """Largest absolute partial sum of a product of two computed operands."""
    return largest(length) * magnitude(first) * magnitude(second)


def contraction_length(node: Node, data: int) -> Any:
    """Size of the contracted axis of a matrix product."""
    source = node.args[data]
    assert isinstance(source, Node)
    return source.meta["val"].shape[-1]
