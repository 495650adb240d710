# SPDX-License-Identifier: Apache-2.0
"""Quantizers move up to the op that makes a value, exactly where codes stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node

from qgraph.backends.onnx.placement import place
from qgraph.formats import AffineEncoding, Encoding
from qgraph.graph import dialect
from tests.backends.exact import by_axis, coded, decode, encode, table
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
X = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(7)) * 0.1
OUT = coded(0, 255, 100)
Build = Callable[[SingleOp, Node], list[Node]]


def placed(build: Build) -> tuple[GraphModule, list[Node]]:
    """The graph after placement, checked to mean the same; and its quantizers."""
    b = SingleOp()
    b.graph.output(tuple(build(b, b.placeholder("x", X))))
    module = b.module
    module.recompile()
    before = module(X)
    place(module)
    module.graph.lint()
    module.recompile()
    for ours, theirs in zip(module(X), before, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    return module, [n for n in module.graph.nodes if dialect.is_quantize(n)]


def sources(build: Build) -> list[str]:
    """What the quantizers read."""
    _, quantizers = placed(build)
    return [str(n.args[0].target).removeprefix("aten.").partition(".")[0] for n in quantizers]  # type: ignore[union-attr]


UP: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "pool": (aten.max_pool2d.default, ([2, 3],)), "shuffle": (aten.pixel_shuffle.default, (2,)),
    "permute": (aten.permute.default, ([0, 2, 3, 1],)),
    "reshape": (aten.reshape.default, ([2, 4, 48],)), "view": (aten.view.default, ([8, 48],)),
    "flatten": (aten.flatten.using_ints, (1, 2)),
}  # fmt: skip
STAY: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mean": (aten.mean.dim, ([1],)), "softmax": (aten.softmax.int, (-1,)),
    "average": (aten.avg_pool2d.default, ([2, 3],)), "relu": (aten.relu.default, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", UP)
@pytest.mark.parametrize("zero", [0, 100, 255])
def test_quantizers_move_through_ops_that_pick_or_move(name: str, zero: int) -> None:
    op, rest = UP[name]
    grid = coded(0, 255, zero)
    assert sources(
        lambda b, x: [encode(b, b.call(op, b.call(aten.neg.default, x), *rest), "q", grid)]
    ) == ["neg"]


@pytest.mark.parametrize("name", STAY)
def test_quantizers_stay_behind_ops_that_compute(name: str) -> None:
    op, rest = STAY[name]
    signed = coded(-128, 127, 0)
    found = sources(
        lambda b, x: [encode(b, b.call(op, b.call(aten.neg.default, x), *rest), "q", signed)]
    )
    assert found != ["neg"]


@pytest.mark.parametrize(
    ("encoding", "through"),
    [
        (coded(0, 255, 100), True), (coded(0, 255, 0), True), (coded(-128, 127, -128), True),
        (coded(-128, 127, -127), False), (coded(-8, 7, 0), False), (coded(-1, 7, 0), False),
        (coded(3, 200, 3), True), (coded(-128, 127, 127), False),
    ],
)  # fmt: skip
def test_a_rectifier_is_the_quantizers_own_bound_where_codes_end_at_zero(
    encoding: AffineEncoding, through: bool
) -> None:
    found = sources(
        lambda b, x: [
            encode(b, b.call(aten.relu.default, b.call(aten.neg.default, x)), "q", encoding)
        ]
    )
    assert found == ["neg" if through else "relu"]


def test_a_rectifier_is_left_to_its_other_readers() -> None:
    def build(b: SingleOp, x: Node) -> list[Node]:
        y = b.call(aten.relu.default, b.call(aten.neg.default, x))
        return [encode(b, y, "q", OUT), b.call(aten.exp.default, y)]

    assert sources(build) == ["neg"]


@pytest.mark.parametrize(
    ("ends", "through"),
    [
        ((0, 254), True), ((0, 255), True), ((0, 256), False), ((-128, 127), True),
        ((-9, 247), False), ((-(2**15), 2**15 - 1), False),
    ],
)  # fmt: skip
def test_pools_hold_bytes(ends: tuple[int, int], through: bool) -> None:
    grid = coded(*ends, 7)

    def build(op: Any, *rest: Any) -> Build:
        return lambda b, x: [encode(b, b.call(op, b.call(aten.neg.default, x), *rest), "q", grid)]

    assert sources(build(aten.max_pool2d.default, [2, 2])) == ["neg" if through else "max_pool2d"]
    assert sources(build(aten.permute.default, [1, 0, 2, 3])) == ["neg"]


def scaled(count: tuple[int, ...], axis: int | None) -> AffineEncoding:
    """Codes 0 to 9 around 3."""
    scale = torch.full(count, 0.01)
    return AffineEncoding(scale=scale, zero_point=scale.int() + 3, qmin=0, qmax=9, axis=axis)


@pytest.mark.parametrize(
    "encoding",
    [by_axis(4, 1), table(-9, -3, 0, 5), scaled((1,), 0), scaled((), 1), scaled((4,), None)],
    ids=["channels", "levels", "a vector", "an axis alone", "along the last axis"],
)
def test_scales_by_channel_and_tables_stay_where_they_are(encoding: Encoding) -> None:
    def build(b: SingleOp, x: Node) -> list[Node]:
        return [
            encode(
                b,
                b.call(aten.max_pool2d.default, b.call(aten.neg.default, x), [2, 2]),
                "q",
                encoding,
            )
        ]

    assert sources(build) == ["max_pool2d"]


OTHERS: dict[str, tuple[AffineEncoding, bool]] = {
    "the same": (coded(0, 255, 100), True), "another zero point": (coded(0, 255, 101), False),
    "another top": (coded(0, 254, 100), False), "another bottom": (coded(1, 255, 100), False),
    "another scale": (AffineEncoding(
        scale=torch.tensor(0.01), zero_point=torch.tensor(100), qmin=0, qmax=255), False),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_two_quantizers_move_together_only_with_the_same_numbers(name: str) -> None:
    other, alike = OTHERS[name]

    def build(b: SingleOp, x: Node) -> list[Node]:
        y = b.call(aten.max_pool2d.default, b.call(aten.neg.default, x), [2, 2])
        return [encode(b, y, "q", OUT), encode(b, y, "r", other)]

    assert set(sources(build)) == {"neg" if alike else "max_pool2d"}


def test_values_that_are_also_read_in_floats_are_quantized_where_they_were() -> None:
    def build(b: SingleOp, x: Node) -> list[Node]:
        y = b.call(aten.permute.default, b.call(aten.neg.default, x), [0, 2, 3, 1])
        return [encode(b, y, "q", OUT), b.call(aten.exp.default, y)]

    assert sources(build) == ["permute"]


def test_parts_are_quantized_each_once_and_chains_of_moves_are_passed() -> None:
    def build(b: SingleOp, x: Node) -> list[Node]:
        first, second = b.call(aten.neg.default, x), b.call(aten.exp.default, x)
        pooled = b.call(aten.max_pool2d.default, first, [3, 3], [1, 1], [1, 1])
        joined = b.call(aten.cat.default, [pooled, second, pooled], 1)
        return [encode(b, b.call(aten.permute.default, joined, [0, 2, 1, 3]), "q", OUT)]

    assert sorted(sources(build)) == ["exp", "neg"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("late", [False, True])
def test_a_quantizer_that_stands_before_serves_a_moved_one_with_the_same_numbers(
    name: str, late: bool
) -> None:
    other, alike = OTHERS[name]

    def build(b: SingleOp, x: Node) -> list[Node]:
        y = b.call(aten.neg.default, x)
        moved = b.call(aten.permute.default, y, [0, 2, 3, 1])
        given = [(moved, "q", OUT), (y, "r", other)]
        return [encode(b, *what) for what in (given if late else given[::-1])]

    assert sources(build) == ["neg"] * (1 if alike and not late else 2)


@pytest.mark.parametrize("name", OTHERS)
def test_codes_of_the_same_numbers_pass_through_a_concatenation(name: str) -> None:
    other, alike = OTHERS[name]

    def build(b: SingleOp, x: Node) -> list[Node]:
        read = decode(b, encode(b, b.call(aten.neg.default, x), "x", other), "x", other)
        joined = b.call(aten.cat.default, [read, b.call(aten.exp.default, x)], 1)
        return [encode(b, joined, "q", OUT)]

    assert sorted(sources(build)) == sorted(["neg", "exp"] + ([] if alike else ["qgraph"]))


@pytest.mark.parametrize("corners", [True, False])
def test_interpolation_is_scaled_afterwards(corners: bool) -> None:
    grid = AffineEncoding(
        scale=torch.tensor(2.0**-7), zero_point=torch.tensor(90), qmin=0, qmax=255
    )

    def build(b: SingleOp, x: Node) -> list[Node]:
        read = decode(b, encode(b, x, "x", grid), "x", grid)
        return [b.call(aten.upsample_bilinear2d.vec, read, [11, 15], corners, None)]

    module, _ = placed(build)
    (scaled,) = [n for n in module.graph.nodes if n.target is aten.mul.Tensor]
    assert scaled.args[0].target is aten.upsample_bilinear2d.vec
    (read,) = [n for n in module.graph.nodes if dialect.is_dequantize(n)]
    assert torch.equal(dialect.encoding_of(module, read).scale, torch.ones(()))


@pytest.mark.parametrize("readers", ["codes", "floats"])
def test_convolutions_are_rewritten_for_their_readers(readers: str) -> None:
    def build(b: SingleOp, x: Node) -> list[Node]:
        grid = coded(-8, 7)
        read = decode(b, encode(b, x, "x", OUT), "x", OUT)
        w = decode(b, b.buffer("w", torch.ones(3, 4, 2, 2, dtype=torch.int8)), "w", by_axis(3, 0))
        y = b.call(aten.conv2d.default, read, w, None, [2, 2])
        if readers == "floats":
            return [b.call(aten.exp.default, y)]
        return [encode(b, y, "q", grid), encode(b, y, "r", OUT)]

    module, _ = placed(build)
    kinds = [n.target for n in module.graph.nodes]
    assert kinds.count(aten.conv2d.default) == (2 if readers == "codes" else 0)
    assert kinds.count(aten.linear.default) == (0 if readers == "codes" else 1)
