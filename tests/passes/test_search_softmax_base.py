# SPDX-License-Identifier: Apache-2.0
"""The search for softmax formats: its choice is the best on its own objective, per site."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.calibration import Histogram
from qgraph.calibration.probability_formats import (
    COARSE,
    FAMILIES,
    REACH,
    Sample,
    attention_errors,
    best_by_family,
    best_by_head,
)
from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding, IntGrid, LevelEncoding
from qgraph.formats.dual_region import dual_region
from qgraph.formats.power_of_two import NAME, candidate_taus, power_of_two
from qgraph.passes import ChooseRanges, ChooseWeightScales, InsertQuantizers, SearchSoftmaxBase
from qgraph.passes.search_softmax_base import attention_products, joint_request
from qgraph.testing.attention_kinds import Masked, PackedSelf, Separate, TwoWay
from tests.passes.attention_pipelines import batches, decisions, run


def rows(keys: int, sharpness: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(24, keys, generator=generator) * sharpness
    return logits.softmax(-1), torch.randn(24, keys, 8, generator=generator)


def error(encoding: AffineEncoding | LevelEncoding, a: Tensor, v: Tensor) -> float:
    return float(torch.bmm((encoding.fake(a) - a).unsqueeze(1), v).double().square().sum())


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([3, 4, 6, 8]), st.sampled_from([7, 49, 196]), st.floats(0.1, 6.0),
    st.integers(0, 20),
)  # fmt: skip
def test_table_errors_are_those_of_the_chosen_encodings(
    bits: int, keys: int, sharpness: float, seed: int
) -> None:
    a, v = rows(keys, sharpness, seed)
    for choice in best_by_family(Sample.of(a, v), bits).values():
        assert isinstance(choice.encoding, AffineEncoding | LevelEncoding)
        assert error(choice.encoding, a, v) == pytest.approx(choice.error, rel=1e-3, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([4, 6]), st.floats(0.5, 6.0), st.integers(0, 20))
def test_the_chosen_base_beats_every_base_at_the_largest_value(
    bits: int, sharpness: float, seed: int
) -> None:
    a, v = rows(49, sharpness, seed)
    best = best_by_family(Sample.of(a, v), bits)["power_of_two"].error
    for tau in candidate_taus(bits):
        assert best <= error(power_of_two(bits, tau, float(a.max())), a, v) * (1 + 1e-4)


def test_errors_add_over_batches_of_rows() -> None:
    a, v = rows(49, 2.0)
    encoding = power_of_two(4, 2, 1.0)
    scales = torch.tensor([0.5, 1.0]) / 2**15
    table = encoding.levels, encoding.thresholds
    whole = attention_errors(a, v, scales, *table)
    parts = sum(attention_errors(a[i], v[i], scales, *table) for i in (slice(9), slice(9, None)))
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0.0)


def test_many_keys_at_four_bits_want_a_power_and_few_keys_at_eight_do_not() -> None:
    found = best_by_family(Sample.of(*rows(400, 3.0)), 4, ("uniform", "power_of_two"))
    assert found["power_of_two"].error < found["uniform"].error
    found = best_by_family(Sample.of(*rows(7, 1.0)), 8, ("uniform", "power_of_two"))
    assert found["uniform"].error < found["power_of_two"].error


def single_candidates(bits: int, peak: float) -> Iterator[AffineEncoding | LevelEncoding]:
    """Every family, base and shift at every coarse scale of the search."""
    for top in (peak * 2.0 ** (-step / COARSE) for step in range(-2, COARSE * REACH + 1)):
        grid = IntGrid(bits, signed=False)
        yield AffineEncoding.per_tensor(top / grid.qmax, 0, grid)
        yield from (power_of_two(bits, tau, top) for tau in candidate_taus(bits))
        yield from (dual_region(bits, shift, high=top) for shift in range(1, bits))


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([3, 4, 6]), st.sampled_from([7, 49]), st.floats(0.1, 6.0), st.integers(0, 20)
)
def test_the_search_never_loses_to_the_best_single_candidate(
    bits: int, keys: int, sharpness: float, seed: int
) -> None:
    a, v = rows(keys, sharpness, seed)
    chosen = min(best_by_family(Sample.of(a, v), bits).values(), key=lambda c: c.error)
    assert isinstance(chosen.encoding, AffineEncoding | LevelEncoding)
    best = min(error(each, a, v) for each in single_candidates(bits, float(a.max())))
    assert error(chosen.encoding, a, v) <= best * (1 + 1e-3) + 1e-12


def test_clipping_costs_what_the_histogram_knows_and_the_rows_do_not() -> None:
    a, v = rows(49, 1.0)
    seen = Histogram(rate=1)
    seen.update(a)
    rare = torch.full((6, 49), 0.02)
    rare[:, 0] = 0.98
    seen.update(rare)
    few, known = Sample(a, v, 0.98), Sample(a, v, 0.98, seen.bins())
    tops = torch.tensor([0.98 * 2**0.25, 0.5, float(a.max())], dtype=torch.float64)
    price = known.unseen(tops)
    assert float(price[0]) == 0.0
    assert float(price[2]) > float(price[1]) > 0.0
    assert not few.unseen(tops).any()
    blind, careful = (best_by_family(s, 6, ("uniform",))["uniform"].encoding for s in (few, known))
    assert float(careful.scale) > 1.5 * float(blind.scale)


@pytest.mark.parametrize("cls", [Masked, PackedSelf, TwoWay])
def test_each_site_gets_the_family_that_is_best_alone(cls: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    model = cls()
    _, context = run(model, SearchSoftmaxBase())
    found = decisions(context, "search-softmax-base")
    sites = [s for s in context.plan if s.decided_by == "search-softmax-base"]
    assert len(found) == len(sites) >= 1
    alone = {
        family: decisions(run(model, SearchSoftmaxBase(formats=(family,)))[1], found[0].by)
        for family in FAMILIES
    }
    for number, (decision, site) in enumerate(zip(found, sites, strict=True)):
        errors = {f: alone[f][number].numbers[f"error_{f}"] for f in FAMILIES}
        best = min(errors, key=lambda f: errors[f])
        assert decision.numbers[f"error_{best}"] == pytest.approx(errors[best])
        assert decision.reason.startswith(alone[best][number].reason.split(":")[0])
        assert isinstance(site.encoding, (AffineEncoding, LevelEncoding))


def test_masked_keys_stay_exactly_masked_in_the_quantized_graph() -> None:
    torch.manual_seed(0)
    module, context = run(
        Masked(), SearchSoftmaxBase(formats=("power_of_two",)), ChooseRanges(),
        ChooseWeightScales(), InsertQuantizers(),
    )  # fmt: skip
    (site,) = [s for s in context.plan if s.decided_by == "search-softmax-base"]
    assert isinstance(site.encoding, LevelEncoding)
    assert site.encoding.name == NAME
    x, y = batches()[0]
    changed = y.clone()
    changed[:, 5:] = 1.0  # every query is shown the first keys only
    with torch.no_grad():
        assert torch.equal(module(x, y), module(x, changed))
        assert torch.equal(module(x, y), module(x, y))


class SharedValues(torch.nn.Module):
    """Four heads of probabilities, values that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = torch.nn.Linear(8, 32), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
        weights = (query @ keys.unsqueeze(1).transpose(-1, -2)).softmax(-1)
        found: Tensor = weights @ self.value(keys).unsqueeze(1)
        return found


