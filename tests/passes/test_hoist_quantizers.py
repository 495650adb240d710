# SPDX-License-Identifier: Apache-2.0
"""Moving quantizers up: the same numbers, fewer float ops, and never past what would be seen."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.graph.build import insert_buffer
from qgraph.graph.dialect import QUANTIZE, is_quantize
from qgraph.graph.verify import Sample, record_values
from qgraph.passes import HoistQuantizers
from tests.backends.builders import minmax, quantize, signed

aten = torch.ops.aten
X = torch.linspace(-3, 3, 24).reshape(2, 3, 4)


class Rectified(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Moved(nn.Module):
    """A transposed value that a product reads, and in float the caller too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(3, 2)

    def forward(self, x):
        y = self.first(x).transpose(1, 2)
        return self.second(y), y


class MovedTwice(nn.Module):
    """One value that two products read, each through a move of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        y = self.first(x)
        return self.left(y.transpose(1, 2)) + self.right(y.transpose(1, 2).clone())


class MovedAgain(nn.Module):
    """Heads taken apart and put together again around a ReLU: five steps from its product."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.first(x).unflatten(-1, (2, 3)).transpose(1, 2)
        return self.second(torch.relu(y).transpose(1, 2).flatten(2))


class Convolved(nn.Module):
    """Tokens in front turned into a picture of width 1."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.second(self.first(x).transpose(1, 2).unsqueeze(-1))


def built(cls: type[nn.Module], choose=minmax) -> GraphModule:
    torch.manual_seed(0)
    return quantize(cls().eval(), (X,), choose, hoist=False)


def hoisted(module: GraphModule) -> bool:
    changed = HoistQuantizers().run(module, Context(Sample((X,)), [(X,)]))
    module.recompile()
    return changed


def targets(module: GraphModule) -> list[object]:
    return [node.target for node in module.graph.nodes]


def test_a_relu_goes_where_the_zero_point_is_the_lowest_code():
    module = built(Rectified)
    want = module(X)
    assert hoisted(module)
    assert aten.relu.default not in targets(module)
    assert torch.equal(module(X), want)


def test_a_relu_stays_where_codes_reach_below_the_zero_point():
    module = built(Rectified, signed)
    quantizer = next(
        n for n in module.graph.nodes if is_quantize(n) and n.args[0].target is aten.relu.default
    )
    with module.graph.inserting_before(quantizer):
        zero = insert_buffer(module, "middle", torch.tensor(0, dtype=torch.int32), before=quantizer)
    quantizer.args = (*quantizer.args[:2], zero, *quantizer.args[3:])
    module.recompile()
    want = module(X)
    hoisted(module)
    assert aten.relu.default in targets(module)
    assert torch.equal(module(X), want)


def test_a_move_that_is_also_read_in_float_is_not_doubled():
    module = built(Moved)
    want = module(X)
    hoisted(module)
    assert targets(module).count(aten.transpose.int) == 1
    assert all(torch.equal(a, b) for a, b in zip(module(X), want, strict=True))


def test_quantizers_of_one_scale_and_two_zero_points_stay_two():
    module = built(MovedTwice)
    first, second = [
        n for n in module.graph.nodes
        if n.target is QUANTIZE and n.args[0].target in {aten.transpose.int, aten.clone.default}
    ]  # fmt: skip
    other = insert_buffer(module, "other", torch.tensor(3, dtype=torch.int32), before=second)
    scale = next(n for n in second.all_input_nodes if n is second.args[1])
    second.args = (second.args[0], first.args[1], other, *second.args[3:])
    (dequantize,) = second.users
    dequantize.args = (second, first.args[1], other, *dequantize.args[3:])
    module.graph.erase_node(scale) if not scale.users else None
    module.graph.lint()
    module.recompile()
    want = module(X)
    assert hoisted(module)
    assert torch.equal(module(X), want)


def test_a_convolution_behind_a_moved_quantizer_sees_the_same_strides():
    module = built(Convolved)
    reads = next(n for n in module.graph.nodes if n.target is aten.conv2d.default).args[0]
    want = record_values(module, Sample((X,)))[reads.name]
    assert hoisted(module)
    got = record_values(module, Sample((X,)))[reads.name]
    assert torch.equal(got, want)
    assert got.stride() == want.stride()


def test_a_quantizer_goes_through_all_moves_up_to_the_product():
    module = built(MovedAgain)
    want = module(X)
    assert hoisted(module)
    found = targets(module)
    assert aten.relu.default not in found
    assert found.count(aten.transpose.int) == 2
    (product, _) = (n for n in module.graph.nodes if n.target is aten.linear.default)
    assert [user.target for user in product.users] == [QUANTIZE]
    assert torch.equal(module(X), want)
    assert not hoisted(module)
