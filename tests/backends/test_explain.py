# SPDX-License-Identifier: Apache-2.0
"""What `explain` says of each op: kernel, width of sums, 16-bit pairs, floats and their cure."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node

from qgraph.backends import integer
from qgraph.backends.integer import ExplainRow, Explanation
from qgraph.formats import AffineEncoding
from tests.backends.exact import coded, decode, drawn, encode, insert_product, product_of, row_of
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
BYTES = coded(0, 255, 3)
X = torch.randn(2, 3, 4) * 0.1


def pairs_saturate(rows: list[list[int]]) -> bool:
    """Whether two neighbouring products with bytes can leave int16."""
    worst = 0
    for row in rows:
        for a, b in zip(row[::2], row[1::2], strict=False):
            for x, y in ((0, 0), (255, 0), (0, 255), (255, 255)):
                worst = max(worst, abs(a * x + b * y))
    return worst > 2**15 - 1


PAIRS = [
    [[64, 64]], [[64, 65]], [[-64, -64]], [[-64, -65]], [[100, -100]], [[127, 1]], [[127, 2]],
    [[0, 65, 64, 0]], [[0, 65, 0, 64]], [[1, 2, 127]], [[127]], [[64, 65, 127]], [[-127, -1, 9]],
    [[1, 1], [64, 65]], [[64, 1], [65, 1]], [[-128, 0]], [[-128, -1]], [[1, 0, 0, 0, 127, 127]],
    [[128, 0]], [[129, 0]], [[128, -1]], [[-128, 5]], [[-129, 5]], [[3, 0, -129, 1]],
]  # fmt: skip


@pytest.mark.parametrize("rows", PAIRS)
def test_pairs_of_a_linear_saturate_where_two_neighbours_leave_int16(rows: list[list[int]]) -> None:
    w = torch.tensor(rows, dtype=torch.int32)
    x = torch.zeros(1, w.shape[1], dtype=torch.int32)
    row = row_of(product_of(aten.linear.default, (x, BYTES), (w, coded(-256, 255))))
    assert row.saturates_pairs == pairs_saturate(rows)


@pytest.mark.parametrize("most", [64, 65, -64, -65])
def test_pairs_of_convolutions_are_bounded_by_their_largest_weight(most: int) -> None:
    w = torch.ones(2, 3, 2, 2, dtype=torch.int32)
    w[1, 2, 0, 1] = most
    x = torch.zeros(1, 3, 4, 4, dtype=torch.int32)
    row = row_of(product_of(aten.conv2d.default, (x, BYTES), (w, coded(-128, 127))))
    assert row.saturates_pairs == (abs(most) > 64)
    w = torch.ones(3, 2, dtype=torch.int32)
    w[2, 1] = most
    row = row_of(product_of(aten.matmul.default, (x[..., :3], BYTES), (w, coded(-128, 127))))
    assert row.saturates_pairs == (abs(most) > 64)


@pytest.mark.parametrize("weights", [[[30, 30]], [[30, -30]], [[64, 1]], [[1, 64]], [[1, 31]]])
@pytest.mark.parametrize("steps", [(0, 0), (0, 2), (2, 0)])
@pytest.mark.parametrize("op", [aten.linear.default, aten.matmul.default])
def test_pairs_are_of_weights_that_took_over_the_scales_of_channels(
    weights: list[list[int]], steps: tuple[int, int], op: Any
) -> None:
    data = AffineEncoding(
        scale=2.0 ** torch.tensor(steps) / 2**10, zero_point=torch.zeros(2), qmin=0, qmax=255,
        axis=1,
    )  # fmt: skip
    w = torch.tensor(weights, dtype=torch.int32)
    x = torch.zeros(1, 2, dtype=torch.int32)
    is_linear = op is aten.linear.default
    stored = w if is_linear else w.t().contiguous()
    row = row_of(product_of(op, (x, data), (stored, coded(-128, 127))))
    multiplied = [[v << s for v, s in zip(line, steps, strict=True)] for line in weights]
    most = max(abs(v) for v in multiplied[0])
    assert row.saturates_pairs == pairs_saturate(multiplied if is_linear else [[most, most]])


def test_computed_operands_have_no_pairs() -> None:
    x = torch.zeros(1, 3, 4, dtype=torch.int32)
    module = product_of(aten.matmul.default, (x, BYTES), (x.mT, BYTES), fixed=False)
    assert not row_of(module).saturates_pairs


@pytest.mark.parametrize("total", [1, 127, 128, 255, 256, 1000])
def test_sums_have_the_bits_that_hold_them_with_their_sign(total: int) -> None:
    w = torch.tensor([[total // 2, total - total // 2]], dtype=torch.int32)
    x = torch.zeros(1, 2, dtype=torch.int32)
    row = row_of(product_of(aten.linear.default, (x, BYTES), (w, coded(-999, 999))))
    assert row.accumulator_bits is not None
    assert 2 ** (row.accumulator_bits - 2) <= 252 * total < 2 ** (row.accumulator_bits - 1)
    assert (row.data, row.weight) == (BYTES.describe(), coded(-999, 999).describe())


def network() -> tuple[GraphModule, dict[str, Node]]:
    """A product, a clamp, a table, a float op, what reads it, and what moves."""
    b = SingleOp()
    data, weight = (X.int(), BYTES), (drawn(coded(-8, 7), (5, 4), 1), coded(-8, 7))
    linear = insert_product(b, aten.linear.default, data, weight)
    relu = b.call(aten.relu.default, linear)
    first = decode(b, encode(b, relu, "q", coded(3, 200, 9)), "q", coded(3, 200, 9))
    gelu = b.call(aten.gelu.default, first)
    second = decode(b, encode(b, gelu, "r", BYTES), "r", BYTES)
    soft = b.call(aten.softmax.int, second, -1)
    moved = b.call(aten.permute.default, soft, [0, 2, 1])
    bent = b.call(aten.tanh.default, soft)
    root = b.call(aten.exp.default, moved)
    summed = b.call(aten.add.Tensor, soft, bent)
    mask = b.call(aten.gt.Scalar, soft, 0.5)
    plain = b.call(aten.matmul.default, soft, root)
    sinus = b.call(aten.sin.default, second)
    b.graph.output((root, mask, plain, sinus, b.call(aten.neg.default, summed)))
    b.module.recompile()
    nodes = {
        "linear": linear, "relu": relu, "gelu": gelu, "softmax": soft, "tanh": bent, "exp": root,
        "add": summed, "mask": mask, "permute": moved, "matmul": plain, "sin": sinus,
    }  # fmt: skip
    return b.module, nodes


def test_each_op_that_computes_has_a_row() -> None:
    module, nodes = network()
    rows = {row.node: row for row in integer.lower(module).explain()}
    found = {name: rows.get(node.name) for name, node in nodes.items()}
    assert found["permute"] is None
    assert found["mask"] is None
    ops = {name: row.op for name, row in found.items() if row is not None}
    assert ops == {
        "linear": "linear", "relu": "elementwise", "gelu": "elementwise", "softmax": "softmax",
        "tanh": "elementwise", "exp": "elementwise", "add": "add", "matmul": "matmul",
        "sin": "elementwise",
    }  # fmt: skip
    kernels = {name: row.kernel for name, row in found.items() if row is not None}
    assert kernels["relu"] == "folded"
    assert kernels["gelu"] == "table of 198"
    assert {kernels[n] for n in ("softmax", "tanh", "exp", "add", "matmul", "sin")} == {"float32"}
    islands = {name: row.island for name, row in found.items() if row is not None}
    assert [n for n, island in islands.items() if not island] == ["linear", "relu", "gelu"]
    why = {name: row.reason for name, row in found.items() if row is not None}
    soft = nodes["softmax"].name
    assert why["tanh"] == f"reads floats: {soft}"
    assert why["add"] == f"reads floats: {soft}, {nodes['tanh'].name}"
    assert "not quantized" in why["matmul"]
    assert why["softmax"] == "onnxruntime runs it in float"
    cures = {name: row.cure for name, row in found.items() if row is not None}
    assert "scope" in cures["matmul"]
    assert "both operands" in cures["add"]
    assert "softmax" in cures["softmax"]
    assert "table" in cures["exp"]
    assert cures["linear"] == cures["gelu"] == ""
    assert all(row.accumulator_bits is None for n, row in found.items() if row and n != "linear")
    assert all(row.dtypes == "" for row in rows.values())


def test_ops_of_no_kind_are_named_as_torch_names_them() -> None:
    b = SingleOp()
    x = b.call(aten.cumsum.default, b.placeholder("x", torch.ones(2, 3)), 1)
    (row,) = integer.lower(b.finish(x)).explain()
    assert row.op == "cumsum.default"


def test_the_fixed_point_mode_says_what_each_op_computes_in() -> None:
    module, nodes = network()
    rows = {row.node: row for row in integer.lower(module, mode="fixed_point").explain()}
    kernels = {name: rows[n.name].kernel for name, n in nodes.items() if n.name in rows}
    assert kernels["softmax"] == kernels["tanh"] == kernels["add"] == "fixed point"
    assert kernels["exp"] == kernels["matmul"] == "float32"
    islands = {name for name, n in nodes.items() if n.name in rows and rows[n.name].island}
    assert islands == {"exp", "matmul"}
    assert "no integer form" in rows[nodes["exp"].name].reason
    assert rows[nodes["exp"].name].cure == rows[nodes["softmax"].name].cure == ""
    assert rows[nodes["softmax"].name].reason == "24 bits"
    assert "int64" in rows[nodes["softmax"].name].dtypes
    assert "float" not in rows[nodes["softmax"].name].dtypes
    assert "float" in rows[nodes["exp"].name].dtypes


def test_a_function_read_in_floats_says_by_whom() -> None:
    b = SingleOp()
    node = b.call(
        aten.tanh.default, decode(b, encode(b, b.placeholder("x", X), "q", BYTES), "q", BYTES)
    )
    readers = [b.call(op, node) for op in (aten.exp.default, aten.neg.default, aten.abs.default)]
    quantized = encode(b, node, "r", BYTES)
    b.graph.output((*readers, quantized))
    b.module.recompile()
    rows = {row.node: row for row in integer.lower(b.module).explain()}
    assert rows[node.name].reason == f"read in float by {readers[0].name}, {readers[1].name}"


def test_quantizers_and_outputs_do_not_read_a_function_in_floats() -> None:
    b = SingleOp()
    x = decode(b, encode(b, b.placeholder("x", X), "q", BYTES), "q", BYTES)
    node = b.call(aten.tanh.default, x)
    quantized = encode(b, node, "r", BYTES)
    b.graph.output((quantized, node, b.call(aten.exp.default, node)))
    b.module.recompile()
    rows = {row.node: row for row in integer.lower(b.module).explain()}
    assert rows[node.name].reason == "read in float by exp_default"


def row(**changes: Any) -> ExplainRow:
    plain: dict[str, Any] = {
        "node": "n", "module_path": "", "source": "", "op": "linear", "data": "d", "weight": "w",
        "kernel": "k", "accumulator_bits": None, "saturates_pairs": False, "dtypes": "",
        "island": False, "reason": "r", "cure": "",
    }  # fmt: skip
    return ExplainRow(**{**plain, **changes})


def test_rows_print_as_a_table_of_at_most_100_columns() -> None:
    long = {"node": "x" * 30 + "y" * 30, "op": "o" * 30, "data": "d" * 30, "weight": "w" * 30}
    table = Explanation([
        row(accumulator_bits=17), row(**long, kernel="k" * 80),
        row(island=True, reason="because", cure="do"), row(island=True, reason="r" * 200),
    ])  # fmt: skip
    head, first, second, *_, cured, why = str(table).splitlines()
    assert [head.index(w) for w in ("node", "op", "data", "weight", "acc", "kernel")] == [
        first.index(" n") + 1 if w == "n" else at for w, at in zip(
            ("node", "op", "data", "weight", "acc", "kernel"),
            (0, first.index("linear"), first.index(" d ") + 1, first.index(" w ") + 1,
             first.index("17") - 2 + 1, first.index(" k") + 1), strict=True)
    ]  # fmt: skip
    assert second.startswith("y" * 22 + " " + "o" * 14 + " " + "d" * 18 + " " + "w" * 18)
    assert max(map(len, str(table).splitlines())) == 100
    assert cured == "float: n: because; do"
    assert why == f"float: n: {'r' * 200}"[:100]
    assert len(str(table).splitlines()) == 1 + 4 + 2
    assert [r["island"] for r in json.loads(table.to_json())] == [False, False, True, True]
    assert "\n " in table.to_json()
    assert '\n  "' in table.to_json()
    assert table.islands == table[2:]
