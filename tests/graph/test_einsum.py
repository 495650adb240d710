# SPDX-License-Identifier: Apache-2.0
"""Einsums of all kinds keep their value in float64 when they become permute and matmul."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

from qgraph.graph.einsum import decompose_einsum
from tests.graph.rewriting import ops
from tests.graph.sketch import Sketch, aten

SIZES = dict(zip("abcdexyz", (2, 3, 4, 5, 6, 2, 3, 4), strict=True))


def sketched(equation: str, *shapes: tuple[int, ...]) -> tuple[GraphModule, list[Tensor]]:
    s = Sketch()
    nodes = [s.input(*shape, name=f"x{i}", dtype=torch.float64) for i, shape in enumerate(shapes)]
    module = s.returns(s.call(aten.einsum.default, equation, nodes))
    return module, [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def decomposed(equation: str, *shapes: tuple[int, ...]) -> Counter[str]:
    module, inputs = sketched(equation, *shapes)
    assert decompose_einsum(module)
    assert not decompose_einsum(module)
    module.graph.lint()
    module.recompile()
    wanted = torch.einsum(equation, *inputs)
    got = module(*inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    output = module.graph.output_node().args[0]
    assert output.meta["val"].shape == wanted.shape  # type: ignore[union-attr]
    return ops(module)


def shapes_of(equation: str, dots: tuple[int, ...] = (3, 2)) -> list[tuple[int, ...]]:
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    return [
        (dots if "..." in t else ()) + tuple(SIZES[c] for c in t.replace("...", "")) for t in terms
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 100_000))
def test_any_equation_of_up_to_three_operands_keeps_its_value(seed):
    draw = random.Random(seed)
    terms = [draw.sample("abcdxyz", draw.randint(1, 4)) for _ in range(draw.randint(1, 3))]
    every = sorted({c for t in terms for c in t})
    output = draw.sample(every, draw.randint(0, min(4, len(every))))
    equation = ",".join("".join(t) for t in terms) + "->" + "".join(output)
    decomposed(equation, *shapes_of(equation))


@pytest.mark.parametrize("equation", [
    "...ab,...bc->...ac", "a...b,b...c->a...c", "ab...,bc...->...ca", "...a,a->...", "...a->a...",
    "...ab,bc->ac...",
])  # fmt: skip
def test_dots_stand_for_any_axes_also_none_and_of_unlike_number(equation):
    places = equation.partition("->")[0].split(",")
    for dots in ((), (3,), (3, 2)):
        shapes = []
        for term in places:
            before, found, after = term.partition("...")
            middle = dots if found else ()
            shapes.append((*(SIZES[c] for c in before), *middle, *(SIZES[c] for c in after)))
        decomposed(equation, *shapes)


def test_dots_are_aligned_at_their_end() -> None:
    decomposed("...ab,...bc->...ac", (3, 2, 2, 3), (2, 3, 4))
    decomposed("...ab,...bc", (2, 2, 3), (4, 2, 3, 4))


@pytest.mark.parametrize("dots", [(3,), (2, 3), (3, 1, 2, 1, 1, 2, 1, 1, 2)])
def test_axes_of_dots_are_as_many_as_there_are_and_keep_their_order(dots):
    for equation in ("...a,ba->...b", "...ab->...ba", "...ab->...", "...a->a"):
        decomposed(equation, *shapes_of(equation, dots))


@pytest.mark.parametrize("equation", ["ab,bc", "ba", "b,a", "ab,ab", "...ba", "ca,ab", "...a,...a"])
def test_without_an_arrow_labels_that_occur_once_are_the_output_in_order(equation):
    decomposed(equation, *shapes_of(equation))


def test_an_ordinary_product_takes_no_more_than_it_needs() -> None:
    assert decomposed("ab,bc->ac", (2, 3), (3, 4)) == Counter(matmul=1)
    assert decomposed("ab,cb->ac", (2, 3), (4, 3)) == Counter(matmul=1, permute=1)
    assert decomposed("xab,xbc->xac", (5, 2, 3), (5, 3, 4)) == Counter(matmul=1)
    assert decomposed("ab->ba", (2, 3)) == Counter(permute=1)
    several = decomposed("abx,bxc->ac", (2, 3, 4), (3, 4, 5))
    assert (several["flatten"], several["matmul"]) == (2, 1)


@pytest.mark.parametrize(("equation", "shapes"), [
    ("aa->a", [(3, 3)]), ("ab,bb->a", [(2, 3), (3, 3)]), ("ab,bc->ac", [(2, 1), (3, 4)]),
])  # fmt: skip
def test_diagonals_and_sizes_that_broadcast_are_left_whole(equation, shapes):
    module, _ = sketched(equation, *shapes)
    assert not decompose_einsum(module)
    assert ops(module) == Counter(einsum=1)
