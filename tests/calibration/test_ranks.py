# SPDX-License-Identifier: Apache-2.0
"""Compilations spread over processes equal those of one process, and fail together."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from qgraph.calibration import FusedStatistics, Histogram, Moments, Range, Reservoir, all_reduce
from qgraph.calibration.ranks import Ranks, Share
from qgraph.errors import CalibrationError, ConfigError, RankError
from tests.calibration.ranked import compiled, on_ranks, same_state, small_batches

State = dict[str, torch.Tensor]
KINDS = ("int8", "ris_int4")


def fresh() -> FusedStatistics:
    return FusedStatistics([Range(), Histogram(), Reservoir(rows=5), Moments()])


def merged(rank: int) -> State:
    seen = fresh()
    for batch in Share(small_batches(), rank, Ranks.here().size):
        seen.update(batch)
    all_reduce({"a": seen})
    return seen.state()


def quantized(_: int) -> list[State]:
    return [dict(compiled(pipeline).graph_module.state_dict()) for pipeline in KINDS]


def one_bad_batch(rank: int) -> None:
    batches = small_batches(4)
    batches[1][0, 0] = torch.nan  # the second batch is rank 1's
    compiled(batches=batches)


def spread(_: int) -> list[tuple[float, float, str]]:
    return Ranks.here().spread(5, lambda number: (number / 3, -math.inf, "inf"), "counting")


def dies(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    compiled()


def other_options(rank: int) -> None:
    compiled("int8" if rank else "int6")


def test_the_batches_of_all_ranks_are_the_loaders() -> None:
    loader = list(range(10))
    shares = [list(Share(loader, rank, 4)) for rank in range(4)]
    assert sorted(x for share in shares for x in share) == loader
    assert [len(Share(loader, rank, 4)) for rank in range(4)] == [len(each) for each in shares]
    assert list(Share(iter(loader), 1, 4)) == shares[1]
    assert Ranks(1, 4).quota(6) == len(Share(loader[:6], 1, 4))


def test_a_loader_that_is_a_share_already_is_refused() -> None:
    data = torch.zeros(4, 2)
    sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=2, rank=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give every rank the whole loader"):
        Share(DataLoader(data, sampler=sampler), 0, 2)  # type: ignore[arg-type]


def test_two_ranks_get_what_one_process_gets() -> None:
    assert on_ranks(2, spread) == [spread(0), spread(0)]
    alone = [dict(compiled(pipeline).graph_module.state_dict()) for pipeline in KINDS]
    first, second = on_ranks(2, quantized)
    for own, state, other in zip(alone, first, second, strict=True):
        assert same_state(own, state)
        assert same_state(other, state)


@pytest.mark.slow
def test_four_ranks_hold_the_statistics_of_one_process() -> None:
    whole = fresh()
    for batch in small_batches():
        whole.update(batch)
    found = on_ranks(4, merged)
    assert all(same_state(each, found[0]) for each in found)
    for name, value in whole.state().items():
        tolerance = 1e-12 if value.dtype == torch.float64 else 0.0
        torch.testing.assert_close(found[0][name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_an_error_on_one_rank_stops_all_and_is_told() -> None:
    first, second = on_ranks(2, one_bad_batch)
    assert isinstance(second, CalibrationError)
    assert isinstance(first, RankError)
    assert "rank 1: CalibrationError: batch 1: 1 non-finite values" in str(first)


@pytest.mark.slow
def test_a_rank_that_dies_is_a_typed_error_on_the_others() -> None:
    first, second = on_ranks(2, dies)
    assert second is None
    assert isinstance(first, RankError)
    assert "rank 0 of 2 lost another rank during" in str(first)
    assert "cache_dir" in str(first)


@pytest.mark.slow
def test_ranks_that_compile_different_things_are_told() -> None:
    first, second = on_ranks(2, other_options)
    for error in (first, second):
        assert isinstance(error, (RankError, CalibrationError))
