# SPDX-License-Identifier: Apache-2.0
"""The search for softmax formats: its choice is the best on its own objective, per site."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.calibration import JointReservoir
from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding, LevelEncoding
from qgraph.formats.power_of_two import NAME, candidate_taus, power_of_two
from qgraph.passes import ChooseRanges, ChooseWeightScales, InsertQuantizers, SearchSoftmaxBase
from qgraph.passes.search_softmax_base import attention_errors, best_by_family
from qgraph.testing.attention_kinds import Masked, PackedSelf, TwoWay
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
    for choice in best_by_family(a, v, bits).values():
        assert isinstance(choice.encoding, AffineEncoding | LevelEncoding)
        assert error(choice.encoding, a, v) == pytest.approx(choice.error, rel=1e-3, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([4, 6]), st.floats(0.5, 6.0), st.integers(0, 20))
def test_the_chosen_base_beats_every_base_at_the_largest_value(
    bits: int, sharpness: float, seed: int
) -> None:
    a, v = rows(49, sharpness, seed)
    best = best_by_family(a, v, bits)["power_of_two"].error
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
    found = best_by_family(*rows(400, 3.0), 4, ("uniform", "power_of_two"))
    assert found["power_of_two"].error < found["uniform"].error
    found = best_by_family(*rows(7, 1.0), 8, ("uniform", "power_of_two"))
    assert found["uniform"].error < found["power_of_two"].error


@pytest.mark.parametrize("cls", [Masked, PackedSelf, TwoWay])
def test_each_site_gets_its_best_family(cls: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    _, context = run(cls(), SearchSoftmaxBase())
    found = decisions(context, "search-softmax-base")
    sites = [s for s in context.plan if s.decided_by == "search-softmax-base"]
    assert len(found) == len(sites) >= 1
    for decision, site in zip(found, sites, strict=True):
        partner = site.edge.consumer.args[1]
        a, v = context.statistics[site.value, partner].get(JointReservoir).sampled()  # type: ignore[index]
        errors = [value for name, value in decision.numbers.items() if name.startswith("error_")]
        assert len(errors) == 3
        assert isinstance(site.encoding, (AffineEncoding, LevelEncoding))
        assert error(site.encoding, a, v) == pytest.approx(min(errors), rel=1e-3)


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


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ConfigError, match="logarithmic"):
        SearchSoftmaxBase(formats=("logarithmic",))
