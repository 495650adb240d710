# SPDX-License-Identifier: Apache-2.0
"""Folding signs of drawn attentions: which stored numbers change, and that no result does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.errors import PassError
from qgraph.graph.build import attribute
from qgraph.graph.channel_maps import channel_maps
from qgraph.graph.sign_folding import fold_signs, negated, unfold_signs
from tests.graph.sketch import Sketch, aten

ROWS = 3
KINDS = ("plain", "no biases", "bias is None", "convolution", "table", "read again")


def turned(s: Sketch, x: Node) -> Node:
    return s.call(aten.transpose.int, x, -2, -1)


def drawn(kind: str) -> tuple[GraphModule, Node, Node, list[Tensor]]:
    """Attention over two inputs, with query and key made by layers of three rows."""
    torch.manual_seed(0)
    s = Sketch()
    x, y = s.input(2, 5, 4), s.input(2, 7, 6, name="y")
    query = s.linear(x, ROWS, bias=kind != "no biases", name="q")
    if kind == "convolution":
        weight, bias = s.stored(torch.randn(ROWS, 6, 1), "k_weight"), torch.randn(ROWS)
        key = s.call(aten.conv1d.default, turned(s, y), weight, s.stored(bias, "k_bias"))
        operand = key
    elif kind == "bias is None":
        key = s.call(aten.linear.default, y, s.stored(torch.randn(ROWS, 6), "k_weight"), None)
        operand = turned(s, key)
    else:
        key = s.linear(y, ROWS, bias=kind != "no biases", name="k")
        operand = turned(s, key)
    logits = s.call(aten.matmul.default, query, operand)
    if kind == "table":
        table = s.call(aten.matmul.default, query, s.stored(torch.randn(ROWS, 7), "table"))
        logits = s.call(aten.add.Tensor, logits, table)
    soft = s.call(aten.softmax.int, logits, -1)
    values = s.input(2, 7, 2, name="v")
    if kind == "read again":
        values = s.linear(key, 2, name="values")
    end = s.call(aten.matmul.default, soft, values)
    module = s.returns(end)
    shapes = [n.meta["val"].shape for n in module.graph.nodes if n.op == "placeholder"]
    return module, query, key, [torch.randn(tuple(shape)) for shape in shapes]


def read(module: GraphModule, node: Node, position: int) -> Tensor | None:
    """The tensor that an argument reads."""
    found = node.args[position] if position < len(node.args) else None
    stored = isinstance(found, Node) and found.op == "get_attr"
    return attribute(module, str(found.target)) if stored else None  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_any_free_signs_change_rows_of_both_and_what_meets_them_and_no_bit_of_the_result(kind):
    for chosen in itertools.product([False, True], repeat=ROWS):
        module, query, key, inputs = drawn(kind)
        want = module(*inputs)
        maps = channel_maps(module)
        (item,) = maps.sites
        roots = [maps.classes.find(v) for v in item.key_rows[0].tolist()]
        assert roots == [maps.classes.find(v) for v in item.query_rows[0].tolist()]
        assert len(set(roots)) == ROWS
        old = {n.name: [read(module, n, i) for i in (1, 2)] for n in (query, key)}
        others = {
            n: [read(module, n, i) for i in (1, 2)]
            for n in module.graph.nodes
            if n.op == "call_function" and n not in (query, key)
        }
        flipped = [root for root, flip in zip(roots, chosen, strict=True) if flip]
        assert fold_signs(module, maps, flipped) is any(chosen)
        module.graph.lint()
        module.recompile()
        assert torch.equal(module(*inputs), want)
        sign = torch.tensor([-1.0 if flip else 1.0 for flip in chosen])
        for node in (query, key):
            for position, before in zip((1, 2), old[node.name], strict=True):
                after = read(module, node, position)
                if before is None:
                    assert after is None
                else:
                    shape = [-1] + [1] * (before.ndim - 1)
                    assert torch.equal(after, before * sign.view(shape))  # type: ignore[arg-type]
        changed = [
            (before, read(module, node, i))
            for node, pair in others.items()
            for i, before in zip((1, 2), pair, strict=True)
            if before is not None and read(module, node, i) is not before
        ]
        assert len(changed) == (any(chosen) and kind in {"table", "read again"})
        for before, after in changed:
            assert after is not None
            assert torch.equal(after, before * (sign[:, None] if kind == "table" else sign))
        assert unfold_signs(module) is any(chosen)
        assert not unfold_signs(module)
        for node in (query, key):
            for position, before in zip((1, 2), old[node.name], strict=True):
                after = read(module, node, position)
                assert before is after or torch.equal(before, after)  # type: ignore[arg-type]
        assert torch.equal(module(*inputs), want)


def test_folds_add_up_and_are_undone_together() -> None:
    module, query, key, inputs = drawn("table")
    want, weights = module(*inputs), [read(module, n, 1) for n in (query, key)]
    for step in ([0, 1], [1, 2], [2]):
        maps = channel_maps(module)
        rows = maps.sites[0].key_rows[0].tolist()
        assert fold_signs(module, maps, [maps.classes.find(rows[i]) for i in step])
    sign = torch.tensor([[-1.0], [1.0], [1.0]])
    module.recompile()
    for node, before in zip((query, key), weights, strict=True):
        assert torch.equal(read(module, node, 1), before * sign)  # type: ignore[arg-type,operator]
    assert torch.equal(module(*inputs), want)
    assert unfold_signs(module)
    for node, before in zip((query, key), weights, strict=True):
        assert torch.equal(read(module, node, 1), before)  # type: ignore[arg-type]
    assert not unfold_signs(module)


def test_layers_that_share_a_weight_share_the_new_one() -> None:
    torch.manual_seed(0)
    s = Sketch()
    x, y = s.input(2, 5, 4), s.input(2, 7, 4, name="y")
    query, key = s.linear(x, ROWS, name="both"), s.linear(y, ROWS, name="both")
    soft = s.call(aten.softmax.int, s.call(aten.matmul.default, query, turned(s, key)), -1)
    module = s.returns(s.call(aten.matmul.default, soft, s.input(2, 7, 2, name="v")))
    maps = channel_maps(module)
    assert fold_signs(module, maps, [2])
    assert query.args[1].target == key.args[1].target  # type: ignore[union-attr]
    assert query.args[2].target == key.args[2].target  # type: ignore[union-attr]
    assert query.args[1].target != "both_weight"  # type: ignore[union-attr]


def test_rows_that_are_pinned_or_stand_for_no_class_are_refused() -> None:
    module, _, _, _ = drawn("plain")
    maps = channel_maps(module)
    row = int(maps.sites[0].key_rows[0, 0])
    root = maps.classes.find(row)
    member = max(row, int(maps.sites[0].query_rows[0, 0]))
    assert member != root
    with pytest.raises(PassError, match=f"rows of class {member} must not change sign"):
        fold_signs(module, maps, [member])
    maps.classes.pin(row, "held")
    with pytest.raises(PassError, match=f"rows of class {root} must not change sign: held"):
        fold_signs(module, maps, [root])


def test_what_has_been_computed_with_since_cannot_be_undone() -> None:
    module, query, _, _ = drawn("plain")
    maps = channel_maps(module)
    assert fold_signs(module, maps, [maps.classes.find(int(maps.sites[0].key_rows[0, 0]))])
    with module.graph.inserting_before(query):
        query.update_arg(1, module.graph.call_function(aten.neg.default, (query.args[1],)))
    with pytest.raises(PassError, match="no longer reads a stored float tensor"):
        unfold_signs(module)


def test_signs_change_where_they_are_asked_to_also_of_zero() -> None:
    given = torch.tensor([[0.0, 1.0, -2.0], [3.0, -0.0, 5.0]])
    got = negated(given, torch.tensor([True, True, False]))
    assert got.tolist() == [[-0.0, -1.0, -2.0], [-3.0, 0.0, 5.0]]
    assert torch.equal(got.signbit(), torch.tensor([[True, True, True], [True, False, False]]))
