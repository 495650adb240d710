# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="arg-type"
"""Which batch norms and per-channel constants fold, case by case, with the same values."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import pytest
import torch
from torch.fx import Node

from qgraph.graph.fold_batch_norm import fold_batch_norm, fold_channel_affine
from tests.graph.rewriting import Draw, rewritten
from tests.graph.sketch import Sketch, aten

OUT = 6


def product(s: Sketch, kind: str, *, bias: bool = True) -> Node:
    """A product of 4 input channels and 6 outputs, the last in two groups."""
    dims = int(kind[-1]) if kind[-1].isdigit() else 0
    if kind == "linear":
        return s.linear(s.input(3, 4), OUT, bias=bias)
    x = s.input(3, 4, *(5, 7, 6)[:dims])
    transposed = kind.startswith("transposed")
    weight = s.stored(torch.randn(*((4, 3) if transposed else (OUT, 2)), *[3] * dims))
    added = s.stored(torch.randn(OUT), "b") if bias else None
    if transposed:
        overload = "default" if dims == 1 else "input"
        target = getattr(getattr(aten, f"conv_transpose{dims}d"), overload)
        return s.call(target, x, weight, added, [2] * dims, [1] * dims, [0] * dims, 2)
    if kind.startswith("same"):
        target = getattr(aten, f"conv{dims}d").padding
        return s.call(target, x, weight, added, [1] * dims, "same", [1] * dims, 2)
    target = getattr(aten, f"conv{dims}d").default
    return s.call(target, x, weight, added, [1] * dims, [1] * dims, [1] * dims, 2)


def statistics(s: Sketch, channels: int = OUT) -> tuple[Node, Node]:
    mean, variance = torch.randn(channels), torch.rand(channels) + 0.2
    return s.stored(mean, "mean"), s.stored(variance, "var")


def norm(
    s: Sketch, x: Node, *, gamma: bool = True, beta: bool = True, form: str = "plain",
    training: bool = False, channels: int = OUT,
) -> Node:  # fmt: skip
    weight = s.stored(torch.randn(channels), "gamma") if gamma else None
    bias = s.stored(torch.randn(channels), "beta") if beta else None
    mean, var = statistics(s, channels)
    if form == "plain":
        return s.call(
            aten.batch_norm.default, x, weight, bias, mean, var, training, 0.1, 0.3, False
        )
    if form == "legit":
        target = aten._native_batch_norm_legit_no_training.default
        made = s.call(target, x, weight, bias, mean, var, 0.1, 0.3)
    else:
        target = aten.native_batch_norm.default
        made = s.call(target, x, weight, bias, mean, var, training, 0.1, 0.3)
    return s.call(operator.getitem, made, 0)


KINDS = ["linear", "conv1", "conv2", "conv3", "same1", "same2", "same3",
         "transposed1", "transposed2", "transposed3"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_product_takes_the_norm_behind_it(kind, bias):
    got = rewritten(lambda s: norm(s, product(s, kind, bias=bias)), fold_batch_norm, changes=True)
    assert sum(got.values()) == 1
    assert not got["mul"]


@pytest.mark.parametrize("form", ["plain", "legit", "native"])
@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("beta", [False, True])
def test_norms_fold_in_every_form_with_any_parameters(form, gamma, beta):
    def draw(s: Sketch) -> Node:
        return norm(s, product(s, "conv2"), gamma=gamma, beta=beta, form=form)

    assert rewritten(draw, fold_batch_norm, changes=True) == Counter(conv2d=1)


@pytest.mark.parametrize("form", ["plain", "native"])
def test_norms_of_the_batch_and_what_reads_their_statistics_stay(form):
    s = Sketch()
    module = s.returns(norm(s, product(s, "conv2"), form=form, training=True))
    assert not fold_batch_norm(module)
    s = Sketch()
    mean, var = statistics(s)
    target = aten._native_batch_norm_legit_no_training.default
    made = s.call(target, product(s, "conv2"), None, None, mean, var, 0.1, 0.3)
    first, second = (s.call(operator.getitem, made, i) for i in (0, 1))
    assert not fold_batch_norm(s.returns(first, second))


@pytest.mark.parametrize("computed", range(1, 5))
def test_norms_with_computed_parameters_stay(computed):
    s = Sketch()
    x = product(s, "conv2")
    args = [s.stored(torch.rand(OUT) + 0.1, f"p{i}") for i in range(4)]
    args[computed - 1] = s.call(aten.neg.default, args[computed - 1])
    module = s.returns(s.call(aten.batch_norm.default, x, *args, False, 0.1, 0.3, False))
    assert not fold_batch_norm(module)


def computed_weight(s: Sketch) -> Node:
    weight = s.call(aten.neg.default, s.stored(torch.randn(OUT, 4, 1)))
    return s.call(aten.conv1d.default, s.input(3, 4, 5), weight)


def computed_bias(s: Sketch) -> Node:
    bias = s.call(aten.neg.default, s.stored(torch.randn(OUT)))
    weight = s.stored(torch.randn(OUT, 4, 1), "v")
    return s.call(aten.conv1d.default, s.input(3, 4, 5), weight, bias)


def another_op(s: Sketch) -> Node:
    return s.call(aten.relu.default, product(s, "conv1"))


def tokens(s: Sketch) -> Node:
    return s.linear(s.input(3, OUT, 4), OUT)


def an_input(s: Sketch) -> Node:
    return s.input(3, OUT, 2, 2, 2)


@pytest.mark.parametrize("source", [computed_weight, computed_bias, another_op, tokens, an_input])
def test_other_norms_become_a_factor_and_a_summand_per_channel(source):
    got = rewritten(lambda s: norm(s, source(s)), fold_batch_norm, changes=True)
    assert (got["mul"], got["add"], got["batch_norm"]) == (1, 1, 0)


def test_weights_given_by_name_are_replaced_and_other_names_kept() -> None:
    def draw(s: Sketch) -> Node:
        weight, bias = s.stored(torch.randn(OUT, 2, 3)), s.stored(torch.randn(OUT), "b")
        x = s.input(3, 4, 7)
        made = s.call(aten.conv1d.default, x, weight=weight, bias=bias, padding=[1], groups=2)
        return norm(s, made)

    assert rewritten(draw, fold_batch_norm, changes=True) == Counter(conv1d=1)


def test_a_product_that_is_also_read_elsewhere_is_not_scaled() -> None:
    def draw(s: Sketch) -> Node:
        x = product(s, "conv2")
        return s.call(aten.add.Tensor, norm(s, x), x)

    assert rewritten(draw, fold_batch_norm, changes=True) == Counter(conv2d=1, mul=1, add=2)

    def affine(s: Sketch) -> Node:
        x = product(s, "conv2")
        scaled = s.call(aten.mul.Tensor, x, s.stored(torch.randn(OUT, 1, 1), "c"))
        return s.call(aten.add.Tensor, scaled, x)

    assert rewritten(affine, fold_channel_affine, changes=False)["mul"] == 1


# the shape of a constant and whether it is one number per channel: of maps [3, 6, 5, 7]
ON_MAPS: list[tuple[tuple[int, ...], bool]] = [
    ((OUT, 1, 1), True), ((1, OUT, 1, 1), True), ((), True), ((1,), True), ((1, 1, 1, 1), True),
    ((7,), False), ((5, 1), False), ((3, 1, 1, 1), False), ((OUT, 1, 7), False),
    ((OUT, 5, 1), False), ((1, 1, 1, 1, 1), False), ((3, OUT, 1, 1), False),
]  # fmt: skip
ON_ROWS: list[tuple[tuple[int, ...], bool]] = [
    ((OUT,), True),
    ((1, OUT), True),
    ((1, 1, OUT), True),
    ((), True),
    ((1,), True),
    ((2, 1), False),
    ((2, OUT), False),
    ((3, 1, 1), False),
    ((1, 1, 1, OUT), False),
]


@pytest.mark.parametrize(("shape", "folds"), ON_MAPS)
def test_constants_fold_into_convolutions_along_axis_one_alone(shape, folds):
    def draw(s: Sketch) -> Node:
        return s.call(aten.mul.Tensor, product(s, "conv2"), s.stored(torch.randn(shape), "c"))

    assert rewritten(draw, fold_channel_affine, changes=folds)["mul"] == (not folds)


@pytest.mark.parametrize(("shape", "folds"), ON_ROWS)
def test_constants_fold_into_linears_along_the_last_axis_alone(shape, folds):
    def draw(s: Sketch) -> Node:
        x = s.linear(s.input(3, 2, 4), OUT)
        return s.call(aten.add.Tensor, s.stored(torch.randn(shape), "c"), x)

    assert rewritten(draw, fold_channel_affine, changes=folds)["add"] == (not folds)


ARITHMETIC: dict[str, tuple[Any, bool, dict[str, Any], bool]] = {
    "x * c": (aten.mul.Tensor, False, {}, True), "c * x": (aten.mul.Tensor, True, {}, True),
    "x + c": (aten.add.Tensor, False, {}, True), "c + x": (aten.add.Tensor, True, {}, True),
    "x + 1 c": (aten.add.Tensor, False, {"alpha": 1}, True),
    "x + 2 c": (aten.add.Tensor, False, {"alpha": 2}, False),
    "x - c": (aten.sub.Tensor, False, {}, True), "c - x": (aten.sub.Tensor, True, {}, True),
    "x - 2 c": (aten.sub.Tensor, False, {"alpha": 2}, False),
    "x / c": (aten.div.Tensor, False, {}, True), "c / x": (aten.div.Tensor, True, {}, False),
    "max(x, c)": (aten.maximum.default, False, {}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize("bias", [False, True])
def test_arithmetic_with_constants_folds_from_either_side(name, bias):
    target, swapped, options, folds = ARITHMETIC[name]

    def draw(s: Sketch) -> Node:
        pair = [product(s, "transposed2", bias=bias), s.stored(torch.rand(OUT, 1, 1) + 0.5, "c")]
        return s.call(target, *(pair[::-1] if swapped else pair), **options)

    got = rewritten(draw, fold_channel_affine, changes=folds)
    assert sum(got.values()) == (1 if folds else 2)


def test_numbers_integers_and_pairs_of_constants_are_left_alone() -> None:
    def scalar(s: Sketch) -> Node:
        return s.call(aten.mul.Tensor, product(s, "conv2"), 2.0)

    def integers(s: Sketch) -> Node:
        whole = s.stored(torch.arange(6)[:, None, None], "c")
        return s.call(aten.mul.Tensor, product(s, "conv2"), whole)

    def constants(s: Sketch) -> Node:
        pair = s.stored(torch.randn(6), "c"), s.stored(torch.randn(6), "d")
        return s.call(aten.add.Tensor, s.input(6), s.call(aten.mul.Tensor, *pair))

    for draw in (scalar, integers, constants):
        assert rewritten(draw, fold_channel_affine, changes=False)["mul"] == 1


def test_constants_that_make_a_wider_type_stay() -> None:
    def double(shape: tuple[int, ...]) -> Draw:
        return lambda s: s.call(
            aten.mul.Tensor, product(s, "conv2"), s.stored(torch.randn(shape).double(), "c")
        )

    assert rewritten(double((OUT, 1, 1)), fold_channel_affine, changes=False)["mul"] == 1
    assert rewritten(double(()), fold_channel_affine, changes=True)["mul"] == 0


def test_a_weight_read_twice_is_scaled_for_one_reader() -> None:
    def draw(s: Sketch) -> Node:
        x = s.input(3, 4)
        first, second = s.linear(x, 4), s.linear(x, 4)
        scaled = s.call(aten.mul.Tensor, first, s.stored(torch.randn(4), "c"))
        return s.call(aten.add.Tensor, scaled, second)

    got = rewritten(draw, fold_channel_affine, changes=True)
    assert got == Counter(linear=2, add=1)
