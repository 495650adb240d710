# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="operator,assignment"
# Attributes of nn.Module are Tensor | Module to the type checker.
"""The verifier catches what a pass may get wrong: form, honesty, promise; and says where."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule

from qgraph.errors import PassError, VerificationError
from qgraph.graph.build import insert_call
from qgraph.graph.verify import (
    Claim,
    Sample,
    Verifier,
    check_form,
    check_order,
    checksum,
    difference,
    difference_in_double,
    excerpt,
    first_difference,
    record_values,
    structure,
    where,
)
from tests.graph.rewriting import node, times
from tests.graph.sketch import Sketch, aten

IDENTICAL, CLOSE = Claim("p", "the same", 0.0), Claim("p", "nearly the same", 1e-3)
ANYTHING = Claim("p", "anything", None)


def drawn() -> tuple[GraphModule, Sample]:
    """relu(x w^T + b), times two, the sum of it, and another linear of x."""
    torch.manual_seed(0)
    s = Sketch()
    x = s.input(2, 3)
    y = s.call(aten.mul.Tensor, s.call(aten.relu.default, s.linear(x, 4)), 2.0)
    last = s.linear(x, 2, name="other")
    return s.returns(y, s.call(aten.sum.default, y), last), Sample((torch.randn(2, 3),))


@pytest.mark.parametrize(
    ("factor", "claim", "largest"),
    [
        (1.0, IDENTICAL, 0.0), (1.0 + 2.0**-12, CLOSE, 2.0**-12), (1.0 + 2.0**-10, CLOSE, 2.0**-10),
        (3.0, ANYTHING, None),
    ],
)  # fmt: skip
def test_kept_promises_pass_and_tell_the_difference(factor, claim, largest):
    module, sample = drawn()
    verifier = Verifier(module, sample)
    times(module, factor)
    got = verifier.after(claim, module, changed=True)
    assert got == (None if largest is None else pytest.approx(largest, rel=1e-2, abs=0))
    assert verifier.after(IDENTICAL, module, changed=False) is None


@pytest.mark.parametrize(
    ("factor", "claim"),
    [(1.0 + 2.0**-20, IDENTICAL), (1.0 + 2.0**-9, CLOSE), (1.5, CLOSE), (-1.0, CLOSE)],
)
def test_a_broken_promise_names_the_first_node_that_differs(factor, claim):
    module, sample = drawn()
    verifier = Verifier(module, sample)
    times(module, factor)
    with pytest.raises(VerificationError, match=f"promises {claim.promise}") as caught:
        verifier.after(claim, module, changed=True)
    error = caught.value
    assert error.node == "mul_tensor"
    assert error.max_abs == pytest.approx(abs(factor - 1), rel=1e-2)
    assert "first at mul_tensor" in str(error)
    assert ">>> " in str(error)


def test_rounding_up_to_a_hundred_tolerances_is_judged_in_double() -> None:
    """Adding and taking away a large number costs digits in float32 and none in float64."""
    for size, passes in ((2.0**13, True), (2.0**21, False)):
        module, sample = drawn()
        verifier = Verifier(module, sample)
        source = node(module, "relu")
        users = list(source.users)
        up = insert_call(module, aten.add.Tensor, source, size, like=source)
        down = insert_call(module, aten.sub.Tensor, up, size, like=up)
        for user in users:
            user.replace_input_with(source, down)
        module.recompile()
        claim = Claim("p", "nearly the same", 2e-5)
        if passes:
            assert 2e-5 < (verifier.after(claim, module, changed=True) or 0) < 2e-3
        else:
            with pytest.raises(VerificationError):
                verifier.after(claim, module, changed=True)


def test_dishonest_passes_are_found_out() -> None:
    module, sample = drawn()
    verifier = Verifier(module, sample)
    with pytest.raises(PassError, match="returned True, but the graph did not change"):
        verifier.after(IDENTICAL, module, changed=True)
    assert verifier.after(IDENTICAL, module, changed=False) is None
    times(module, 1.0)
    with pytest.raises(
        PassError, match="returned False, but the graph changed, first at"
    ) as caught:
        verifier.after(IDENTICAL, module, changed=False)
    assert caught.value.node == "mul_tensor_1"


def test_a_replaced_tensor_is_a_change_and_a_written_one_is_refused() -> None:
    module, sample = drawn()
    verifier = Verifier(module, sample)
    module.fc_bias = module.fc_bias.clone()
    with pytest.raises(PassError, match="returned False, but the graph changed"):
        verifier.after(IDENTICAL, module, changed=False)
    assert verifier.after(IDENTICAL, module, changed=True) == 0.0
    for name, reader in (("other_bias", "linear_default_1"), ("fc_weight", "linear_default")):
        module, sample = drawn()
        verifier = Verifier(module, sample)
        module.get_buffer(name)[1] += 1
        with pytest.raises(PassError, match=f"wrote into '{name}' in place") as caught:
            verifier.after(ANYTHING, module, changed=True)
        assert caught.value.node == reader


def test_what_makes_outputs_infinite_is_named_whatever_was_promised() -> None:
    module, sample = drawn()
    verifier = Verifier(module, sample)
    times(module, math.inf)
    with pytest.raises(VerificationError, match=r"non-finite \(output 0\); first at mul") as e:
        verifier.after(ANYTHING, module, changed=True)
    assert e.value.node is not None
    assert node(module, e.value.node).args[1] == math.inf


def test_outputs_that_were_infinite_before_may_stay_so() -> None:
    s = Sketch()
    x = s.input(4)
    module = s.returns(s.call(aten.log.default, s.call(aten.relu.default, x)))
    verifier = Verifier(module, Sample((torch.tensor([1.0, -1.0, 2.0, 3.0]),)))
    times(module, 2.0)
    assert verifier.after(ANYTHING, module, changed=True) is None


def test_quantizers_with_computed_parameters_are_refused() -> None:
    for quantizes in (True, False):
        s = Sketch()
        x = s.input(2, 3)
        scale, zero = s.stored(torch.tensor(1.0)), s.stored(torch.tensor(0, dtype=torch.int32), "z")
        if quantizes:
            scale = s.call(aten.neg.default, scale)
        codes = s.call(torch.ops.qgraph.quantize.default, x, scale, zero, -8, 7)
        if not quantizes:
            scale = s.call(aten.neg.default, scale)
        back = s.call(torch.ops.qgraph.dequantize.default, codes, scale, zero, -8, 7)
        with pytest.raises(PassError, match="must be buffers"):
            check_form(s.returns(back))


def test_without_verification_only_dead_tensors_go() -> None:
    module, sample = drawn()
    verifier = Verifier(module, sample, enabled=False)
    times(module, 7.0)
    module.register_buffer("unread", torch.ones(1))
    assert verifier.after(IDENTICAL, module, changed=False) is None
    assert hasattr(module, "unread")
    assert verifier.after(IDENTICAL, module, changed=True) is None
    assert not hasattr(module, "unread")


def wrong_metadata(module: GraphModule, value: object) -> None:
    node(module, "relu").meta["val"] = value


@pytest.mark.parametrize(("value", "passes"), [
    (torch.empty(2, 4), True), (torch.empty(2, 5), False), (torch.empty(4, 2), False),
    (torch.empty(2, 4, dtype=torch.float64), False), (torch.empty(2, 4, 1), False),
    (torch.empty(2), False),
])  # fmt: skip
def test_metadata_must_say_what_is_computed(value, passes):
    module, sample = drawn()
    verifier = Verifier(module, sample)
    times(module, 1.0)
    wrong_metadata(module, value)
    if passes:
        assert verifier.after(IDENTICAL, module, changed=True) == 0.0
    else:
        with pytest.raises(PassError, match=r"p: relu_default computes .*call set_value") as caught:
            verifier.after(IDENTICAL, module, changed=True)
        assert caught.value.pass_name == "p"


def break_order(module: GraphModule) -> None:
    node(module, "linear").args = (node(module, "relu"), *node(module, "linear").args[1:])


def break_attribute(module: GraphModule) -> None:
    del module.fc_weight


def break_metadata(module: GraphModule) -> None:
    del node(module, "relu").meta["val"]


BREAKS: dict[str, tuple[Callable[[GraphModule], None], str]] = {
    "order": (break_order, "reads relu_default, which does not come before it"),
    "attribute": (break_attribute, "reads 'fc_weight', which the module does not hold"),
    "metadata": (break_metadata, "carries no metadata 'val'"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_malformed_graphs_are_refused(name):
    wrong, words = BREAKS[name]
    module, _ = drawn()
    check_form(module)
    check_order(module)
    wrong(module)
    with pytest.raises(PassError, match=words):
        check_form(module)


def test_messages_show_a_node_with_five_lines_on_either_side() -> None:
    s = Sketch()
    value = s.input(2)
    for _ in range(20):
        value = s.call(aten.relu.default, value, within="body.first")
    module = s.returns(value)
    nodes = list(module.graph.nodes)
    assert where(nodes[3]) == f"{nodes[3].name} in body.first"
    assert where(nodes[0]) == "x"
    for at, context, lines in ((10, 5, (5, 16)), (2, 5, (0, 8)), (20, 3, (17, 22)), (0, 1, (0, 2))):
        shown = excerpt(module, nodes[at], context=context).split("\n")
        assert len(shown) == lines[1] - lines[0]
        marked = [i for i, line in enumerate(shown) if line.startswith(">>> ")]
        assert marked == [at - lines[0]]
        assert all(line.startswith(("    ", ">>> ")) for line in shown)
    assert len(excerpt(module, nodes[10]).split("\n")) == 11


def test_every_element_counts_in_a_checksum() -> None:
    for dtype, count in ((torch.float32, 7), (torch.int8, 17), (torch.float64, 5), (torch.bool, 9)):
        plain = torch.zeros(count, dtype=dtype)
        sums = {checksum(plain)}
        for i in range(count):
            changed = plain.clone()
            changed[i] = 1
            assert checksum(changed) != checksum(plain)
            sums.add(checksum(changed))
        assert checksum(plain.clone()) == checksum(plain)
        assert checksum(plain[:0]) != checksum(plain)
    assert checksum(torch.zeros(2, 3)) != checksum(torch.zeros(3, 2))
    assert checksum(torch.zeros(0, 3)) != checksum(torch.zeros(3, 0))
    swapped = torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([2.0, 2.0, 1.0, 1.0])
    assert checksum(swapped[0]) != checksum(swapped[1])


def test_the_difference_is_relative_to_the_largest_finite_value() -> None:
    def of(a: list[float], b: list[float]) -> float:
        return difference([torch.tensor(a)], [torch.tensor(b)])

    nan, inf = math.nan, math.inf
    assert of([1.0, -4.0], [1.0, -4.0]) == 0.0
    assert of([1.0, -4.0], [2.0, -4.0]) == 0.25
    assert of([1.0, 0.0], [1.0, 4.0]) == 4.0
    assert of([nan, inf, 2.0], [nan, inf, 3.0]) == 0.5
    assert of([2.0, 1.0], [nan, 1.0]) == inf
    assert of([2.0, 1.0], [inf, 1.0]) == inf
    assert of([nan], [nan]) == 0.0
    assert of([inf], [-inf]) == inf
    assert of([], []) == 0.0
    two = [torch.ones(2), torch.ones(3)]
    assert difference(two, two[:1]) == inf
    assert difference(two, two[::-1]) == inf
    assert difference(two, [torch.ones(2).double(), torch.ones(3)]) == inf
    assert difference(two, [torch.ones(2) * 3, torch.ones(3) * 2]) == 2.0
    assert difference(two, [torch.ones(2) * 2, torch.ones(3) * 3]) == 2.0
    assert difference([], []) == 0.0


def test_values_that_moved_and_came_back_are_passed_over() -> None:
    before, sample = drawn()
    after, _ = drawn()
    times(after, 2.0, after="linear")
    times(after, 0.5, after="relu")
    assert first_difference(before, after, sample, 1e-6)[0] is None
    times(after, 3.0, after="sum")
    found, error = first_difference(before, after, sample, 1e-6)
    assert found is None or found.name.startswith("mul_tensor")
    assert math.isnan(error) or error > 0
    wrong, _ = drawn()
    wrong.fc_bias = wrong.fc_bias + 1.0
    found, error = first_difference(before, wrong, sample, 1e-6)
    assert found is not None
    assert found.name == "linear_default"
    assert error > 0


def test_graphs_compare_in_double_unless_an_op_insists_on_float32() -> None:
    module, sample = drawn()
    other, _ = drawn()
    times(other, 1.0 + 1e-9)
    assert difference_in_double(module, other, sample) == pytest.approx(1e-9, rel=1e-3)
    s = Sketch()
    x = s.input(2, 3)
    fixed = s.returns(s.call(aten._to_copy.default, x, dtype=torch.float32))
    assert difference_in_double(fixed, fixed, sample) is None
    assert module.fc_weight.dtype is torch.float32


def test_values_are_recorded_by_name_or_all() -> None:
    module, sample = drawn()
    every = record_values(module, sample)
    assert {"x", "fc_weight", "fc_bias", "linear_default", "relu_default"} <= set(every)
    some = record_values(module, sample, {"relu_default"})
    assert list(some) == ["relu_default"]
    seen: list[str] = []
    record_values(module, sample, set(), lambda n, v: seen.append(f"{n.name}{list(v.shape)}"))
    assert "relu_default[2, 4]" in seen
    assert len(seen) == len(every)
    names = [entry[0] for entry in structure(module)]
    assert names == [n.name for n in module.graph.nodes]
