# SPDX-License-Identifier: Apache-2.0
"""Clips and encodings behind made-up sensitivities: what is stored follows who reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qgraph.calibration.row_errors import data_encoding
from qgraph.formats import AffineEncoding
from qgraph.graph.bit_units import CARRIERS, carriers
from qgraph.passes import AssignBits
from tests.passes.assigning import (
    CHOICES,
    Made,
    assigned,
    bits_of,
)


def forced(names: dict[str, int], choices: tuple[int, ...] = (4, 8)) -> Made:
    """Sensitivities by which these units take such activation bits under a tight size."""
    made = Made()
    for name, bits in names.items():
        made.given[name] = ({8: 0.0}, {b: 0.0 if b == bits else 1.0 + b for b in choices})
    return made


ACTIVATIONS: dict[str, Any] = {"weight_choices": (8,), "activation_choices": (4, 8)}


@pytest.fixture
def as_given(monkeypatch):
    """Sensitivities that fall and rise as a test says, not repaired."""
    from qgraph.calibration import sensitivities

    monkeypatch.setattr(sensitivities, "repair_monotone", lambda group: group)


@pytest.mark.usefixtures("as_given")
@pytest.mark.parametrize(("deep", "merge"), [(4, 8), (8, 4), (4, 4), (8, 8)])
def test_what_is_stored_is_as_wide_as_its_widest_reader(deep, merge):
    made = forced({"first": 4, "deep": deep, "deeper": 4, "merge": merge})
    made.clips = {"deep": {4: 0.5, 8: 0.5}, "merge": {4: 0.25, 8: 0.25}}
    units, context = assigned("unet", AssignBits(**ACTIVATIONS), made)
    found = bits_of(units)
    assert (found["deep"][1], found["merge"][1]) == (deep, merge)
    stores = carriers(context.plan, units.units)
    assert len(stores) >= 2
    encodings = {u.name: u.activations[0].encoding for u in units.units}
    for sites, readers in stores.values():
        names = {u.name for u in readers}
        widest = max(found[n][1] for n in names)
        assert {s.bits for s in sites} == {widest}
        behind = [encodings[n] for n in names if found[n][1] == widest]
        wanted = max(behind, key=lambda e: float(e.scale))  # type: ignore[union-attr]
        assert all(s.encoding is wanted for s in sites)
        assert {s.reason for s in sites} == {"as behind the concatenation or pool"}


@pytest.mark.usefixtures("as_given")
@pytest.mark.parametrize(("near", "far"), [(4, 4), (8, 8), (8, 4), (4, 8)])
def test_a_value_that_a_product_reads_too_keeps_that_products_encoding_at_equal_bits(near, far):
    made = forced({"near": near, "far": far})
    made.clips = {"near": {4: 0.5, 8: 0.5}, "far": {4: 0.75, 8: 0.75}}
    units, context = assigned("forked", AssignBits(**ACTIVATIONS), made)
    by_name = {u.name: u for u in units.units}
    own, behind = (by_name[n].activations[0] for n in ("near", "far"))
    assert (own.bits, behind.bits) == (near, far)
    (pool,) = [s for s in context.plan.activations() if s.value is own.value and s is not own]
    assert pool.kind in CARRIERS
    assert pool.bits == far
    assert pool.encoding is (own.encoding if near == far else behind.encoding)
    scales = [float(s.encoding.scale) for s in (own, behind)]  # type: ignore[union-attr]
    assert scales[0] != scales[1]


def test_the_best_clip_of_the_chosen_width_becomes_the_range_and_pinned_ones_stay_whole():
    made = Made()
    made.clips = {"first": {8: 0.7, 4: 0.1}, "deep": {4: 0.2}}
    units, context = assigned("unet", AssignBits(weight_choices=(8,), activation_choices=(8,)),
                              made)  # fmt: skip
    for unit in units.units:
        share = 0.7 if unit.name == "first" else 1.0
        for site in unit.activations:
            low, high = context.statistics[site.value].range().bounds()
            wanted = data_encoding(low, high, 8, share)
            assert isinstance(site.encoding, AffineEncoding)
            assert torch.equal(site.encoding.scale, wanted.scale)
            assert torch.equal(site.encoding.zero_point, wanted.zero_point)
    shared = [u for u in units.units if len(u.activations) > 1]
    assert shared, "merge and short read one value"
    assert all(len({id(s.encoding) for s in u.activations}) == 1 for u in shared)
    item = AssignBits(choose_clips=False, **CHOICES)
    _, plain = assigned("unet", item, Made())
    assert all(s.encoding is None for s in plain.plan)


def test_the_report_marks_exactly_the_widths_that_the_plan_has():
    units, context = assigned("unet", AssignBits(budget={"size": 0.13}, **CHOICES), Made(5))
    found = bits_of(units)
    assert len(set(found.values())) > 1
    for name, width, omega, chosen in context.sensitivity:
        label, _, what = name.rpartition(" ")
        assert chosen is (width == found[label][0 if what == "weights" else 1])
        assert omega >= 0
    told = {d.site: d.reason for d in context.decisions}
    for unit in units.units:
        assert told[unit.name].endswith("by a pass)") is (unit.pinned is not None)
