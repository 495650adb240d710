# SPDX-License-Identifier: Apache-2.0
"""Laws of the two passes on random graphs (method file, P3, P9 and P11)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.graph.build import shallow_copy
from qgraph.graph.permute_channels import permute_columns
from qgraph.graph.trace import trace
from qgraph.graph.value_heads import ValueHeads, apply_value_heads, find_value_heads
from qgraph.passes import ReorderChannels, UseDualRegions
from tests.passes.deciding import decided, seeded

few = settings(max_examples=3, deadline=None)
KINDS = ("gelu", "relu", "norm", "attention", "gate")


class Block(nn.Module):
    """One residual step of a random network of 16 channels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)
        with torch.no_grad():
            self.norm.weight[::5] = 12.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.kind == "norm":
            return y
        hidden = self.first(y)
        if self.kind == "attention":
            scores = (hidden[..., :16] @ y.transpose(-2, -1) * 0.1).softmax(-1)
            hidden = scores @ hidden
        elif self.kind == "gate":
            hidden = F.silu(hidden) * hidden
        else:
            hidden = F.gelu(hidden) if self.kind == "gelu" else F.relu(hidden)
        out: Tensor = x + self.second(hidden)
        return out


@few
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), st.integers(0, 1000))
def test_random_graphs_keep_their_function_shapes_and_dynamic_batch(kinds, seed):
    model = seeded(nn.Sequential(*(Block(kind) for kind in kinds)), seed)
    found = decided(model, UseDualRegions(), ReorderChannels(tile=1))
    x = torch.randn(7, 12, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        before, after = found.before(x), found.module(x)
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    moved = any(outcome == "applied" for outcome, _ in found.lines("reorder-channels"))
    assert found.steps["reorder-channels"].changed <= moved
    assert not found.steps["use-dual-regions"].changed


@few
@given(st.permutations(range(16)), st.sampled_from([1, 2, 8]))
def test_decisions_do_not_depend_on_how_the_data_came_in_batches(order, size):
    model = seeded(nn.Sequential(Block("gelu"), Block("norm"), nn.Linear(16, 4)))
    data = torch.randn(16, 12, 16, generator=torch.Generator().manual_seed(0))
    passes = (UseDualRegions(), ReorderChannels(tile=1))
    first = decided(model, *passes, data=list(data.split(4)))
    second = decided(model, *passes, data=list(data[torch.tensor(order)].split(size)))
    assert first.formats() == second.formats()
    for item in passes:
        outcomes = [[o for o, _ in found.lines(item.name)] for found in (first, second)]
        assert outcomes[0] == outcomes[1]


class Heads(nn.Module):
    """Two heads of 16 channels in front of an output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 96), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (2, 16)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        out: Tensor = self.out(
            ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        )
        return out


HEADS = trace(seeded(Heads()).eval(), torch.randn(2, 5, 16))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=32, max_size=32))
def test_any_groups_behind_an_attention_fold_into_the_value_rows_head_by_head(group):
    module = shallow_copy(HEADS)
    last = [n for n in module.graph.nodes if n.name.startswith("linear")][-1]
    heads = find_value_heads(last.args[0], [last])
    assert isinstance(heads, ValueHeads)
    order = heads.order(torch.tensor(group))
    assert torch.equal(order.sort().values, torch.arange(32))
    assert torch.equal(heads.heads[order], heads.heads)
    permute_columns(module, last, order)
    apply_value_heads(module, heads, order)
    module.graph.lint()
    module.recompile()
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(module(x), HEADS(x), rtol=1e-4, atol=1e-4)
