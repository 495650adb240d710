# SPDX-License-Identifier: Apache-2.0
"""Calibration keeps summaries, not activations: bytes of live tensors are counted."""

from __future__ import annotations

import gc

import torch
from torch.fx import GraphModule

from qgraph.calibration.fused import FusedStatistics, build_statistics
from qgraph.calibration.sweep import Key, collect
from qgraph.graph.requests import Request
from qgraph.testing.chains import WIDTH, chain
from tests.calibration.live_bytes import LiveBytes

SAMPLES = 256


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SAMPLES, 4, WIDTH, generator=generator) for _ in range(count)]


def wanted(module: GraphModule) -> dict[Key, FusedStatistics]:
    values = [n for n in module.graph.nodes if n.op == "call_function"]
    kinds = ("Range", "Histogram", "Reservoir")
    return build_statistics(Request(node, kind) for node in values for kind in kinds)


def swept(
    module: GraphModule, statistics: dict[Key, FusedStatistics], count: int
) -> tuple[int, int]:
    """Most bytes alive during a sweep, and bytes alive at its end."""
    data = batches(count)
    gc.collect()
    with LiveBytes() as live:
        collect(module, data, statistics)
        return live.peak, live.now


def test_the_counter_sees_what_is_kept_and_what_is_freed() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(100)
        for _ in range(5):
            torch.zeros(1000)
        view = kept.view(10, 10)
    assert live.now == kept.nbytes == view.nbytes
    assert live.peak == 400 + 4000


def test_memory_does_not_grow_with_the_loader() -> None:
    module = chain(2)
    few, many = (swept(module, wanted(module), count) for count in (2, 12))
    assert few[1] > 0
    assert many[0] <= 1.02 * few[0]
    assert many[1] <= 1.02 * few[1]


def test_activations_are_freed_as_the_sweep_goes_on() -> None:
    (shallow, _), (deep, _) = (swept(chain(blocks), {}, 2) for blocks in (2, 8))
    activation = SAMPLES * 4 * WIDTH * 4
    assert shallow >= 2 * activation  # the counter does see activations
    assert deep <= shallow + 4096


def test_statistics_of_one_value_have_a_bounded_size() -> None:
    module = chain(1)
    sizes = []
    for count in (2, 12):
        statistics = wanted(module)
        collect(module, batches(count), statistics)
        states = [fused.state() for fused in statistics.values()]
        sizes.append(sum(t.nbytes for state in states for t in state.values()))
    assert sizes[0] == sizes[1] <= 64 * 1024 * len(states)
