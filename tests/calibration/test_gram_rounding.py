# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.calibration.gram_rounding import InputSums, factor, round_compensated
from qgraph.calibration.weight_scales import weight_scales
from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.formats.power_of_two import power_of_two

seeds = st.integers(0, 10**6)


def rows(seed, count=60, length=10, groups=1):
    """Correlated columns of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(length, length, generator=generator) * torch.linspace(0.2, 2, length)
    return torch.randn(groups, count, length, generator=generator) @ mix


def gram_of(rough, exact=None, *, outputs=6, importance=None, beside=None):
    gram = InputSums(rough.shape[0], outputs, rough.shape[2])
    gram.add(rough, rough if exact is None else exact, importance, beside)
    return gram


def weight_and_encoding(seed, bits=3, outputs=6, length=10):
    weight = torch.randn(outputs, length, generator=torch.Generator().manual_seed(seed + 1))
    return weight, AffineEncoding.symmetric(
        weight_scales(weight, bits=bits, narrow=False), IntGrid(bits, signed=True), 0
    )


@settings(max_examples=30, deadline=None)
@given(seed=seeds, damping=st.floats(0.0, 2.0), groups=st.integers(1, 3))
def test_the_factors_multiply_to_the_damped_form(seed, damping, groups):
    square = gram_of(rows(seed, groups=groups)).square
    upper, damped = factor(square, damping)
    assert torch.equal(upper, upper.triu())
    assert torch.equal(upper.diagonal(dim1=1, dim2=2), torch.ones(groups, 10).double())
    inner = torch.linalg.solve(upper, torch.linalg.solve(upper, damped).transpose(1, 2))
    scale = damped.abs().max()
    assert float((inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max()) < (
        1e-6 * float(scale)
    )
    size = square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    assert torch.allclose(damped, square + damping * size * torch.eye(10).double())


def test_dead_columns_and_too_few_rows_only_need_more_damping():
    weight, encoding = weight_and_encoding(0)
    few = rows(0, count=3)
    few[..., 4] = 0
    found = round_compensated(weight, encoding, gram_of(few), damping=0.0)
    assert bool(torch.isfinite(found.target).all())
    assert int(found.codes.min()) >= -4
    assert int(found.codes.max()) <= 3


@settings(max_examples=30, deadline=None)
@given(seed=seeds, bits=st.integers(2, 8))
def test_codes_are_exact_codes_and_weights_on_the_grid_stay(seed, bits):
    weight, encoding = weight_and_encoding(seed, bits)
    found = round_compensated(weight, encoding, gram_of(rows(seed)))
    assert int(found.codes.min()) >= encoding.qmin
    assert int(found.codes.max()) <= encoding.qmax
    settled = round_compensated(encoding.decode(found.codes), encoding, gram_of(rows(seed)))
    assert torch.equal(settled.codes, found.codes)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_the_form_is_the_squared_error_of_outputs(seed):
    rough, weight = rows(seed), weight_and_encoding(seed)[0]
    encoding = weight_and_encoding(seed)[1]
    found = round_compensated(weight, encoding, gram_of(rough))
    outputs = rough[0] @ weight.T
    error = rough[0] @ encoding.decode(found.codes).T - outputs
    direct = float(error.square().sum() / outputs.square().sum())
    assert found.after == pytest.approx(direct, rel=1e-4)
    plain = rough[0] @ encoding.fake(weight).T - outputs
    direct = float(plain.square().sum() / outputs.square().sum())
    assert found.before == pytest.approx(direct, rel=1e-4)


def test_feedback_beats_rounding_to_nearest_and_descent_lowers_it_further():
    ratios = []
    for seed in range(20):
        weight, encoding = weight_and_encoding(seed, bits=4, length=32)
        gram = gram_of(rows(seed, length=32))
        once, more = (
            round_compensated(weight, encoding, gram, damping=0.0, rounds=r) for r in (0, 3)
        )
        assert more.after <= once.after * (1 + 1e-9) <= once.before * (1 + 2e-9)
        ratios.append(once.after / once.before)
    assert sum(ratios) / len(ratios) < 0.85


def test_each_column_takes_the_best_code_given_the_earlier_ones():
    weight, encoding = weight_and_encoding(3, outputs=1, length=4)
    rough = rows(3, length=4)
    gram = gram_of(rough, outputs=1)
    codes = round_compensated(weight, encoding, gram, damping=0.0, rounds=0).codes[0]
    square = gram.square[0]
    fixed: list[int] = []
    for j in range(4):
        costs = []
        for code in range(encoding.qmin, encoding.qmax + 1):
            made = torch.tensor([*fixed, code]).double() * encoding.scale[0]
            error = weight[0, : j + 1].double() - made
            head, side, rest = square[: j + 1, : j + 1], square[: j + 1, j + 1 :], None
            if j < 3:
                rest = square[j + 1 :, j + 1 :]
                head = head - side @ torch.linalg.solve(rest, side.T)
            costs.append(float(error @ head @ error))
        fixed.append(encoding.qmin + min(range(len(costs)), key=costs.__getitem__))
    assert codes.tolist() == fixed


@settings(max_examples=30, deadline=None)
@given(seed=seeds, split=st.integers(1, 59))
def test_sums_do_not_depend_on_how_rows_come(seed, split):
    rough, exact, importance = rows(seed), rows(seed + 1), torch.rand(60)
    beside = rows(seed + 2, length=6)
    whole = gram_of(rough, exact, importance=importance, beside=beside)
    parts = InputSums(1, 6, 10)
    for part in (slice(0, split), slice(split, 60)):
        parts.add(rough[:, part], exact[:, part], importance[part], beside[:, part])
    merged = InputSums(1, 6, 10)
    merged.add(rough[:, :split], exact[:, :split], importance[:split], beside[:, :split])
    merged.merge(gram_of(
        rough[:, split:], exact[:, split:], importance=importance[split:], beside=beside[:, split:]
    ))  # fmt: skip
    for name in ("square", "drift", "beside"):
        a = getattr(whole, name)
        for b in (getattr(parts, name), getattr(merged, name)):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
    assert merged.rows == whole.rows


def test_the_target_serves_shifted_inputs_and_what_is_summed_with_the_output():
    exact = rows(0, count=400)
    rough = exact + 0.3 * rows(1, count=400)
    beside = rough @ torch.randn(10, 6, generator=torch.Generator().manual_seed(2)) * 0.1
    weight, encoding = weight_and_encoding(0, bits=8)
    gram = gram_of(rough, exact, beside=beside)
    target = round_compensated(weight, encoding, gram, ridge=1e-9).target
    wanted = exact[0] @ weight.T + beside[0]
    best = torch.linalg.lstsq(rough[0], wanted).solution.T
    assert torch.allclose(target, best, atol=1e-3)
    still = round_compensated(weight, encoding, gram, ridge=1e9).target
    assert torch.allclose(still, weight, atol=1e-5)


def test_groups_are_rounded_each_on_its_own():
    rough = rows(5, groups=3)
    weight, encoding = weight_and_encoding(5)
    together = round_compensated(weight, encoding, gram_of(rough, outputs=2)).codes
    for g in range(3):
        own = AffineEncoding.symmetric(
            encoding.scale[2 * g : 2 * g + 2], IntGrid(3, signed=True), 0
        )
        part = weight[2 * g : 2 * g + 2]
        alone = round_compensated(part, own, gram_of(rough[g : g + 1], outputs=2)).codes
        assert torch.equal(together[2 * g : 2 * g + 2], alone)


def test_blocked_scales_and_tables_of_levels_are_taken():
    weight, _ = weight_and_encoding(7)
    scale = weight.abs().reshape(6, 2, 5).amax(2) / 7
    blocked = AffineEncoding(
        scale=scale, zero_point=torch.zeros(6, 2, dtype=torch.int32), qmin=-8, qmax=7,
        axis=1, block=5,
    )  # fmt: skip
    table = power_of_two(4, 2, float(weight.abs().max()))
    for encoding in (blocked, table):
        found = round_compensated(weight.abs(), encoding, gram_of(rows(7)), damping=0.0)
        assert found.after <= found.before
    with pytest.raises(ConfigError):
        round_compensated(weight, dataclasses.replace(table, axis=1), gram_of(rows(7)))
