# SPDX-License-Identifier: Apache-2.0
"""Centring keys: function preserved, refused where softmax would see it, weighed against signs."""

from __future__ import annotations

import pytest
import torch

from qgraph.calibration import ChannelRange
from qgraph.graph.channel_maps import channel_maps
from qgraph.graph.verify import Sample, record_values
from qgraph.passes import CenterKeys, FoldKeySigns
from qgraph.testing.attention_kinds import (
    LEGAL,
    Grouped,
    KeysReadElsewhere,
    Masked,
    NoBias,
    Packed,
    PackedSelf,
    RelativePositions,
    Returned,
    RmsNormed,
    RotaryHalf,
    RotaryPairs,
    ScaledKeys,
    Separate,
    SoftCapped,
    Temperature,
    UnitNormed,
)
from tests.passes.attention_pipelines import (
    batches,
    decisions,
    observe_again,
    offset_keys,
    run,
)

CENTRED = (
    Separate, NoBias, Masked, Grouped, Packed, PackedSelf, RelativePositions,
    ScaledKeys, Temperature,
)  # fmt: skip


@pytest.mark.parametrize("cls", CENTRED)
def test_logits_move_by_a_constant_per_query(cls: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    model = offset_keys(cls())
    plain, _ = run(model)
    module, context = run(model, CenterKeys(force_centring=True))
    (found,) = decisions(context, "center-keys")
    assert found.outcome == "applied", found.reason
    sample = Sample(batches()[1])
    site = channel_maps(module).sites[0].site
    was, now = (record_values(m, sample) for m in (plain, module))
    moved = (now[site.logits.name] - was[site.logits.name]).double()
    assert float((moved - moved.mean(-1, keepdim=True)).abs().max()) < 1e-4
    assert float(moved.abs().max()) > 1e-3


@pytest.mark.parametrize("cls", [Separate, ScaledKeys])
def test_centred_keys_have_no_mean_left(cls: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    module, _ = run(offset_keys(cls()), CenterKeys(force_centring=True))
    key = channel_maps(module).sites[0].site.key.name
    seen = [record_values(module, Sample(batch), {key})[key] for batch in batches()]
    assert float(torch.cat(seen).mean((0, -1)).abs().max()) < 0.1


@pytest.mark.parametrize("cls", [Separate, Grouped])
def test_transported_ranges_equal_observed_ones(cls: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    module, context = run(offset_keys(cls()), CenterKeys(force_centring=True))
    key = channel_maps(module).sites[0].site.key
    assert context.statistics[key].find(ChannelRange) is not None
    observe_again(module, {key: context.statistics[key]})


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (RotaryHalf, "more than movement"),
        (RotaryPairs, "more than movement"),
        (RmsNormed, "more than movement"),
        (UnitNormed, "more than movement"),
        (SoftCapped, "tanh"),
        (Returned, "also read by output"),
        (KeysReadElsewhere, "also read by linear"),
    ],
)
def test_centring_is_refused_where_it_would_be_seen(
    cls: type[torch.nn.Module], reason: str
) -> None:
    torch.manual_seed(0)
    _, context = run(offset_keys(cls()), CenterKeys(force_centring=True))
    (found,) = decisions(context, "center-keys")
    assert found.outcome == "refused"
    assert reason in found.reason


@pytest.mark.parametrize("name", ["Tied", "Twice", "TwoWay", "LowRank", "Convolved"])
def test_centring_by_force_never_breaks_its_promise(name: str) -> None:
    torch.manual_seed(2)
    _, context = run(offset_keys(LEGAL[name](), 2.0), CenterKeys(force_centring=True))
    assert decisions(context, "center-keys")


def test_each_site_goes_to_the_better_of_centring_and_signs() -> None:
    torch.manual_seed(0)
    _, context = run(offset_keys(Separate()), CenterKeys(), FoldKeySigns())
    (centred,) = decisions(context, "center-keys")
    (folded,) = decisions(context, "fold-key-signs")
    assert {centred.outcome, folded.outcome} == {"applied", "kept"}
    best = min(centred.numbers["logit_error_after"], centred.numbers["logit_error_signs"])
    winner = centred if centred.outcome == "applied" else folded
    assert winner.numbers["logit_error_after"] == pytest.approx(best)


def test_keys_around_zero_are_not_worth_centring() -> None:
    torch.manual_seed(0)
    model = Separate()
    torch.nn.init.zeros_(model.k.bias)
    module, context = run(model, CenterKeys())
    (found,) = decisions(context, "center-keys")
    assert found.outcome == "kept"
    assert not any("centred" in n for n in dict(module.named_buffers()))
