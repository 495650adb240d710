# SPDX-License-Identifier: Apache-2.0
"""Balancing changes no bit of the float function, and lowers the quantized error or stays away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.calibration import ChannelRange, build_statistics
from qgraph.calibration.sweep import collect
from qgraph.graph.requests import Request
from qgraph.graph.scale_channels import find_scaled_source
from qgraph.graph.trace import trace
from qgraph.passes import BalanceChannels
from qgraph.passes.balance_channels import exponents
from tests.passes.deciding import Decided, decided, seeded

WIDE = torch.tensor([1.0] * 28 + [20.0, 30.0, 60.0, 90.0])


class Block(nn.Module):
    """Something, a wide value, and a linear that reads it."""

    def __init__(self, kind: str, *, peek: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8)
        self.kind, self.peek = kind, peek

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "norm": self.norm, "relu": F.relu, "gelu": F.gelu,
        }  # fmt: skip
        wide = functions[self.kind](hidden)
        out: Tensor = self.out(wide)
        return out + wide.sum(-1, keepdim=True) if self.peek else out


def balanced(kind: str, *, peek: bool = False, bits: str = "int8") -> Decided:
    model = seeded(Block(kind, peek=peek))
    assert isinstance(model, Block)
    with torch.no_grad():
        model.norm.weight.copy_(WIDE)
        model.first.weight *= WIDE[:, None]
    return decided(model, BalanceChannels(skip=("first",)), name=bits, verify=True)


@pytest.mark.parametrize(
    ("kind", "how"),
    [("norm", "folded into layer_norm"), ("relu", "folded into linear"), ("gelu", "multiplied (")],
)
def test_outputs_are_the_same_bits_wherever_the_factors_went(kind, how):
    found = balanced(kind)
    outcome, reason = found.lines("balance-channels")[-1]
    assert outcome == "applied"
    assert how in reason
    assert found.steps["balance-channels"].changed
    with torch.no_grad():
        for batch in found.batches:
            assert torch.equal(found.before(batch), found.module(batch))


def test_another_reader_keeps_the_unscaled_value():
    found = balanced("norm", peek=True)
    _, reason = found.lines("balance-channels")[-1]
    assert "multiplied (layer_norm is also read by sum" in reason
    with torch.no_grad():
        assert torch.equal(found.before(found.batches[0]), found.module(found.batches[0]))


def test_transported_ranges_equal_those_of_a_fresh_sweep():
    found = balanced("norm")
    site = next(s for s in found.context.plan if s.decided_by == "balance-channels")
    ours = found.context.statistics[site.value].get(ChannelRange)
    fresh = build_statistics([Request(site.value, "ChannelRange", (("axis", -1),))])
    collect(found.module, found.batches, fresh)
    theirs = fresh[site.value].get(ChannelRange)
    assert ours.low is not None
    assert theirs.low is not None
    assert torch.equal(ours.low, theirs.low)


def test_even_channels_are_left_alone_with_the_measured_gain():
    model = seeded(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)))
    found = decided(model, BalanceChannels(min_gain_db=3.0), verify=True)
    assert {outcome for outcome, _ in found.lines("balance-channels")} == {"kept"}
    assert not found.steps["balance-channels"].changed
    assert "balancing gains" in found.lines("balance-channels")[0][1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40))
def test_factors_are_powers_of_two_from_one_up_and_larger_for_wider_channels(seed, channels):
    generator = torch.Generator().manual_seed(seed)
    seen = ChannelRange(-1)
    seen.update(torch.randn(8, channels, generator=generator) * torch.rand(channels).exp2() * 8)
    weight = torch.ones(4, channels)
    for factor in exponents(seen, weight):
        mantissa, _ = torch.frexp(factor)
        assert (mantissa == 0.5).all()
        assert float(factor.min()) == 1.0
        assert seen.high is not None
        assert seen.low is not None
        width = seen.high.clamp(min=0) - seen.low.clamp(max=0)
        order = width.argsort()
        assert (factor[order].diff() >= 0).all()


def test_what_does_not_commute_with_a_scale_is_named():
    class Tanh(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(x.tanh())
            return out

    module = trace(Tanh().eval(), torch.randn(3, 16))
    value = next(n for n in module.graph.nodes if n.name == "tanh")
    assert find_scaled_source(value, list(value.users)) == "tanh does not commute with a scale"
