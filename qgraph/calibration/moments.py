# SPDX-License-Identifier: Apache-2.0
"""Per-channel moments and the Gram matrix of a layer's inputs, accumulated in fp64."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from qgraph.calibration.statistics import Observation, Statistic, channel_axis

CHUNK_ROWS = 512


def _matrix(seen: Observation, axis: int) -> Tensor:
    """All rows that count, as [N, C]."""
    front = channel_axis(axis, seen.x.ndim)
    if front == seen.x.ndim - 1:
        return seen.rows()
    return seen.x.movedim(front, -1).reshape(-1, seen.x.shape[front])


class _Sums(Statistic):
    """Statistics whose fields add up."""

    OPTIONS: ClassVar[tuple[str, ...]] = ("axis",)

    def _accumulate(self, new: dict[str, Tensor]) -> None:
        old = self.fields()
        self._load({k: old[k] + v if k in old else v for k, v in new.items()})

    def _combine(self, other: Self) -> None:
        self._accumulate(other.fields())


class Moments(_Sums):
    """Per-channel sum and sum of squares.

    Attributes:
        count: int64 [], values per channel; total, squares: fp64 [C]. None before an update.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("count", "total", "squares")
    count: Tensor | None
    total: Tensor | None
    squares: Tensor | None

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.count = self.total = self.squares = None

    def observe(self, seen: Observation) -> None:  # noqa: D102
        rows = _matrix(seen, self.axis)
        total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        squares = total.clone()
        for chunk in rows.split(CHUNK_ROWS):
            wide = chunk.double()
            total += wide.sum(0)
            squares += wide.square_().sum(0)
        count = torch.tensor(rows.shape[0], device=rows.device)
        self._accumulate({"count": count, "total": total, "squares": squares})

    @property
    def mean(self) -> Tensor:
        """fp64 [C]; zeros when nothing was seen."""
        if self.total is None or self.count is None:
            return torch.zeros(0, dtype=torch.float64)
        return self.total / self.count.clamp(min=1)

    @property
    def second_moment(self) -> Tensor:
        """E[x^2], fp64 [C]."""
        if self.squares is None or self.count is None:
            return torch.zeros(0, dtype=torch.float64)
        return self.squares / self.count.clamp(min=1)

    @property
    def std(self) -> Tensor:
        """Population standard deviation, fp64 [C]."""
        return (self.second_moment - self.mean.square()).clamp(min=0.0).sqrt()


class Gram(_Sums):
    """X^T X of the vectors along `axis`. Costs more than the layer it serves: on request only.

    Args:
        axis: channel axis.
        exact: 1: products in fp64; 0: fp32 products of blocks of rows, summed in fp64.

    Attributes:
        count: int64 [], rows; matrix: fp64 [C, C].
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("axis", "exact")
    FIELDS: ClassVar[tuple[str, ...]] = ("count", "matrix")
    count: Tensor | None
    matrix: Tensor | None

    def __init__(self, axis: int = -1, exact: int = 0) -> None:
        self.axis = axis
        self.exact = int(exact)
        self.count = self.matrix = None

    def observe(self, seen: Observation) -> None:  # noqa: D102
        rows = _matrix(seen, self.axis)
        size = rows.shape[1]
        matrix = torch.zeros(size, size, dtype=torch.float64, device=rows.device)
        for chunk in rows.split(CHUNK_ROWS):
            block = chunk.double() if self.exact else chunk
            matrix += block.T @ block
        count = torch.tensor(rows.shape[0], device=rows.device)
        self._accumulate({"count": count, "matrix": matrix})
