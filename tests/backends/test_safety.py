# SPDX-License-Identifier: Apache-2.0
"""Declared sizes and ranges of tensors right at their limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qgraph.backends.onnx import safety
from qgraph.backends.onnx.safety import check_bytes, check_file, check_tensor, declared_bytes
from qgraph.errors import ArtifactError


def external(dims: list[int], entries: dict[str, Any], kind: str = "FLOAT") -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.DataType.Value(kind), dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def allowed(folder: Path, dims: list[int], kind: str = "FLOAT", **entries: Any) -> bool:
    try:
        check_tensor(external(dims, {"location": "w.bin", **entries}, kind), folder)
    except ArtifactError:
        return False
    return True


@pytest.mark.parametrize("kind", ["FLOAT", "INT8", "INT4", "UINT2", "DOUBLE"])
def test_external_ranges_lie_inside_the_file_and_hold_the_tensor(kind: str, tmp_path: Path) -> None:
    size = 24
    (tmp_path / "w.bin").write_bytes(bytes(size))
    bits = {"FLOAT": 32, "INT8": 8, "INT4": 4, "UINT2": 2, "DOUBLE": 64}[kind]
    for count in (0, 1, 2, 3, 4, 5, 6, 7, 23, 24, 25, 47, 48, 49, 95, 96, 97):
        needed = math.ceil(count * bits / 8)
        for offset in (None, -1, 0, 1, 8, 23, 24, 25):
            start = offset or 0
            for length in (None, -1, 0, 1, 8, 23, 24, 25):
                span = max(size - start, 0) if length is None else length
                wanted = start >= 0 and span >= 0 and start + span <= size and needed <= span
                given = {"offset": offset, "length": length}
                said = {k: v for k, v in given.items() if v is not None}
                assert allowed(tmp_path, [count], kind, **said) == wanted, (count, said)


def test_shapes_multiply(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(24))
    assert allowed(tmp_path, [2, 3])
    assert not allowed(tmp_path, [2, 4])
    assert allowed(tmp_path, [])
    assert allowed(tmp_path, [0, 9])


@pytest.mark.parametrize(
    ("dims", "fine"),
    [([2**36], True), ([2**36 + 1], False), ([2**18, 2**18], True), ([2**18, 2**18, 2], False),
     ([-1], False), ([2, -1], False), ([0], True), ([], True)],
)  # fmt: skip
def test_absurd_shapes_are_refused_from_the_first_element_too_many(
    dims: list[int], fine: bool
) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims)
    if fine:
        check_tensor(tensor, None)
    else:
        with pytest.raises(ArtifactError, match="absurd shape"):
            check_tensor(tensor, None)


def test_the_limits_are_those_of_real_models() -> None:
    assert (safety.MAX_BYTES, safety.MAX_ELEMENTS, safety.MAX_NODES) == (
        64 << 30,
        1 << 36,
        2_000_000,
    )


@pytest.mark.parametrize("kind", sorted(set(TensorProto.DataType.keys()) - {"UNDEFINED", "STRING"}))
def test_declared_bytes_are_those_that_onnx_stores(kind: str) -> None:
    code = TensorProto.DataType.Value(kind)
    dtype = helper.tensor_dtype_to_np_dtype(code)
    bits = 4 if ("4" in kind.removesuffix("64") and "FLOAT" not in kind) or "4E2M1" in kind else 0
    bits = 2 if kind in {"INT2", "UINT2"} else bits if "INT4" in kind or "4E2M1" in kind else 0
    for dims in ([], [1], [3], [5, 3], [2, 2, 2], [0]):
        count = int(np.prod(dims))
        stored = math.ceil(count * bits / 8) if bits else count * dtype.itemsize
        assert declared_bytes(TensorProto(name="w", data_type=code, dims=dims)) == stored


def test_types_that_hold_no_numbers_are_refused() -> None:
    for code in (TensorProto.UNDEFINED, TensorProto.STRING, 99):
        with pytest.raises(ArtifactError, match="has type"):
            declared_bytes(TensorProto(name="w", data_type=code, dims=[1]))


def added(nodes: int) -> onnx.ModelProto:
    """So many nodes, half of them inside the branches of one."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    inner = [helper.make_node("Neg", ["x"], [f"z{k}"]) for k in range((nodes - 1) // 2)]
    body = helper.make_graph(inner, "b", [], [value])
    outer = [helper.make_node("Neg", ["x"], [f"y{k}"]) for k in range(nodes - 1 - len(inner))]
    outer.append(helper.make_node("If", ["x"], ["i"], then_branch=body))
    return helper.make_model(helper.make_graph(outer, "g", [value], [value]), ir_version=10)


def test_nodes_of_all_graphs_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safety, "MAX_NODES", 9)
    check_bytes(added(9).SerializeToString())
    with pytest.raises(ArtifactError, match="10 nodes; refused above 9"):
        check_bytes(added(10).SerializeToString())


def test_files_are_measured_before_they_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = added(3).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data)
    monkeypatch.setattr(safety, "MAX_BYTES", len(data))
    check_file(tmp_path / "m.onnx")
    monkeypatch.setattr(safety, "MAX_BYTES", len(data) - 1)
    with pytest.raises(ArtifactError, match="refused above"):
        check_file(tmp_path / "m.onnx")


@pytest.mark.parametrize("where", ["values", "indices", "attribute", "list", "branches"])
def test_tensors_are_checked_wherever_they_stand(where: str) -> None:
    model = added(3)
    bad = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[-1])
    good = numpy_helper.from_array(np.zeros(1, np.int64), "w")
    if where in {"values", "indices"}:
        sparse = model.graph.sparse_initializer.add()
        sparse.values.CopyFrom(bad if where == "values" else good)
        sparse.indices.CopyFrom(bad if where == "indices" else good)
    else:
        attribute = model.graph.node[0].attribute.add(name="a")
        if where == "attribute":
            attribute.t.CopyFrom(bad)
        elif where == "list":
            attribute.tensors.extend([good, bad])
        else:
            body = helper.make_graph([], "b", [], [])
            body.initializer.append(bad)
            attribute.graphs.extend([helper.make_graph([], "a", [], []), body])
    with pytest.raises(ArtifactError, match="absurd shape"):
        check_bytes(model.SerializeToString())


@pytest.mark.parametrize(("nodes", "outputs"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_graph_has_a_node_or_an_output(nodes: int, outputs: int) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    made = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])] * nodes, "g", [value], [value] * outputs
    )
    data = helper.make_model(made, ir_version=10).SerializeToString()
    if nodes or outputs:
        check_bytes(data)
    else:
        with pytest.raises(ArtifactError, match="holds no graph"):
            check_bytes(data)
