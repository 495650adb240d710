# SPDX-License-Identifier: Apache-2.0
"""Centring keys and folding their signs: decisions at their limits, and the tensors behind them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.calibration import ChannelHistogram, ChannelRange, FusedStatistics, Histogram
from qgraph.calibration.logit_error import LogitError
from qgraph.calibration.operand_channels import OperandChannels
from qgraph.context import Context
from qgraph.graph.build import attribute, shallow_copy
from qgraph.graph.channel_maps import channel_maps
from qgraph.graph.plan import Plan
from qgraph.graph.row_classes import RowClasses
from qgraph.passes import CenterKeys, ChooseRanges, FoldKeySigns, center_keys, fold_key_signs
from qgraph.passes.center_keys import add_to_bias, centring_obstacle, centring_shift
from qgraph.passes.fold_key_signs import (
    mirrored_rows,
    negative_classes,
    range_method,
    stability,
)
from qgraph.pipeline import Pipeline
from qgraph.testing.attention_kinds import Separate, join, split
from tests.passes.attention_pipelines import decisions, offset_keys, run
from tests.passes.by_hand import Hand, aten, normal

ENCODING: Any = None


@functools.cache
def observed() -> tuple[Any, Context]:
    """Attention with keys far from zero, planned and calibrated for both passes."""
    torch.manual_seed(0)
    far = CenterKeys(min_gain=math.inf), FoldKeySigns(min_gain=math.inf)
    return run(offset_keys(Separate()), *far)


def decided(item: Any, totals: list[float], pipeline: tuple[Any, ...] = ()) -> tuple[Any, Any, Any]:
    """Run a pass where the errors of the logits are as told, in the order of the questions."""
    graph, known = observed()
    module = shallow_copy(graph)
    same = dict(zip(graph.graph.nodes, module.graph.nodes, strict=True))
    sites = [
        dataclasses.replace(
            s, edge=dataclasses.replace(s.edge, consumer=same[s.edge.consumer]), encoding=None
        )
        for s in known.plan
    ]
    seen = {
        tuple(same[n] for n in k) if isinstance(k, tuple) else same[k]: v
        for k, v in known.statistics.items()
    }
    context = dataclasses.replace(
        known, plan=Plan(sites), statistics=seen, decisions=[],
        pipeline=Pipeline("test", pipeline) if pipeline else None,
    )  # fmt: skip
    told = iter(totals)
    home: Any = center_keys if isinstance(item, CenterKeys) else fold_key_signs
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(home, "logit_error", lambda *_: LogitError(next(told), 0.5, ENCODING))
        changed = item.run(module, context)
    (line,) = decisions(context, item.name)
    return line, changed, context


SIGNS = (CenterKeys(), FoldKeySigns())


@pytest.mark.parametrize(
    ("item", "totals", "pipeline", "outcome", "reason"),
    [
        (CenterKeys(min_gain=0.5), [1.0, 0.5], (), "applied", "-50.0%"),
        (CenterKeys(min_gain=0.5), [1.0, 0.25], (), "applied", "-75.0%"),
        (CenterKeys(min_gain=0.5), [1.0, 0.75], (), "kept", "not worth it"),
        (CenterKeys(min_gain=0.5), [1.0, 1.5], (), "kept", "+50.0%"),
        (CenterKeys(), [0.0, 0.0], (), "kept", "not worth it"),
        (CenterKeys(), [0.0, 0.5], (), "kept", "+inf%"),
        (CenterKeys(min_gain=0.5), [1.0, 0.5, 0.5], SIGNS, "applied", "-50.0%"),
        (CenterKeys(min_gain=0.5), [1.0, 0.5, 0.25], SIGNS, "kept", "left to fold-key-signs"),
        (CenterKeys(min_gain=0.5), [1.0, 0.5, 0.75], SIGNS, "applied", "-50.0%"),
        (CenterKeys(min_gain=0.5), [1.0, 0.75, 0.9], SIGNS, "kept", "not worth it"),
        (CenterKeys(min_gain=0.5), [1.0, 0.5], SIGNS[::-1], "applied", "-50.0%"),
        (CenterKeys(min_gain=0.5), [1.0, 0.5], SIGNS[:1], "applied", "-50.0%"),
        (CenterKeys(min_gain=0.5), [1.0, 0.5], SIGNS[1:], "applied", "-50.0%"),
        (CenterKeys(force_centring=True), [1.0, 1.5], SIGNS, "applied", "+50.0%"),
        (FoldKeySigns(min_gain=0.5), [1.0, 0.5], (), "applied", "-50.0%"),
        (FoldKeySigns(min_gain=0.5), [1.0, 0.75], (), "kept", "asked for -50.0%"),
        (FoldKeySigns(), [0.0, 0.0], (), "kept", "not worth it"),
        (FoldKeySigns(), [0.0, 0.5], (), "kept", "+inf%"),
        (FoldKeySigns(force_signs=True), [1.0, 1.5], (), "applied", "+50.0%"),
        (FoldKeySigns(min_gain=-1.0), [1.0, 1.5], (), "applied", "+50.0%"),
    ],
)  # fmt: skip
def test_gains_decide_right_at_their_limits(item, totals, pipeline, outcome, reason):
    line, changed, context = decided(item, totals, pipeline)
    assert (line.outcome, changed) == (outcome, outcome == "applied")
    assert reason in line.reason
    assert line.numbers["logit_error_before"] == totals[0]
    assert line.numbers["logit_error_after"] == totals[1]
    assert line.numbers.get("logit_error_signs") == (totals[2] if len(totals) > 2 else None)
    taken = {str(s.edge).rpartition("[")[2] for s in context.plan if s.decided_by == item.name}
    both = {"0]", "1]"} if isinstance(item, FoldKeySigns) else {"1]"}
    assert taken == (both if outcome == "applied" else set())


def test_only_undecided_sites_of_the_keys_themselves_are_decided():
    graph, known = observed()
    assert len(known.plan.activations()) > 4
    _, _, context = decided(CenterKeys(force_centring=True), [1.0, 0.5])
    (site,) = [s for s in context.plan if s.encoding is not None]
    (item,) = channel_maps(graph).sites
    assert site.value.name == item.site.key.name
    assert site.edge.consumer.name == item.site.logits.name


class Bent(Separate):
    """Keys of which a part is read elsewhere, or that share a part of their rows with queries."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.both = how, nn.Linear(8, 12)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k = self.q(y), self.k(y)
        if self.how == "overlap":
            both = self.both(y)
            q, k = both[..., :8], both[..., 4:]
        out: Tensor = self.out(join(self.logits(split(q), split(k)).softmax(-1) @ split(self.v(y))))
        return out + k[..., :2].sum() if self.how == "read" else out


