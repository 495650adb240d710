# SPDX-License-Identifier: Apache-2.0
"""The failure that the paper describes: keys on two sides of an empty middle, as in SAM-B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.graph.channel_maps import channel_maps
from qgraph.graph.edges import Edge
from qgraph.passes import CenterKeys, ChooseRanges, FoldKeySigns, InsertQuantizers
from qgraph.pipeline import Fact, Pass, Promise
from qgraph.testing.attention_kinds import Separate
from tests.passes.attention_pipelines import batches, decisions, run


@dataclass(frozen=True)
class OnlyKeys(Pass):
    """Leave everything but keys in float, so that errors are theirs alone."""

    name: ClassVar[str] = "only-keys"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED})

    def run(self, module: GraphModule, context: Context) -> bool:
        keys = {Edge(item.site.logits, (1,)) for item in channel_maps(module).sites}
        context.plan.sites = [site for site in context.plan if site.edge in keys]
        return False


def bimodal() -> nn.Module:
    """Every key channel spreads by about 1 around +8 or -8."""
    torch.manual_seed(0)
    model = Separate()
    with torch.no_grad():
        signs = 1.0 - 2.0 * torch.randint(0, 2, (8,))
        model.k.bias.copy_(8.0 * signs * (0.8 + 0.4 * torch.rand(8)))
        model.k.weight.copy_(torch.linalg.qr(torch.randn(8, 8)).Q)
    return model


def error(bits: int, *passes: Pass) -> float:
    """Squared error of the output with keys at so many bits."""
    model = bimodal()
    module, context = run(model, *passes, OnlyKeys(), ChooseRanges(), InsertQuantizers(), bits=bits)
    for name in ("center-keys", "fold-key-signs"):
        assert len(decisions(context, name)) == sum(p.name == name for p in passes)
    total = 0.0
    with torch.no_grad():
        for batch in batches(4, seed=1):
            total += float((module(*batch) - model(*batch)).square().sum())
    return total


@pytest.mark.parametrize("bits", [4, 6])
def test_centring_or_folding_recovers_a_bit(bits: int) -> None:
    assert error(bits, CenterKeys(), FoldKeySigns()) <= error(bits + 1)


@pytest.mark.parametrize("bits", [4, 6])
def test_folding_alone_quarters_the_error_or_nearly(bits: int) -> None:
    assert error(bits, FoldKeySigns()) <= 0.4 * error(bits)
