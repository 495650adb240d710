# SPDX-License-Identifier: Apache-2.0
"""Work that waits gives what work at once gives, whatever happens to the values meanwhile."""

import pytest
import torch

from qgraph.calibration import Reservoir
from qgraph.calibration import later as later_module
from qgraph.calibration.fused import FusedStatistics
from qgraph.calibration.later import Later


@pytest.mark.parametrize("shape", [(4, 9, 6), (4, 6), (4, 3, 5, 6)])
@pytest.mark.parametrize("room", [1 << 21, 300, 5])
def test_rows_that_wait_are_those_that_were_seen(shape, room, monkeypatch):
    monkeypatch.setattr(later_module, "ROOM", room)
    later = Later()
    waiting, at_once = (FusedStatistics([Reservoir(-1, 20, 4)]) for _ in range(2))
    for seed in range(5):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        at_once.update(x)
        waiting.update(x, later=later)
        x.zero_()  # the model's memory is used again
    later.run()
    got, want = waiting.get(Reservoir).sampled(), at_once.get(Reservoir).sampled()
    assert torch.equal(got, want)
    assert got.abs().min() > 0


def test_nothing_counts_before_it_is_run_and_nothing_counts_twice():
    later, held = Later(), FusedStatistics([Reservoir(-1, 20, 4)])
    held.update(torch.randn(2, 3, 4), later=later)
    assert not held.get(Reservoir).sampled().numel()
    later.run()
    first = held.get(Reservoir).sampled().clone()
    later.run()
    assert torch.equal(held.get(Reservoir).sampled(), first)
    assert first.shape == (6, 4)
