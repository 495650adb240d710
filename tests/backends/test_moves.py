# SPDX-License-Identifier: Apache-2.0
"""Moves hand codes on wherever scales can follow them, and the backends agree where they cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qgraph.backends import integer, reference
from qgraph.backends.elementary import is_elementary
from qgraph.backends.levels import same_encoding
from qgraph.backends.semantics import Role, Semantics, analyze
from qgraph.formats import AffineEncoding, Encoding, IntGrid, LevelEncoding
from qgraph.graph.build import insert_call
from qgraph.graph.dialect import DEQUANTIZE, DEQUANTIZE_LEVELS, QUANTIZE, QUANTIZE_LEVELS
from qgraph.graph.trace import trace
from qgraph.passes.insert_quantizers import parameter_nodes
from tests.backends.single_ops import product_graph

Move = Callable[[Tensor], Tensor]


class Product(nn.Module):
    """A product whose left operand was moved."""

    def __init__(self, move: Move) -> None:
        super().__init__()
        self.move = move

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.move(x) @ y


class Joined(nn.Module):
    """Two inputs side by side, then a product."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([x, y], 1)
        return both @ both.transpose(1, 2)


def behind_input(module: GraphModule, name: str, encoding: Encoding) -> None:
    """Quantize an input where it enters, ahead of all moves."""
    node = next(n for n in module.graph.nodes if n.op == "placeholder" and n.target == name)
    behind(module, node, encoding)


def behind(module: GraphModule, node: Node, encoding: Encoding) -> None:
    """Quantize a value for all its readers."""
    name = node.name
    pair = (
        (QUANTIZE, DEQUANTIZE) if isinstance(encoding, AffineEncoding)
        else (QUANTIZE_LEVELS, DEQUANTIZE_LEVELS)
    )  # fmt: skip
    readers = list(node.users)
    parameters = parameter_nodes(module, name, encoding, before=readers[0])
    codes = insert_call(module, pair[0], node, *parameters, like=node, before=readers[0])
    values = insert_call(module, pair[1], codes, *parameters, like=node, before=readers[0])
    for reader in readers:
        reader.replace_input_with(node, values)
    module.recompile()


def channels(axis: int, count: int) -> AffineEncoding:
    scale = 0.02 * torch.arange(1, count + 1)
    zero = torch.arange(100, 100 + count, dtype=torch.int32)
    return AffineEncoding(scale=scale, zero_point=zero, qmin=0, qmax=255, axis=axis)


def plain(scale: float = 0.02, zero: int = 120) -> AffineEncoding:
    return AffineEncoding.per_tensor(scale, zero, IntGrid(8, signed=False))


def table(scale: float = 0.05) -> LevelEncoding:
    levels = torch.tensor([*range(-8, 8), *range(8, 64, 8)])
    return LevelEncoding.nearest("dual region", torch.tensor(scale), levels, storage_bits=5)


def calls(found: Semantics, *names: str) -> list[Node]:
    nodes = [n for n in found.module.graph.nodes if n.op == "call_function"]
    return [n for n in nodes if any(f"aten.{name}." in str(n.target) for name in names)]


def agree(module: GraphModule, *inputs: Tensor) -> None:
    """Bit for bit."""
    assert torch.equal(integer.lower(module)(*inputs), reference.lower(module)(*inputs))


# (move, axis of the scales, where they lie behind it; None: they cannot follow)
MOVES: dict[str, tuple[Move, int, int | None]] = {
    "permute": (lambda x: x.permute(0, 2, 1, 3), 1, 2),
    "transpose": (lambda x: x.transpose(1, 2), 2, 1),
    "transpose of others": (lambda x: x.transpose(0, 2), 1, 1),
    "slice of another axis": (lambda x: x[:, :, 1:3], 1, 1),
    "slice of their own": (lambda x: x[:, 1:], 1, None),
    "select behind": (lambda x: x.select(2, 1), 1, 1),
    "select before": (lambda x: x.select(1, 1), 2, 1),
    "select of their own": (lambda x: x.select(1, 1), 1, None),
    "reshape behind": (lambda x: x.reshape(-1, 3, 24), 1, 1),
    "reshape before": (lambda x: x.reshape(-1, 4, 6), 2, 1),
    "reshape across": (lambda x: x.reshape(-1, 12, 6), 1, None),
}


