# SPDX-License-Identifier: Apache-2.0
"""The pass manager: order from facts, honesty, promises, and errors that name the culprit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.errors import ConfigError, PassError, VerificationError
from qgraph.graph.build import attribute, insert_call, replace_tensor
from qgraph.graph.edges import Edge
from qgraph.graph.trace import trace
from qgraph.graph.verify import Sample
from qgraph.pipeline import Pass, Pipeline, Promise, run_pipeline

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def run(*passes, facts=()):
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    module = trace(Net().eval(), x)
    context = Context(sample=Sample((x,)), batches=[x], facts=frozenset(facts))
    steps = run_pipeline(Pipeline("test", passes), module, context)
    return module, context, steps


def node_of(module: GraphModule, target: object, index: int = 0):
    return [n for n in module.graph.nodes if n.target is target][index]


def scale_weight(module: GraphModule, factor: float) -> None:
    linear = node_of(module, aten.linear.default)
    weight = attribute(module, str(linear.args[1].target))
    replace_tensor(module, Edge(linear, (1,)), weight * factor, "weight")


@dataclass(frozen=True)
class Base(Pass):
    name: ClassVar[str] = "base"
    promise: ClassVar[Promise] = Promise.IDENTICAL

    def run(self, module, context):
        return False


@dataclass(frozen=True)
class ScaleSilently(Base):
    name: ClassVar[str] = "scale-silently"
    promise: ClassVar[Promise] = Promise.EQUIVALENT
    factor: float = 1.001

    def run(self, module, context):
        scale_weight(module, self.factor)
        return True


@dataclass(frozen=True)
class WriteInPlace(Base):
    name: ClassVar[str] = "write-in-place"
    promise: ClassVar[Promise] = Promise.QUANTIZING

    def run(self, module, context):
        linear = node_of(module, aten.linear.default)
        attribute(module, str(linear.args[1].target)).data[0, 0] += 1.0
        return True


@dataclass(frozen=True)
class LieAboutChange(Base):
    name: ClassVar[str] = "lie-about-change"
    says: bool = False

    def run(self, module, context):
        if not self.says:
            scale_weight(module, 1.0)
        return self.says


@dataclass(frozen=True)
class ForgetMetadata(Base):
    name: ClassVar[str] = "forget-metadata"

    def run(self, module, context):
        relu = node_of(module, aten.relu.default)
        with module.graph.inserting_after(relu):
            extra = module.graph.call_function(aten.relu.default, (relu,))
        relu.replace_all_uses_with(extra, delete_user_cb=lambda u: u is not extra)
        return True


@dataclass(frozen=True)
class DropBias(Base):
    name: ClassVar[str] = "drop-bias"
    promise: ClassVar[Promise] = Promise.EQUIVALENT

    def run(self, module, context):
        linear = node_of(module, aten.linear.default, 1)
        linear.args = linear.args[:2]
        return True


@dataclass(frozen=True)
class DoubleRelu(Base):
    """An exact rewrite: relu(relu(x)) = relu(x)."""

    name: ClassVar[str] = "double-relu"
    establishes: ClassVar[frozenset[str]] = frozenset({"doubled"})

    def run(self, module, context):
        relu = node_of(module, aten.relu.default)
        extra = insert_call(module, aten.relu.default, relu, like=relu)
        relu.replace_all_uses_with(extra, delete_user_cb=lambda u: u is not extra)
        return True


@dataclass(frozen=True)
class NeedDoubled(Base):
    name: ClassVar[str] = "need-doubled"
    requires: ClassVar[frozenset[str]] = frozenset({"doubled"})


@dataclass(frozen=True)
class LoseDoubled(Base):
    name: ClassVar[str] = "lose-doubled"
    invalidates: ClassVar[frozenset[str]] = frozenset({"doubled"})


def test_an_exact_rewrite_passes_and_is_stamped_with_the_name_of_its_pass():
    module, _, steps = run(DoubleRelu())
    made = [n for n in module.graph.nodes if "custom" in n.meta]
    assert [n.meta["custom"]["qgraph"]["created_by"] for n in made] == ["double-relu"]
    assert steps[0].max_abs == 0.0
    assert steps[0].changed


def test_a_missing_fact_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match=r"need-doubled .step 1.*'doubled'.*no pass before it"):
        run(NeedDoubled())


def test_a_fact_established_too_late_names_the_pass_to_move_behind():
    with pytest.raises(ConfigError, match="double-relu establishes only later"):
        run(NeedDoubled(), DoubleRelu())


def test_an_invalidated_fact_names_who_invalidated_it():
    with pytest.raises(ConfigError, match="which lose-doubled invalidated"):
        run(DoubleRelu(), LoseDoubled(), NeedDoubled())


def test_a_scaled_weight_breaks_the_promise_and_the_node_is_named():
    with pytest.raises(VerificationError, match="scale-silently promises") as caught:
        run(ScaleSilently())
    assert caught.value.pass_name == "scale-silently"
    assert caught.value.node == "linear"
    assert "in first" in str(caught.value)
    assert "test_pipeline.py" in str(caught.value)
    assert 1e-4 < caught.value.max_abs < 1e-2


def test_a_difference_within_the_tolerance_is_accepted():
    _, _, steps = run(ScaleSilently(factor=1 + 1e-7))
    assert steps[0].max_abs is not None
    assert steps[0].max_abs <= ScaleSilently.tolerance


def test_a_slightly_broken_promise_is_not_taken_for_rounding():
    for times in (3, 30):  # near enough to be repeated in float64, where it does not go away
        factor = 1 + times * ScaleSilently.tolerance
        with pytest.raises(VerificationError, match="scale-silently promises"):
            run(ScaleSilently(factor))


class Steep(nn.Module):
    """Amplifies the last bit of float32 a thousand times."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        y = self.linear(x)
        return torch.tanh(1000.0 * (y - y.detach().round()) + 1000.0 * y) + torch.sin(3000.0 * y)


