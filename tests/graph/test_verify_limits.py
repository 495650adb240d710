# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="operator,assignment"
# Attributes of nn.Module are Tensor | Module to the type checker.
"""The verifier right at its limits: tolerances, single elements, single bits, odd inputs."""

from __future__ import annotations

import math
import operator

import pytest
import torch
from torch.fx import GraphModule

from qgraph.errors import PassError, VerificationError
from qgraph.graph import verify
from qgraph.graph.verify import (
    Claim,
    Sample,
    Verifier,
    checksum,
    difference,
    difference_in_double,
    first_difference,
)
from tests.graph.rewriting import node, times
from tests.graph.sketch import Sketch, aten

ANYTHING = Claim("p", "anything", None)


def drawn() -> tuple[GraphModule, Sample]:
    """Halves of x joined the other way round, times a weight, and rectified."""
    s = Sketch()
    x = s.input(2, 4)
    halves = s.call(aten.split.Tensor, x, 2, 1)
    swapped = s.call(aten.cat.default, [s.call(operator.getitem, halves, i) for i in (1, 0)], 1)
    scaled = s.call(aten.mul.Tensor, swapped, s.stored(torch.ones(4), "weight"))
    return s.returns(s.call(aten.relu.default, scaled)), Sample((torch.arange(8.0).view(2, 4),))


ABOVE, BEYOND = math.nextafter(0.5, 1.0), math.nextafter(50.0, 99.0)


@pytest.mark.parametrize(
    ("allowed", "largest", "exact", "passes", "asked"),
    [
        (0.5, 0.5, None, True, False), (0.5, 0.0, None, True, False), (0.0, 0.0, None, True, False),
        (0.5, ABOVE, 0.5, True, True), (0.5, ABOVE, ABOVE, False, True),
        (0.5, ABOVE, None, False, True), (0.5, 50.0, 0.0, True, True),
        (0.5, BEYOND, 0.0, False, False), (0.0, 1e-30, 0.0, False, False),
        (0.5, math.inf, 0.0, False, False), (0.5, 50.0, math.inf, False, True),
    ],
)  # fmt: skip
def test_a_promise_holds_up_to_its_limit_and_in_double_up_to_a_hundred_of_them(
    allowed, largest, exact, passes, asked, monkeypatch
):
    module, sample = drawn()
    verifier = Verifier(module, sample)
    times(module, 1.0)
    doubled: list[object] = []
    monkeypatch.setattr(verify, "difference", lambda *_: largest)

    def in_double(*given: object) -> float | None:
        doubled.append(given)
        return exact

    monkeypatch.setattr(verify, "difference_in_double", in_double)
    monkeypatch.setattr(verify, "first_difference", lambda *_: (None, math.nan))
    claim = Claim("p", "little", allowed)
    if passes:
        assert verifier.after(claim, module, changed=True) == largest
    else:
        with pytest.raises(VerificationError, match=r"first at an output, by nan$") as caught:
            verifier.after(claim, module, changed=True)
        assert (caught.value.node, caught.value.max_abs) == (None, largest)
        assert caught.value.pass_name == "p"
    assert bool(doubled) is asked


def test_one_infinite_element_is_enough_to_name_the_node_that_made_it() -> None:
    module, sample = drawn()
    verifier = Verifier(module, sample)
    times(module, 1e38, after="cat")
    with pytest.raises(VerificationError, match=r"\(output 0\); first at mul_tensor_1\n") as caught:
        verifier.after(ANYTHING, module, changed=True)
    assert caught.value.node == "mul_tensor_1"
    assert caught.value.pass_name == "p"
    assert ">>> %mul_tensor_1" in str(caught.value)


def test_a_stored_tensor_with_an_infinite_element_is_named_itself() -> None:
    module, sample = drawn()
    verifier = Verifier(module, sample)
    module.weight = torch.tensor([1.0, math.inf, 1.0, 1.0])
    with pytest.raises(VerificationError) as caught:
        verifier.after(ANYTHING, module, changed=True)
    assert caught.value.node == "weight"
    module, _ = drawn()
    verifier = Verifier(module, sample)
    module.weight = torch.tensor([1.0, 2.0, 1.0, 1.0])
    assert verifier.after(ANYTHING, module, changed=True) is None


