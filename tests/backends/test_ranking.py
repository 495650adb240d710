# SPDX-License-Identifier: Apache-2.0
"""One gather gives the rank that a search over thresholds gives."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.backends.integer.ranking import half_steps
from qgraph.formats import LevelEncoding


@st.composite
def tables(draw: st.DrawFn) -> LevelEncoding:
    levels = torch.tensor(sorted(draw(st.sets(st.integers(-500, 500), min_size=2, max_size=30))))
    share = draw(st.sampled_from([0.5, 0.37, 0.75]))
    gaps = levels.diff().double()
    thresholds = (levels[:-1].double() + gaps * share).float()
    return LevelEncoding(
        name="any", scale=torch.tensor(1.0), levels=levels, thresholds=thresholds, storage_bits=8
    )


@given(tables(), st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_half_steps_give_the_rank_of_a_search(encoding, values):
    steps = half_steps(encoding)
    assert steps is not None
    u = torch.cat([torch.tensor(values), encoding.thresholds, encoding.levels.float()])
    index = (torch.ceil(u * 2).clamp(steps.low, steps.high) - steps.low).to(torch.int64)
    ranks = steps.ranks[index].to(torch.int64)
    if steps.cuts is not None:
        ranks = ranks + (u > steps.cuts[index])
    assert torch.equal(ranks, encoding.encode(u).to(torch.int64))


def test_thresholds_that_crowd_in_one_cell_are_left_to_a_search():
    encoding = LevelEncoding(
        name="crowded", scale=torch.tensor(1.0), levels=torch.tensor([0, 1, 2]),
        thresholds=torch.tensor([0.75, 1.0]), storage_bits=2,
    )  # fmt: skip
    assert half_steps(encoding) is None