@dataclass(frozen=True)
class SumInHalves(Base):
    """Exact in real numbers: W x = W1 x1 + W2 x2. Float32 rounds otherwise."""

    name: ClassVar[str] = "sum-in-halves"
    promise: ClassVar[Promise] = Promise.EQUIVALENT
    factor: float = 1.0

    def run(self, module, context):
        linear = node_of(module, aten.linear.default)
        weight = attribute(module, str(linear.args[1].target))
        left = torch.arange(weight.shape[1]) < weight.shape[1] // 2
        replace_tensor(module, Edge(linear, (1,)), weight * left * self.factor, "left")
        twin = insert_call(module, aten.linear.default, *linear.args, like=linear)
        replace_tensor(module, Edge(twin, (1,)), weight * ~left * self.factor, "right")
        twin.args = twin.args[:2]
        both = insert_call(module, aten.add.Tensor, linear, twin, like=twin)
        linear.replace_all_uses_with(both, delete_user_cb=lambda u: u is not both)
        return True


def run_steep(item):
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    module = trace(Steep().eval(), x)
    context = Context(sample=Sample((x,)), batches=[x], facts=frozenset())
    return run_pipeline(Pipeline("test", (item,)), module, context)


def test_rounding_that_a_steep_network_amplifies_is_no_broken_promise():
    steps = run_steep(SumInHalves())
    assert steps[0].max_abs > SumInHalves.tolerance
    with pytest.raises(VerificationError, match="sum-in-halves promises"):
        run_steep(SumInHalves(factor=1.0 + 3e-7))


def test_a_dropped_bias_is_found_at_its_linear():
    with pytest.raises(VerificationError, match="drop-bias") as caught:
        run(DropBias())
    assert caught.value.node == "linear_1"


def test_writing_into_a_tensor_in_place_is_refused_by_name():
    with pytest.raises(PassError, match=r"write-in-place wrote into '.*weight' in place"):
        run(WriteInPlace())


@pytest.mark.parametrize(("says", "match"), [(False, "returned False"), (True, "returned True")])
def test_a_dishonest_bool_is_refused(says, match):
    with pytest.raises(PassError, match=match):
        run(LieAboutChange(says=says))


def test_a_node_without_metadata_is_refused():
    with pytest.raises(PassError, match=r"forget-metadata: relu_default.* no metadata 'val'"):
        run(ForgetMetadata())


def test_a_crash_inside_a_pass_is_wrapped_and_names_the_pass():
    @dataclass(frozen=True)
    class Crash(Base):
        name: ClassVar[str] = "crash"

        def run(self, module, context):
            raise ZeroDivisionError("oops")

    with pytest.raises(PassError, match="crash failed: ZeroDivisionError: oops") as caught:
        run(Crash())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_editing_gives_copies_and_unknown_names_suggest_the_nearest():
    base = Pipeline("p", (DoubleRelu(), NeedDoubled()))
    longer = base.insert_before("need-doubled", LoseDoubled())
    assert [p.name for p in longer] == ["double-relu", "lose-doubled", "need-doubled"]
    assert [p.name for p in base] == ["double-relu", "need-doubled"]
    assert longer.without("lose-doubled") == base
    assert base.replace("need-doubled", LoseDoubled())["lose-doubled"] == LoseDoubled()
    with pytest.raises(ConfigError, match="did you mean 'double-relu'"):
        base.insert_after("double-rely", LoseDoubled())


def test_a_pass_twice_or_a_class_instead_of_an_instance_is_refused():
    with pytest.raises(ConfigError, match="occurs 2 times"):
        Pipeline("p", (DoubleRelu(), DoubleRelu()))
    with pytest.raises(ConfigError, match="is not a Pass"):
        Pipeline("p", (DoubleRelu,))  # type: ignore[arg-type]
