# SPDX-License-Identifier: Apache-2.0
"""What a file is called, where its tensors lie, how its sizes are named, and why it is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from qgraph.backends.onnx.export import INLINE_LIMIT, export
from qgraph.backends.onnx.session import Session
from qgraph.errors import ConfigError, ExportError
from qgraph.graph.trace import trace
from tests.backends.exact import coded, decode, drawn, encode
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
MODULE = importlib.import_module("qgraph.backends.onnx.export")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(3)) * 0.1


def small(seed: int = 1) -> GraphModule:
    """One linear with 5 x 8 weights."""
    b = SingleOp()
    grid = coded(0, 255, 100)
    read = decode(b, encode(b, b.placeholder("x", X), "x", grid), "x", grid)
    w = b.buffer("w", drawn(coded(-128, 127), (5, 8), seed).to(torch.int8))
    return b.finish(b.call(aten.linear.default, read, decode(b, w, "w", coded(-128, 127))))


class Crossed(nn.Module):
    """Batch, two lengths of tokens, and what they make together."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(x) @ y.transpose(1, 2), y * 2


def test_sizes_are_named_alike_in_the_file_and_in_the_signature(tmp_path: Path) -> None:
    batch, rows, columns = Dim("b", max=64), Dim("r", max=64), Dim("c", max=64)
    module = trace(
        Crossed().eval(), torch.randn(3, 5, 4), torch.randn(3, 7, 4),
        dynamic_shapes={"x": {0: batch, 1: rows}, "y": {0: batch, 1: columns}},
    )  # fmt: skip
    export(module, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph

    def sizes(values: Any) -> list[list[Any]]:
        return [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values]

    assert sizes(graph.input) == [["batch", "dim1", 4], ["batch", "dim2", 4]]
    session = Session(tmp_path / "m.onnx", threads=1)
    assert [list(i.shape) for i in session.signature.inputs] == sizes(graph.input)
    for b, r, c in ((1, 2, 3), (6, 1, 9)):
        x, y = torch.randn(b, r, 4), torch.randn(b, c, 4)
        for ours, theirs in zip(session(x, y), module(x, y), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_size_that_is_no_batch_is_not_called_one(tmp_path: Path) -> None:
    module = trace(
        Crossed().eval(), torch.randn(3, 5, 4), torch.randn(3, 7, 4),
        dynamic_shapes={"x": {1: Dim("r", max=64)}, "y": {1: Dim("c", max=64)}},
    )  # fmt: skip
    export(module, tmp_path / "m.onnx")
    shapes = [v.type.tensor_type.shape.dim for v in onnx.load(tmp_path / "m.onnx").graph.input]
    assert [d.dim_param for shape in shapes for d in shape] == ["", "dim0", "", "", "dim1", ""]


class Named(nn.Module):
    """Results that are called like the argument and like each other."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"x": torch.relu(x), "a_b": x + 1, "a": {"b": x * 2}}


def test_results_may_be_called_like_arguments(tmp_path: Path) -> None:
    module = trace(Named().eval(), X)
    info = export(module, tmp_path / "m.onnx")
    assert (info.inputs, info.outputs) == (("x",), ("x_1", "a_b", "a_b_1"))
    found = Session(tmp_path / "m.onnx", threads=1)(X)
    assert torch.equal(found["x"], X.clamp_min(0))
    assert torch.equal(found["a_b"], X + 1)
    assert torch.equal(found["a"]["b"], X * 2)


@torch.library.custom_op("qgraph_test_export::odd", mutates_args=())
def _odd(x: Tensor) -> Tensor:
    return x.clone()


@_odd.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_op_without_a_translation_is_named_by_the_innermost_error(tmp_path: Path) -> None:
    b = SingleOp()
    odd = torch.ops.qgraph_test_export.odd.default
    module = b.finish(b.call(odd, b.placeholder("x", X)))
    with pytest.raises(ExportError, match="qgraph_test_export") as caught:
        export(module, tmp_path / "m.onnx")
    error: BaseException | None = caught.value.__cause__
    innermost = error
    while error is not None:
        innermost, error = error, error.__cause__
    assert str(caught.value) == f"torch.onnx.export cannot translate the graph: {innermost}"
    assert not list(tmp_path.iterdir())


def test_a_file_whose_shapes_contradict_its_ops_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = MODULE.finish.finish

    def lying(model: ir.Model, **options: Any) -> None:
        finish(model, **options)
        model.graph.outputs[0].shape = ir.Shape([7, 7, 7])

    monkeypatch.setattr(MODULE.finish, "finish", lying)
    with pytest.raises(ExportError, match=r"does not pass onnx\.checker"):
        export(small(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_tensors_lie_beside_the_file_from_the_limit_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert INLINE_LIMIT < 2**31
    export(small(), tmp_path / "m.onnx")
    held = sum(len(t.raw_data) for t in onnx.load(tmp_path / "m.onnx").graph.initializer)
    assert held >= 5 * 8 + 4 + 2  # weights, at least one scale, two zero points
    for limit, outside in ((held, False), (held - 1, True)):
        monkeypatch.setattr(MODULE, "INLINE_LIMIT", limit)
        info = export(small(), tmp_path / "m.onnx")
        beside = list(tmp_path.glob("*.data"))
        assert bool(beside) == outside
        assert info.size == sum(p.stat().st_size for p in tmp_path.iterdir())
    export(small(), tmp_path / "m.onnx", external_data=False)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_only_tensors_of_older_graphs_are_removed(tmp_path: Path) -> None:
    names = ["m.onnx.data", f"m.onnx.{'0' * 31}.data", f"m.onnx.{'0' * 33}.data", "other.txt",
             f"n.onnx.{'0' * 32}.data", f"m.onnx.{'g' * 32}.data", f"m.onnx.{'0' * 32}.data2",
             f"m_onnx.{'0' * 32}.data"]  # fmt: skip
    for name in [*names, f"m.onnx.{'0' * 32}.data"]:
        (tmp_path / name).write_text("kept")
    seen = set()
    for seed in (1, 2):
        export(small(seed), tmp_path / "m.onnx", external_data=True)
        (data,) = [p.name for p in tmp_path.iterdir() if p.name not in {*names, "m.onnx"}]
        seen.add(data)
        middle = data.removeprefix("m.onnx.").removesuffix(".data")
        assert len(middle) == 32
        session = Session(tmp_path / "m.onnx", threads=1)
        torch.testing.assert_close(session(X)[0], small(seed)(X)[0])
    assert len(seen) == 2
    assert all((tmp_path / name).read_text() == "kept" for name in names)


def test_opsets_and_containers_are_checked(tmp_path: Path) -> None:
    assert export(small(), tmp_path / "m.onnx", opset=21).opset == 21
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 21
    with pytest.raises(ExportError, match="opset is 20"):
        export(small(), tmp_path / "m.onnx", opset=20)
    with pytest.raises(ConfigError, match="container"):
        export(small(), tmp_path / "m.onnx", container="int4")


def test_codes_are_named_and_remembered_with_their_shift(tmp_path: Path) -> None:
    b = SingleOp()
    grid = coded(-8, 7, 2)
    q = encode(b, b.placeholder("x", X), "x", grid)
    module = b.finish(b.call(aten.neg.default, decode(b, q, "x", grid)))
    info = export(module, tmp_path / "m.onnx")
    assert info.codes == {q.name: f"{q.name}/codes"}
    got = Session(tmp_path / "m.onnx", threads=1).codes(X)
    assert torch.equal(torch.from_numpy(got[q.name]), grid.encode(X).int())
