# SPDX-License-Identifier: Apache-2.0
"""Which nodes a pattern of the user covers."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule, Node

from qgraph.errors import ConfigError
from qgraph.graph.ignore import Ignore, names_of
from qgraph.graph.ops import OpKind, kind
from tests.graph.sketch import Sketch, aten


def drawn() -> tuple[GraphModule, dict[str, Node]]:
    s = Sketch()
    x = s.input(2, 3)
    weight, bias = s.stored(torch.ones(4, 3), "enc.fc.weight"), s.stored(torch.ones(4), "b")
    linear = s.call(aten.linear.default, x, weight, bias, within="enc.fc")
    relu = s.call(aten.relu.default, linear, within="enc")
    head = s.call(aten.softmax.int, relu, -1)
    tail = s.call(aten.relu.default, head, within="encoder")
    return s.returns(tail), {"linear": linear, "relu": relu, "softmax": head, "tail": tail}


def test_a_node_is_known_by_name_module_kind_and_the_tensors_it_reads() -> None:
    _, nodes = drawn()
    assert list(names_of(nodes["linear"])) == [
        "linear_default", "enc.fc", "linear", "enc_fc_weight", "b",
    ]  # fmt: skip
    assert list(names_of(nodes["relu"])) == ["relu_default", "enc", "elementwise"]
    assert list(names_of(nodes["softmax"])) == ["softmax_int", "", "softmax"]


@pytest.mark.parametrize(
    ("patterns", "covered"),
    [
        ("linear_default", {"linear"}),
        ("relu_default", {"relu"}),
        ("relu_default*", {"relu", "tail"}),
        ("enc", {"linear", "relu"}),
        ("enc.fc", {"linear"}),
        ("enc.*", {"linear"}),
        ("enc*", {"linear", "relu", "tail"}),
        ("encoder", {"tail"}),
        ("en", set()),
        ("ENC", set()),
        ("fc", set()),
        ("softmax", {"softmax"}),
        ("elementwise", {"relu", "tail"}),
        ("b", {"linear"}),
        ("enc_fc_weight", {"linear"}),
        ("*", {"linear", "relu", "softmax", "tail"}),
        ("", set()),
        (("softmax", "encoder"), {"softmax", "tail"}),
        (["nothing", "enc.fc"], {"linear"}),
        (lambda n: kind(n) is OpKind.ELEMENTWISE, {"relu", "tail"}),
        ((lambda n: n.name.startswith("lin"), "softmax"), {"linear", "softmax"}),
        (lambda n: None, set()),
        ((), set()),
    ],
)
def test_patterns_cover_what_they_name_and_what_lies_inside(patterns, covered):
    _, nodes = drawn()
    ignore = Ignore.of(patterns)
    assert {name for name, node in nodes.items() if ignore.matches(node)} == covered


def test_one_pattern_or_several_make_the_same_object() -> None:
    def own(node: Node) -> bool:
        return node.name == "x"

    assert Ignore.of("a") == Ignore(("a",))
    assert Ignore.of(own) == Ignore((own,))
    assert Ignore.of(["a", own]) == Ignore(("a", own))
    assert Ignore.of(()) == Ignore()


def test_patterns_that_cover_no_call_are_refused_by_name() -> None:
    module, _ = drawn()
    Ignore.of(("enc", "softmax", lambda n: n.name == "linear_default")).check(module)
    Ignore().check(module)
    for patterns, named in (
        ("decoder", "decoder"), (("enc", "heads"), "heads"), (("heads", "enc"), "heads"),
        ("x", "x"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"pattern '{named}' matches nothing") as caught:
            Ignore.of(patterns).check(module)
        assert "['enc', 'enc.fc', 'encoder']" in str(caught.value)
        assert "conv_transpose" in str(caught.value)
    with pytest.raises(ConfigError, match="matches nothing"):
        Ignore.of(lambda n: n.op == "placeholder").check(module)


def test_at_most_eight_paths_are_suggested() -> None:
    s = Sketch()
    x = s.input(2, 3)
    for i in range(9):
        x = s.call(aten.relu.default, x, within=f"m{i}")
    with pytest.raises(ConfigError) as caught:
        Ignore.of("none").check(s.returns(x))
    assert "'m7'" in str(caught.value)
    assert "'m8'" not in str(caught.value)
