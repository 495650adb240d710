# SPDX-License-Identifier: Apache-2.0
"""Reordering keeps the function, folds where exact, refuses where not, and says why."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.calibration import ChannelRange, Range, Reservoir, build_statistics
from qgraph.calibration.sweep import collect
from qgraph.calibration.transport import permuted_statistics
from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding, LevelEncoding
from qgraph.graph.edges import Edge
from qgraph.graph.permute_channels import (
    apply_fold,
    find_fold,
    insert_gather,
    permute_columns,
)
from qgraph.graph.requests import Request
from qgraph.graph.tensors import get_attr_tensor
from qgraph.graph.trace import trace
from qgraph.graph.value_heads import find_value_heads
from qgraph.passes import ReorderChannels, UseDualRegions
from qgraph.passes.reorder_channels import likely_range
from tests.passes.deciding import decided, seeded

WIDE = torch.tensor([1.0] * 28 + [20.0, 30.0, 60.0, 90.0])[
    torch.randperm(32, generator=torch.Generator().manual_seed(0))
]


class Normed(nn.Module):
    """A layer norm read by two linears and a residual sum; some channels are wide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.left, self.right = nn.Linear(32, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.norm.weight.copy_(WIDE)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.cat([x, x.flip(-1)], -1))
        return torch.cat([self.left(y) + y, self.right(y)], -1)


class Mlp(nn.Module):
    """Two linears with an elementwise function between; some hidden channels are wide."""

    def __init__(self, *, peek: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)
        self.peek = peek

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.first(x))
        out: Tensor = self.second(hidden)
        return out + hidden.sum() if self.peek else out


def wide_mlp(*, peek: bool = False) -> nn.Module:
    model = seeded(Mlp(peek=peek))
    assert isinstance(model, Mlp)
    with torch.no_grad():
        model.first.weight *= WIDE[:, None]
    return model


def outputs(module: nn.Module, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(b) for b in batches])


def test_outlier_channels_get_groups_and_the_float_function_is_kept():
    found = decided(seeded(Normed()), ReorderChannels(tile=1), verify=True)
    ((outcome, reason),) = found.lines("reorder-channels")
    assert outcome == "applied"
    assert "channel groups" in reason
    assert "gathered (layer_norm is also read by add" in reason
    before, after = (outputs(m, found.batches) for m in (found.before, found.module))
    assert float((before - after).abs().max() / before.abs().max()) <= 1e-6
    encodings = {id(s.encoding) for s in found.context.plan if s.decided_by == "reorder-channels"}
    assert len(encodings) == 1


def test_the_gather_makes_groups_contiguous_and_leaves_other_readers_alone():
    found = decided(seeded(Normed()), ReorderChannels(tile=1))
    (gather,) = [n for n in found.module.graph.nodes if "index_select" in n.name]
    assert {u.name.split("_")[0] for u in gather.users} == {"linear"}
    norm = gather.args[0]
    assert any(u.name.startswith("add") for u in norm.users)
    encoding = next(s.encoding for s in found.context.plan if s.decided_by == "reorder-channels")
    assert isinstance(encoding, AffineEncoding)
    assert (encoding.scale.diff() >= 0).all()
    mantissa, _ = torch.frexp(encoding.scale / encoding.scale.min())
    assert (mantissa == 0.5).all()


def test_the_order_is_folded_into_the_linear_before_an_elementwise_function():
    found = decided(wide_mlp(), ReorderChannels(tile=1), verify=True)
    ((outcome, reason),) = found.lines("reorder-channels")[-1:]
    assert outcome == "applied"
    assert "order folded into linear" in reason
    assert not any("index_select" in n.name for n in found.module.graph.nodes)
    before, after = (outputs(m, found.batches) for m in (found.before, found.module))
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-3)