@pytest.mark.parametrize("name", MOVES)
def test_scales_follow_moves_or_the_product_stays_in_float(name: str) -> None:
    torch.manual_seed(0)
    move, axis, place = MOVES[name]
    x = torch.randn(2, 3, 4, 6)
    y = torch.randn(move(x).shape[-1], 5)
    module = trace(Product(move).eval(), x, y)
    behind_input(module, "x", channels(axis, x.shape[axis]))
    behind_input(module, "y", plain())
    found = analyze(module)
    (multiplied,) = calls(found, "matmul")
    moved = multiplied.args[0]
    assert isinstance(moved, Node)
    if place is not None:
        assert found.roles[moved] is Role.MOVE
        assert found.levels[moved].axis == place
        assert found.roles[multiplied] is Role.PRODUCT
    else:
        assert found.roles[moved] is Role.FLOAT
        assert found.roles[multiplied] is Role.FLOAT
        assert "not quantized" in found.reasons[multiplied]
    agree(module, x, y)
    # the scales of moved codes are those of the values: compare with the plain formula
    left = move(channels(axis, x.shape[axis]).fake(x))
    torch.testing.assert_close(integer.lower(module)(x, y), left @ plain().fake(y))


CHAINS: dict[str, tuple[Move, set[Role]]] = {
    "a chain": (lambda x: torch.nn.functional.gelu(x * 0.5 + 0.1), {Role.TABLE}),
    "with a move": (lambda x: torch.sigmoid(x).reshape(-1, 6), {Role.TABLE, Role.MOVE}),
    "of two values": (lambda x: torch.tanh(x) + x.flip(0), {Role.FLOAT}),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("encoding", [plain(), table()], ids=["grid", "table"])
def test_functions_of_one_code_between_quantizers_are_tables(name: str, encoding: Encoding) -> None:
    torch.manual_seed(0)
    function, roles = CHAINS[name]
    x, y = torch.randn(2, 3, 6), torch.randn(6, 5)
    module = trace(Product(function).eval(), x, y)
    (multiplied,) = [n for n in module.graph.nodes if "matmul" in str(n.target)]
    value = multiplied.args[0]
    behind_input(module, "x", encoding)
    behind_input(module, "y", plain())
    behind(module, value, plain(0.01))
    found = analyze(module)
    between = [n for n in module.graph.nodes if "aten" in str(n.target) and n is not multiplied]
    assert {found.roles[n] for n in between} - {Role.SHAPE} >= roles
    assert (Role.TABLE in {found.roles[n] for n in between}) == (Role.TABLE in roles)
    agree(module, x, y)
    left = plain(0.01).fake(function(encoding.fake(x)))
    torch.testing.assert_close(integer.lower(module)(x, y), left @ plain().fake(y))


PAIRS: dict[str, tuple[Encoding, Encoding, bool]] = {
    "equal": (plain(), plain(), True),
    "other scales": (plain(), plain(0.03), False),
    "other zero points": (plain(), plain(zero=3), False),
    "equal tables": (table(), table(), True),
    "other scales of tables": (table(), table(0.07), False),
    "a table and a grid": (table(), plain(), False),
    "one scale per channel": (channels(2, 6), channels(2, 6), False),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_side_by_side_are_levels_only_with_equal_numbers(name: str) -> None:
    torch.manual_seed(0)
    first, second, joins = PAIRS[name]
    x, y = torch.randn(2, 3, 6), torch.randn(2, 4, 6)
    module = trace(Joined().eval(), x, y)
    behind_input(module, "x", first)
    behind_input(module, "y", second)
    found = analyze(module)
    (cat,) = calls(found, "cat")
    assert found.roles[cat] is (Role.MOVE if joins else Role.FLOAT)
    agree(module, x, y)
    both = torch.cat([first.fake(x), second.fake(y)], 1)
    torch.testing.assert_close(integer.lower(module)(x, y), both @ both.transpose(1, 2))


def test_encodings_are_the_same_by_their_numbers() -> None:
    assert same_encoding(plain(), plain())
    assert same_encoding(channels(1, 3), channels(1, 3))
    assert not same_encoding(channels(1, 3), channels(2, 3))
    assert not same_encoding(table(), plain())


@pytest.mark.parametrize("count", [16, 17])
def test_so_many_free_scales_along_the_contraction_share_products(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (3, count), generator=generator).to(torch.uint8)
    w = torch.randint(-127, 128, (5, count), generator=generator).to(torch.int8)
    weight = AffineEncoding.per_tensor(0.5, 0, IntGrid(8, signed=True))
    module = product_graph(torch.ops.aten.linear.default, (x, channels(1, count)), (w, weight))
    found = analyze(module)
    (multiplied,) = calls(found, "linear")
    assert found.roles[multiplied] is (Role.PRODUCT if count == 16 else Role.FLOAT)
    if count > 16:
        assert "17 free scales along the contraction" in found.reasons[multiplied]
    assert torch.equal(integer.lower(module)(x)[0], reference.lower(module)(x)[0])


def test_compilers_may_look_into_ops_that_round_in_one_way_only() -> None:
    aten = torch.ops.aten
    for op in (aten.permute.default, aten.split.Tensor, aten.add.Tensor, torch.ops.qgraph.quantize):
        assert is_elementary(op)
    for op in (aten.softmax.int, aten.exp.default, aten.mean.dim, aten.layer_norm.default):
        assert not is_elementary(op)
