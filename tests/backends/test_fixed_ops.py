# SPDX-License-Identifier: Apache-2.0
"""Each op of the fixed-point mode alone: what float64 gives, to the last bits, or an island."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from qgraph.backends import integer
from qgraph.backends.integer.fixed_ops import LOWERINGS, TABLES
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
UNIT = 2.0**-24
X = torch.Generator().manual_seed(5)
IMAGE = torch.randn(2, 6, 5, 7, generator=X) * 3
TOKENS = torch.randn(3, 4, 6, generator=X) * 3
WEIGHT, BIAS = torch.rand(6, generator=X) + 0.5, torch.randn(6, generator=X)
FEW = torch.tensor([-64.0, -1, 0, 1, 3, 64]) * UNIT  # whole units of the last bit
LONG = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([-16.0, 15.9999, 16.0, 16.5])])

Given = Any  # what stands for an argument: a Tensor comes in or is stored, others are literals


def graph(target: Any, args: tuple[Given, ...], kwargs: dict[str, Any]) -> GraphModule:
    """One op; its first tensor is the input, others are stored."""
    builder = SingleOp()
    first = next(a for a in args if isinstance(a, Tensor))
    nodes: dict[int, Any] = {id(first): builder.placeholder("x", first)}
    for at, item in enumerate(args):
        if isinstance(item, Tensor) and id(item) not in nodes:
            nodes[id(item)] = builder.buffer(f"b{at}", item)
    given = [nodes.get(id(a), a) if isinstance(a, Tensor) else a for a in args]
    return builder.finish(builder.call(target, *given, **kwargs))


def wide(item: Any) -> Any:
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item


def run(target: Any, *args: Given, **kwargs: Any) -> tuple[float, bool]:
    """Largest error against the op on float64, and whether it is an island."""
    module = graph(target, args, kwargs)
    lowered = integer.lower(module, mode="fixed_point")
    x = next(a for a in args if isinstance(a, Tensor))
    (found,) = lowered(x)
    exact = target(*(wide(a) for a in args), **kwargs)
    assert found.shape == exact.shape
    if not exact.is_floating_point():
        assert torch.equal(found, exact)
        return 0.0, bool(lowered.explain().islands)
    scale = exact.abs().clamp_min(1)
    return float(((found - exact).abs() / scale).max()), bool(lowered.explain().islands)


# float32 keeps 24 bits of what comes in and goes out, fixed point 24 behind the point.
LAST = 4 * UNIT
OPS: dict[str, tuple[Any, ...]] = {
    "sum": (aten.add.Tensor, TOKENS, BIAS), "sum with a number": (aten.add.Tensor, TOKENS, 1.5),
    "difference": (aten.sub.Tensor, TOKENS, BIAS),
    "less a number": (aten.sub.Tensor, TOKENS, 0.75),
    "from a number": (aten.rsub.Scalar, TOKENS, 2),
    "from a stored value": (aten.sub.Tensor, BIAS, WEIGHT),
    "product": (aten.mul.Tensor, TOKENS, BIAS), "times a number": (aten.mul.Tensor, TOKENS, -0.3),
    "times a whole number": (aten.mul.Scalar, TOKENS, 3), "times one": (aten.mul.Tensor, TOKENS, 1),
    "quotient": (aten.div.Tensor, TOKENS, WEIGHT), "by a number": (aten.div.Tensor, TOKENS, 7.0),
    "by a negative number": (aten.div.Scalar, TOKENS, -0.3),
    "clamped": (aten.clamp.default, TOKENS, -0.5, 1.7),
    "capped": (aten.clamp.default, TOKENS, None, 2),
    "rectified": (aten.relu.default, TOKENS), "up to six": (aten.relu6.default, TOKENS * 4),
    "hard": (aten.hardtanh.default, TOKENS, -2, 3),
    "at least": (aten.clamp_min.default, TOKENS, -0.3),
    "at most": (aten.clamp_max.default, TOKENS, 0.3),
    "leaky": (aten.leaky_relu.default, TOKENS, 0.2),
    "leaky by itself": (aten.leaky_relu.default, TOKENS),
    "root": (aten.sqrt.default, TOKENS.abs()), "magnitude": (aten.abs.default, TOKENS),
    "negative": (aten.neg.default, TOKENS), "softmax": (aten.softmax.int, TOKENS, -1),
    "softmax of another axis": (aten.softmax.int, TOKENS, 1),
    "maxima": (aten.amax.default, TOKENS, [1], True),
    "minima": (aten.amin.default, TOKENS, [1], True),
    "larger one": (aten.maximum.default, TOKENS, BIAS),
    "smaller one": (aten.minimum.default, TOKENS, BIAS),
    "mean": (aten.mean.dim, TOKENS, [1]), "mean kept": (aten.mean.dim, IMAGE, [2, 3], True),
    "filled": (aten.masked_fill.Scalar, TOKENS, TOKENS > 1, 0.25),
    "filled by a value": (aten.masked_fill.Tensor, TOKENS, TOKENS > 1, torch.tensor(0.3)),
    "like": (aten.full_like.default, TOKENS, 0.3),
    "greater": (aten.gt.Scalar, TOKENS, 0.5), "equal": (aten.eq.Tensor, TOKENS, TOKENS.round()),
    "place": (aten.argmax.default, TOKENS, 1), "sine": (aten.sin.default, TOKENS * 9),
    "cosine": (aten.cos.default, TOKENS * 9),
    "a float again": (aten.to.dtype, TOKENS, torch.float32),
    "transposed": (aten.permute.default, TOKENS, [2, 0, 1]),
    "norm": (aten.layer_norm.default, TOKENS, [6], WEIGHT, BIAS, 1e-5),
    "norm of two axes": (aten.layer_norm.default, TOKENS, [4, 6]),
    "norm with a large epsilon": (aten.layer_norm.default, TOKENS, [6], None, BIAS, 2.0),
    "root mean square": (aten.rms_norm.default, TOKENS, [6], WEIGHT, 1e-3),
    "root mean square of two axes": (aten.rms_norm.default, TOKENS, [4, 6], None, 0.5),
    "norm of groups": (aten.group_norm.default, IMAGE, 3, WEIGHT, BIAS, 1e-3),
    "norm of two groups": (aten.group_norm.default, IMAGE, 2, None, None, 1.5),
    "pooled to one": (aten.adaptive_avg_pool2d.default, IMAGE, [1, 1]),
    "pooled": (aten.avg_pool2d.default, IMAGE, [2, 3], [1, 2]),
    "pooled squares": (aten.avg_pool2d.default, IMAGE, [2]),
    "pooled by its own step": (aten.avg_pool2d.default, IMAGE, [3, 2]),
    "pooled with padding": (aten.avg_pool2d.default, IMAGE, [3, 2], [1, 2], [1, 0]),
    "pooled by another count": (
        aten.avg_pool2d.default, IMAGE, [3, 2], [1, 2], [0, 0], False, True, 5,
    ),
    "largest of a window": (aten.max_pool2d.default, IMAGE, [2, 3], [1, 2]),
    "nearest": (aten.upsample_nearest2d.vec, IMAGE, [9, 11], None),
    "bilinear": (aten.upsample_bilinear2d.vec, IMAGE, [9, 11], False, None),
    "bilinear by corners": (aten.upsample_bilinear2d.vec, IMAGE, [9, 11], True, None),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_ops_give_what_float64_gives_to_the_last_bits(name: str) -> None:
    target, *args = OPS[name]
    error, island = run(target, *args)
    assert not island
    loose = {"bilinear": 2.0**-17, "norm": 9 * LAST, "sine": 9 * LAST, "root": 9 * LAST}
    assert error <= next((most for word, most in loose.items() if word in name), LAST)


@pytest.mark.parametrize("target", TABLES, ids=str)
def test_smooth_functions_are_close_inside_their_table_and_beyond(target: Any) -> None:
    error, island = run(target, LONG)
    assert not island
    assert error <= 2.0**-19


def test_options_of_smooth_functions_are_kept() -> None:
    for target, args, kwargs in (
        (aten.gelu.default, (), {"approximate": "tanh"}), (aten.elu.default, (0.5,), {}),
        (aten.softplus.default, (2.0,), {}),
    ):  # fmt: skip
        assert run(target, LONG, *args, **kwargs)[0] <= 2.0**-19


def ints(shape: tuple[int, ...], low: int, high: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1))


def test_integers_and_masks_become_the_same_numbers() -> None:
    for values in (ints((3, 4), -9, 9), ints((3, 4), 0, 2).bool()):
        assert run(aten.to.dtype, values, torch.float32) == (0.0, False)
        assert run(aten._to_copy.default, values, dtype=torch.float32) == (0.0, False)


def test_rows_of_a_table_are_gathered_in_integers() -> None:
    index = ints((2, 3), 0, 4)
    builder = SingleOp()
    x, table = builder.placeholder("x", index), builder.buffer("table", TOKENS[0])
    module = builder.finish(builder.call(aten.embedding.default, table, x))
    lowered = integer.lower(module, mode="fixed_point")
    torch.testing.assert_close(lowered(index)[0], TOKENS[0][index], atol=UNIT, rtol=1e-7)
    assert not lowered.explain().islands


def joined(target: Any, parts: list[Tensor], *args: Any) -> None:
    builder = SingleOp()
    nodes = [builder.placeholder(f"x{at}", part) for at, part in enumerate(parts)]
    module = builder.finish(builder.call(target, nodes, *args))
    lowered = integer.lower(module, mode="fixed_point")
    torch.testing.assert_close(lowered(*parts)[0], target(parts, *args), atol=UNIT, rtol=1e-7)
    assert not lowered.explain().islands


def test_values_are_joined_as_they_are() -> None:
    joined(aten.cat.default, [TOKENS, TOKENS[:, :2]], 1)
    joined(aten.stack.default, [TOKENS, TOKENS.flip(0)], 2)


def test_one_of_two_values_is_chosen_by_a_mask() -> None:
    builder = SingleOp()
    x, other = builder.placeholder("x", TOKENS), builder.buffer("other", BIAS)
    mask = builder.call(aten.gt.Tensor, x, other)
    for choice in ((aten.where.self, mask, x, other), (aten.where.ScalarOther, mask, x, 0.5)):
        again = SingleOp()
        x, other = again.placeholder("x", TOKENS), again.buffer("other", BIAS)
        mask = again.call(aten.gt.Tensor, x, other)
        last = other if choice[0] is aten.where.self else 0.5
        lowered = integer.lower(
            again.finish(again.call(choice[0], mask, x, last)), mode="fixed_point"
        )
        wanted = torch.where(TOKENS > BIAS, TOKENS, BIAS if last is other else torch.tensor(0.5))
        torch.testing.assert_close(lowered(TOKENS)[0], wanted, atol=UNIT, rtol=1e-7)


ISLANDS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "a factor inside a sum": (aten.add.Tensor, (TOKENS, BIAS), {"alpha": 2}),
    "a factor inside a difference": (aten.sub.Tensor, (TOKENS, BIAS), {"alpha": 3}),
    "division that rounds": (aten.div.Tensor_mode, (TOKENS, 0.3), {"rounding_mode": "floor"}),
    "a huge factor": (aten.mul.Tensor, (FEW, 2.0**29), {}),
    "a tiny divisor": (aten.div.Tensor, (FEW, 2.0**-29), {}),
    "several windows over all": (aten.adaptive_avg_pool2d.default, (IMAGE, [1, 7]), {}),
    "windows that end outside": (
        aten.avg_pool2d.default, (IMAGE, [2, 3], [2, 2], [0, 0], True), {},
    ),
    "windows cut by padding": (
        aten.avg_pool2d.default, (IMAGE, [3, 3], [1, 1], [0, 1], False, False), {},
    ),
    "an exponential": (aten.exp.default, (TOKENS,), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ISLANDS)
def test_what_has_no_integer_form_is_a_float_island_and_right(name: str) -> None:
    target, args, kwargs = ISLANDS[name]
    error, island = run(target, *args, **kwargs)
    assert island
    assert error <= 2.0**-20


@pytest.mark.parametrize(
    ("target", "number"),
    [(aten.mul.Tensor, 2.0**29 - 64), (aten.mul.Tensor, 64 - 2.0**29),
     (aten.div.Tensor, 2.0**-29 * 1.001), (aten.div.Tensor, -(2.0**-29) * 1.001)],
)  # fmt: skip
def test_factors_up_to_the_limit_stay_in_integers(target: Any, number: float) -> None:
    error, island = run(target, FEW, number)
    assert not island
    assert error <= 2.0**-20


@pytest.mark.parametrize("factor", [2.0**k * 1.3 for k in range(-12, 28, 3)])
def test_factors_of_every_size_are_exact_to_the_last_bits_or_saturate(factor: float) -> None:
    exact = torch.cat([torch.linspace(-16_000, 16_000, 99), FEW / UNIT]).double()
    x = (exact / factor * 2.0**24).round() * UNIT
    x = x[(x.float().double() == x) & (x.abs() < 2**14)].float()
    module = graph(aten.mul.Tensor, (x, factor), {})
    found = integer.lower(module, mode="fixed_point")(x)[0]
    torch.testing.assert_close(found.double(), x.double() * factor, atol=4 * UNIT, rtol=2.0**-23)
    beyond = torch.tensor([-16_000.0, 16_000.0]) if factor > 2 else FEW
    high = integer.lower(graph(aten.mul.Tensor, (beyond, factor), {}), mode="fixed_point")(beyond)
    wanted = (beyond.double() * factor).clamp(-(2**14), 2**14)
    torch.testing.assert_close(high[0].double(), wanted, atol=UNIT, rtol=2.0**-23)


def test_alpha_of_one_and_windows_without_padding_are_nothing_special() -> None:
    assert run(aten.add.Tensor, TOKENS, BIAS, alpha=1)[1] is False
    assert run(aten.sub.Tensor, TOKENS, BIAS, alpha=1)[1] is False
    error, island = run(aten.avg_pool2d.default, IMAGE, [2, 3], [1, 1], [0, 0], False, False)
    assert (error <= LAST, island) == (True, False)


def test_a_mean_square_norm_without_epsilon_uses_that_of_float32() -> None:
    tiny = TOKENS * 2.0**-14
    exact = tiny.double() / (tiny.double().square().mean(-1, True) + 2.0**-23).sqrt()
    module = graph(aten.rms_norm.default, (tiny, [6]), {})
    (found,) = integer.lower(module, mode="fixed_point")(tiny)
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=1e-3)


def test_every_op_of_the_table_is_tried_here() -> None:
    tried = {op[0] for op in OPS.values()} | {op[0] for op in ISLANDS.values()} | set(TABLES)
    tried |= {aten.embedding.default, aten.cat.default, aten.stack.default, aten._to_copy.default}
    tried |= {aten.where.self, aten.where.ScalarOther}
    names = {str(op) for op in set(LOWERINGS) - tried}
    assert names <= {
        "aten.add.Scalar", "aten.sub.Scalar", "aten._softmax.default", "aten.where.ScalarSelf",
    }  # fmt: skip


def test_turns_and_segments_meet_at_their_ends() -> None:
    steps = torch.tensor([0.0, math.pi / 2, math.pi, 2 * math.pi, -math.pi / 2, 100 * math.pi])
    for target in (aten.sin.default, aten.cos.default):
        assert run(target, steps)[0] <= 40 * UNIT
