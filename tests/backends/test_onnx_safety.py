# SPDX-License-Identifier: Apache-2.0
"""Hostile and damaged files are refused before onnxruntime sees them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from qgraph.backends.onnx import safety
from qgraph.backends.onnx.capabilities import SESSION_CONFIG
from qgraph.backends.onnx.export import export
from qgraph.backends.onnx.safety import check_bytes, check_file, declared_bytes
from qgraph.backends.onnx.session import Session, read_codes, read_config
from qgraph.backends.onnx.signature import Signature, load
from qgraph.errors import ArtifactError, InputError
from tests.backends.onnx_models import quantized


def model(tensor: onnx.TensorProto, domain: str = "") -> onnx.ModelProto:
    node = helper.make_node("Add", ["x", tensor.name], ["y"], domain=domain)
    shape = [None]
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], [tensor],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def external(location: str, length: int = 16, offset: int = 0) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def saved(folder: Path, tensor: onnx.TensorProto) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model(tensor).SerializeToString())
    return path


def test_plain_external_data_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    assert check_file(saved(tmp_path, external("w.bin"))).graph.node[0].op_type == "Add"


def test_a_graph_may_hand_its_input_on_but_not_be_empty(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    for values, whole in (([value], True), ([], False)):
        made = helper.make_model(helper.make_graph([], "g", values, values), ir_version=10)
        (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
        if whole:
            assert not check_file(tmp_path / "m.onnx").graph.node
        else:
            with pytest.raises(ArtifactError, match="holds no graph"):
                check_file(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "location", ["../w.bin", "/etc/passwd", "a/../../w.bin", "..\\w.bin", "C:w.bin", "", "a\0b"]
)
def test_external_data_may_not_leave_the_folder(location: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(ArtifactError, match="leaves the model's folder"):
        check_file(saved(inner, external(location)))


def test_links_are_refused(tmp_path: Path) -> None:
    inner, secret = tmp_path / "inner", tmp_path / "secret.bin"
    inner.mkdir()
    secret.write_bytes(bytes(16))
    (inner / "soft.bin").symlink_to(secret)
    os.link(secret, inner / "hard.bin")
    (inner / "folder").symlink_to(tmp_path)
    for location, reason in [
        ("soft.bin", "through a link"),
        ("hard.bin", "plain"),
        ("folder/secret.bin", "through a link"),
        ("missing.bin", "cannot be read"),
    ]:
        with pytest.raises(ArtifactError, match=reason):
            check_file(saved(inner, external(location)))


def test_ranges_outside_the_external_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    for tensor in (external("w.bin", 64), external("w.bin", 16, 8), external("w.bin", 16, -4)):
        with pytest.raises(ArtifactError, match="bytes"):
            check_file(saved(tmp_path, tensor))
    with pytest.raises(ArtifactError, match="needs 16 bytes"):
        check_file(saved(tmp_path, external("w.bin", 8)))


def test_unknown_domains_absurd_shapes_and_functions_are_refused() -> None:
    weight = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    with pytest.raises(ArtifactError, match="unknown domain 'evil'"):
        check_bytes(model(weight, "evil").SerializeToString())
    huge = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**40])
    with pytest.raises(ArtifactError, match="absurd shape"):
        check_bytes(model(huge).SerializeToString())
    with pytest.raises(ArtifactError, match="not accepted here"):
        check_bytes(model(external("w.bin")).SerializeToString())
    local = model(weight)
    local.functions.add(name="f", domain="")
    with pytest.raises(ArtifactError, match="functions"):
        check_bytes(local.SerializeToString())


def test_hostile_nodes_inside_subgraphs_are_found() -> None:
    weight = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    outer = model(weight)
    body = model(weight, "evil").graph
    node = helper.make_node("If", ["x"], ["z"], then_branch=body, else_branch=body)
    outer.graph.node.append(node)
    with pytest.raises(ArtifactError, match="unknown domain"):
        check_bytes(outer.SerializeToString())


def test_garbage_empty_and_foreign_files_are_named(tmp_path: Path) -> None:
    for content in (b"", b"not a model", bytes(range(256))):
        path = tmp_path / "m.onnx"
        path.write_bytes(content)
        with pytest.raises(ArtifactError):
            Session(path)
    with pytest.raises(ArtifactError, match="not a readable"):
        Session(tmp_path / "absent.onnx")
    weight = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    with pytest.raises(ArtifactError, match="no qgraph metadata"):
        Session(model(weight).SerializeToString())


def test_metadata_may_not_choose_session_settings_or_odd_types() -> None:
    assert read_config({}) == SESSION_CONFIG
    with pytest.raises(ArtifactError, match="session settings"):
        read_config({"session.load_model_format": "ORT"})
    with pytest.raises(ArtifactError, match="record of codes"):
        read_codes({"q": {"value": "v", "shift": 0, "dtype": "object"}})
    for text in ("{", "[]", '{"version": 9}', '{"version": 1, "signature": {"inputs": 3}}'):
        with pytest.raises(ArtifactError):
            load(text)
    bad = {"leaf": 0, "name": "x", "dtype": "nn", "shape": []}
    with pytest.raises(ArtifactError, match="damaged"):
        Signature.from_json({"inputs": [bad]})


def test_declared_bytes_know_packed_types() -> None:
    for kind, size in [("FLOAT", 24), ("INT8", 6), ("INT4", 3), ("UINT2", 2), ("DOUBLE", 48)]:
        tensor = TensorProto(name="w", data_type=TensorProto.DataType.Value(kind), dims=[2, 3])
        assert declared_bytes(tensor) == size


def test_files_and_graphs_beyond_the_limits_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, numpy_helper.from_array(np.zeros(4, np.float32), "w"))
    check_file(path)
    monkeypatch.setattr(safety, "MAX_NODES", 0)
    with pytest.raises(ArtifactError, match="1 nodes; refused above 0"):
        check_file(path)
    monkeypatch.setattr(safety, "MAX_BYTES", 10)
    with pytest.raises(ArtifactError, match="bytes; refused above 10"):
        check_file(path)


def test_tensors_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    unmarked, offset = external("w.bin"), external("w.bin")
    unmarked.data_location = TensorProto.DEFAULT
    next(e for e in offset.external_data if e.key == "offset").value = "here"
    text = external("w.bin")
    text.data_type = TensorProto.STRING
    for tensor, words in [
        (unmarked, "not marked external"), (offset, "has offset"), (text, "has type STRING"),
    ]:  # fmt: skip
        with pytest.raises(ArtifactError, match=words):
            check_file(saved(tmp_path, tensor))
    negative = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[-1])
    with pytest.raises(ArtifactError, match="absurd shape"):
        check_bytes(model(negative).SerializeToString())


def test_sparse_tensors_and_tensors_in_attributes_are_checked_too() -> None:
    whole = model(numpy_helper.from_array(np.zeros(4, np.float32), "w"))
    sparse = whole.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external("w.bin"))
    with pytest.raises(ArtifactError, match="not accepted here"):
        check_bytes(whole.SerializeToString())
    whole = model(numpy_helper.from_array(np.zeros(4, np.float32), "w"))
    whole.graph.node.append(helper.make_node("Constant", [], ["c"], value=external("w.bin")))
    with pytest.raises(ArtifactError, match="not accepted here"):
        check_bytes(whole.SerializeToString())


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ x.transpose(0, 1)) @ y


def test_what_onnxruntime_refuses_is_a_typed_error(tmp_path: Path) -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 3)
    export(quantized(Sum(), (x, y)), tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx", threads=1)
    assert session(x, y).shape == (4, 3)
    with pytest.raises(InputError, match="could not run these inputs"):
        session(x, torch.randn(5, 3))
    with pytest.raises(InputError, match="must be a tensor, got float"):
        session(x, 1.0)
    with pytest.raises(InputError, match="got 3 positional arguments, the model takes 2"):
        session(x, y, y)
    broken = onnx.load(tmp_path / "m.onnx")
    broken.graph.node[-1].op_type = "Nonsense"
    onnx.save(broken, tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match="onnxruntime refuses the file"):
        Session(tmp_path / "m.onnx", threads=1)
