# SPDX-License-Identifier: Apache-2.0
"""Finished models: what is packed, folded, kept, renamed and written as what."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qgraph.backends.onnx.finish import finish, rename_dims, resolve_marks


def model(
    nodes: list[Any], stored: dict[str, Any], outputs: list[str], shape: Any = (4, 16)
) -> ir.Model:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qgraph", 1)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets))


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def mark(codes: str, output: str, name: str) -> Any:
    made = helper.make_node("Mark", [codes], [output], domain="qgraph")
    made.attribute.append(helper.make_attribute("name", name))
    return made


def weights(codes: np.ndarray, extra: list[Any] | None = None) -> ir.Model:
    """``x + decoded codes``, and whatever else reads them."""
    nodes = [
        node("DequantizeLinear", "w s", "d"), node("ReduceSum", "d", "r", keepdims=0),
        node("Add", "x r", "y"), *(extra or []),
    ]  # fmt: skip
    names = [n.output[0] for n in nodes if n.op_type in {"Add", "Mul"} or "c" in n.output]
    return model(nodes, {"w": codes, "s": np.float32(0.5)}, names)


def held(made: ir.Model) -> dict[str, str]:
    return {
        n: v.dtype.name for n, v in made.graph.initializers.items() if v.dtype and v.shape != ()
    }


def codes(low: int, high: int, count: int, dtype: Any = np.int8) -> np.ndarray:
    values = np.resize(np.arange(low, high + 1), count)
    return values.astype(dtype).reshape(-1, 1)


@pytest.mark.parametrize(
    ("given", "opset", "name"),
    [
        (codes(-8, 7, 256), 21, "INT4"), (codes(-8, 7, 255), 21, "INT8"),
        (codes(-2, 1, 256), 21, "INT4"), (codes(-2, 1, 256), 25, "INT2"),
        (codes(-2, 2, 300), 25, "INT4"), (codes(-9, 7, 300), 25, "INT8"),
        (codes(0, 7, 300, np.uint8), 25, "UINT8"), (codes(-2, 1, 300), 24, "INT4"),
    ],
)  # fmt: skip
def test_narrow_codes_worth_it_are_packed_and_mean_the_same(
    given: np.ndarray, opset: int, name: str
) -> None:
    made = weights(given)
    finish(made, native=True, opset=opset)
    assert set(held(made).values()) == {name}
    assert made.ir_version == (13 if opset >= 25 else 10)
    assert made.opset_imports == {"": opset}
    if name == "INT2":
        return
    plain = weights(given)
    finish(plain, native=False, opset=21)
    assert set(held(plain).values()) == {given.dtype.name.upper()}
    x, found = np.ones((4, 16), np.float32), []
    for item in (made, plain):
        item.opset_imports[""], item.ir_version = 21, 10
        session = onnxruntime.InferenceSession(
            ir.serde.serialize_model(item).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        found.append(session.run(None, {"x": x})[0])
    assert np.array_equal(found[0], found[1])
    assert found[0][0, 0] == 1 + 0.5 * given.astype(np.int64).sum()


def test_codes_that_something_else_reads_are_not_packed() -> None:
    gather = [node("Cast", "x", "i", to=TensorProto.INT64), node("Gather", "w i", "g"),
              node("Cast", "g", "c", to=TensorProto.FLOAT)]  # fmt: skip
    twice = [node("DequantizeLinear", "w s", "e"), node("Mul", "e e", "m")]
    for extra, name in ((gather, "INT8"), (twice, "INT4")):
        made = weights(codes(-8, 7, 300), extra)
        finish(made, native=True, opset=21)
        assert held(made)["w" if name == "INT8" else "w/packed"] == name


def test_zero_points_are_not_mistaken_for_codes() -> None:
    zeros = codes(0, 1, 300)
    nodes = [
        node("QuantizeLinear", "x s z", "q", axis=0),
        node("DequantizeLinear", "q s z", "d", axis=0),
        node("Neg", "d", "y"),
    ]  # fmt: skip
    made = model(nodes, {"s": np.ones(300, np.float32), "z": zeros.reshape(-1)}, ["y"], (300, 2))
    finish(made, native=True, opset=21)
    assert set(held(made).values()) == {"INT8", "FLOAT"}


def test_attributes_with_their_defaults_are_dropped_and_others_kept() -> None:
    nodes = [
        node("QuantizeLinear", "x s z", "q", axis=1, block_size=0, saturate=1, output_dtype=0),
        node("DequantizeLinear", "q s z", "d", axis=1, block_size=0),
        node("Cast", "q", "c", to=TensorProto.FLOAT, saturate=1),
        node("Cast", "d", "e", to=TensorProto.FLOAT16, saturate=0),
        node("Cast", "e", "f", to=TensorProto.FLOAT, saturate=0), node("Add", "c f", "y"),
    ]  # fmt: skip
    made = model(nodes, {"s": np.ones(16, np.float32), "z": np.zeros(16, np.uint8)}, ["y"])
    finish(made, native=False, opset=21)
    said = [(n.op_type, sorted(n.attributes)) for n in made.graph]
    assert said == [
        ("QuantizeLinear", ["axis"]), ("DequantizeLinear", ["axis"]), ("Cast", ["to"]),
        ("Cast", ["saturate", "to"]), ("Cast", ["saturate", "to"]), ("Add", []),
    ]  # fmt: skip


@pytest.mark.parametrize("readers", [["LayerNormalization"], ["LayerNormalization"] * 2,
                                     ["LayerNormalization", "Neg"], ["Neg"], []])  # fmt: skip
def test_sums_in_front_of_norms_alone_are_written_apart(readers: list[str]) -> None:
    nodes = [node("Add", "x b", "a")]
    for at, op in enumerate(readers):
        nodes.append(node(op, "a g" if "Norm" in op else "a", f"y{at}"))
    made = model(
        nodes, {"b": np.arange(16, dtype=np.float32), "g": np.arange(1, 17, dtype=np.float32)},
        [f"y{at}" for at in range(len(readers))] or ["a"],
    )  # fmt: skip
    for at, item in enumerate(n for n in made.graph if n.op_type == "LayerNormalization"):
        item.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3 * (at + 1))  # else they merge
    finish(made, native=False, opset=21)
    apart = bool(readers) and "Neg" not in readers
    assert next(n.op_type for n in made.graph) == ("Sum" if apart else "Add")


def test_decoders_of_constants_stay_and_other_constants_fold() -> None:
    nodes = [
        node("DequantizeLinear", "w s", "d"), node("Add", "c c", "e"), node("Mul", "e d", "f"),
        node("Add", "x f", "y"),
    ]  # fmt: skip
    made = model(
        nodes, {
            "w": np.arange(16, dtype=np.int8), "s": np.float32(0.5), "c": np.ones(16, np.float32),
        }, ["y"],
    )  # fmt: skip
    finish(made, native=False, opset=21)
    assert [n.op_type for n in made.graph] == ["DequantizeLinear", "Mul", "Add"]
    assert made.producer_name == "qgraph"
    assert not made.functions
    assert not made.metadata_props


def test_values_that_hold_codes_stay_in_the_file_and_become_no_outputs() -> None:
    nodes = [
        node("QuantizeLinear", "x s z", "a/codes"), node("Reshape", "a/codes n", "b/codes"),
        node("Reshape", "b/codes m", "c/codes"), node("DequantizeLinear", "c/codes s z", "y"),
    ]  # fmt: skip
    stored = {"s": np.float32(1), "z": np.uint8(3), "n": np.array([8, 8]), "m": np.array([2, 32])}
    made = model(nodes, stored, ["y"])
    finish(made, native=False, opset=21)
    values = {str(v.name) for n in made.graph for v in n.outputs}
    assert {"a/codes", "b/codes", "c/codes"} <= values
    assert [v.name for v in made.graph.outputs] == ["y"]


def test_marks_name_the_values_that_hold_codes() -> None:
    nodes = [
        node("QuantizeLinear", "x s z", "q"), mark("q", "m", "first"),
        mark("q", "n", "second"), node("DequantizeLinear", "m s z", "y"),
        node("DequantizeLinear", "n s z", "v"), node("QuantizeLinear", "v s z", "r"),
        mark("r", "o", "third"), node("DequantizeLinear", "o s z", "w"),
    ]  # fmt: skip
    made = model(nodes, {"s": np.float32(1), "z": np.uint8(3)}, ["y", "w"])
    assert resolve_marks(made) == {
        "first": "first/codes", "second": "first/codes", "third": "third/codes",
    }  # fmt: skip
    assert [n.op_type for n in made.graph] == [
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "QuantizeLinear",
        "DequantizeLinear",
    ]  # fmt: skip
    assert "qgraph" not in made.opset_imports


def test_sizes_are_renamed_everywhere_and_inside_expressions() -> None:
    made = model([node("Neg", "x", "a"), node("Abs", "a", "y")], {}, ["y"], ("s0", 3, "s01"))
    (value,) = next(iter(made.graph)).outputs
    value.shape = ir.Shape(["2*s0 + s1", 7, None])
    rename_dims(made, {"s0": "batch", "s1": "dim1"})
    assert [str(d) for d in made.graph.inputs[0].shape] == ["batch", "3", "s01"]
    assert str(value.shape[0]) == "2*batch + dim1"
    assert value.shape[1] == 7
    rename_dims(made, {})
    assert str(made.graph.inputs[0].shape[0]) == "batch"
