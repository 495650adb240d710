# SPDX-License-Identifier: Apache-2.0
"""Opened attention computes what torch's fused attention does, dead rows included."""

# mypy: disable-error-code="no-any-return,operator,index,assignment"
# Attributes and calls of nn.Module are Tensor | Module, or Any, to the type checker.
from __future__ import annotations

import copy
import functools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from qgraph.graph.decompose_attention import decompose_attention
from qgraph.graph.provenance import module_path, source_line
from qgraph.graph.trace import trace
from tests.graph.rewriting import assert_rewrites, ops, randomize


class Attention(nn.Module):
    """Fused attention over projections of one input, with a mask given at run time."""

    def __init__(self, *, heads: int = 2, groups: int = 2, causal: bool = False,
                 scale: float | None = None) -> None:  # fmt: skip
        super().__init__()
        self.query, self.key = nn.Linear(6, heads * 4), nn.Linear(6, groups * 4)
        self.value = nn.Linear(6, groups * 5)
        self.heads, self.groups, self.causal, self.scale = heads, groups, causal, scale

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        return scaled_dot_product_attention(
            self.split(self.query(x), self.heads), self.split(self.key(memory), self.groups),
            self.split(self.value(memory), self.groups), mask, is_causal=self.causal,
            scale=self.scale, enable_gqa=self.heads != self.groups,
        )  # fmt: skip


def inputs(queries: int = 3, keys: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(2, queries, 6), torch.randn(2, keys, 6)


@pytest.mark.parametrize(
    ("heads", "scale", "mask"),
    [
        ((2, 2), None, "bool"),
        ((4, 1), 0.3, "infinite"),
        ((4, 2), 1.0, "float"),
        ((4, 2), None, "causal"),
    ],
)
def test_opened_attention_equals_fused_attention(heads, scale, mask):
    model = randomize(
        Attention(heads=heads[0], groups=heads[1], causal=mask == "causal", scale=scale)
    )
    allowed = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[0, 0, 0] = False  # a row without any key gives 0
    masks = {
        "bool": (allowed,),
        "infinite": (torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf")),),
        "float": (torch.randn(2, 1, 3, 4),),
        "causal": (),
    }
    args = (*inputs(), *masks[mask])
    module = assert_rewrites(model, args, decompose_attention).float()
    assert "scaled_dot_product_attention" not in ops(module)
    if mask in {"bool", "infinite"}:
        assert bool((module(*args)[0, :, 0] == 0).all())


@given(seed=st.integers(0, 10_000), density=st.floats(0, 1), kind=st.sampled_from(["b", "f"]))
@settings(max_examples=30, deadline=None)
def test_any_mask_gives_what_fused_attention_gives(seed, density, kind):
    fused, opened = masked_pair(kind)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 1, 3, 4, generator=generator) < density
    if kind == "f":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    x, memory = torch.randn(3, 3, 6, generator=generator), torch.randn(3, 4, 6, generator=generator)
    got = opened(x, memory, mask)
    torch.testing.assert_close(got, fused(x, memory, mask), rtol=1e-5, atol=1e-5)
    assert bool(got.isfinite().all())


@functools.cache
def masked_pair(kind: str) -> tuple[GraphModule, GraphModule]:
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool if kind == "b" else torch.float32)
    fused = trace(randomize(Attention()), *inputs(), mask)
    opened = copy.deepcopy(fused)
    decompose_attention(opened)
    opened.recompile()
    return fused, opened


def test_an_unmasked_attention_takes_five_nodes():
    module = trace(randomize(Attention()), *inputs())
    before = ops(module)
    assert decompose_attention(module)
    added = ops(module) - before
    assert added == Counter(transpose=1, matmul=2, mul=1, softmax=1)


def test_a_scale_of_one_takes_no_node():
    module = trace(randomize(Attention(scale=1.0)), *inputs())
    decompose_attention(module)
    assert ops(module)["mul"] == 0


class ConstantMask(Attention):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, memory, self.mask.expand(x.shape[0], -1, -1, -1))


def constant(values: list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.bool).reshape(1, 1, 3, 4)