@pytest.mark.parametrize(
    ("how", "reason"),
    [("overlap", "queries and keys are the same value"),
     ("read", "the key projection is also read by sum")],
)  # fmt: skip
def test_a_part_of_the_keys_that_somebody_else_sees_is_enough(how, reason):
    torch.manual_seed(0)
    module, context = run(Bent(how), CenterKeys(force_centring=True))
    (line,) = decisions(context, "center-keys")
    assert line.outcome == "refused"
    assert line.reason.startswith(reason)
    maps = channel_maps(module)
    assert all(centring_obstacle(item.site, maps) == line.reason for item in maps.sites)


def channels(x: Tensor, labels: list[int]) -> OperandChannels:
    extrema, histogram = ChannelRange(-1), ChannelHistogram(-1, positions=0)
    extrema.update(x)
    histogram.update(x)
    return OperandChannels(torch.tensor(labels), extrema, histogram, 1.0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(0, 99))
def test_channels_of_one_row_are_shifted_by_their_common_mean(labels, seed):
    x = normal(200, len(labels), seed=seed) + torch.arange(len(labels)) - 2.0
    key = channels(x, labels)
    mean = key.moments()[0].numpy()
    rows = np.array(labels)
    wanted = [-mean[rows == row].mean() for row in rows]
    np.testing.assert_allclose(centring_shift(key).numpy(), wanted, rtol=1e-9, atol=1e-12)
    ratio = np.abs(mean) / np.sqrt(np.maximum(key.moments()[1].numpy(), 0))
    assert stability(key) == pytest.approx(ratio.min(), rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv", "conv without bias"])
def test_a_shift_is_added_to_the_bias_and_nothing_else_changes(kind):
    hand = Hand()
    conv = kind.startswith("conv")
    x = hand.given("x", normal(2, 4, 9) if conv else normal(2, 4))
    w = hand.stored("w", normal(6, 2, 3, seed=1) if conv else normal(6, 4, seed=1))
    bias = [] if "without" in kind else [hand.stored("b", normal(6, seed=2))]
    rest = ([2], [1], [2], 2) if conv else ()
    held = bias if not conv or bias else [None]
    node = hand.call((aten.conv1d if conv else aten.linear).default, x, w, *held, *rest)
    wanted = node.meta["val"]
    shift = torch.arange(6, dtype=torch.float64) / 8
    module = hand.module()
    add_to_bias(module, node, shift)
    module.graph.lint()
    module.recompile()
    assert node.args[:2] == (x, w)
    assert tuple(node.args[3:]) == rest
    stored = attribute(module, str(node.args[2].target))
    before = torch.zeros(6) if not bias else normal(6, seed=2)
    assert torch.equal(stored, (before.double() + shift).float())
    moved = module(x.meta["val"]) - wanted
    shape = shift.float()[:, None] if conv else shift.float()
    assert torch.allclose(moved, shape.expand_as(moved), atol=1e-5)


def test_classes_are_voted_on_by_the_sum_of_their_means():
    x = torch.tensor([[-3.0, 1.0, 2.0, 0.0, -1.0]]).expand(8, 5)
    key = channels(x, [1, 1, 1, 2, 3])
    assert negative_classes([key], RowClasses(4)) == {3}, "-3 + 1 + 2 is 0, and 0 is not negative"
    other = channels(-x, [1, 1, 3, 2, 2])
    assert negative_classes([key, other], RowClasses(4)) == {3}
    assert negative_classes([other], RowClasses(4)) == {3}
    assert negative_classes([channels(x[:, :1], [2]), channels(x[:, 2:3], [2])],
                            RowClasses(4)) == {2}  # fmt: skip
    bound = RowClasses(4)
    bound.pin(3, "read by somebody else")
    assert negative_classes([key], bound) == set()
    assert negative_classes([], RowClasses(4)) == set()


def test_statistics_of_rows_are_mirrored_where_the_channels_are_the_rows():
    x = normal(50, 4, 4) + 1
    negative = torch.tensor([True, False, True, False])
    seen = FusedStatistics([
        ChannelRange(-1), ChannelRange(1), ChannelRange(2), ChannelHistogram(-1),
        ChannelHistogram(1), ChannelHistogram(2), Histogram(),
    ])  # fmt: skip
    seen.update(x)
    found = mirrored_rows(seen, negative).statistics
    assert sorted((type(s).__name__, s.options()["axis"]) for s in found) == [
        ("ChannelHistogram", -1), ("ChannelHistogram", 1),
        ("ChannelRange", -1), ("ChannelRange", 1),
    ]  # fmt: skip
    for each in found:
        if isinstance(each, ChannelRange):
            axis: Any = each.options()["axis"]
            high = x.transpose(-1, axis).flatten(0, 1).amax(0)
            low = x.transpose(-1, axis).flatten(0, 1).amin(0)
            assert torch.equal(each.fields()["high"], torch.where(negative, -low, high))


@pytest.mark.parametrize(
    ("own", "pipeline", "method"),
    [
        (None, None, "mse"), (None, (), "mse"), (None, ("minmax",), "minmax"),
        (None, ("output",), "mse"), (None, ("percentile",), "percentile"),
        ("entropy", ("minmax",), "entropy"), ("mse", None, "mse"), ("output", ("minmax",), "mse"),
    ],
)  # fmt: skip
def test_ranges_are_chosen_as_asked_for_or_as_the_pipeline_does(own, pipeline, method):
    _, context = observed()
    passes = None if pipeline is None else Pipeline(
        "test", (CenterKeys(), *(ChooseRanges(method=m) for m in pipeline), FoldKeySigns())
    )  # fmt: skip
    context = dataclasses.replace(context, pipeline=passes)
    assert range_method(context, own) == method
