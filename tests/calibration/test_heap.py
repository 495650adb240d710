# SPDX-License-Identifier: Apache-2.0
"""When freed memory is handed back, and that it is."""

from __future__ import annotations

import pytest
import torch

import qgraph
from qgraph.calibration import heap
from qgraph.calibration.heap import GROWTH, LOOK, Heap
from qgraph.calibration.sweep import collect


def test_memory_is_looked_at_now_and_then_and_handed_back_once_it_has_grown():
    size, released = [1000], []
    watched = Heap(lambda: size[0], lambda: released.append(size[0]))
    steps = [(0, 0), (GROWTH, 0), (GROWTH + 1, 1), (2 * GROWTH + 1, 1), (2 * GROWTH + 2, 2)]
    for grown, times in steps:  # what a release leaves is the floor of the next one
        before, size[0] = len(released), 1000 + grown
        watched.passed(LOOK - 1)
        assert len(released) == before
        watched.passed(1)
        assert len(released) == times


@pytest.mark.skipif(not heap.STATM.exists(), reason="the system does not say how large we are")
def test_what_is_resident_grows_with_what_is_touched():
    before = heap.resident()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    grown = heap.resident() - before
    del held
    assert 60 << 20 < grown < 200 << 20


def test_systems_that_say_nothing_release_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(heap, "STATM", tmp_path / "missing")
    assert heap.resident() == 0
    calls = []
    watched = Heap(release=lambda: calls.append(1))
    watched.passed(10 * LOOK)
    assert not calls
    heap.give_back()


def test_trimming_sets_the_floor_anew():
    size, released = [1000], []
    watched = Heap(lambda: size[0], lambda: released.append(size[0]))
    size[0] = 5000
    watched.trim()
    assert released == [5000]
    size[0] = 5000 + GROWTH
    watched.passed(LOOK)
    assert released == [5000]


def test_a_sweep_hands_back_once_after_its_first_batch(monkeypatch):
    told: list[object] = []
    monkeypatch.setattr(Heap, "trim", lambda _: told.append("trimmed"))
    module = qgraph.trace(torch.nn.Linear(2, 2).eval(), torch.ones(2, 2))
    data = [torch.ones(2, 2)] * 3
    collect(module, data, {}, progress=lambda _, done, __: told.append(done))
    assert told == ["trimmed", 1, 2, 3]