def test_a_constant_mask_that_hides_nothing_takes_no_node():
    module = assert_rewrites(ConstantMask(constant([[1] * 4] * 3)).eval(), inputs())
    assert ops(module)["masked_fill"] == 0
    floating = assert_rewrites(ConstantMask(torch.zeros(1, 1, 3, 4)).eval(), inputs())
    assert ops(floating)["add"] == 0


def test_rows_are_zeroed_only_where_a_row_may_lack_every_key():
    alive = constant([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    module = assert_rewrites(ConstantMask(alive).eval(), inputs())
    assert ops(module)["masked_fill"] == 1
    dead = constant([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    module = assert_rewrites(ConstantMask(dead).eval(), inputs())
    assert ops(module)["masked_fill"] == 2


class Relative(Attention):
    """A bias computed from the queries, as SAM's relative positions: provably finite."""

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = (x @ memory.transpose(1, 2)).unsqueeze(1) + torch.ones(3, 4)
        return super().forward(x, memory, bias)


def test_a_bias_computed_from_products_needs_no_care_for_infinities():
    module = assert_rewrites(randomize(Relative()), inputs())
    assert ops(module)["masked_fill"] == ops(module)["eq"] == 0


class Shifted(Attention):
    """A computed bias plus a stored one that hides every key from the second query."""

    def __init__(self) -> None:
        super().__init__()
        extra = torch.zeros(3, 4)
        extra[1] = float("-inf")
        self.register_buffer("extra", extra)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, memory, (x @ memory.mT).unsqueeze(1) + self.extra)


def test_a_stored_bias_with_some_infinities_is_taken_care_of():
    module = assert_rewrites(randomize(Shifted()), inputs())
    assert ops(module)["masked_fill"] == 1


class Filled(Attention):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.fill = value

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = (x @ memory.transpose(1, 2)).unsqueeze(1)
        return super().forward(x, memory, bias.masked_fill(bias > 0, self.fill))


@pytest.mark.parametrize(("value", "extra"), [(-100.0, 0), (float("-inf"), 1)])
def test_infinite_fills_are_taken_care_of_finite_ones_need_not(value, extra):
    module = assert_rewrites(randomize(Filled(value)), inputs())
    assert ops(module)["masked_fill"] == 1 + extra


def test_causal_layers_of_one_length_share_their_mask():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(causal=True), Attention(causal=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x, x), self.second(x, x)

    module = assert_rewrites(randomize(Stack()), (torch.randn(2, 4, 6),))
    fills = [n for n in module.graph.nodes if n.target is torch.ops.aten.masked_fill.Scalar]
    assert len(fills) == 2
    assert fills[0].args[1] is fills[1].args[1]
    assert fills[0].args[1].op == "get_attr"


def test_a_dynamic_length_keeps_its_causal_mask_symbolic():
    model = randomize(Attention(causal=True))
    dim = torch.export.Dim.AUTO
    module = trace(
        model, *inputs(4, 4), dynamic_shapes={"x": {0: dim, 1: dim}, "memory": {0: dim, 1: dim}}
    )
    assert decompose_attention(module)
    module.recompile()
    x = torch.randn(3, 6, 6)
    torch.testing.assert_close(module(x, x), model(x, x))


def test_new_nodes_keep_the_module_path_and_source_line():
    module = trace(randomize(Attention()), *inputs())
    fused = next(n for n in module.graph.nodes if "scaled_dot" in str(n.target))
    path, line = module_path(fused), source_line(fused)
    decompose_attention(module)
    softmax = next(n for n in module.graph.nodes if n.target is torch.ops.aten.softmax.int)
    assert (module_path(softmax), source_line(softmax)) == (path, line)
    assert line.startswith("test_decompose_attention.py:")


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_opens_into_linear_matmul_and_softmax(need_weights):
    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.attention(x, x, x, need_weights=need_weights)

    module = assert_rewrites(randomize(Self()), (torch.randn(2, 5, 8),))
    counts = ops(module)
    assert (counts["linear"], counts["matmul"], counts["softmax"]) == (2, 2, 1)
    assert counts["bmm"] == counts["scaled_dot_product_attention"] == 0
