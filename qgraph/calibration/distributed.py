# SPDX-License-Identifier: Apache-2.0
"""Merging statistics over the ranks of a torch.distributed job."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from qgraph.calibration.fused import FusedStatistics
from qgraph.errors import CalibrationError


def all_reduce(
    statistics: Mapping[Hashable, FusedStatistics], group: dist.ProcessGroup | None = None
) -> None:
    """Merge, in place, what all ranks of a group have seen; a no-op without torch.distributed.

    Every rank merges all ranks' states in rank order, so all end with the same bits. The values
    of `statistics` must come in the same order on every rank; keys are not compared.

    Raises:
        CalibrationError: if the ranks asked for different statistics.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    mine = [fused.state() for fused in statistics.values()]
    host = [{name: value.cpu() for name, value in state.items()} for state in mine]
    gathered: list[list[dict[str, Tensor]] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, host, group=group)
    ranks = [states for states in gathered if states is not None]
    if any(len(states) != len(host) for states in ranks):
        msg = f"ranks observe different numbers of values: {[len(states) for states in ranks]}"
        raise CalibrationError(msg)
    for at, fused in enumerate(statistics.values()):
        _merge_states(fused, [states[at] for states in ranks])


def _merge_states(fused: FusedStatistics, states: list[dict[str, Tensor]]) -> None:
    devices = [value.device for each in fused.statistics for value in each.fields().values()] or [
        torch.device("cpu")
    ]
    total = FusedStatistics(fused.statistics)
    for rank, state in enumerate(states):
        part = FusedStatistics(fused.statistics)
        try:
            part.load_state(state)
        except KeyError as error:
            msg = f"rank {rank} observed other statistics: {error} is missing"
            raise CalibrationError(msg) from error
        if rank == 0:
            total = part
        else:
            total.merge(part)
    for each in total.statistics:
        each.place(devices[0])
    fused.statistics = total.statistics
