# SPDX-License-Identifier: Apache-2.0
"""Sign folding: bit-identical, decided by benefit, statistics transported, every site reported."""

from __future__ import annotations

import pytest
import torch

from qgraph.calibration import ChannelRange
from qgraph.graph.channel_maps import channel_maps
from qgraph.graph.edges import Edge
from qgraph.passes import FoldKeySigns
from tests.graph.attention_models import (
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


def test_sites_of_queries_and_keys_are_decided_and_nothing_else() -> None:
    module, context = run(offset_keys(seeded(Separate)), FoldKeySigns())
    logits = channel_maps(module).sites[0].site.logits
    decided = {s.edge for s in context.plan if s.encoding is not None}
    assert decided == {Edge(logits, (0,)), Edge(logits, (1,))}


def test_a_range_in_linear_scope_keeps_keys_in_float() -> None:
    _, context = run(offset_keys(seeded(Separate)), FoldKeySigns(), scope="linear")
    (found,) = decisions(context, "fold-key-signs")
    assert (found.outcome, found.reason) == ("kept", "the keys stay in float")
