# SPDX-License-Identifier: Apache-2.0
"""Laws of the affine format, against exact rational arithmetic and against itself."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding, IntGrid, code_dtype

FLOATS = st.floats(-1e4, 1e4, width=32)
SCALES = st.floats(2.0**-12, 8.0, width=32)
GRIDS = st.builds(IntGrid, st.integers(2, 16), signed=st.booleans())


@st.composite
def encodings(draw: st.DrawFn) -> AffineEncoding:
    grid = draw(GRIDS)
    zero = draw(st.integers(grid.qmin, grid.qmax))
    return AffineEncoding.per_tensor(draw(SCALES), zero, grid)


def exact_code(x: float, encoding: AffineEncoding) -> int:
    """The same formula in rationals: one rounding to fp32, one to an integer, then clamp."""
    quotient = Fraction(x) / Fraction(float(encoding.scale))
    single = Fraction(float(np.float32(quotient.numerator / quotient.denominator)))
    exact = Fraction(float(np.float32(x) / np.float32(float(encoding.scale))))
    assert abs(single - exact) <= abs(exact) / 2**22
    code = round(exact) + int(encoding.zero_point)
    return min(max(code, encoding.qmin), encoding.qmax)


@given(encodings(), st.lists(FLOATS, min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_codes_equal_the_formula_in_exact_rationals(encoding, values):
    codes = encoding.encode(torch.tensor(values))
    assert codes.tolist() == [exact_code(v, encoding) for v in values]
    assert codes.dtype is code_dtype(encoding.qmin, encoding.qmax)


@given(encodings())
@settings(max_examples=30, deadline=None)
def test_every_grid_point_survives_a_round_trip(encoding):
    codes = torch.arange(encoding.qmin, encoding.qmax + 1, dtype=torch.int32)
    assert torch.equal(encoding.encode(encoding.decode(codes)).to(torch.int32), codes)
    assert torch.equal(encoding.level(codes), encoding.table())


@given(encodings(), st.lists(FLOATS, min_size=2, max_size=30))
@settings(max_examples=50, deadline=None)
def test_encoding_is_monotone_idempotent_and_keeps_zero(encoding, values):
    x = torch.tensor(values).sort().values
    codes = encoding.encode(x).to(torch.int32)
    assert bool((codes.diff() >= 0).all())
    assert torch.equal(encoding.fake(encoding.fake(x)), encoding.fake(x))
    assert float(encoding.fake(torch.zeros(1))) == 0.0


@given(encodings(), st.lists(FLOATS, min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_values_inside_the_range_move_by_at_most_half_a_step(encoding, values):
    table, scale = encoding.table(), float(encoding.scale)
    x = torch.tensor(values, dtype=torch.float32)
    inside = (x >= scale * int(table[0])) & (x <= scale * int(table[-1]))
    error = (encoding.fake(x) - x).abs()[inside].double()
    slack = 2.0**-22 * x.abs()[inside].double()
    assert bool((error <= scale / 2 + slack).all())


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_both_ends_saturate_even_for_quotients_beyond_int32(bits, signed):
    grid = IntGrid(bits, signed=signed)
    encoding = AffineEncoding.per_tensor(2.0**-20, 0, grid)
    x = torch.tensor([float("inf"), 3e38, 1e10, 2.0**12, -(2.0**12), -1e10, -3e38, -float("inf")])
    assert encoding.encode(x).tolist() == [grid.qmax] * 4 + [grid.qmin] * 4


def test_int32_codes_saturate_instead_of_wrapping():
    encoding = AffineEncoding(
        scale=torch.tensor(1.0), zero_point=torch.tensor(0), qmin=-(2**31), qmax=2**31 - 1
    )
    codes = encoding.encode(torch.tensor([3e9, 2.0**31, -3e9, 5.0]))
    assert codes.tolist() == [2**31 - 1, 2**31 - 1, -(2**31), 5]


def test_ties_go_to_even_before_the_zero_point_is_added():
    encoding = AffineEncoding.per_tensor(1.0, 1, IntGrid(8, signed=True))
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert encoding.encode(x).tolist() == [-1, -1, 1, 1, 3, 3]


def test_division_is_used_where_a_reciprocal_would_round_elsewhere():
    generator = np.random.default_rng(0)
    scales = generator.uniform(0.01, 1, 500).astype(np.float32)
    steps = generator.integers(-120, 120, (500, 400)).astype(np.float32) + np.float32(0.5)
    x = steps * scales[:, None]
    divided = np.rint(x / scales[:, None])
    multiplied = np.rint(x * (np.float32(1) / scales)[:, None])
    assert (divided != multiplied).any(), "the vectors do not tell the two apart"
    encoding = AffineEncoding.symmetric(torch.from_numpy(scales), IntGrid(8, signed=True), 0)
    assert np.array_equal(encoding.encode(torch.from_numpy(x)).numpy(), divided.astype(np.int8))


def test_tiny_scales_do_not_collapse():
    encoding = AffineEncoding.per_tensor(1e-40, 0, IntGrid(8, signed=True))
    scale = float(encoding.scale)
    assert encoding.encode(torch.tensor([3 * scale, -5 * scale])).tolist() == [3, -5]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_are_encoded_as_if_each_were_alone(axis):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5)
    size, grid = x.shape[axis], IntGrid(6, signed=False)
    scale, zero = torch.rand(size) / 10 + 0.01, torch.randint(0, 64, (size,))
    whole = AffineEncoding(scale=scale, zero_point=zero, qmin=0, qmax=63, axis=axis)
    parts = [
        AffineEncoding.per_tensor(float(scale[i]), int(zero[i]), grid).encode(x.select(axis, i))
        for i in range(size)
    ]
    assert torch.equal(whole.encode(x), torch.stack(parts, axis))
    decoded = whole.decode(whole.encode(x))
    assert torch.equal(whole.encode(decoded), whole.encode(x))
    assert whole.table().shape == (size, 64)


@given(st.integers(1, 6), st.sampled_from([0, 1]))
@settings(max_examples=20, deadline=None)
def test_blocks_repeat_their_scale_and_the_last_may_be_short(block, axis):
    torch.manual_seed(block)
    x = torch.randn(7, 5)
    count = -(-x.shape[axis] // block)
    shape = [x.shape[0], x.shape[1]]
    shape[axis] = count
    scale = torch.rand(shape) / 10 + 0.01
    zero = torch.zeros(shape, dtype=torch.int32)
    encoding = AffineEncoding(scale=scale, zero_point=zero, qmin=-8, qmax=7, axis=axis, block=block)
    repeated = scale.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    assert torch.equal(encoding.encode(x).float(), (x / repeated).round().clamp(-8, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.tensor(0.0)}, "finite and positive"),
        ({"scale": torch.tensor(float("nan"))}, "finite and positive"),
        ({"zero_point": torch.tensor(9)}, "outside the codes"),
        ({"qmin": 8}, "empty code range"),
        ({"scale": torch.ones(2)}, "scale has shape"),
    ],
)
def test_impossible_encodings_are_refused(change, message):
    fields = {"scale": torch.tensor(1.0), "zero_point": torch.tensor(0), "qmin": -8, "qmax": 7}
    with pytest.raises(ConfigError, match=message):
        AffineEncoding(**{**fields, **change})


@pytest.mark.parametrize("bits", [0, 1, -3, 17, True, 2.0])
def test_widths_outside_two_to_sixteen_are_refused(bits):
    with pytest.raises(ConfigError, match="allowed: integers from 2 to 16"):
        IntGrid(bits, signed=True)


def test_narrow_grids_leave_out_the_lowest_code():
    assert (IntGrid(8, signed=True).qmin, IntGrid(8, signed=True, narrow=True).qmin) == (-128, -127)
    assert (IntGrid(2, signed=True).qmin, IntGrid(2, signed=True, narrow=True).qmin) == (-2, -1)


@pytest.mark.parametrize(
    ("qmin", "qmax", "dtype"),
    [
        (-128, 127, torch.int8), (-129, 127, torch.int16), (-128, 128, torch.int16),
        (0, 255, torch.uint8), (0, 256, torch.int16), (-(2**15), 2**15 - 1, torch.int16),
        (0, 2**15, torch.int32),
    ],
)  # fmt: skip
def test_codes_take_the_narrowest_type_that_holds_them(qmin, qmax, dtype):
    assert code_dtype(qmin, qmax) is dtype


def test_what_an_encoding_says_of_itself():
    plain = AffineEncoding.per_tensor(0.5, 3, IntGrid(4, signed=False))
    assert (plain.bits, plain.is_symmetric, plain.describe()) == (4, False, "uint4 per tensor")
    assert plain.to("cpu").table().tolist() == [c - 3 for c in range(16)]
    zero = torch.zeros(2, 3, dtype=torch.int32)
    blocked = AffineEncoding(
        scale=torch.rand(2, 3) + 0.1, zero_point=zero, qmin=-8, qmax=7, axis=1, block=4
    )
    assert (blocked.is_symmetric, blocked.describe()) == (True, "int4 per block of 4")
    codes = torch.randint(-8, 8, (2, 12))
    assert torch.equal(blocked.level(codes), codes.to(torch.int32))
    with pytest.raises(ConfigError, match="block=4 needs an axis"):
        AffineEncoding(
            scale=torch.rand(3) + 0.1, zero_point=zero[0], qmin=-8, qmax=7, block=4
        ).encode(torch.randn(2, 12))