def test_where_somebody_else_reads_the_hidden_value_nothing_is_folded():
    found = decided(wide_mlp(peek=True), ReorderChannels(tile=1), verify=True)
    (_, reason) = found.lines("reorder-channels")[-1]
    assert "gathered (gelu is also read by sum" in reason


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(12)), st.integers(0, 100))
def test_any_permutation_keeps_the_function_bit_for_bit_on_integers(order, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-50, 50, (6, 12), generator=generator)
    weight = torch.randint(-50, 50, (5, 12), generator=generator)
    at = torch.tensor(order)
    assert torch.equal(x[:, at] @ weight[:, at].T, x @ weight.T)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(F.silu(self.first(x)) * 2.0)
        return out


CHAIN = Chain().eval()
TRACED = trace(CHAIN, torch.randn(3, 6))


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(12)), st.booleans())
def test_folding_or_gathering_any_permutation_keeps_the_function(order, fold):
    from qgraph.graph.build import shallow_copy

    module = shallow_copy(TRACED)
    second = [n for n in module.graph.nodes if n.name.startswith("linear")][1]
    value = second.args[0]
    at = torch.tensor(order)
    permute_columns(module, second, at)
    if fold:
        found = find_fold(value, [second])
        assert not isinstance(found, str)
        apply_fold(module, found, at)
    else:
        insert_gather(module, value, [Edge(second, (0,))], at)
    module.graph.lint()
    module.recompile()
    x = torch.randn(7, 6)
    with torch.no_grad():
        assert torch.allclose(module(x), CHAIN(x), rtol=1e-5, atol=1e-5)


def test_a_layer_norm_is_never_reordered_by_gamma_and_beta():
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.norm(x))
            return out

    module = trace(Alone().eval(), torch.randn(3, 16))
    norm = next(n for n in module.graph.nodes if "norm" in n.name and n.op == "call_function")
    (consumer,) = norm.users
    reason = find_fold(norm, [consumer])
    assert isinstance(reason, str)
    assert "is a norm: its weights cannot reorder" in reason
    x, order = torch.randn(5, 16), torch.randperm(16)
    gamma, beta = torch.randn(16), torch.randn(16)
    right = F.layer_norm(x, (16,), gamma, beta)[:, order]
    assert not torch.allclose(F.layer_norm(x, (16,), gamma[order], beta[order]), right, atol=0.1)


def test_a_weight_that_serves_other_values_keeps_its_order_and_its_one_copy():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 32)
            with torch.no_grad():
                self.norm.weight.copy_(WIDE)

        def forward(self, x: Tensor) -> Tensor:
            wide = self.out(self.norm(torch.cat([x, x.flip(-1)], -1)))
            return torch.cat([wide, self.out(wide.tanh())], -1)

    found = decided(seeded(Tied()), ReorderChannels(tile=1), verify=True)
    before, after = (outputs(m, found.batches) for m in (found.before, found.module))
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4)
    told = [reason for o, reason in found.lines("reorder-channels") if o == "applied"]
    assert told
    assert all(reason.endswith("order kept, the weight serves others too") for reason in told)
    assert len(found.module.state_dict()) == len(found.before.state_dict())


def test_even_channels_stay_one_group_and_say_so():
    found = decided(
        seeded(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))),
        ReorderChannels(grouping="outliers", enough_db=99.0),
    )
    assert ("kept", "channel ranges form one group") in found.lines("reorder-channels")
    assert (
        found.module.graph.find_nodes(
            op="call_function", target=torch.ops.aten.index_select.default
        )
        == []
    )


def test_a_gain_that_is_too_small_changes_nothing_unless_forced():
    kept = decided(seeded(Normed()), ReorderChannels(tile=1, min_gain_db=300.0), verify=True)
    assert kept.lines("reorder-channels")[0][0] == "kept"
    assert not kept.steps["reorder-channels"].changed
    forced = ReorderChannels(tile=1, min_gain_db=300.0, force=("left",))
    assert decided(seeded(Normed()), forced).lines("reorder-channels")[0][0] == "applied"
    skipped = decided(seeded(Normed()), ReorderChannels(skip=("left",)))
    assert skipped.lines("reorder-channels") == [("kept", "left alone on request")]


