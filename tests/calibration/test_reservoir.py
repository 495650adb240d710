# SPDX-License-Identifier: Apache-2.0
"""Reservoirs: real rows, seeded, not flooded by repeated rows, joint rows stay together."""

from __future__ import annotations

import pytest
import torch

from qgraph.calibration import JointReservoir, Reservoir
from qgraph.errors import CalibrationError, ConfigError


def test_sampled_rows_are_rows_of_the_data():
    x = torch.randn(10, 12, 5)
    reservoir = Reservoir(rows=20, per_sample=4)
    reservoir.update(x)
    rows = reservoir.sampled()
    assert rows.shape == (20, 5)
    same = (rows[:, None] == x.reshape(1, -1, 5)).all(-1)
    assert bool(same.any(1).all())


def test_fewer_rows_than_asked_are_all_kept():
    reservoir = Reservoir(axis=1, rows=100, per_sample=100)
    x = torch.randn(2, 3, 4, 2)
    reservoir.update(x)
    found = reservoir.sampled().sort(0).values
    assert torch.equal(found, x.movedim(1, -1).reshape(-1, 3).sort(0).values)
    assert Reservoir().sampled().numel() == 0


def test_another_seed_gives_another_sample():
    x = torch.randn(30, 4, 5)
    first, second = Reservoir(rows=8, seed=0), Reservoir(rows=8, seed=1)
    first.update(x)
    second.update(x)
    assert not torch.equal(first.sampled(), second.sampled())


def test_every_sample_has_the_same_chance():
    hits = torch.zeros(40)
    for seed in range(60):
        x = torch.arange(40.0)[:, None, None] + torch.rand(40, 2, 3) / 2
        reservoir = Reservoir(rows=10, per_sample=1, seed=seed)
        reservoir.update(x)
        hits[reservoir.sampled()[:, 0].long()] += 1
    assert float(hits.mean()) == 15.0
    assert float(hits.max()) < 32  # 5 standard deviations
    assert float(hits.min()) > 0


def test_a_row_that_all_samples_share_does_not_flood_the_sample():
    shared = []
    for seed in range(20):
        x = torch.randn(64, 8, 5, generator=torch.Generator().manual_seed(seed))
        x[:, 0] = 1.0
        reservoir = Reservoir(rows=32, per_sample=8, seed=seed)
        reservoir.update(x)
        shared.append(int((reservoir.sampled() == 1.0).all(1).sum()))
    assert 20 <= sum(shared) <= 150  # 80 expected of 640
    assert max(shared) <= 14  # 4 expected of 32; one priority for all would give 0 or 32


def test_joint_rows_belong_together_however_the_batches_came():
    a, v = torch.rand(6, 2, 5, 7), torch.randn(6, 2, 7, 3)
    o = a @ v
    once, parts, left = (JointReservoir((3, 2, 3), rows=9, per_sample=4) for _ in range(3))
    once.update_all([a, v, o])
    for at in (torch.tensor([5, 0]), torch.tensor([3]), torch.tensor([1, 2, 4])):
        parts.update_all([a[at], v[at], o[at]])
    left.update_all([a[:3], v[:3], o[:3]])
    right = JointReservoir((3, 2, 3), rows=9, per_sample=4)
    right.update_all([a[3:], v[3:], o[3:]])
    left.merge(right)
    rows, values, outputs = once.sampled()
    assert rows.shape == (9, 7)
    assert values.shape == (9, 7, 3)
    torch.testing.assert_close((rows[:, None] @ values)[:, 0], outputs)
    for other in (parts, left, JointReservoir.from_state(once.state())):
        for mine, theirs in zip(once.sampled(), other.sampled(), strict=True):
            assert torch.equal(mine, theirs)


def test_payloads_of_varying_length_are_padded_with_zeros():
    forward, backward = JointReservoir((1, 1), rows=8), JointReservoir((1, 1), rows=8)
    short, long = [torch.rand(2, 3), torch.ones(2, 1)], [torch.rand(2, 5), torch.ones(2, 1)]
    forward.update_all(short)
    forward.update_all(long)
    backward.update_all(long)
    backward.update_all(short)
    assert forward.sampled()[0].shape == (4, 5)
    assert int((forward.sampled()[0][:, 3:] == 0).all(1).sum()) == 2
    for mine, theirs in zip(forward.sampled(), backward.sampled(), strict=True):
        assert torch.equal(mine, theirs)


def test_values_without_common_indices_are_refused():
    with pytest.raises(CalibrationError, match="do not share leading dimensions"):
        JointReservoir((2, 2)).update_all([torch.rand(2, 3), torch.rand(2, 4)])
    with pytest.raises(CalibrationError, match="do not share leading dimensions"):
        JointReservoir((2, 2)).update(torch.rand(2, 3))


def test_rows_know_which_head_they_come_from():
    reservoir = JointReservoir((3, 2), rows=12, per_sample=6, index_axis=1)
    for _ in range(3):
        values = torch.randn(2, 3, 5, 4)
        heads = torch.arange(3.0)[None, :, None].expand(2, 3, 7)
        values[..., 0] = torch.arange(3.0)[None, :, None]
        reservoir.update_all([values, heads[..., None]])
    rows, constants, places = reservoir.sampled()
    assert places.shape == (12, 1)
    assert set(places.flatten().tolist()) == {0.0, 1.0, 2.0}
    assert torch.equal(rows[:, :1], places)
    assert torch.equal(constants[:, 0], places)
    with pytest.raises(ConfigError, match="index_axis=3"):
        JointReservoir((3, 2), index_axis=3)