def test_malformed_graphs_are_reported_with_the_pass_that_made_them() -> None:
    module, sample = drawn()
    verifier = Verifier(module, sample)
    del node(module, "relu_default").meta["val"]
    with pytest.raises(PassError, match=r"^p: relu_default carries no metadata") as caught:
        verifier.after(ANYTHING, module, changed=True)
    assert (caught.value.pass_name, caught.value.node) == ("p", "relu_default")


def test_a_tensor_that_is_gone_or_new_under_an_old_name_is_a_change() -> None:
    for change in ("gone", "replaced", "none"):
        module, sample = drawn()
        module.register_buffer("aside", torch.ones(3))
        verifier = Verifier(module, sample)
        if change == "gone":
            del module.aside
        elif change == "replaced":
            module.aside = torch.ones(3)
        if change == "none":
            assert verifier.after(ANYTHING, module, changed=False) is None
            continue
        with pytest.raises(PassError, match=r"returned False, but the graph changed$") as caught:
            verifier.after(ANYTHING, module, changed=False)
        assert caught.value.node is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 17, 24, 25])
def test_a_sign_or_the_last_bit_of_any_single_element_changes_the_checksum(dtype, count):
    values = (torch.arange(count) % 5 + 1).to(dtype)
    whole = checksum(values)
    for at in range(count):
        for bit in (0, 7 if dtype is torch.int8 else 8 * values.element_size() - 1):
            raw = values.clone().view(torch.uint8)
            raw[at * values.element_size() + bit // 8] ^= 1 << bit % 8
            assert checksum(raw.view(dtype)) != whole
    assert checksum(values.clone()) == whole
    assert checksum(values[0]) == checksum(values[0].clone())
    assert checksum(values[0]) != checksum(-values[0])


def test_neighbours_that_change_places_change_the_checksum() -> None:
    for dtype, step in ((torch.float64, 1), (torch.int64, 1), (torch.float32, 2)):
        values = torch.arange(40).to(dtype)
        for at in range(40 - step):
            order = torch.arange(40)
            order[[at, at + step]] = order[[at + step, at]]
            assert checksum(values[order]) != checksum(values)


def test_a_difference_of_exactly_what_is_allowed_is_passed_over() -> None:
    before, after = (drawn()[0] for _ in range(2))
    times(after, 1.25)
    sample = Sample((torch.tensor([[1.0, 2.0, 4.0, 8.0]] * 2),))
    assert difference([after(*sample.args) / 1.25], [after(*sample.args)]) == 0.25
    times(before, 1.0)
    found, error = first_difference(before, after, sample, 0.25)
    assert found is None
    assert math.isnan(error)
    found, error = first_difference(before, after, sample, math.nextafter(0.25, 0.0))
    assert (found and found.name, error) == ("mul_tensor_1", 0.25)


def test_one_output_that_stays_in_float32_forbids_the_comparison_in_double() -> None:
    s = Sketch()
    x = s.input(2, 3)
    fixed = s.call(aten._to_copy.default, x, dtype=torch.float32)
    mixed = s.returns(s.call(aten.relu.default, x), fixed)
    sample = Sample((torch.randn(2, 3),))
    assert difference_in_double(mixed, mixed, sample) is None


def test_indices_stay_integers_in_double() -> None:
    s = Sketch()
    x, at = s.input(4, 3), s.input(2, name="at", dtype=torch.int64)
    module = s.returns(s.call(aten.index_select.default, x, 0, at))
    sample = Sample((torch.randn(4, 3), torch.tensor([3, 1])))
    assert difference_in_double(module, module, sample) == 0.0


def test_a_free_batch_may_be_any_and_other_sizes_may_not() -> None:
    s = Sketch()
    x = s.input(4, 3, free=1)
    module = s.returns(s.call(aten.relu.default, x))
    assert Verifier(module, Sample((torch.randn(7, 3),)))
    with pytest.raises(PassError, match="call set_value"):
        Verifier(module, Sample((torch.randn(4, 5),)))


def test_a_difference_from_nothing_but_zeros_is_very_large_and_finite() -> None:
    found = difference([torch.zeros(2)], [torch.tensor([0.0, 1e-3])])
    assert found == pytest.approx(1e-3 / torch.finfo(torch.float32).tiny, rel=1e-6)
    only = [torch.tensor([math.inf, math.nan])]
    assert difference(only, [torch.tensor([math.inf, 3.0])]) == math.inf
