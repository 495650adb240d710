# SPDX-License-Identifier: Apache-2.0
"""Statistics on a CUDA device: the CPU's integers and extrema, and no host round trip."""

from __future__ import annotations

import pytest
import torch

from qgraph.calibration import (
    ChannelHistogram,
    ChannelRange,
    Gram,
    Histogram,
    JointReservoir,
    Moments,
    Range,
    Reservoir,
    Statistic,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def every() -> list[Statistic]:
    return [
        Range(), ChannelRange(), Moments(), Gram(exact=1), Histogram(), ChannelHistogram(),
        Reservoir(rows=7), JointReservoir((2,), rows=7),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(every())))
def test_a_device_gives_the_same_summary_without_waiting_for_the_host(number):
    host, device = every()[number], every()[number]
    batches = [torch.randn(5, 12, 24, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    mask = torch.rand(5, 12) < 0.7
    moved, there = [batch.cuda() for batch in batches], mask.cuda()
    masked = not isinstance(host, JointReservoir | Moments | Gram)
    device.update(moved[0], mask=there if masked else None)  # positions are uploaded once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in moved[1:]:
            device.update(batch, mask=there if masked else None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch in batches:
        host.update(batch, mask=mask if masked else None)
    for name, value in device.state().items():
        expected = host.state()[name]
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-12 * (name in {"total", "squares",
            "matrix"}), atol=1e-9 * (name in {"total", "squares", "matrix"}))  # fmt: skip


def test_statistics_of_two_devices_merge():
    host, device = Range(), Range()
    host.update(torch.tensor([[1.0, 2.0]]))
    device.update(torch.tensor([[-3.0, 5.0]], device="cuda"))
    host.merge(device)
    assert host.bounds() == (-3.0, 5.0)
