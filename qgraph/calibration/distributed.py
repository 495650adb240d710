# SPDX-License-Identifier: Apache-2.0
"""Merging statistics over the ranks of a torch.distributed job.

A binary tree: rank 1 sends what it has seen to rank 0, 3 to 2, then 2 to 0, and so on; rank 0
sends the sum back to all. The tree is fixed, so float sums have one order, and all ranks end with
the same bits; integers and extrema equal those of one process exactly. A piece holds so many
values, so no rank holds more than two states of one piece beside its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qgraph.calibration.fused import FusedStatistics
from qgraph.calibration.ranks import Ranks
from qgraph.errors import CalibrationError

PIECE = 128  # values whose statistics travel in one message
WHAT = "merging statistics"


def all_reduce(
    statistics: Mapping[Any, FusedStatistics], group: dist.ProcessGroup | None = None
) -> None:
    """Merge, in place, what all ranks of a group have seen; a no-op without torch.distributed.

    The values of `statistics` must come in the same order on every rank; keys are not compared.

    Raises:
        CalibrationError: if the ranks asked for different statistics.
        RankError: a rank is gone.
    """
    ranks = Ranks.here(group)
    if ranks.size == 1:
        return
    values = list(statistics.values())
    _check_equal(ranks, values)
    for start in range(0, len(values), PIECE):
        piece = values[start : start + PIECE]
        _merge_piece(ranks, piece)


def _check_equal(ranks: Ranks, values: Sequence[FusedStatistics]) -> None:
    told = ranks.gather("\n".join(str(fused.statistics) for fused in values), WHAT)
    kinds = [text.splitlines() for text in told]
    if any(len(each) != len(kinds[0]) for each in kinds):
        msg = f"ranks observe different numbers of values: {[len(each) for each in kinds]}"
        raise CalibrationError(msg)
    for rank, each in enumerate(kinds):
        for mine, theirs in zip(kinds[0], each, strict=True):
            if mine != theirs:
                msg = f"rank {rank} observed other statistics: {theirs}, rank 0 {mine}"
                raise CalibrationError(msg)


def _merge_piece(ranks: Ranks, piece: Sequence[FusedStatistics]) -> None:
    step = 1
    while step < ranks.size:
        if ranks.rank % (2 * step):
            ranks.send([fused.state() for fused in piece], ranks.rank - step, WHAT)
            break
        if ranks.rank + step < ranks.size:
            states = ranks.receive(ranks.rank + step, WHAT)
            for fused, state in zip(piece, states, strict=True):
                part = FusedStatistics(fused.statistics)
                part.load_state(state)
                fused.merge(part)
        step *= 2
    total = ranks.broadcast([fused.state() for fused in piece], WHAT)
    if ranks.rank:
        for fused, state in zip(piece, total, strict=True):
            _replace(fused, state)


def _replace(fused: FusedStatistics, state: dict[str, Tensor]) -> None:
    held = (value.device for each in fused.statistics for value in each.fields().values())
    device = next(held, torch.device("cpu"))
    fused.load_state(state)
    for each in fused.statistics:
        each.place(device)
