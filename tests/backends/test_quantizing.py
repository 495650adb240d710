# SPDX-License-Identifier: Apache-2.0
"""Quantizers behind every kind of value: codes are those of the value, in both integer modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from qgraph.backends import integer
from qgraph.backends.integer.kernels import LOOKUP
from qgraph.formats import AffineEncoding, Encoding, LevelEncoding, code_dtype
from tests.backends.exact import (
    SCALE,
    by_axis,
    coded,
    decode,
    drawn,
    encode,
    insert_product,
    values,
)
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2)) * 3
MODES = ("onnxruntime", "fixed_point")


def grid(step: float, qmin: int, qmax: int, zero: int = 0) -> AffineEncoding:
    return AffineEncoding(
        scale=torch.tensor(step), zero_point=torch.tensor(zero), qmin=qmin, qmax=qmax
    )


def channels(
    step: float, zeros: list[int], axis: int, qmin: int = 0, qmax: int = 255
) -> AffineEncoding:
    scale = step * 2.0 ** (torch.arange(len(zeros)) % 3)
    return AffineEncoding(
        scale=scale, zero_point=torch.tensor(zeros), qmin=qmin, qmax=qmax, axis=axis
    )


def codes_of(value: Tensor, encoding: AffineEncoding, mode: str) -> Tensor:
    """``clamp(round(x / s) + z)`` in float64; ties to even, or up in fixed point."""
    shape = [1] * value.ndim
    if encoding.axis is not None:
        shape[encoding.axis] = -1
    units = value.double() / encoding.scale.double().view(shape)
    whole = units.round() if mode == "onnxruntime" else torch.floor(units + 0.5)
    found = (whole + encoding.zero_point.view(shape)).clamp(encoding.qmin, encoding.qmax)
    return found.to(code_dtype(encoding.qmin, encoding.qmax))


def outputs(module_of: Callable[[SingleOp], list[Node]], *inputs: Tensor, mode: Any) -> Any:
    builder = SingleOp()
    builder.graph.output(tuple(module_of(builder)))
    builder.module.recompile()
    return integer.lower(builder.module, mode=mode)(*inputs)


OUT: dict[str, AffineEncoding] = {
    "bytes": grid(SCALE * 2**-2, 0, 255, 100), "signed bytes": grid(SCALE * 2**-2, -128, 127, -9),
    "3 bits": grid(SCALE, -4, 3, 1), "words": grid(SCALE * 2**-6, -(2**15), 2**15 - 1, 700),
    "a vector of one": AffineEncoding(
        scale=torch.tensor([SCALE / 4]), zero_point=torch.tensor([90]), qmin=0, qmax=255, axis=0
    ),
    "columns": channels(SCALE * 2**-3, [100, 0, 255, 128, 7], 2),
    "columns from the end": channels(SCALE * 2**-3, [0] * 5, -1, -128, 127),
    "columns around zero": channels(SCALE * 2**-4, [0, -3, 0, 9, 1], 2, -2048, 2047),
}  # fmt: skip
CLAMPS: dict[str, tuple[Any, tuple[Any, ...], Callable[[Tensor], Tensor]]] = {
    "nothing": (None, (), lambda v: v),
    "relu": (aten.relu.default, (), torch.relu),
    "clamp": (
        aten.clamp.default,
        (-9 * SCALE, 6 * SCALE),
        lambda v: v.clamp(-9 * SCALE, 6 * SCALE),
    ),
    "cap": (aten.clamp_max.default, (4 * SCALE,), lambda v: v.clamp(max=4 * SCALE)),
    "floor": (aten.clamp_min.default, (-2 * SCALE,), lambda v: v.clamp(min=-2 * SCALE)),
}
DATA, WEIGHT = coded(0, 255, 99), by_axis(5, 0, -8, 7)
CODES, ROWS = drawn(DATA, (2, 4, 6), 1), drawn(WEIGHT, (5, 6), 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("out", OUT)
@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_requantized_in_one_step(mode: str, out: str, clamp: str, bias: bool) -> None:
    op, rest, plain = CLAMPS[clamp]
    start = torch.tensor([0, 900, -900, 5, 1]) if bias else None
    value = plain(values(aten.linear.default, (CODES, DATA), (ROWS, WEIGHT), start))
    encoding = OUT[out]

    def build(b: SingleOp) -> list[Node]:
        node = insert_product(b, aten.linear.default, (CODES, DATA), (ROWS, WEIGHT), start)
        node = node if op is None else b.call(op, node, *rest)
        return [encode(b, node, "out", encoding), node]

    got, floats = outputs(build, CODES, mode=mode)
    shaped = encoding if encoding.scale.numel() > 1 else grid(
        float(encoding.scale), encoding.qmin, encoding.qmax, int(encoding.zero_point)
    )  # fmt: skip
    assert torch.equal(got, codes_of(value, shaped, mode))
    assert torch.equal(floats, value)


MOVES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "permute": (aten.permute.default, ([2, 0, 1],)),
    "transpose": (aten.transpose.int, (1, 2)),
    "reshape": (aten.reshape.default, ([2, 20],)),
    "view": (aten.view.default, ([-1, 5],)),
    "slice": (aten.slice.Tensor, (2, 1, 4)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("clamp", ["nothing", "clamp"])
def test_moved_products_are_requantized_as_they_lie(
    mode: str, move: str, per_row: bool, clamp: str
) -> None:
    weight = WEIGHT if per_row else coded(-8, 7)
    op, rest, plain = CLAMPS[clamp]
    target, args = MOVES[move]
    value = plain(target(values(aten.linear.default, (CODES, DATA), (ROWS, weight)), *args))
    by_channel = channels(SCALE / 8, [5 * k for k in range(value.shape[-1])], value.ndim - 1)
    first = channels(SCALE / 8, [3 * k for k in range(value.shape[0])], 0)
    tensor = grid(SCALE / 4, 0, 255, 128)

    def build(b: SingleOp) -> list[Node]:
        node = insert_product(b, aten.linear.default, (CODES, DATA), (ROWS, weight))
        node = b.call(target, node, *args)
        node = node if op is None else b.call(op, node, *rest)
        return [
            encode(b, node, "a", by_channel), encode(b, node, "b", tensor),
            encode(b, node, "c", tensor), encode(b, node, "d", first), node,
        ]  # fmt: skip

    got = outputs(build, CODES, mode=mode)
    for found, encoding in zip(got, (by_channel, tensor, tensor, first), strict=False):
        assert torch.equal(found, codes_of(value, encoding, mode))
    assert torch.equal(got[-1], value)


@pytest.mark.parametrize("mode", MODES)
def test_equal_quantizers_share_codes_and_others_do_not(mode: str) -> None:
    value = values(aten.linear.default, (CODES, DATA), (ROWS, WEIGHT))
    made = [
        grid(SCALE / 4, 0, 255, 128), grid(SCALE / 4, 0, 255, 128), grid(SCALE / 2, 0, 255, 128),
        grid(SCALE / 4, 0, 255, 127), grid(SCALE / 4, 0, 200, 128), grid(SCALE / 4, 1, 255, 128),
        channels(SCALE / 4, [128] * 5, 2), channels(SCALE / 4, [128] * 5, 2, 0, 200),
    ]  # fmt: skip

    def build(b: SingleOp) -> list[Node]:
        node = insert_product(b, aten.linear.default, (CODES, DATA), (ROWS, WEIGHT))
        return [encode(b, node, f"q{at}", encoding) for at, encoding in enumerate(made)]

    for found, encoding in zip(outputs(build, CODES, mode=mode), made, strict=True):
        assert torch.equal(found, codes_of(value, encoding, mode))


FLOATS: dict[str, AffineEncoding] = {
    "bytes": grid(0.05, 0, 255, 120),
    "signed": grid(0.05, -128, 127, -3),
    "from one": grid(0.05, 1, 200, 50),
    "words": grid(0.001, -(2**15), 2**15 - 1, 9),
    "wide": grid(1e-4, 0, 2**16 - 1, 2**15),
    "rows": channels(0.01, [9, 100, 200, 0], 1),
    "columns": channels(0.01, [128] * 6, -1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", FLOATS)
def test_inputs_are_encoded_by_division(name: str, dtype: torch.dtype) -> None:
    encoding, x = FLOATS[name], X.to(dtype)
    for mode in MODES:
        (found,) = outputs(
            lambda b: [encode(b, b.placeholder("x", x), "q", encoding)], x, mode=mode
        )
        assert torch.equal(found, encoding.encode(x.float()))


LEVELS: dict[str, LevelEncoding] = {
    "regions": LevelEncoding.nearest(
        "regions", torch.tensor(0.05), torch.tensor([*range(-8, 8), *range(8, 64, 8)]),
        storage_bits=5
    ),
    "off the half steps": LevelEncoding(
        name="log", scale=torch.tensor(0.1), levels=torch.tensor([-20, -3, 0, 3, 20]),
        thresholds=torch.tensor([-8.3, -1.1, 1.1, 8.3]), storage_bits=3,
    ),
    "crowded": LevelEncoding(
        name="crowded", scale=torch.tensor(0.5), levels=torch.tensor([0, 1, 2]),
        thresholds=torch.tensor([0.75, 1.0]), storage_bits=2,
    ),
    "by channel": LevelEncoding.nearest(
        "rows", torch.rand(6) + 0.1, torch.stack([torch.arange(5) * (c + 1) for c in range(6)]),
        storage_bits=3, axis=2,
    ),
    "scales by channel": LevelEncoding.nearest(
        "columns", torch.rand(4) + 0.1, torch.tensor([-9, -1, 0, 1, 9]), storage_bits=3, axis=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LEVELS)
def test_values_are_ranked_in_tables(name: str, mode: str, dtype: torch.dtype) -> None:
    encoding = LEVELS[name]
    x = X.to(dtype)
    computed = torch.relu(X)

    def build(b: SingleOp) -> list[Node]:
        value = b.placeholder("x", x)
        codes = encode(b, value, "q", encoding)
        later = encode(b, b.call(aten.relu.default, value), "r", encoding)
        return [codes, decode(b, codes, "d", encoding), later]

    codes, decoded, later = outputs(build, x, mode=mode)
    assert torch.equal(codes.int(), encoding.encode(X).int())
    wanted = encoding.decode(encoding.encode(X))
    if mode == "onnxruntime":
        assert torch.equal(decoded, wanted)
    torch.testing.assert_close(decoded, wanted, atol=2.0**-23, rtol=1e-7)
    assert torch.equal(later.int(), encoding.encode(computed).int())


READ: dict[str, AffineEncoding] = {
    "bytes": grid(0.05, 0, 255, 120),
    "from three": grid(0.05, 3, 250, 120),
    "signed": grid(0.05, -128, 127, 3),
    "words": grid(0.01, -600, 600, 9),
    "wide": grid(0.01, 0, 4095, 2000),
    "from a thousand": grid(0.01, 1000, 2000, 1500),
}
AGAIN: dict[str, Encoding] = {
    "bytes": grid(0.07, 0, 255, 100),
    "signed": grid(0.07, -128, 127, 1),
    "words": grid(0.003, -(2**15), 2**15 - 1),
    "rows": channels(0.03, [1, 2, 130, 4], 1),
    "regions": LEVELS["regions"],
}


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("function", [None, aten.sigmoid.default])
def test_codes_become_other_codes(read: str, again: str, function: Any) -> None:
    first, second = READ[read], AGAIN[again]

    def build(b: SingleOp) -> list[Node]:
        node = decode(b, encode(b, b.placeholder("x", X), "q", first), "d", first)
        node = node if function is None else b.call(function, node)
        return [encode(b, node, "r", second)]

    value = first.fake(X)
    value = value if function is None else function(value)
    (found,) = outputs(build, X, mode="onnxruntime")
    assert torch.equal(found.int(), second.encode(value).int())
    (near,) = outputs(build, X, mode="fixed_point")
    assert int((near.int() - found.int()).abs().max()) <= 1


def lookups(build: Callable[[SingleOp], list[Node]]) -> int:
    builder = SingleOp()
    builder.graph.output(tuple(build(builder)))
    graph = integer.lower(builder.module).graph_module.graph
    return sum(n.target is LOOKUP for n in graph.nodes)


def test_bytes_become_bytes_by_one_table() -> None:
    for first, second, tables in (
        (READ["bytes"], AGAIN["bytes"], 1), (READ["signed"], AGAIN["signed"], 1),
        (READ["words"], AGAIN["bytes"], 0), (READ["bytes"], AGAIN["words"], 0),
        (READ["bytes"], AGAIN["rows"], 0), (channels(0.03, [1, 2, 130, 4], 1), AGAIN["bytes"], 0),
    ):  # fmt: skip

        def build(b: SingleOp, first: Encoding = first, second: Encoding = second) -> list[Node]:
            node = decode(b, encode(b, b.placeholder("x", X), "q", first), "d", first)
            return [encode(b, node, "r", second)]

        assert lookups(build) == tables


@pytest.mark.parametrize("reader", [True, False])
@pytest.mark.parametrize("out", ["bytes", "rows", "regions"])
def test_values_side_by_side_are_encoded_apart_and_joined(reader: bool, out: str) -> None:
    encoding = AGAIN[out] if out != "rows" else channels(0.03, [1, 2, 130, 4], 1)
    other = X.flip(0) * 2
    wanted = torch.cat([X, other, X], 2)

    def build(b: SingleOp) -> list[Node]:
        x, y = b.placeholder("x", X), b.placeholder("y", other)
        joined = b.call(aten.cat.default, [x, y, x], 2)
        found = [encode(b, joined, "q", encoding), encode(b, joined, "r", AGAIN["words"])]
        return [*found, b.call(aten.relu.default, joined)] if reader else found

    for mode in MODES:
        found, words, *rest = outputs(build, X, other, mode=mode)
        near = (found.int() - encoding.encode(wanted).int()).abs()
        assert int(near.max()) <= (mode == "fixed_point")
        assert int((words.int() - AGAIN["words"].encode(wanted).int()).abs().max()) <= (
            mode == "fixed_point"
        )
        for value in rest:
            torch.testing.assert_close(value, torch.relu(wanted), atol=2.0**-24, rtol=1e-7)


def test_blocks_of_scales_are_encoded_in_floats() -> None:
    encoding = AffineEncoding(
        scale=torch.tensor([[[0.03, 0.05, 0.11]]] * 3).repeat(1, 4, 1),
        zero_point=torch.zeros(3, 4, 3), qmin=-8, qmax=7, axis=2, block=2,
    )  # fmt: skip
    for mode in MODES:
        (found,) = outputs(
            lambda b: [encode(b, b.placeholder("x", X), "q", encoding)], X, mode=mode
        )
        assert torch.equal(found.int(), encoding.encode(X).int())
