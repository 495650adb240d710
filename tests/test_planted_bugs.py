# SPDX-License-Identifier: Apache-2.0
"""Wrong passes, planted on purpose: the manager or the kit catches each and names pass and node."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import qgraph
from qgraph.errors import PassError
from qgraph.graph.build import attribute, insert_call, replace_tensor, set_value
from qgraph.graph.dialect import is_dequantize, is_quantize
from qgraph.graph.edges import Edge
from qgraph.graph.requests import Request
from qgraph.graph.trace import trace
from qgraph.graph.verify import Sample
from qgraph.pipeline import Pass, Pipeline, Promise, run_pipeline
from qgraph.testing import BrokenLawError, assert_preserves, assert_transports

aten = torch.ops.aten


class Net(nn.Module):
    """Attention, a value with two readers, a residual, a ReLU, a reshape by the batch."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.hidden, self.left, self.right = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.query(x) @ self.key(x).transpose(-1, -2)
        y = torch.relu(logits.softmax(-1) @ x + 2.0)
        h = self.hidden(y)
        z = self.left(h) - self.right(h) * 0.5
        return z.reshape(x.shape[0], -1)


torch.manual_seed(3)
MODEL, X = Net().eval(), torch.rand(2, 4, 8)


def linear(module, name):
    return next(
        n for n in module.graph.nodes
        if n.target is aten.linear.default and name in str(n.meta["nn_module_stack"])
    )  # fmt: skip


def op(module, target):
    return next(n for n in module.graph.nodes if n.target is target)


def weight(module, node) -> Tensor:
    return attribute(module, str(node.args[1].target))


@dataclass(frozen=True)
class Bug(Pass):
    promise: ClassVar[Promise] = Promise.EQUIVALENT

    def run(self, module, context):
        self.plant(module)
        return True

    @abstractmethod
    def plant(self, module) -> Any:
        """The bug."""


class TransposesAWeight(Bug):
    name = "transposes-a-weight"

    def plant(self, module):
        node = linear(module, "left")
        replace_tensor(module, Edge(node, (1,)), weight(module, node).t().contiguous(), "w")


class DropsABias(Bug):
    name = "drops-a-bias"

    def plant(self, module):
        node = linear(module, "right")
        node.args = node.args[:2]


class ScalesByAThousandth(Bug):
    name = "scales-by-1.001"

    def plant(self, module):
        node = linear(module, "hidden")
        replace_tensor(module, Edge(node, (1,)), weight(module, node) * 1.001, "w")


class ForgetsMetadata(Bug):
    name = "forgets-metadata"

    def plant(self, module):
        relu = op(module, aten.relu.default)
        with module.graph.inserting_after(relu):
            new = module.graph.call_function(aten.relu.default, (relu,))
        relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


class LeavesStaleMetadata(Bug):
    """softmax of a double gives a double; what follows says float still."""

    name = "leaves-stale-metadata"
    promise = Promise.QUANTIZING

    def plant(self, module):
        softmax = op(module, aten.softmax.int)
        softmax.args = (*softmax.args[:2], torch.float64)
        with module.graph.inserting_after(softmax):
            back = module.graph.call_function(aten.to.dtype, (softmax, torch.float32))
        set_value(module, back)
        softmax.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)


class FlipsOneSign(Bug):
    """A row of the keys, but not of the queries."""

    name = "flips-one-sign"
    promise = Promise.IDENTICAL

    def plant(self, module):
        node = linear(module, "key")
        flipped = weight(module, node).clone()
        flipped[3] *= -1
        replace_tensor(module, Edge(node, (1,)), flipped, "w")


class PermutesOneConsumerOnly(Bug):
    """Rows of hidden and columns of left change places; those of right stay."""

    name = "permutes-one-consumer-only"

    def plant(self, module):
        order = torch.arange(8).flip(0)
        hidden, left = linear(module, "hidden"), linear(module, "left")
        replace_tensor(module, Edge(hidden, (1,)), weight(module, hidden)[order], "w")
        bias = attribute(module, str(hidden.args[2].target))
        replace_tensor(module, Edge(hidden, (2,)), bias[order], "b")
        replace_tensor(module, Edge(left, (1,)), weight(module, left)[:, order], "w")


class ChangesAndSaysNo(Bug):
    name = "changes-and-says-no"
    promise = Promise.QUANTIZING

    def run(self, module, context):
        self.plant(module)
        return False

    def plant(self, module):
        node = linear(module, "hidden")
        replace_tensor(module, Edge(node, (1,)), weight(module, node) * 1.0, "w")


class WritesInPlace(Bug):
    name = "writes-in-place"
    promise = Promise.QUANTIZING

    def plant(self, module):
        weight(module, linear(module, "hidden")).data[0, 0] += 1.0


class ReadsWhatComesLater(Bug):
    name = "reads-what-comes-later"

    def plant(self, module):
        first, second = linear(module, "query"), linear(module, "left")
        first.args = (second, *first.args[1:])


class SwapsTheOperandsOfASubtraction(Bug):
    name = "swaps-operands"
    promise = Promise.IDENTICAL

    def plant(self, module):
        node = op(module, aten.sub.Tensor)
        node.args = (node.args[1], node.args[0])


class MakesANumberInfinite(Bug):
    """It promises nothing, yet a value that no number stands for is never meant."""

    name = "makes-a-number-infinite"
    promise = Promise.QUANTIZING

    def plant(self, module):
        relu = op(module, aten.relu.default)
        new = insert_call(module, aten.div.Tensor, relu, 0.0, like=relu)
        relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


