# SPDX-License-Identifier: Apache-2.0
"""Sign folding: bit-identical, decided by benefit, statistics transported, every site reported."""

from __future__ import annotations

import pytest
import torch

from qgraph.calibration import ChannelHistogram, ChannelRange
from qgraph.calibration.operand_channels import OperandChannels, view_of
from qgraph.formats import AffineEncoding
from qgraph.graph.channel_maps import channel_maps
from qgraph.graph.edges import Edge
from qgraph.graph.row_classes import RowClasses
from qgraph.passes import FoldKeySigns
from qgraph.passes.fold_key_signs import negative_classes
from qgraph.testing.attention_kinds import (
    ILLEGAL,
    LEGAL,
    Grouped,
    Masked,
    Packed,
    Separate,
    Twice,
    UnitNormed,
)
from tests.passes.attention_pipelines import decisions, observe_again, offset_keys, run


def seeded(cls: type[torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    return cls()


@pytest.mark.parametrize("cls", [Separate, Masked, Grouped, Twice])
def test_keys_on_two_sides_are_folded_to_one(cls: type[torch.nn.Module]) -> None:
    module, context = run(offset_keys(seeded(cls)), FoldKeySigns())
    found = decisions(context, "fold-key-signs")
    assert found
    assert {d.outcome for d in found} == {"applied"}
    for each in found:
        assert each.numbers["key_error_after"] < 0.5 * each.numbers["key_error_before"]
    for item in channel_maps(module).sites:
        seen = context.statistics[item.site.key].get(ChannelRange)
        low, high = seen.fields()["low"], seen.fields()["high"]
        assert bool((low + high > 0).all())


@pytest.mark.parametrize(
    "name",
    ["Separate", "PackedSelf", "Fused", "RelativePositions", "GroupedSdpa", "RotaryHalf",
     "RmsNormed", "Tied", "KeysReadElsewhere"],
)  # fmt: skip
def test_forced_folding_transports_statistics_exactly(name: str) -> None:
    torch.manual_seed(1)
    module, context = run(LEGAL[name](), FoldKeySigns(force_signs=True))
    applied = [d for d in decisions(context, "fold-key-signs") if d.outcome == "applied"]
    changed = {s.value for s in context.plan.activations() if s.decided_by == "fold-key-signs"}
    assert bool(applied) == bool(changed)
    single = {
        node: seen
        for node, seen in context.statistics.items()
        if not isinstance(node, tuple) and node in set(module.graph.nodes)
    }
    observe_again(module, single)


@pytest.mark.parametrize("cls", [Packed, UnitNormed])
def test_packed_and_rotary_attention_are_decided_from_their_own_rows(
    cls: type[torch.nn.Module],
) -> None:
    _, context = run(seeded(cls), FoldKeySigns(force_signs=True))
    (found,) = decisions(context, "fold-key-signs")
    assert found.outcome == "applied"
    assert found.numbers["channels"] == 8


@pytest.mark.parametrize("name", ["LayerNormed", "Returned"])
def test_illegal_sites_are_refused_and_left_alone(name: str) -> None:
    torch.manual_seed(0)
    cls, reason = ILLEGAL[name]
    _, context = run(offset_keys(cls()), FoldKeySigns(force_signs=True))
    (found,) = decisions(context, "fold-key-signs")
    assert found.outcome == "refused"
    assert reason in found.reason


def test_symmetric_keys_are_not_worth_it() -> None:
    model = seeded(Separate)
    torch.nn.init.zeros_(model.k.bias)  # type: ignore[union-attr, arg-type]
    module, context = run(model, FoldKeySigns(min_gain=0.4))
    (found,) = decisions(context, "fold-key-signs")
    assert found.outcome == "kept"
    assert not any("signed" in n for n in dict(module.named_buffers()))


def test_after_folding_every_key_channel_has_a_mean_above_zero() -> None:
    module, context = run(seeded(Separate), FoldKeySigns(force_signs=True))
    maps = channel_maps(module)
    view = view_of(maps, maps.sites[0].site.key)
    assert view is not None
    mean, _ = OperandChannels.of(view, context.statistics[view.node]).moments()
    assert bool((mean >= 0).all())


def test_two_sided_channels_may_widen_and_are_then_left_alone() -> None:
    torch.manual_seed(0)
    x = 6.0 * torch.rand(400, 2) ** torch.tensor([1.0, 8.0]) - 1.0  # means 2 and -1/3
    extrema, histogram = ChannelRange(-1), ChannelHistogram(-1, positions=0)
    extrema.update(x)
    histogram.update(x)
    key = OperandChannels(torch.tensor([1, 2]), extrema, histogram, 1.0)
    assert negative_classes([key], RowClasses(2)) == {2}
    folded = key.mirrored(torch.tensor([False, True]))
    (low, high), (lowest, highest) = key.range().bounds(), folded.range().bounds()
    assert highest - lowest > 1.5 * (high - low)
    assert folded.encoding(4, "minmax")[1] > 1.5 * key.encoding(4, "minmax")[1]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_restricted_weight_codes_commute_with_signs_and_full_ones_do_not(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(200)
    weight[0] = -weight.abs().max() - 1.0
    top = 2 ** (bits - 1)

    def grid(qmin: int) -> AffineEncoding:
        scale, zero = torch.tensor(float(weight.abs().max()) / top), torch.tensor(0)
        return AffineEncoding(scale=scale, zero_point=zero, qmin=qmin, qmax=top - 1)

    restricted, full = grid(1 - top), grid(-top)
    assert torch.equal(restricted.fake(-weight), -restricted.fake(weight))
    assert not torch.equal(full.fake(-weight), -full.fake(weight))


def test_sites_of_queries_and_keys_are_decided_and_nothing_else() -> None:
    module, context = run(offset_keys(seeded(Separate)), FoldKeySigns())
    logits = channel_maps(module).sites[0].site.logits
    decided = {s.edge for s in context.plan if s.encoding is not None}
    assert decided == {Edge(logits, (0,)), Edge(logits, (1,))}


def test_a_range_in_linear_scope_keeps_keys_in_float() -> None:
    _, context = run(offset_keys(seeded(Separate)), FoldKeySigns(), scope="linear")
    (found,) = decisions(context, "fold-key-signs")
    assert (found.outcome, found.reason) == ("kept", "the keys stay in float")