def test_a_second_run_changes_nothing():
    @dataclasses.dataclass(frozen=True)
    class Again(ReorderChannels):
        name = "reorder-channels-again"

    found = decided(seeded(Normed()), ReorderChannels(tile=1), Again(tile=1), verify=True)
    assert not found.steps["reorder-channels-again"].changed
    assert found.lines("reorder-channels-again") == []


def test_a_graph_without_linears_is_left_alone():
    found = decided(
        nn.Sequential(nn.Tanh(), nn.Conv1d(12, 12, 3, padding=1, groups=12)),
        ReorderChannels(),
        verify=True,
    )
    assert found.lines("reorder-channels") == []
    assert not found.steps["reorder-channels"].changed


def test_padding_rows_do_not_vote():
    data = [torch.randn(4, 12, 16) for _ in range(3)]
    for batch in data:
        batch[:, 8:, 3] = 500.0
    mask = torch.arange(12).expand(4, 12) < 8
    model = seeded(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)))
    seen = decided(model, ReorderChannels(tile=1, grouping="outliers", enough_db=99.0), data=data)
    masked = decided(
        model, ReorderChannels(tile=1, grouping="outliers", enough_db=99.0), data=data,
        row_masks=lambda args, kwargs: mask,
    )  # fmt: skip
    assert seen.lines("reorder-channels")[0][0] == "applied"
    assert masked.lines("reorder-channels")[0] == ("kept", "channel ranges form one group")


def test_element_groups_are_available_and_count_their_bits():
    found = decided(seeded(Normed()), ReorderChannels(elements=True), name="int6")
    ((outcome, reason),) = found.lines("reorder-channels")
    assert outcome == "applied"
    encoding = next(s.encoding for s in found.context.plan if s.decided_by == "reorder-channels")
    assert isinstance(encoding, LevelEncoding)
    assert encoding.bits > 8 or "groups" in reason
    assert not found.steps["reorder-channels"].changed


def test_it_takes_over_from_two_regions_only_where_it_is_better():
    found = decided(wide_mlp(), UseDualRegions(force=("*",)), ReorderChannels(tile=1))
    by = {s.decided_by for s in found.context.plan.activations() if "gelu" in s.value.name}
    assert by == {"reorder-channels"}
    found = decided(wide_mlp(), UseDualRegions(force=("*",)), ReorderChannels(min_gain_db=300.0))
    by = {s.decided_by for s in found.context.plan.activations() if "gelu" in s.value.name}
    assert by == {"use-dual-regions"}


def test_transported_statistics_equal_those_of_a_fresh_sweep():
    found = decided(wide_mlp(), ReorderChannels(tile=1))
    value = next(n for n in found.module.graph.nodes if n.name == "gelu")
    transported = found.context.statistics[value]
    asked = [Request(value, "ChannelRange", (("axis", -1),)), Request(value, "Range")]
    fresh = build_statistics(asked)
    collect(found.module, found.batches, fresh)
    for kind in (ChannelRange, Range):
        ours, theirs = transported.get(kind).fields(), fresh[value].get(kind).fields()
        assert torch.allclose(ours["low"], theirs["low"], atol=1e-5)
        assert torch.allclose(ours["high"], theirs["high"], rtol=1e-5)
    rows = transported.get(Reservoir).sampled()
    assert (rows <= transported.get(ChannelRange).fields()["high"] + 1e-4).all()
    identity = permuted_statistics(transported, torch.arange(32))
    assert torch.equal(identity.get(Reservoir).sampled(), rows)


def test_an_unknown_grouping_is_refused():
    with pytest.raises(ConfigError, match="grouping"):
        ReorderChannels(grouping="octave")


