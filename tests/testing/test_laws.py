# SPDX-License-Identifier: Apache-2.0
"""The laws hold for what is right, and fail, by name, for what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import qgraph
from qgraph import passes, testing
from qgraph.calibration import Histogram, Moments, Range
from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.graph.build import attribute, insert_call, replace_tensor
from qgraph.graph.edges import Edge
from qgraph.testing import BrokenLawError, Case, ConvBlock, ConvNet, Program, Step

aten = torch.ops.aten
few = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NET = Case(ConvNet(blocks=(ConvBlock(norm=True), ConvBlock(join="add"))))


@few
@given(testing.conv_models())
def test_the_built_in_fold_preserves_and_settles(case):
    testing.assert_preserves(passes.FoldBatchNorm(), case.model(), case.inputs())
    testing.assert_idempotent(passes.FoldBatchNorm(), case.model(), case.inputs())


@few
@given(testing.attention_models())
def test_sign_folding_preserves_every_attention_and_transports_its_statistics(case):
    item = passes.FoldKeySigns(force_signs=True)
    testing.assert_preserves(item, case.model(), case.inputs())
    testing.assert_transports(item, case.model(), case.inputs())


@few
@given(testing.models())
def test_normalisation_preserves_all_models(case):
    testing.assert_preserves(passes.NormalizeOps(), case.model(), case.inputs())


@given(testing.encodings(channels=4), testing.tensors(shape=(5, 4)))
def test_all_formats_obey_the_laws_of_quantizers_on_awkward_tensors(encoding, x):
    testing.assert_monotone(encoding, x)
    testing.assert_idempotent(encoding, encoding.fake(x))
    testing.assert_in_range(encoding, x)
    testing.assert_permutation_invariant(encoding, x, axis=0)
    if encoding.scale.ndim == 0:
        testing.assert_nearest(encoding, x)


@given(testing.affine_encodings(symmetric=True), testing.tensors(shape=(4, 3)))
def test_symmetric_formats_fold_signs(encoding, x):
    testing.assert_sign_fold_invariant(encoding, x)


@given(testing.tensors(shape=(6, 5)))
def test_statistics_merge(x):
    testing.assert_mergeable(Range, x)
    testing.assert_mergeable(Histogram, x)


def test_statistics_that_depend_on_the_split_are_caught():
    class Last(Range):
        def observe(self, seen):
            super().observe(seen)
            self.low = seen.x[-1, 0].clone()

    with pytest.raises(AssertionError, match="field"):
        testing.assert_mergeable(Last, torch.randn(6, 3))
    testing.assert_mergeable(lambda: Moments(axis=-1), torch.randn(6, 3))


@pytest.mark.parametrize(
    ("law", "broken", "words"),
    [
        (testing.assert_monotone, torch.sin, "not monotone"),
        (testing.assert_idempotent, lambda x: x / 2, "becomes"),
        (testing.assert_permutation_invariant, lambda x: x.cumsum(-1), "depend on the order"),
        (testing.assert_sign_fold_invariant, torch.floor, "not the negative"),
    ],
)  # fmt: skip
def test_broken_quantizers_are_caught(law, broken, words):
    x = testing.awkward("normal", (6, 5), seed=1) * 3
    with pytest.raises(AssertionError, match=words):
        law(broken, x)


def test_an_encoding_whose_codes_leave_its_range_is_caught():
    class Wide(AffineEncoding):
        def encode(self, x):
            return super().encode(x) + 9

    encoding = Wide.per_tensor(0.1, 3, IntGrid(4, signed=False))
    with pytest.raises(AssertionError, match=r"code \d+ lies outside \[0, 15\]"):
        testing.assert_in_range(encoding, torch.randn(4, 4))


def test_an_encoding_that_takes_the_second_nearest_level_is_caught():
    class Floor(AffineEncoding):
        def encode(self, x):
            return super().encode(x - self.scale * 0.4)

    encoding = Floor.per_tensor(0.1, 3, IntGrid(4, signed=False))
    with pytest.raises(AssertionError, match="a level lies"):
        testing.assert_nearest(encoding, torch.rand(4, 4))


@dataclass(frozen=True)
class ForgetNegatives(qgraph.Pass):
    """Wrong only where an input is negative: one positive sample hides it."""

    name: ClassVar[str] = "forget-negatives"
    promise: ClassVar[qgraph.Promise] = qgraph.Promise.IDENTICAL

    def run(self, module, context):
        for node in list(module.graph.nodes):
            if node.target is aten.relu.default:
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
                return True
        return False


class Positive(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(torch.relu(x) + 1.0) + self.first(x).sigmoid()


def test_a_pass_that_is_right_on_the_sample_only_is_caught_and_shown_small():
    model, x = Positive().eval(), torch.rand(2, 4)
    with pytest.raises(BrokenLawError, match="forget-negatives promises") as caught:
        testing.assert_preserves(ForgetNegatives(), model, (x,))
    assert "negated" in str(caught.value)
    assert caught.value.pass_name == "forget-negatives"
    assert str(caught.value.node).startswith("add")
    assert "sigmoid" not in caught.value.code
    scope: dict[str, Any] = {}
    exec(caught.value.code, scope)
    part = qgraph.trace(scope["model"], *scope["inputs"])
    with pytest.raises(BrokenLawError):
        testing.assert_preserves(ForgetNegatives(), part, scope["inputs"])


@dataclass(frozen=True)
class DoubleRelu(qgraph.Pass):
    """Right, but it never ends: each run adds a relu."""

    name: ClassVar[str] = "double-relu"
    promise: ClassVar[qgraph.Promise] = qgraph.Promise.IDENTICAL

    def run(self, module, context):
        relu = next((n for n in module.graph.nodes if n.target is aten.relu.default), None)
        if relu is not None:
            extra = insert_call(module, aten.relu.default, relu, like=relu)
            relu.replace_all_uses_with(extra, delete_user_cb=lambda u: u is not extra)
        return relu is not None


def test_a_pass_that_never_settles_is_caught():
    testing.assert_preserves(DoubleRelu(), NET.model(), NET.inputs())
    with pytest.raises(BrokenLawError, match="second run returned True") as caught:
        testing.assert_idempotent(DoubleRelu(), NET.model(), NET.inputs())
    assert "torch.ops.aten.relu.default(" in caught.value.code
    assert caught.value.code.count("= torch.ops.") == 1


@dataclass(frozen=True)
class ScaleWithoutTransport(qgraph.Pass):
    """Keeps the function, but leaves the statistics as they were."""

    name: ClassVar[str] = "scale-without-transport"
    promise: ClassVar[qgraph.Promise] = qgraph.Promise.EQUIVALENT
    requires: ClassVar[frozenset[str]] = frozenset({"statistics"})

    def statistics(self, module, context):
        for node in module.graph.nodes:
            if node.target is aten.linear.default:
                yield qgraph.graph.requests.Request(node, "Range")

    def run(self, module, context):
        first, second = [n for n in module.graph.nodes if n.target is aten.linear.default][:2]
        for node, factor in ((first, 2.0), (second, 0.5)):
            weight = attribute(module, str(node.args[1].target))
            replace_tensor(module, Edge(node, (1,)), weight * factor, "weight")
        return True


def test_a_pass_that_forgets_to_transport_statistics_is_caught():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3)).eval()
    testing.assert_preserves(ScaleWithoutTransport(), model, (torch.randn(3, 4),))
    with pytest.raises(BrokenLawError, match="statistics of linear are not what") as caught:
        testing.assert_transports(ScaleWithoutTransport(), model, (torch.randn(3, 4),))
    assert caught.value.node == "linear"


def test_a_pass_without_a_promise_and_a_missing_fact_are_refused():
    with pytest.raises(ConfigError, match="promises nothing about outputs"):
        testing.assert_preserves(passes.QuantizeBiases(), NET.model(), NET.inputs())

    @dataclass(frozen=True)
    class Strange(ForgetNegatives):
        name: ClassVar[str] = "strange"
        requires: ClassVar[frozenset[str]] = frozenset({"moonlight"})

    with pytest.raises(ConfigError, match=r"strange requires \['moonlight'\]"):
        testing.assert_preserves(Strange(), NET.model(), NET.inputs())


def test_models_of_any_pipeline_have_parity_save_and_export():
    case = Case(Program((Step("linear"), Step("gelu"), Step("linear"), Step("add", 0, 1))))
    for name in ("int8", "ris_w4a4"):
        quantized = qgraph.compile(case.model(), case.loader(), name)
        testing.assert_parity(quantized)
        testing.assert_survives_saving(quantized)
        testing.assert_exports(quantized)


def test_broken_parity_names_the_node(monkeypatch):
    case = Case(Program((Step("linear"), Step("linear"))))
    quantized = qgraph.compile(case.model(), case.loader(), "int8")

    def differs(self, inputs=None):
        raise qgraph.VerificationError("integer differs at linear_1")

    monkeypatch.setattr(qgraph.QuantizedModel, "verify", differs)
    with pytest.raises(AssertionError, match="linear_1"):
        testing.assert_parity(quantized)
