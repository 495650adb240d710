# SPDX-License-Identifier: Apache-2.0
"""Laws of formats given by tables of levels, for random tables."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import ConfigError
from qgraph.formats import LevelEncoding
from qgraph.formats.levels import (
    by_channel,
    levels_decode,
    levels_encode,
    midpoints,
    rank_dtype,
)

SCALES = st.floats(2.0**-8, 4.0, width=32)
TABLES = st.sets(st.integers(-(2**14), 2**14), min_size=2, max_size=40).map(sorted)
UNITS = st.floats(-20000.0, 20000.0, width=32)


@st.composite
def encodings(draw: st.DrawFn) -> LevelEncoding:
    levels = torch.tensor(draw(TABLES))
    scale = torch.tensor(draw(SCALES))
    return LevelEncoding.nearest("random", scale, levels, storage_bits=8)


def nearest_rank(x: float, encoding: LevelEncoding) -> int:
    """Nearest level of ``fl32(x / s)`` in rationals; a tie takes the lower."""
    units = Fraction(float(np.float32(x) / np.float32(float(encoding.scale))))
    levels = encoding.levels.tolist()
    return min(range(len(levels)), key=lambda i: (abs(units - levels[i]), i))


@given(encodings(), st.lists(UNITS, min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_ranks_are_the_nearest_levels_in_exact_rationals(encoding, units):
    x = torch.tensor(units) * encoding.scale
    assert encoding.encode(x).tolist() == [nearest_rank(float(v), encoding) for v in x]


@given(encodings())
@settings(max_examples=30, deadline=None)
def test_every_rank_survives_a_round_trip(encoding):
    ranks = torch.arange(encoding.levels.numel(), dtype=torch.int32)
    assert torch.equal(encoding.encode(encoding.decode(ranks)).to(torch.int32), ranks)
    assert torch.equal(encoding.level(ranks), encoding.table())


@given(encodings(), st.lists(UNITS, min_size=2, max_size=30))
@settings(max_examples=50, deadline=None)
def test_encoding_is_monotone_idempotent_and_in_range(encoding, units):
    x = (torch.tensor(units) * encoding.scale).sort().values
    ranks = encoding.encode(x).to(torch.int64)
    assert bool((ranks.diff() >= 0).all())
    assert 0 <= int(ranks.min()) <= int(ranks.max()) < encoding.levels.numel()
    assert torch.equal(encoding.fake(encoding.fake(x)), encoding.fake(x))
    infinite = encoding.encode(torch.tensor([-float("inf"), float("inf")]))
    assert infinite.tolist() == [0, encoding.levels.numel() - 1]


def test_a_value_on_a_threshold_takes_the_lower_rank():
    encoding = LevelEncoding.nearest(
        "dual", torch.tensor(0.5), torch.tensor([-1, 0, 4, 8]), storage_bits=2
    )
    assert encoding.encode(torch.tensor([-0.25, 1.0, 3.0, 3.001])).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_ranks_of_each_channel_are_decoded_by_its_own_scale_and_levels(axis):
    torch.manual_seed(0)
    ranks = torch.randint(0, 9, (3, 4, 5))
    size = ranks.shape[axis]
    levels = torch.randint(1, 5, (size, 9)).cumsum(1) - 12
    scale = 2.0 ** torch.arange(size)
    whole = LevelEncoding.nearest("random", scale, levels, storage_bits=4, axis=axis)
    decoded, levels_of_ranks = levels_decode(ranks, scale, levels, axis), whole.level(ranks)
    assert torch.equal(whole.decode(ranks), decoded)
    for i in range(size):
        wanted = levels[i][ranks.select(axis, i)]
        assert torch.equal(levels_of_ranks.select(axis, i), wanted.to(levels_of_ranks.dtype))
        assert torch.equal(decoded.select(axis, i), wanted.float() * scale[i])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_are_encoded_as_if_each_were_alone(axis):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5) * 10
    size = x.shape[axis]
    levels = torch.randint(1, 5, (size, 9)).cumsum(1) - 12
    scale = torch.rand(size) + 0.1
    whole = LevelEncoding.nearest("random", scale, levels, storage_bits=4, axis=axis)
    parts = [
        LevelEncoding.nearest("random", scale[i], levels[i], storage_bits=4).encode(
            x.select(axis, i)
        )
        for i in range(size)
    ]
    ranks = whole.encode(x)
    assert torch.equal(ranks, torch.stack(parts, axis))
    assert torch.equal(whole.encode(whole.decode(ranks)), ranks)


@pytest.mark.parametrize("count", [1, 3, 15, 16, 17])
def test_comparing_and_searching_give_the_same_ranks(count):
    generator = torch.Generator().manual_seed(count)
    thresholds = torch.randint(1, 9, (count,), generator=generator).cumsum(0) - 20.5
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), *thresholds.tolist()])
    x = torch.cat([odd, torch.randn(200, generator=generator) * 40])
    ranks = levels_encode(x, torch.tensor(1.0), thresholds)
    assert torch.equal(ranks.long(), torch.bucketize(x, thresholds))
    assert ranks.dtype is torch.uint8


def test_ranks_of_large_tables_need_sixteen_bits():
    assert rank_dtype(256) is torch.uint8
    assert rank_dtype(257) is torch.int16
    encoding = LevelEncoding.nearest("wide", torch.tensor(1.0), torch.arange(300), storage_bits=9)
    assert encoding.encode(torch.tensor([299.0, 256.6])).tolist() == [299, 257]


def test_midpoints_of_odd_gaps_are_exact():
    assert midpoints(torch.tensor([0, 1, 4, 32767])).tolist() == [0.5, 2.5, 16385.5]


@pytest.mark.parametrize(
    ("levels", "thresholds", "message"),
    [
        ([0, 2, 2], [1.0, 2.0], "strictly ascending"),
        ([1], [], "at least two"),
        ([0, 2, 4], [1.0, 4.0], "must lie between"),
        ([0, 2, 4], [1.0], "must lie between"),
    ],
)
def test_impossible_tables_are_refused(levels, thresholds, message):
    with pytest.raises(ConfigError, match=message):
        LevelEncoding(
            name="bad", scale=torch.tensor(1.0), levels=torch.tensor(levels),
            thresholds=torch.tensor(thresholds), storage_bits=2,
        )  # fmt: skip


def test_each_channel_decodes_with_its_own_scale():
    scale = torch.tensor([0.5, 2.0])
    levels = torch.tensor([-1, 0, 3])
    encoding = LevelEncoding.nearest("table", scale, levels, storage_bits=2, axis=1)
    ranks = torch.tensor([[0, 0], [2, 2], [1, 2]], dtype=torch.uint8)
    wanted = torch.tensor([[-0.5, -2.0], [1.5, 6.0], [0.0, 6.0]])
    assert torch.equal(encoding.decode(ranks), wanted)
    assert torch.equal(encoding.encode(wanted), ranks)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sets(st.integers(1, 2**14), min_size=1, max_size=12), min_size=1, max_size=4),
    st.lists(st.floats(0.0, 20000.0, width=32), min_size=1, max_size=8), SCALES,
)  # fmt: skip
def test_joined_tables_of_different_lengths_code_as_each_alone(tables, units, scale):
    alone = [
        LevelEncoding.nearest(
            "table", torch.tensor(scale) * (i + 1), torch.tensor([0, *sorted(t)]), storage_bits=4
        )
        for i, t in enumerate(tables)
    ]
    joined = by_channel(alone, 1)
    x = torch.tensor(units)[:, None].expand(-1, len(alone)) * scale
    decoded = [each.fake(x[:, i]) for i, each in enumerate(alone)]
    assert torch.equal(joined.fake(x), torch.stack(decoded, 1))
    assert joined.levels.shape[1] == max(each.levels.numel() for each in alone)
    assert torch.equal(joined.encode(joined.fake(x)), joined.encode(x))


def test_tables_below_zero_or_of_other_formats_are_not_joined():
    plain = LevelEncoding.nearest("a", torch.tensor(1.0), torch.arange(3), storage_bits=2)
    below = LevelEncoding.nearest("a", torch.tensor(1.0), torch.arange(-1, 2), storage_bits=2)
    other = LevelEncoding.nearest("b", torch.tensor(1.0), torch.arange(3), storage_bits=2)
    for wrong in ([], [plain, below], [plain, other]):
        with pytest.raises(ConfigError, match="do not make one"):
            by_channel(wrong, 1)
