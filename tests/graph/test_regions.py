# SPDX-License-Identifier: Apache-2.0
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim

from qgraph.errors import ConfigError, PassError
from qgraph.graph.canonicalize import canonicalize
from qgraph.graph.extract import extract
from qgraph.graph.regions import GRANULARITIES, cut_points, find_regions
from qgraph.graph.trace import trace


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.expand, self.contract = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x, mask):
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(
            2, 0, 3, 1, 4
        ).unbind(0)  # fmt: skip
        weights = (query @ key.transpose(-2, -1) + mask).softmax(-1)
        x = x + self.project((weights @ value).transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, dim=8, depth=2):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 2, 2)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, image, keep):
        x = self.embed(image).flatten(2).transpose(1, 2)
        mask = (1.0 - keep[:, None, None, :]) * -10.0
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x)[:, 0])


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4, 4))
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(3))
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        kept = []
        for conv in self.down:
            x = F.relu(conv(x))
            kept.append(x)
        for conv, skip in zip(self.up, reversed(kept[:-1]), strict=True):
            x = F.relu(conv(torch.cat([x, skip], 1)))
        return self.head(x)


class Chain(nn.Module):
    """Convolutions with residuals, splits and a value used twice, as drawn."""

    def __init__(self, plan):
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in plan)

    def forward(self, x):
        saved = x
        for kind, layer in zip(self.plan, self.layers, strict=True):
            if kind == "plain":
                x = F.relu(layer(x))
            elif kind == "residual":
                x = x + layer(F.relu(x))
            elif kind == "late":
                x, saved = layer(x) * saved, x
            else:
                first, second = layer(x).chunk(2, 1)
                x = torch.cat([second, first], 1)
        return x, saved


def graph_of(model, *args, dynamic_shapes=None):
    torch.manual_seed(0)
    module = trace(model.eval(), *args, dynamic_shapes=dynamic_shapes)
    canonicalize(module)
    module.recompile()
    return module


@cache
def transformer():
    keep = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    module = graph_of(Transformer(), torch.randn(2, 3, 4, 4), keep.repeat(2, 1))
    return module, (torch.randn(5, 3, 4, 4), keep.repeat(5, 1))


def run_by_regions(module, regions, args):
    names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    values = dict(zip(names, args, strict=True))
    for region in regions:
        part = extract(module, region.inputs, region.outputs)
        made = part(*(values[name] for name in region.inputs))
        values.update(zip(region.outputs, made, strict=True))
    output = next(n for n in module.graph.nodes if n.op == "output")
    return [values[n.name] for n in output.all_input_nodes]


def assert_partition(module, regions):
    inside = [name for region in regions for name in region.nodes]
    calls = [n for n in module.graph.nodes if n.name in set(inside)]
    assert inside == [n.name for n in calls]
    weights = [name for region in regions for name in region.weights]
    assert len(weights) == len(set(weights))
    products = [n.name for n in module.graph.nodes if "conv" in n.name or "linear" in n.name]
    assert set(products) <= set(weights)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_running_the_regions_is_running_the_graph_bit_for_bit_at_another_batch(granularity):
    module, args = transformer()
    regions = find_regions(module, granularity)
    assert_partition(module, regions)
    (got,) = run_by_regions(module, regions, args)
    assert torch.equal(got, module(*args))


@settings(max_examples=6, deadline=None)
@given(
    plan=st.lists(st.sampled_from(["plain", "residual", "late", "split"]), min_size=1, max_size=4),
    limit=st.integers(1, 3),
)
def test_composition_equals_the_graph_for_random_graphs(plan, limit):
    module = graph_of(Chain(plan), torch.randn(2, 4, 5, 5))
    x = torch.randn(3, 4, 5, 5)
    for granularity in GRANULARITIES:
        regions = find_regions(module, granularity, max_products=limit)
        assert_partition(module, regions)
        for got, want in zip(run_by_regions(module, regions, (x,)), module(x), strict=True):
            assert torch.equal(got, want)


def test_granularities_find_layers_residuals_blocks_and_stages():
    module, _ = transformer()
    names = {g: [r.name for r in find_regions(module, g)] for g in GRANULARITIES}
    assert len(names["layer"]) == 10
    assert names["subblock"] == [
        "embed", "blocks.0", "blocks.0", "blocks.1", "blocks.1", "head",
    ]  # fmt: skip
    assert names["block"] == names["auto"] == ["embed", "blocks.0", "blocks.1", "head"]
    assert names["stage"] == ["embed", "blocks", "head"]


def test_cuts_close_residuals():
    module, _ = transformer()
    adds = [n.name for n in module.graph.nodes if n.name.startswith("add")]
    cuts = cut_points(module)
    residual = [name for name in adds if name in cuts]
    assert len(residual) == 4  # the mask is added in every block, and is no activation


def test_masks_are_side_inputs_that_do_not_move():
    module, _ = transformer()
    blocks = [r for r in find_regions(module, "block") if r.name.startswith("blocks")]
    for region in blocks:
        assert len([i for i in region.inputs if i in region.moving]) == 1
    assert len(blocks[1].inputs) == 2


def test_a_unet_is_cut_with_more_live_values_where_no_single_one_closes():
    module = graph_of(UNet(), torch.randn(2, 3, 8, 8))
    assert max(len(r.weights) for r in find_regions(module, "block")) == 5
    regions = find_regions(module, "auto", max_products=4)
    assert max(len(r.weights) for r in regions) <= 4
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(run_by_regions(module, regions, (x,))[0], module(x))


class TokensFirst(nn.Module):
    """Attention over [tokens, batch, channels], or over [batch, tokens, channels]."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis
        self.embed, self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, keep):
        mask = keep.movedim(0, self.axis)
        x = self.embed(x).movedim(0, self.axis)
        rows = self.second(F.relu(self.first(x.flatten(0, 1))))
        x = (x + rows.view_as(x)) * mask
        return self.last(F.relu(x.movedim(self.axis, 0))) + keep


@pytest.mark.parametrize(("axis", "count"), [(0, 4), (1, 1)])
def test_no_region_ends_where_rows_are_sorted_by_token(axis, count):
    args = (torch.randn(2, 3, 4), torch.ones(2, 3, 1))
    module = graph_of(TokensFirst(axis), *args)
    regions = find_regions(module, "layer")
    assert len(regions) == count
    args = (torch.randn(5, 3, 4), torch.rand(5, 3, 1))
    assert torch.equal(run_by_regions(module, regions, args)[0], module(*args))
    for region in find_regions(module, "subblock"):
        extract(module, region.inputs, region.outputs)


def test_a_free_number_of_tokens_is_not_taken_for_the_batch():
    args = (torch.randn(2, 3, 4), torch.ones(2, 3, 1))
    sizes = {name: {0: Dim("batch"), 1: Dim("tokens")} for name in ("x", "keep")}
    module = graph_of(TokensFirst(1), *args, dynamic_shapes=sizes)
    assert len(find_regions(module, "layer")) == 1


def test_extraction_shares_tensors_and_refuses_missing_inputs():
    module, _ = transformer()
    region = find_regions(module, "block")[1]
    part = extract(module, region.inputs, region.outputs)
    shared = {id(p) for p in module.parameters()}
    assert list(part.parameters())
    assert all(id(p) in shared for p in part.parameters())
    with pytest.raises(PassError, match="is needed too"):
        extract(module, [], region.outputs)


def test_an_unknown_granularity_is_refused():
    module, _ = transformer()
    with pytest.raises(ConfigError, match="block"):
        find_regions(module, "blocks")