def test_values_that_heads_share_cannot_be_sampled_head_by_head() -> None:
    module, context = run(SharedValues().eval())
    ((_, site),) = attention_products(module, context)
    told = joint_request(site, 16)
    assert told == "probabilities and values do not share their leading dimensions"


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ConfigError, match="logarithmic"):
        SearchSoftmaxBase(formats=("logarithmic",))


def test_every_head_gets_a_format_of_its_own() -> None:
    torch.manual_seed(0)
    model = Separate()
    with torch.no_grad():  # the second head looks at one key, the first at all
        model.q.weight[4:] *= 12.0
        model.q.weight[:4] *= 0.1
    _, together = run(model, SearchSoftmaxBase(formats=("power_of_two",)))
    _, apart = run(model, SearchSoftmaxBase(formats=("power_of_two",), per_head=True))
    (one,), (two,) = (
        [s.encoding for s in c.plan if s.decided_by == "search-softmax-base"]
        for c in (together, apart)
    )
    assert isinstance(one, LevelEncoding)
    assert isinstance(two, LevelEncoding)
    assert (one.axis, one.scale.ndim) == (None, 0)
    assert (two.axis, list(two.scale.shape), two.levels.ndim) == (1, [2], 2)
    assert float(two.scale[1]) > 1.5 * float(two.scale[0])
    (decision,) = decisions(apart, "search-softmax-base")
    assert decision.numbers["heads"] == 2


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([4, 6]), st.integers(0, 20))
def test_formats_of_heads_code_each_head_as_if_it_were_alone(bits: int, seed: int) -> None:
    heads = [rows(49, sharpness, seed) for sharpness in (0.2, 2.0, 6.0)]
    samples = [Sample.of(*each) for each in heads]
    for family, joined in best_by_head(samples, bits, axis=1).items():
        alone = [best_by_family(s, bits, (family,))[family] for s in samples]
        together = joined.encoding.fake(torch.stack([a for a, _ in heads], 0)[None])
        for head, ((a, _), choice) in enumerate(zip(heads, alone, strict=True)):
            assert torch.equal(together[0, head], choice.encoding.fake(a)), family
        assert joined.error == pytest.approx(sum(c.error for c in alone))
        assert joined.encoding.table().shape[-1] <= 1 << bits


def test_windows_whose_heads_are_folded_into_the_batch_share_one_format() -> None:
    torch.manual_seed(0)
    _, context = run(PackedSelf(), SearchSoftmaxBase(per_head=True))
    for decision in decisions(context, "search-softmax-base"):
        assert decision.outcome in {"applied", "kept"}