class Heads(nn.Module):
    """Two heads whose values are a slice of one fused projection; some value rows are wide."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.out = nn.Linear(16, 96), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x)
        if self.fused:
            q, k, v = parts.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (p.unflatten(-1, (2, 16)).transpose(1, 2) for p in parts.chunk(3, -1))
        mixed = ((q @ k.transpose(-2, -1)) * 0.02).softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def heads_model(*, fused: bool) -> nn.Module:
    model = seeded(Heads(fused=fused))
    assert isinstance(model, Heads)
    with torch.no_grad():
        model.qkv.weight[64:] *= WIDE[:, None]
    return model


@pytest.mark.parametrize("fused", [False, True])
def test_behind_an_attention_the_order_inside_heads_is_folded_into_the_value_rows(fused):
    found = decided(heads_model(fused=fused), ReorderChannels(tile=1), verify=True)
    reasons = [r for o, r in found.lines("reorder-channels") if o == "applied"]
    assert any("inside each head folded into linear" in reason for reason in reasons)
    before, after = (outputs(m, found.batches) for m in (found.before, found.module))
    assert not torch.equal(_fused_weight(found.before), _fused_weight(found.module))
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-3)
    site = next(s for s in found.context.plan.activations() if s.edge.consumer.name == "linear_1")
    fresh = build_statistics([Request(site.value, "ChannelRange", (("axis", -1),))])
    collect(found.module, found.batches, fresh)
    ours = found.context.statistics[site.value].get(ChannelRange).fields()["high"]
    theirs = fresh[site.value].get(ChannelRange).fields()["high"]
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def _fused_weight(module: torch.fx.GraphModule) -> Tensor:
    linear = next(n for n in module.graph.nodes if n.name == "linear")
    return get_attr_tensor(module, linear.args[1])


def test_values_that_several_heads_share_are_not_reordered_by_rows():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value, self.out = (
                nn.Linear(16, 32),
                nn.Linear(16, 16),
                nn.Linear(32, 8),
            )

        def forward(self, x: Tensor) -> Tensor:
            q = self.query(x).unflatten(-1, (2, 16)).transpose(1, 2)
            v = self.value(x).unsqueeze(1).expand(-1, 2, -1, -1)
            a = (q @ v.transpose(-2, -1)).softmax(-1)
            out: Tensor = self.out((a @ v).transpose(1, 2).flatten(2))
            return out

    module = trace(Shared().eval(), torch.randn(2, 5, 16))
    linear = [n for n in module.graph.nodes if n.name.startswith("linear")][-1]
    reason = find_value_heads(linear.args[0], [linear])
    assert isinstance(reason, str)
    assert "other readers" in reason or "several heads" in reason


def test_a_site_that_affine_serves_well_enough_keeps_its_plain_product():
    found = decided(seeded(Normed()), ReorderChannels(enough_db=10.0), name="int8", verify=True)
    ((outcome, reason),) = found.lines("reorder-channels")
    assert outcome == "kept"
    assert "dB are enough" in reason


def test_channels_of_a_convolution_are_grouped_and_their_order_folded():
    model = nn.Sequential(nn.Conv1d(12, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 8, 3))
    with torch.no_grad():
        model[0].weight *= WIDE[:, None, None]  # type: ignore[operator]
    found = decided(model, ReorderChannels(), verify=True)
    reasons = [
        reason for outcome, reason in found.lines("reorder-channels") if outcome == "applied"
    ]
    assert any("order folded into conv1d" in reason for reason in reasons)
    before, after = (outputs(m, found.batches) for m in (found.before, found.module))
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 3]))
def test_ranges_are_extrapolated_little_for_bounded_values_and_much_for_heavy_tails(seed, power):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(4000, 16, generator=generator) ** power
    seen = ChannelRange(-1)
    seen.update(data)
    low, high = likely_range(seen, data[:100])
    fields = seen.fields()
    assert (low <= fields["low"]).all()
    assert (high >= fields["high"]).all()
    growth = float((high / fields["high"]).median())
    assert 1.0 <= growth <= (1.2 if power == 1 else 2.0)
    assert growth >= (1.0 if power == 1 else 1.15)
    same_low, same_high = likely_range(seen, data[:2100])  # less than a doubling tells nothing
    assert torch.equal(same_low, fields["low"])
    assert torch.equal(same_high, fields["high"])
    if power == 3:
        assert (likely_range(seen, data[:1600])[1] > fields["high"]).all()
