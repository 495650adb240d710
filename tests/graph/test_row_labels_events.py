# SPDX-License-Identifier: Apache-2.0
"""Which rows each op sees, wherever among its operands the labelled value stands."""

from __future__ import annotations

import pytest
import torch

from qgraph.graph.row_labels import RowLabels, label_rows
from tests.graph.sketch import Sketch, aten

LAYERS = {"q": [1, 2], "k": [3, 4]}


def behind(target: object, order: tuple[str, ...]) -> RowLabels:
    """An exponential behind an op on two of `q`, `k`, a stored value and a number."""
    s = Sketch()
    x = s.input(2, 3, 5)
    nodes = [s.linear(x, 2, name=name) for name in LAYERS]
    values: dict[str, object] = dict(zip(LAYERS, nodes, strict=True))
    values |= {"stored": s.stored(torch.rand(2, 3, 2), "stored"), "number": 0.5}
    made = s.call(target, *(values[name] for name in order))
    module = s.returns(s.call(aten.exp.default, made))
    return label_rows(module, nodes)


@pytest.mark.parametrize("other", ["stored", "number"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["add", "sub", "mul", "div"])
def test_rows_go_through_sums_and_factors_on_either_side_of_what_has_none(kind, name, other):
    target = getattr(aten, kind).Tensor
    for order in ((name, other), (other, name)):
        if order[0] == "number":
            continue
        labels = behind(target, order)
        rows = LAYERS[name]
        seen = {node.name: found.tolist() for node, found in labels.events}
        assert seen["exp_default"] == rows
        scales = kind in {"mul", "div"}
        plain = scales and order == (name, "number")
        assert (f"{kind}_tensor" in seen) is not plain
        assert {n.target for n in labels.values} <= {aten.linear.default}
        assert bool(labels.values) is not scales
        others = [r for each in LAYERS.values() for r in each if r not in rows]
        assert all(labels.classes.reason(r) for r in rows)
        assert [labels.classes.reason(r) for r in others] == [None, None]


def test_both_operands_of_a_sum_are_seen_and_agree_and_products_end_labels() -> None:
    for order in (("q", "k"), ("k", "q")):
        labels = behind(aten.add.Tensor, order)
        seen = {node.name: found.tolist() for node, found in labels.events}
        assert seen["add_tensor"] == [1, 2, 3, 4]
        assert seen["exp_default"] == LAYERS[order[0]]
        assert [labels.classes.find(v) for v in (1, 2, 3, 4)][:2] == [
            labels.classes.find(v) for v in (3, 4)
        ]
        product = behind(aten.mul.Tensor, order)
        assert [node.name for node, _ in product.events] == ["mul_tensor"]
        assert product.values == {}
