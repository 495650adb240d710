# SPDX-License-Identifier: Apache-2.0
"""Laws of the dual-region formats (method file, P4 to P8) on random tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.calibration import Histogram
from qgraph.calibration.table_error import table_error
from qgraph.errors import ConfigError
from qgraph.formats import LevelEncoding
from qgraph.formats.dual_region import (
    dual_region,
    duplicate_codes,
    non_negative_levels,
    packed_codes,
    packed_signed_codes,
    rank_table,
    region_size,
    shift_of,
    signed_dual_region,
    signed_levels,
)

laws = settings(max_examples=30, deadline=None)


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int]:
    bits = draw(st.integers(2, 8))
    return bits, draw(st.integers(0, bits - 1))


@st.composite
def signed_encodings(draw: st.DrawFn) -> LevelEncoding:
    bits, shift = draw(splits())
    scale = draw(st.floats(1e-4, 1.0))
    return signed_dual_region(bits, shift * draw(st.sampled_from([1, -1])), torch.tensor(scale))


def values(seed: int, size: int, high: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(size, generator=generator) * high
    return spread * torch.exp2(-12 * torch.rand(size, generator=generator))


@laws
@given(splits(), st.integers(0, 1000))
def test_the_error_is_at_most_half_a_step_of_the_region_and_the_top_saturates(split, seed):
    bits, shift = split
    encoding, x = dual_region(bits, shift), values(seed, 500)
    size = region_size(bits)
    fine = float(encoding.scale)
    coarse, error = fine * 2**shift, (encoding.fake(x) - x).abs()
    slack = 1e-6
    assert (error[x <= fine * (size - 1)] <= fine / 2 + slack).all()
    assert (error[x <= 1.0] <= coarse / 2 + slack).all()
    assert (encoding.fake(x[x > 1.0]) == encoding.fake(torch.tensor(9.0))).all()


@laws
@given(splits(), st.integers(0, 1000))
def test_non_negative_encoding_is_monotone_idempotent_and_keeps_zero(split, seed):
    encoding = dual_region(*split)
    x = values(seed, 500).sort().values
    quantized = encoding.fake(x)
    assert (quantized.diff() >= 0).all()
    assert torch.equal(encoding.fake(quantized), quantized)
    assert encoding.fake(torch.zeros(3)).tolist() == [0.0] * 3


@laws
@given(signed_encodings(), st.integers(0, 1000))
def test_signed_encoding_is_monotone_idempotent_and_keeps_zero_and_sign(encoding, seed):
    x = values(seed, 500) * torch.where(values(seed + 1, 500) > 0.02, 1, -1)
    x = x.sort().values
    quantized = encoding.fake(x)
    assert (quantized.diff() >= 0).all()
    assert torch.equal(encoding.fake(quantized), quantized)
    assert ((quantized == 0) | (quantized.sign() == x.sign())).all()
    assert float(encoding.fake(torch.zeros(()))) == 0.0


@pytest.mark.parametrize("bits", range(2, 9))
def test_one_is_a_level_for_every_split(bits):
    for shift in range(bits):
        encoding = dual_region(bits, shift)
        assert float(encoding.fake(torch.ones(()))) == 1.0
        assert int(encoding.encode(torch.ones(()))) == encoding.levels.numel() - 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_without_a_split_there_is_one_uniform_grid_of_half_the_codes(bits):
    encoding = dual_region(bits, 0)
    assert torch.equal(encoding.levels, torch.arange(region_size(bits), dtype=torch.int32))
    assert duplicate_codes(encoding) == region_size(bits)


@laws
@given(splits(), st.integers(0, 1000), st.integers(1, 60))
def test_rows_of_a_softmax_sum_to_one_within_half_steps(split, seed, keys):
    bits, shift = split
    encoding = dual_region(bits, shift)
    logits = torch.randn(8, keys, generator=torch.Generator().manual_seed(seed)) * 3
    rows = logits.softmax(-1)
    fine = float(encoding.scale)
    near = (rows <= fine * (region_size(bits) - 1)).sum(-1)
    allowed = (near * fine + (keys - near) * fine * 2**shift) / 2 + 1e-5
    assert ((encoding.fake(rows).sum(-1) - 1).abs() <= allowed).all()


def test_a_single_key_gets_exactly_all_attention():
    for bits in range(2, 9):
        rows = torch.zeros(5, 1).softmax(-1)
        assert torch.equal(dual_region(bits, bits - 1).fake(rows), torch.ones(5, 1))


@laws
@given(splits())
def test_packed_codes_and_ranks_are_a_bijection_up_to_the_counted_duplicates(split):
    bits, shift = split
    encoding = dual_region(bits, shift)
    codes = packed_codes(encoding.levels, bits, shift)
    assert codes.unique().numel() == codes.numel()
    assert 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits
    ranks = rank_table(bits, shift)
    assert torch.equal(ranks[codes.long()], torch.arange(codes.numel(), dtype=torch.int32))
    assert ranks.unique().numel() == (1 << bits) - duplicate_codes(encoding)
    region, c = ranks.new_tensor(range(1 << bits)) >> (bits - 1), torch.arange(1 << (bits - 1))
    meant = torch.cat([c, c << shift]).to(torch.int32)
    assert torch.equal(encoding.levels[ranks.long()], meant)
    assert region.sum() == 1 << (bits - 1)


@laws
@given(splits(), st.sampled_from([1, -1]))
def test_signed_packed_codes_are_twos_complement_and_use_every_code(split, side):
    bits, shift = split[0], split[1] * side
    levels = signed_levels(bits, shift)
    size = region_size(bits)
    packed = packed_signed_codes(levels, shift)
    assert torch.equal(packed, torch.arange(-size, size, dtype=torch.int32))
    assert shift_of(signed_dual_region(bits, shift, torch.tensor(0.1))) == shift


@laws
@given(splits(), st.integers(0, 1000))
def test_two_int8_products_and_a_shift_equal_one_wide_product_and_the_float_product(split, seed):
    bits, shift = split
    generator = torch.Generator().manual_seed(seed)
    encoding = dual_region(bits, shift)
    rows = (torch.randn(6, 40, generator=generator) * 4).softmax(-1)
    weight = torch.randint(-127, 128, (40, 7), generator=generator)
    levels = encoding.level(encoding.encode(rows)).long()
    packed = packed_codes(levels.int(), bits, shift).long()
    region, c = packed >= region_size(bits), packed % region_size(bits)
    narrow = (c * ~region) @ weight + (((c * region) @ weight) << shift)
    wide = levels @ weight
    assert torch.equal(narrow, wide)
    assert int(c.max()) <= 127
    assert int(levels.max()) < 1 << 15
    assert int(wide.abs().max()) < 1 << 31
    scale = encoding.scale.double()
    product = encoding.fake(rows).double() @ weight.double()
    # decoding rounds each term once, to fp32; what cancels in the sum does not cancel in that
    rounding = encoding.fake(rows).double() @ weight.double().abs() * 2.0**-23
    assert bool(((product - wide.double() * scale).abs() <= rounding).all())


@laws
@given(st.integers(2, 8), st.integers(0, 1000))
def test_the_best_split_is_never_worse_than_no_split_on_its_own_data(bits, seed):
    x = values(seed, 4000, high=1.0)
    errors = [float((dual_region(bits, m).fake(x) - x).square().sum()) for m in range(bits)]
    seen = Histogram(bins_per_octave=64, rate=1)
    seen.update(x[None])
    expected = table_error(seen.bins(), [dual_region(bits, m) for m in range(bits)])
    chosen = int(expected.argmin())
    assert errors[chosen] <= errors[0] * (1 + 1e-9) or errors[chosen] <= min(errors) * 1.02


@laws
@given(signed_encodings(), st.integers(0, 1000))
def test_the_expected_error_agrees_with_the_error_on_data(encoding, seed):
    generator = torch.Generator().manual_seed(seed)
    reach = float(encoding.scale) * int(encoding.levels[-1])
    x = torch.nn.functional.gelu(torch.randn(1, 20000, generator=generator) * reach)
    seen = Histogram(bins_per_octave=64, rate=1)
    seen.update(x)
    measured = float((encoding.fake(x) - x).double().square().sum())
    expected = float(table_error(seen.bins(), [encoding]))
    assert expected == pytest.approx(measured, rel=0.05, abs=1e-9)


def test_expected_errors_of_many_tables_equal_those_of_each_alone():
    seen = Histogram(rate=1)
    seen.update(values(3, 5000)[None])
    tables = [dual_region(bits, m) for bits in (3, 5, 8) for m in range(bits)]
    together = table_error(seen.bins(), tables)
    alone = torch.cat([table_error(seen.bins(), [each]) for each in tables])
    assert torch.allclose(together, alone, rtol=1e-9)
    assert table_error(seen.bins(), []).numel() == 0


def test_a_scale_per_channel_equals_one_encoding_per_channel():
    scales = torch.tensor([0.01, 0.5, 0.125])
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    together = signed_dual_region(6, 3, scales, axis=-1).fake(x)
    for channel, scale in enumerate(scales):
        alone = signed_dual_region(6, 3, scale).fake(x[:, channel])
        assert torch.equal(together[:, channel], alone)
    with pytest.raises(ConfigError, match="per-tensor tables only"):
        table_error(Histogram().bins(), [signed_dual_region(6, 3, scales, axis=-1)])


@pytest.mark.parametrize(("bits", "shift"), [(8, 9), (4, -1), (4, 13)])
def test_shifts_beyond_int16_operands_are_refused(bits, shift):
    with pytest.raises(ConfigError, match=f"allowed at {bits} bits: 0 to {16 - bits}"):
        non_negative_levels(bits, shift)


def test_other_formats_have_no_regions():
    plain = LevelEncoding.nearest(
        "plain", torch.tensor(1.0), torch.tensor([0, 1, 5]), storage_bits=2
    )
    with pytest.raises(ConfigError, match="has no regions"):
        shift_of(plain)
