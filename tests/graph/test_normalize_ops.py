# SPDX-License-Identifier: Apache-2.0
"""Every op gets its one spelling, and computes what it did, also with unusual arguments."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import pytest
import torch
from torch.fx import Node

from qgraph.graph.normalize_ops import (
    only_first_result,
    recompose_norms,
    recompose_products,
    rename_ops,
    specialise_convolutions,
)
from tests.graph.rewriting import Draw, rewritten
from tests.graph.sketch import Sketch, aten

RENAMED: dict[str, tuple[Draw, str]] = {
    "view": (lambda s: s.call(aten.view.default, s.input(2, 3, 4), [6, 4]), "reshape"),
    "unsafe view": (lambda s: s.call(aten._unsafe_view.default, s.input(2, 6), [3, 4]), "reshape"),
    "bmm": (lambda s: s.call(aten.bmm.default, s.input(2, 3, 4), s.input(2, 4, 5, name="y")),
            "matmul"),
    "expand copy": (lambda s: s.call(aten.expand_copy.default, s.input(1, 4), [3, 4]), "expand"),
    "permute copy": (lambda s: s.call(aten.permute_copy.default, s.input(2, 3), [1, 0]), "permute"),
    "softmax": (lambda s: s.call(aten._softmax.default, s.input(2, 3), 1, False), "softmax"),
    "log softmax": (lambda s: s.call(aten._log_softmax.default, s.input(2, 3), 0, False),
                    "log_softmax"),
    "t": (lambda s: s.call(aten.t.default, s.input(2, 3)), "transpose"),
}  # fmt: skip


@pytest.mark.parametrize("name", RENAMED)
def test_ops_of_one_meaning_get_one_name(name):
    draw, wanted = RENAMED[name]
    assert rewritten(draw, rename_ops, changes=True) == Counter([wanted])


def test_a_vector_is_its_own_transpose_and_other_names_stay() -> None:
    def vector(s: Sketch) -> Node:
        return s.call(aten.t.default, s.input(3))

    assert rewritten(vector, rename_ops, changes=False) == Counter(t=1)


def layer_norm(s: Sketch, *, affine: bool) -> Node:
    weight = s.stored(torch.randn(4), "w") if affine else None
    bias = s.stored(torch.randn(4), "b") if affine else None
    return s.call(aten.native_layer_norm.default, s.input(2, 3, 4), [4], weight, bias, 0.5)


def group_norm(s: Sketch, *, affine: bool) -> Node:
    weight = s.stored(torch.randn(6), "w") if affine else None
    bias = s.stored(torch.randn(6), "b") if affine else None
    x = s.input(2, 6, 5)
    return s.call(aten.native_group_norm.default, x, weight, bias, 2, 6, 5, 3, 0.5)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("norm", [layer_norm, group_norm])
def test_the_first_result_of_a_norm_is_the_norm(norm, affine):
    def first(s: Sketch) -> Node:
        return s.call(operator.getitem, norm(s, affine=affine), 0)

    def mean(s: Sketch) -> Node:
        return s.call(operator.getitem, norm(s, affine=affine), 1)

    def sum_of_two(s: Sketch) -> Node:
        node = norm(s, affine=affine)
        mean = s.call(operator.getitem, node, 1)
        total = s.call(aten.sum.default, s.call(operator.getitem, node, 0))
        return s.call(aten.add.Tensor, s.call(aten.sum.default, mean), total)

    assert rewritten(first, recompose_norms, changes=True) == Counter([norm.__name__])
    for other in (mean, sum_of_two):
        assert rewritten(other, recompose_norms, changes=False)[f"native_{norm.__name__}"] == 1


def test_only_a_lone_first_result_counts() -> None:
    s = Sketch()
    node = layer_norm(s, affine=False)
    assert only_first_result(node) is None
    first = s.call(operator.getitem, node, 0)
    assert only_first_result(node) is first
    s.call(operator.getitem, node, 0)
    assert only_first_result(node) is None
    other = s.call(aten.relu.default, first)
    assert only_first_result(first) is None
    assert only_first_result(other) is None


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_of_any_rank_keep_stride_padding_dilation_and_groups(dims, transposed, bias):
    def draw(s: Sketch) -> Node:
        shape = (4, 3) if transposed else (6, 2)
        weight = s.stored(torch.randn(*shape, *[3] * dims))
        added = s.stored(torch.randn(6), "b") if bias else None
        extra = [1] * dims if transposed else [0] * dims
        return s.call(
            aten.convolution.default, s.input(2, 4, *range(9, 9 + dims)), weight, added,
            [2] * dims, [1] * dims, [3] * dims, transposed, extra, 2,
        )  # fmt: skip

    name = f"conv_transpose{dims}d" if transposed else f"conv{dims}d"
    assert rewritten(draw, specialise_convolutions, changes=True) == Counter([name])


def matrix(s: Sketch, rows: int, columns: int, name: str = "w") -> Node:
    return s.stored(torch.randn(rows, columns), name)


def flipped(s: Sketch, how: str) -> Node:
    """A constant [4, 5] that is the transpose of a stored [5, 4], or looks like one."""
    if how == "not":
        return s.call(aten.transpose.int, matrix(s, 4, 5), 0, 0)
    if how == "not permuted":
        return s.call(aten.permute.default, matrix(s, 4, 5), [0, 1])
    if how == "permuted":
        return s.call(aten.permute.default, matrix(s, 5, 4), [1, 0])
    if how == "T":
        return s.call(aten.numpy_T.default, matrix(s, 5, 4))
    if how == "from the end":
        return s.call(aten.transpose.int, matrix(s, 5, 4), -1, -2)
    return s.call(aten.transpose.int, matrix(s, 5, 4), 0, 1)


@pytest.mark.parametrize(
    "how", ["transposed", "from the end", "permuted", "T", "not", "not permuted"]
)
@pytest.mark.parametrize("target", [aten.mm.default, aten.matmul.default])
def test_a_product_with_a_constant_matrix_is_a_linear_that_reads_what_is_stored(target, how):
    def draw(s: Sketch) -> Node:
        return s.call(target, s.input(3, 4), flipped(s, how))

    got = rewritten(draw, recompose_products, changes=True)
    assert got["linear"] == 1
    moves = got["transpose"] + got["permute"] + got["numpy_T"]
    assert moves == {"not": 2, "not permuted": 2}.get(how, 0)


def constant_cube(s: Sketch) -> Node:
    return s.stored(torch.randn(2, 4, 5))


PRODUCTS: dict[str, tuple[Draw, Counter[str] | None]] = {
    "rows of any rank": (
        lambda s: s.call(aten.matmul.default, s.input(2, 3, 4), matrix(s, 4, 5)),
        Counter(linear=1, transpose=1),
    ),
    "one row": (
        lambda s: s.call(aten.matmul.default, s.input(4), matrix(s, 4, 5)),
        Counter(linear=1, transpose=1),
    ),
    "a constant on the left": (
        lambda s: s.call(aten.matmul.default, matrix(s, 5, 4), s.input(4, 3)), None,
    ),
    "constants": (
        lambda s: s.call(
            aten.add.Tensor, s.input(3, 3),
            s.call(aten.matmul.default, matrix(s, 3, 4, "a"), matrix(s, 4, 3, "b")),
        ), None,
    ),
    "a constant cube": (
        lambda s: s.call(aten.matmul.default, s.input(2, 3, 4), constant_cube(s)), None,
    ),
    "a constant vector": (
        lambda s: s.call(aten.matmul.default, s.input(3, 4), s.stored(torch.randn(4))), None,
    ),
    "two activations": (
        lambda s: s.call(aten.mm.default, s.input(3, 4), s.input(4, 5, name="y")),
        Counter(matmul=1),
    ),
    "two activations already": (
        lambda s: s.call(aten.matmul.default, s.input(3, 4), s.input(4, 5, name="y")), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_become_linear_where_the_right_side_is_a_constant_matrix(name):
    draw, wanted = PRODUCTS[name]
    got = rewritten(draw, recompose_products, changes=wanted is not None)
    assert got == wanted or (wanted is None and got["matmul"] == 1 and not got["linear"])


def addmm(bias: tuple[int, ...], *, stored: bool = True, **factors: Any) -> Draw:
    """``bias + x @ w`` with x of [3, 4] and w the transpose of a stored [5, 4]."""

    def draw(s: Sketch) -> Node:
        x = s.input(3, 4)
        summand = s.stored(torch.randn(bias), "b") if stored else s.input(*bias, name="b")
        return s.call(aten.addmm.default, summand, x, flipped(s, "transposed"), **factors)

    return draw


SUMS: dict[str, tuple[Draw, Counter[str]]] = {
    "bias": (addmm((5,)), Counter(linear=1)),
    "bias by factors of one": (addmm((5,), beta=1, alpha=1), Counter(linear=1)),
    "one number": (addmm((1,)), Counter(linear=1, add=1)),
    "a row": (addmm((1, 5)), Counter(linear=1, add=1)),
    "a matrix": (addmm((3, 5)), Counter(linear=1, add=1)),
    "an activation": (addmm((5,), stored=False), Counter(linear=1, add=1)),
    "twice the bias": (addmm((5,), beta=2), Counter(linear=1, add=1, mul=1)),
    "twice the product": (addmm((5,), alpha=2), Counter(linear=1, add=1, mul=1)),
    "both": (addmm((5,), alpha=2, beta=3), Counter(linear=1, add=1, mul=2)),
    "no bias": (addmm((5,), beta=0), Counter(linear=1)),
    "no bias, half the product": (addmm((5,), beta=0, alpha=0.5), Counter(linear=1, mul=1)),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_with_a_product_is_linear_with_bias_or_spelled_out(name):
    draw, wanted = SUMS[name]
    assert rewritten(draw, recompose_products, changes=True) == wanted


@pytest.mark.parametrize(
    ("factors", "wanted"),
    [
        ({}, Counter(matmul=1, add=1)), ({"beta": 0}, Counter(matmul=1)),
        ({"beta": 2, "alpha": 3}, Counter(matmul=1, add=1, mul=2)),
    ],
)  # fmt: skip
def test_batched_sums_are_spelled_out(factors, wanted):
    def draw(s: Sketch) -> Node:
        x, y = s.input(2, 3, 4), s.input(2, 4, 5, name="y")
        return s.call(aten.baddbmm.default, s.input(2, 3, 5, name="z"), x, y, **factors)

    assert rewritten(draw, recompose_products, changes=True) == wanted


def test_addmm_of_two_activations_stays_a_matmul() -> None:
    def draw(s: Sketch) -> Node:
        x, y = s.input(3, 4), s.input(4, 5, name="y")
        return s.call(aten.addmm.default, s.stored(torch.randn(5), "b"), x, y)

    assert rewritten(draw, recompose_products, changes=True) == Counter(matmul=1, add=1)
