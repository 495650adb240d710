# SPDX-License-Identifier: Apache-2.0
"""The fixed-point mode: its arithmetic against exact integers and float64, and no float inside."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from qgraph.backends import fixed_point as fixed
from qgraph.backends import integer, parity
from qgraph.backends.integer.dtypes import computed_dtypes, example_inputs
from qgraph.backends.integer.fixed_kernels import convolve, convolve_transposed
from tests.backends.builders import minmax, models, quantize, signed
from tests.backends.site_formats import CHOICES

MODELS = models()
NAMES = [name for name, _, _ in MODELS]
UNIT = 2.0**-fixed.FRACTION


@given(
    st.integers(-(2**31), 2**31 - 1),
    st.floats(2.0**-40, 2.0**10, width=32).filter(lambda v: v > 0),
    st.sampled_from([1, -1]),
)
@settings(max_examples=200, deadline=None)
def test_rescaling_is_one_rounding_of_the_exact_product(x, real, sign):
    multiplier, shift = fixed.factor(torch.tensor(sign * real, dtype=torch.float64))
    exact = Fraction(x) * int(multiplier) / 2 ** int(shift)
    expected = math.floor(exact + Fraction(1, 2))
    assert int(fixed.rescale(torch.tensor(x), multiplier, shift)) == expected
    if int(multiplier):
        error = abs(Fraction(int(multiplier), 2 ** int(shift)) / Fraction(sign * real) - 1)
        assert error <= Fraction(1, 2**30)


@given(st.integers(-(2**46), 2**46), st.floats(2.0**-24, 0.5, width=32))
@settings(max_examples=200, deadline=None)
def test_wide_values_rescale_within_one_unit(x, real):
    multiplier, shift = fixed.factor(torch.tensor(real, dtype=torch.float64))
    exact = Fraction(x) * int(multiplier) / 2 ** int(shift)
    assert abs(int(fixed.rescale_wide(torch.tensor(x), multiplier, shift)) - exact) <= 1


@given(st.integers(0, 2**62 - 1))
@settings(max_examples=200, deadline=None)
def test_roots_and_bit_lengths_are_those_of_python_integers(x):
    assert int(fixed.integer_sqrt(torch.tensor(x))) == math.isqrt(x)
    assert int(fixed.bit_length(torch.tensor(x))) == x.bit_length()


def test_softmax_and_norms_keep_at_least_22_bits_of_their_results():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 48) * 5
    table = fixed.ExpTable.make()
    soft = fixed.softmax(fixed.to_fixed(x), -1, table.coarse, table.fine)
    assert float((soft.double() * UNIT - x.double().softmax(-1)).abs().max()) < UNIT
    for spread, eps in ((1.0, 1e-5), (300.0, 1e-12), (0.05, 1e-5)):
        values = x * spread
        expected = F.layer_norm(values.double(), (48,), eps=eps)
        got = fixed.normalize(fixed.to_fixed(values), [-1], eps).double() * UNIT
        # The input's own last bit weighs 1 / std in the result.
        bound = (1 + 1 / float(values.std())) * UNIT
        assert float((got - expected).abs().max()) < bound, (spread, eps)
    rms = fixed.normalize(fixed.to_fixed(x), [-1], 1e-6, centred=False).double() * UNIT
    root = (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert float((rms - x.double() / root).abs().max()) < UNIT


def test_a_constant_row_normalises_to_zero_and_a_masked_row_to_a_uniform_softmax():
    constant = fixed.to_fixed(torch.full((1, 8), 3.0))
    assert fixed.normalize(constant, [-1], 1e-12).tolist() == [[0] * 8]
    table = fixed.ExpTable.make()
    masked = fixed.to_fixed(torch.full((1, 4), torch.finfo(torch.float32).min))
    assert fixed.softmax(masked, -1, table.coarse, table.fine).tolist() == [[fixed.ONE // 4] * 4]


@pytest.mark.parametrize("function", [torch.sin, torch.cos])
def test_periodic_functions_come_from_one_turn(function):
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    turns = torch.arange(2**16 + 1, dtype=torch.float64) / 2**16 * (2 * math.pi)
    factor = fixed.factor(torch.tensor(1 / (2 * math.pi), dtype=torch.float64))
    got = fixed.periodic(fixed.to_fixed(x), fixed.to_fixed(function(turns)), *factor)
    assert float((got.double() * UNIT - function(x)).abs().max()) < 8 * UNIT


@pytest.mark.parametrize("corners", [True, False])
def test_interpolation_uses_integer_weights(corners):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 7)
    expected = F.interpolate(x.double(), (9, 14), mode="bilinear", align_corners=corners)
    got = fixed.from_fixed(fixed.bilinear(fixed.to_fixed(x), (9, 14), corners=corners))
    assert float((got.double() - expected).abs().max()) < 1e-5
    near = fixed.from_fixed(fixed.nearest(fixed.to_fixed(x), (9, 14)))
    assert float((near - F.interpolate(x, (9, 14))).abs().max()) < 1e-6


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_integer_convolutions_equal_the_float_ops(groups, stride, dilation):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (2, 4, 6, 5), generator=generator, dtype=torch.int32)
    w = torch.randint(-128, 128, (4, 6 // groups, 3, 2), generator=generator, dtype=torch.int32)
    direct = torch.randint(-9, 9, (6, 4 // groups, 3, 2), generator=generator, dtype=torch.int32)
    plain = convolve(x, direct, None, stride, [2, 1], dilation, groups)
    expected = F.conv2d(x.double(), direct.double(), None, stride, (2, 1), dilation, groups)
    assert torch.equal(plain.double(), expected)
    extra = [stride - 1, 0]
    got = convolve_transposed(x, w, None, stride, [1, 0], extra, groups, dilation)
    wide = (x.double(), w.double(), None, stride, (1, 0), tuple(extra), groups, dilation)
    assert torch.equal(got.double(), F.conv_transpose2d(*wide))


@pytest.mark.parametrize("choose", [minmax, signed, *CHOICES])
@pytest.mark.parametrize(("name", "model", "inputs"), MODELS, ids=NAMES)
def test_integer_kernels_and_exact_products_give_the_same_codes(name, model, inputs, choose):
    module = quantize(model, inputs, choose)
    report = parity.compare(module, (inputs, {}), mode="fixed_point")
    assert report.mismatches == 0
    ours = integer.lower(module, mode="fixed_point")(*inputs)
    theirs = integer.fixed_point_reference(module)(*inputs)
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("choose", [minmax, signed, CHOICES[0], CHOICES[1]])
@pytest.mark.parametrize(("name", "model", "inputs"), MODELS, ids=NAMES)
def test_no_float_between_the_input_and_the_output(name, model, inputs, choose):
    module = quantize(model, inputs, choose)
    lowered = integer.lower(module, mode="fixed_point")
    explanation = lowered.explain()
    assert explanation.islands == []
    assert all("float" not in row.dtypes for row in explanation), name
    inputs_quantizer = next(n.name for n in module.graph.nodes if n.name in lowered.codes)
    found = computed_dtypes(lowered.graph_module, example_inputs(module))
    for node, dtypes in found.items():
        if any("float" in dtype for dtype in dtypes):
            is_entry = node.target is fixed.to_fixed
            source = node.meta["qgraph_source"]
            assert is_entry or source in {"output", inputs_quantizer}, (name, node, source)


@pytest.mark.parametrize(("name", "model", "inputs"), MODELS, ids=NAMES)
def test_both_modes_give_nearly_the_same_codes(name, model, inputs):
    module = quantize(model, inputs)
    codes: dict[str, torch.Tensor] = {}
    integer.lower(module).run(inputs, {}, codes.setdefault)
    gaps = []

    def compare(node: str, ours: torch.Tensor) -> torch.Tensor:
        gaps.append((ours - codes[node]).abs().flatten())
        return codes[node]

    integer.lower(module, mode="fixed_point").run(inputs, {}, compare)
    gap = torch.cat(gaps)
    assert int(gap.max()) <= 1, name
    assert float((gap > 0).float().mean()) < 1e-3
