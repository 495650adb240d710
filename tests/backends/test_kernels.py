# SPDX-License-Identifier: Apache-2.0
"""Registered integer kernels and their shapes; the table of what onnxruntime runs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qgraph.backends.integer import kernels as kernel_module
from qgraph.backends.integer.kernels import (
    CONV_U8,
    LINEAR_I32,
    LINEAR_U8,
    LOOKUP,
    has_exact_u8_kernels,
    pack_conv,
    pack_linear,
)
from qgraph.backends.onnx.kernels import Kernel, KernelTable, example_feed, kernels, shares
from qgraph.errors import ArtifactError

table_module = importlib.import_module("qgraph.backends.onnx.kernels")
needs_kernels = pytest.mark.skipif(not has_exact_u8_kernels(), reason="no exact int8 kernels here")


def same_without_running(op: Any, *args: Any) -> Tensor:
    """The op, its shape, dtype and layout compared with what is known without running it."""
    found: Tensor = op(*args)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = [mode.from_tensor(a) if isinstance(a, Tensor) and not a.is_mkldnn else a for a in args]
    fake = op(*given)
    # compilers plan memory by the layout they are told, and stop where it is another one
    assert (fake.shape, fake.stride(), fake.dtype) == (found.shape, found.stride(), found.dtype)
    return found


@needs_kernels
@pytest.mark.parametrize("shape", [(7, 11), (2, 3, 11), (1, 1, 2, 11)])
@pytest.mark.parametrize("zero", [0, 3, 255])
def test_linear_kernels_sum_bytes_exactly(shape: tuple[int, ...], zero: int) -> None:
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    w = torch.randint(-128, 128, (5, 11), dtype=torch.int8)
    bias = torch.arange(5) * 1000
    exact = (x.double() - zero) @ w.double().T
    ones, zeros = torch.ones(5), torch.zeros(5, dtype=torch.int64)
    for start in (None, bias.float()):
        got = same_without_running(LINEAR_U8, x, pack_linear(w), ones, zeros, start, zero)
        assert torch.equal(got.double(), exact if start is None else exact + bias)
    correction = (((128 - zero) * w.int()).sum(1) + bias).int()
    got = same_without_running(LINEAR_I32, x, w.t().contiguous(), correction)
    assert got.dtype is torch.int32
    assert torch.equal(got.double(), exact + bias)


@needs_kernels
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [([1, 1], [0, 0], [1, 1], 1), ([2, 1], [1, 2], [1, 2], 2), ([3, 2], [2, 0], [2, 1], 1)],
)
def test_convolution_kernels_sum_bytes_exactly(
    stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> None:
    x = torch.randint(0, 256, (2, 4, 11, 8), dtype=torch.uint8)
    w = torch.randint(-128, 128, (6, 4 // groups, 3, 2), dtype=torch.int8)
    ones, zeros = torch.ones(6), torch.zeros(6, dtype=torch.int64)
    exact = torch.conv2d(x.double() - 9, w.double(), None, stride, padding, dilation, groups)
    packed = pack_conv(w, 9, stride, padding, dilation, groups)
    rest = ([3, 2], stride, padding, dilation, groups)
    for layout in (torch.contiguous_format, torch.channels_last):
        data = x.contiguous(memory_format=layout)
        got = same_without_running(CONV_U8, data, packed, ones, zeros, None, 9, *rest)
        assert torch.equal(got.double(), exact)
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_lookups_keep_shape_and_layout(dtype: torch.dtype) -> None:
    table = torch.arange(60.0).flip(0)
    plain = torch.arange(60).reshape(1, 3, 4, 5).to(dtype)
    layouts = [
        plain, plain[0], plain[0, 0, 0], plain.permute(0, 3, 1, 2), plain.permute(0, 2, 1, 3),
        plain.permute(1, 2, 3, 0), plain.contiguous(memory_format=torch.channels_last),
        plain.permute(0, 1, 3, 2), plain.reshape(1, 3, 4, 5)[:, :, 1:],
    ]  # fmt: skip
    for index in layouts:
        found = same_without_running(LOOKUP, table, index)
        assert torch.equal(found, table[index.long()])
    last = layouts[6]
    assert LOOKUP(table, last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the processor sums in 16 bits")
def test_processors_that_sum_bytes_in_32_bits_have_exact_kernels() -> None:
    # else the tests above, and with them all that runs in int8, would be skipped in silence
    assert has_exact_u8_kernels()


def one_less(weight: Tensor, where: slice) -> Tensor:
    changed = weight.clone()
    changed[where] -= 1
    return changed


def test_kernels_count_as_exact_only_if_both_give_all_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = has_exact_u8_kernels.__wrapped__
    right = probe()
    for name in ("pack_linear", "pack_conv"):
        original = getattr(kernel_module, name)
        for where in (slice(None), slice(1), slice(7, 8)):  # all channels, or a single one
            with monkeypatch.context() as patch:
                patch.setattr(
                    kernel_module, name,
                    lambda w, *a, f=original, at=where: f(one_less(w, at), *a),
                )  # fmt: skip
                assert not probe()
        with monkeypatch.context() as patch:
            patch.setattr(kernel_module, name, lambda *_: [].missing)  # type: ignore[attr-defined]
            assert not probe()
    assert probe() == right == has_exact_u8_kernels()


def graph_of(nodes: list[Any], inputs: dict[str, Any], stored: dict[str, Any]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()]
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items()]
    out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "g", values, [out], tensors))


def ran(
    nodes: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *,
    times: dict[str, list[float]] | None = None, runs: int = 2, feeds: Any = None,
    inputs: dict[str, Any] | None = None, stored: dict[str, Any] | None = None,
    declared: dict[str, int] | None = None,
) -> tuple[KernelTable, list[Any]]:  # fmt: skip
    """The table of a graph as if onnxruntime ran it, with the times given."""
    fed: list[Any] = []
    model = graph_of(nodes, inputs or {"x": (TensorProto.FLOAT, [2, None])}, stored or {})
    for name, kind in (declared or {}).items():
        model.graph.value_info.append(helper.make_tensor_value_info(name, kind, None))
    onnx.save(model, tmp_path / "m.onnx")

    def profile() -> str:
        events = [{"cat": "Session", "name": "model_run", "dur": 10**6}]
        for name, spent in (times or {}).items():
            events += [{"cat": "Node", "name": f"{name}_kernel_time", "dur": t} for t in spent]
        (tmp_path / "profile.json").write_text(json.dumps(events))
        return str(tmp_path / "profile.json")

    session = SimpleNamespace(run=lambda _, feed: fed.append(feed), end_profiling=profile)
    monkeypatch.setattr(table_module, "optimized", lambda _: model)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    return kernels(tmp_path / "m.onnx", feeds, runs=runs), fed


def node(op: str, inputs: str, output: str, **attributes: Any) -> Any:
    domain = "com.microsoft" if op.startswith(("QLinear", "QGemm", "Fused", "MatMulI")) else ""
    return helper.make_node(
        op, inputs.split(), output.split(), name=output, domain=domain, **attributes
    )


def test_values_of_integers_make_integer_nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nine, eight = " ".join("abcdefghi"), " ".join("abcdefgh")
    nodes = [
        node("QuantizeLinear", "x", "q"), node("Clip", "q", "clipped"), node("Clip", "x", "bent"),
        node("Reshape", "q", "shaped"), node("MaxPool", "shaped", "pooled"),
        node("MaxPool", "x", "floats"), node("QGemm", nine, "g"), node("Max", "g", "more"),
        node("QGemm", eight, "open"), node("Min", "open", "less"),
        node("MatMulIntegerToFloat", "q w", "wide"), node("Min", "wide", "small"),
        node("QLinearAdd", "q q", "sum"), node("Min", "sum", "least"),
        node("Cast", "q", "cast"), node("Max", "cast", "largest"),
        node("Max", "w", "held"), node("Max", "f", "unheld"), node("Max", "i", "given"),
        node("Softmax", "x", "soft"), node("DequantizeLinear", "q", "y"),
    ]  # fmt: skip
    found, _ = ran(
        nodes, monkeypatch, tmp_path,
        stored={"w": np.ones(1, np.int8), "f": np.ones(1, np.float32)},
        inputs={"x": (TensorProto.FLOAT, [2]), "i": (TensorProto.INT64, [2])},
    )  # fmt: skip
    kinds = {row.name: row.kind for row in found.rows}
    assert kinds == {
        "q": "border", "clipped": "integer", "bent": "float", "shaped": "move",
        "pooled": "integer", "floats": "float", "g": "integer", "more": "integer",
        "open": "integer", "less": "float", "wide": "integer", "small": "float", "sum": "integer",
        "least": "integer", "cast": "move", "largest": "float", "held": "integer",
        "unheld": "float", "given": "integer", "soft": "float", "y": "border",
    }  # fmt: skip
    assert all(bool(row.cure) == (row.kind == "float") for row in found.rows)


def test_the_only_integers_of_a_graph_are_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes = [node("ArgMax", "x", "place"), node("Softmax", "x", "y")]
    declared = {"place": TensorProto.INT64, "y": TensorProto.FLOAT}
    found, _ = ran(nodes, monkeypatch, tmp_path, declared=declared)
    assert [row.kind for row in found.rows] == ["integer", "float"]


@pytest.mark.parametrize(
    ("kind", "reader", "told"),
    [
        (TensorProto.INT2, "DequantizeLinear", True), (TensorProto.UINT2, "DequantizeLinear", True),
        (TensorProto.INT2, "Cast", False), (TensorProto.INT8, "DequantizeLinear", False),
    ],
)  # fmt: skip
def test_a_refused_file_is_explained_by_two_bits_only_where_it_decodes_them(
    kind: int, reader: str, told: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(_: Path) -> onnx.ModelProto:
        raise ArtifactError("not this one")

    nodes = [node(reader, "w", "d"), node("DequantizeLinear", "c", "e"), node("Add", "d e", "y")]
    model = graph_of(nodes, {}, {"c": np.ones(4, np.int8)})
    model.graph.initializer.append(helper.make_tensor("w", kind, [4], [0, 1, 1, 0]))
    onnx.save(model, tmp_path / "m.onnx")
    monkeypatch.setattr(table_module, "optimized", refused)
    with pytest.raises(ArtifactError, match=r"^not this one") as caught:
        kernels(tmp_path / "m.onnx")
    assert ("INT2" in str(caught.value)) == told


def test_times_are_medians_of_warm_runs_and_shares_add_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes = [node("Softmax", "x", "a"), node("Gelu", "a", "b"), node("QLinearAdd", "b b", "c")]
    times = {"a": [900.0, 10, 30, 20], "b": [60.0], "c": [5.0, 20.0]}
    found, _ = ran(nodes, monkeypatch, tmp_path, times=times)
    assert [row.microseconds for row in found.rows] == [20, 60, 20]
    assert [row.share for row in found.rows] == [0.2, 0.6, 0.2]
    assert found.share("float") == pytest.approx(0.8)
    told = shares(found)
    assert told["by_kind"]["integer"] == pytest.approx(0.2)
    assert [row["name"] for row in told["islands"]] == ["b", "a"]
    idle, _ = ran(nodes, monkeypatch, tmp_path)
    assert [(row.share, row.microseconds) for row in idle.rows] == [(0.0, 0.0)] * 3


def test_each_feed_runs_in_turn_after_one_to_warm_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes = [node("Softmax", "x", "y")]
    _, fed = ran(nodes, monkeypatch, tmp_path, runs=3, feeds=["a", "b"])
    assert fed == ["a", "a", "b", "a"]
    _, fed = ran(nodes, monkeypatch, tmp_path, runs=2)
    assert len(fed) == 3
    assert fed[0]["x"].shape == (2, 2)
    assert not fed[0]["x"].any()
    kernels(tmp_path / "m.onnx")
    assert len(fed) == 3 + 1 + 5


def test_inputs_of_open_sizes_are_two_long() -> None:
    model = graph_of(
        [node("Softmax", "x", "y")],
        {"x": (TensorProto.FLOAT, ["batch", 3, None]), "i": (TensorProto.INT64, [0, 4])}, {},
    )  # fmt: skip
    feed = example_feed(model)
    assert {k: (v.shape, v.dtype.name) for k, v in feed.items()} == {
        "x": ((2, 3, 2), "float32"), "i": ((0, 4), "int64"),
    }  # fmt: skip


def test_float_clips_that_a_quantizer_reads_are_traps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes = [
        node("Clip", "x", "a"), node("Clip", "x", "b"),
        node("FusedConv", "x", "c", activation="Clip"),
        node("FusedConv", "x", "d", activation="Relu"), node("Conv", "x", "e"),
        node("FusedConv", "x", "f", activation="Clip"), node("FusedConv", "x", "g", other="Clip"),
        *(node("QuantizeLinear", n, f"q{n}") for n in "acdeg"), node("MatMulNBits", "x", "m"),
    ]  # fmt: skip
    found, _ = ran(nodes, monkeypatch, tmp_path)
    warned = {row.name: row.warning for row in found.rows if row.warning}
    assert warned.keys() == {"a", "c", "m"}
    assert "accuracy_level" in warned["m"]
    assert len(found.warnings) == 2


def test_tables_print_shares_and_cures() -> None:
    rows = (
        Kernel("n1", "QGemm", "integer", 0.75, 1234.56, "never shown"),
        Kernel("n2", "Softmax", "float", 0.25, 0.04, "a cure", "a trap"),
        Kernel("n3", "Add", "float", 0.0, 0.0),
    )
    table = KernelTable(rows)
    head, first, second, third, kinds, warning = str(table).splitlines()
    assert head.split() == ["kernel", "kind", "share", "us", "node", "/", "cure"]
    assert first.split() == ["QGemm", "integer", "75.0%", "1234.6", "n1"]
    assert second.split() == ["Softmax", "float", "25.0%", "0.0", "n2", "<-", "a", "cure"]
    assert third.split() == ["Add", "float", "0.0%", "0.0", "n3"]
    assert kinds == "integer 75.0%, float 25.0%, border 0.0%, move 0.0%"
    assert warning == "warning: a trap"
    assert [row["op"] for row in table.to_json()] == ["QGemm", "Softmax", "Add"]