CAUGHT_BY_THE_MANAGER = [
    (TransposesAWeight, "linear_3"),
    (DropsABias, "linear_4"),
    (ScalesByAThousandth, "linear_2"),
    (ForgetsMetadata, "relu_default"),
    (LeavesStaleMetadata, "softmax"),
    (FlipsOneSign, "linear_1"),
    (PermutesOneConsumerOnly, "linear_2"),
    (ChangesAndSaysNo, "w"),
    (WritesInPlace, "linear_2"),
    (ReadsWhatComesLater, "linear"),
    (SwapsTheOperandsOfASubtraction, "sub"),
    (MakesANumberInfinite, "div_tensor"),
]


@pytest.mark.parametrize(
    ("bug", "node"), CAUGHT_BY_THE_MANAGER, ids=lambda v: getattr(v, "name", "")
)
def test_the_manager_catches_the_bug_and_names_pass_and_node(bug, node):
    module = trace(MODEL, X)
    before = [weight(module, linear(module, "hidden")).clone()]
    context = qgraph.Context(sample=Sample((X,)), batches=[X], facts=frozenset({"traced"}))
    with pytest.raises(PassError, match=bug.name) as caught, torch.no_grad():
        run_pipeline(Pipeline("planted", (bug(),)), module, context)
    assert caught.value.pass_name == bug.name
    assert node in str(caught.value.node)
    assert torch.equal(before[0], MODEL.hidden.weight)  # the caller's model never changes


def test_the_clean_graph_passes_all_checks():
    class DoesNothing(Pass):
        name = "does-nothing"
        promise = Promise.EQUIVALENT

        def run(self, module, context):
            return False

    module = trace(MODEL, X)
    context = qgraph.Context(sample=Sample((X,)), batches=[X], facts=frozenset({"traced"}))
    assert run_pipeline(Pipeline("planted", (DoesNothing(),)), module, context)


class DropsAReluThatTheSampleDoesNotNeed(Bug):
    """All samples are positive there, so the manager's replay agrees."""

    name = "drops-a-relu"
    promise = Promise.IDENTICAL

    def plant(self, module):
        relu = op(module, aten.relu.default)
        relu.replace_all_uses_with(relu.args[0])
        module.graph.erase_node(relu)


class FreezesTheBatch(Bug):
    name = "freezes-the-batch"
    promise = Promise.IDENTICAL

    def plant(self, module):
        node = next(
            n for n in module.graph.nodes if "reshape" in str(n.target) or "view" in str(n.target)
        )
        node.args = (node.args[0], [2, *node.args[1][1:]])


@pytest.mark.parametrize(
    ("bug", "words"),
    [(DropsAReluThatTheSampleDoesNotNeed, "outlier channels"), (FreezesTheBatch, "sample")],
)  # fmt: skip
def test_the_kit_catches_what_one_sample_hides(bug, words):
    module = trace(MODEL, X)
    context = qgraph.Context(sample=Sample((X,)), batches=[X], facts=frozenset({"traced"}))
    # the manager sees nothing wrong
    run_pipeline(Pipeline("planted", (bug(),)), module, context)
    with pytest.raises(BrokenLawError, match=words) as caught:
        assert_preserves(bug(), MODEL, (X,))
    assert caught.value.pass_name == bug.name
    assert caught.value.node
    assert "class Net" in caught.value.code


class ForgetsToTransport(Bug):
    """Moves a factor from one linear to the next, and leaves the statistics between them."""

    name = "forgets-to-transport"
    requires = frozenset({"statistics"})

    def statistics(self, module, context):
        yield Request(linear(module, "hidden"), "Range")

    def plant(self, module):
        hidden = linear(module, "hidden")
        for position in (1, 2):
            value = attribute(module, str(hidden.args[position].target))
            replace_tensor(module, Edge(hidden, (position,)), value * 2, "w")
        for name in ("left", "right"):
            node = linear(module, name)
            replace_tensor(module, Edge(node, (1,)), weight(module, node) / 2, "w")


def test_the_kit_catches_statistics_that_were_left_behind():
    assert_preserves(ForgetsToTransport(), MODEL, (X,))
    with pytest.raises(BrokenLawError, match="not what a new sweep sees") as caught:
        assert_transports(ForgetsToTransport(), MODEL, (X,))
    assert (caught.value.pass_name, caught.value.node) == ("forgets-to-transport", "linear_2")


class DoublesAScale(Bug):
    """One quantizer of hidden, both of its nodes: well formed, no promise broken, and wrong."""

    name = "doubles-a-scale"
    promise = Promise.QUANTIZING
    requires = frozenset({"quantized"})

    def plant(self, module):
        decode = linear(module, "hidden").args[0]
        assert is_dequantize(decode)
        assert is_quantize(decode.args[0])
        scale = attribute(module, str(decode.args[1].target))
        replace_tensor(module, Edge(decode, (1,)), scale * 2, "scale")


def test_bisect_names_a_wrong_scale_that_breaks_no_promise():
    pipeline = qgraph.pipeline("int8").insert_after("insert-quantizers", DoublesAScale())
    found = qgraph.bisect(pipeline, MODEL, [X])
    assert found.pass_name == "doubles-a-scale"
    assert found.node.startswith("dequantize")
    assert len(found.nodes) == 1
