# SPDX-License-Identifier: Apache-2.0
"""Sessions: options, what a file may say of codes, and codes as extra outputs."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.fx import GraphModule

from qgraph.backends import onnx as backend
from qgraph.backends import reference
from qgraph.backends.cutting import CutGraph
from qgraph.backends.onnx.capabilities import (
    CAPABILITIES,
    OPSET_DEFAULT,
    OPSET_INT2,
    SESSION_CONFIG,
)
from qgraph.backends.onnx.export import ExportInfo, export
from qgraph.backends.onnx.session import Session, read_codes, read_config, session_options
from qgraph.errors import ArtifactError, InputError
from tests.backends.exact import by_axis, coded, decode, drawn, encode
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
Written = tuple[GraphModule, list[str], ExportInfo]
X = torch.linspace(-0.2, 0.2, 24).view(2, 3, 4)


def chain(signed: bool = True) -> tuple[GraphModule, list[str]]:
    """Two quantizers, a linear with weights of their own scales, a third."""
    grid = coded(-128, 127, 3) if signed else coded(0, 255, 100)
    wide, weights = coded(-2048, 2047, -7), by_axis(5, 0)
    b = SingleOp()
    first = encode(b, b.placeholder("x", X), "first", grid)
    product = b.call(
        aten.linear.default, decode(b, first, "first", grid),
        decode(b, b.buffer("w", drawn(weights, (5, 4), 2).to(torch.int8)), "w", weights),
    )  # fmt: skip
    second = encode(b, b.call(aten.relu.default, product), "second", wide)
    twice = b.call(aten.mul.Tensor, decode(b, second, "second", wide), 2.0)
    third = encode(b, twice, "third", wide)
    return b.finish(decode(b, third, "third", wide)), [first.name, second.name, third.name]


def codes_of(module: GraphModule) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    reference.lower(module).run((X,), {}, lambda n, c: seen.setdefault(n.name, c))
    return seen


@pytest.fixture(scope="module", params=[True, False])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The chain on disk, exported once."""
    module, names = chain(request.param)
    return module, names, export(module, tmp_path_factory.mktemp("written") / "m.onnx")


def test_codes_are_shown_in_the_quantizers_own_numbers(written: Written) -> None:
    module, names, info = written
    wanted = codes_of(module)
    data = info.path.read_bytes()
    for session in (Session(info.path, threads=1), Session(data, threads=1)):
        for _ in range(2):
            found = session.codes(X)
            assert list(found) == names == list(info.codes)
            for name in names:
                assert found[name].dtype == np.int32
                assert np.array_equal(found[name], wanted[name].int().numpy())
        assert torch.equal(session(X)[0], reference.lower(module)(X)[0])
        assert list(session.feed(X)) == list(info.inputs)
    assert info.path.read_bytes() == data


def test_codes_that_were_merged_away_or_are_outputs_are_handled(written: Written) -> None:
    module, names, info = written
    model = onnx.load(info.path)
    shown = onnx.helper.make_tensor_value_info(info.codes[names[1]], onnx.TensorProto.INT16, None)
    model.graph.output.append(shown)
    for entry in model.metadata_props:
        if entry.key == "qgraph":
            data = json.loads(entry.value)
            data["codes"][names[0]]["value"] = "merged"
            entry.value = json.dumps(data)
    session = Session(model.SerializeToString(), threads=1)
    found = session.codes(X)
    wanted = codes_of(module)
    assert list(found) == names[1:]
    for name in names[1:]:
        assert np.array_equal(found[name], wanted[name].int().numpy())


def test_records_of_codes_are_read_or_refused_whole() -> None:
    good = {"value": "v", "shift": -128, "dtype": "uint8"}
    for dtype in ("uint8", "int16", "uint16", "int32"):
        entry = {**good, "dtype": dtype}
        assert read_codes({"q": entry, "p": good}) == {"q": entry, "p": good}
    assert read_codes({"q": {**good, "shift": "3", "more": 1}}) == {"q": {**good, "shift": 3}}
    assert read_codes({}) == {}
    bad: list[Any] = [
        [], 3, None, {"q": None}, {"q": {**good, "dtype": "float32"}}, {"q": {"value": "v"}},
        {"q": {**good, "shift": "x"}}, {"q": {**good, "shift": None}}, {"q": good, "p": 1},
    ]  # fmt: skip
    for data in bad:
        with pytest.raises(ArtifactError, match="record of codes is damaged"):
            read_codes(data)


def test_settings_of_a_file_are_those_of_the_list_and_come_over_the_defaults() -> None:
    (key,) = SESSION_CONFIG
    assert read_config({}) == SESSION_CONFIG
    assert read_config({key: 4}) == {key: "4"}
    bad: list[Any] = [[], None, "text", {key: "1", "other": "1"}, {"other": "1"}]
    for data in bad:
        with pytest.raises(ArtifactError, match="session settings"):
            read_config(data)


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_options_set_threads_inside_ops_alone_and_keep_quiet(threads: int | None) -> None:
    (key,) = SESSION_CONFIG
    plain = onnxruntime.SessionOptions()
    made = session_options(threads=threads)
    assert made.intra_op_num_threads == (threads or plain.intra_op_num_threads)
    assert made.inter_op_num_threads == (1 if threads else plain.inter_op_num_threads)
    assert made.log_severity_level == 3
    assert made.get_session_config_entry(key) == SESSION_CONFIG[key] == "1"
    assert made.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    other = session_options({key: "4"}, threads=threads)
    assert other.get_session_config_entry(key) == "4"


def test_capabilities_name_a_kernel_or_a_cure_and_opsets_in_order() -> None:
    assert OPSET_DEFAULT == 21 < OPSET_INT2 == 25
    for op, capability in CAPABILITIES.items():
        assert capability.fused or capability.cure, op


@pytest.mark.parametrize("signed", [True, False])
def test_cutting_feeds_every_reader_and_shows_every_quantizer(signed: bool) -> None:
    module, names = chain(signed)
    before = [n.name for n in module.graph.nodes]
    cut = CutGraph(module)
    assert list(cut.names) == names
    assert [n.name for n in module.graph.nodes] == before
    placeholders = [n for n in cut.module.graph.nodes if n.op == "placeholder"]
    shapes = [tuple(n.meta["val"].shape) for n in placeholders]
    assert shapes == [(2, 3, 4), (2, 3, 4), (2, 3, 5), (2, 3, 5)]
    fed, expected = cut.feed((X,), {})
    wanted = codes_of(module)
    assert all(torch.equal(expected[n].int(), wanted[n].int()) for n in names)
    assert torch.equal(fed[0], X)
    shown = reference.lower(cut.module)(*fed)
    assert len(shown) == len(names)
    for ours, decoded in zip(shown, fed[1:], strict=True):
        assert torch.equal(ours, decoded)
    # what a quantizer is fed changes its readers alone
    for position, changed in enumerate(names, 1):
        other = [*fed]
        other[position] = torch.zeros_like(fed[position])
        again = reference.lower(cut.module)(*other)
        differing = [
            n for n, a, b in zip(names, again, shown, strict=True) if not torch.equal(a, b)
        ]
        assert differing == names[position : position + 1], changed


def test_values_that_are_fed_come_behind_all_inputs() -> None:
    b, grid = SingleOp(), coded(-128, 127)
    given = [b.placeholder(name, X * factor) for name, factor in (("x", 1), ("y", 2), ("z", 3))]
    read = [decode(b, encode(b, n, n.name, grid), n.name, grid) for n in given[1:]]
    total = b.call(aten.sub.Tensor, b.call(aten.sub.Tensor, given[0], read[0]), read[1])
    module = b.finish(total)
    cut = CutGraph(module)
    inputs = (X, X * 2, X * 3)
    fed, expected = cut.feed(inputs, {})
    assert all(torch.equal(a, b) for a, b in zip(fed, inputs, strict=False))
    assert [n.target for n in cut.module.graph.nodes if n.op == "placeholder"] == [
        "x", "y", "z", *(f"fed_{name}" for name in cut.names),
    ]  # fmt: skip
    for name, factor, ours in zip(
        cut.names, (2, 3), reference.lower(cut.module)(*fed), strict=True
    ):
        assert torch.equal(ours, grid.fake(X * factor))
        assert torch.equal(expected[name], grid.encode(X * factor))


def test_a_sample_is_what_an_explanation_is_measured_with(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, info = written
    monkeypatch.setattr(backend, "export", lambda _, path: shutil.copy(info.path, path))
    found: list[Any] = []
    monkeypatch.setattr(backend, "kernels", lambda *args, **options: found.append((args, options)))
    backend.explain(module, sample=((), {"x": X}), threads=2)
    backend.explain(module, sample=((X,), {}))
    backend.explain(module)
    assert [options["threads"] for _, options in found] == [2, None, None]
    for (_, feeds), _ in found[:2]:
        assert [(name, value.tolist()) for name, value in feeds[0].items()] == [("x", X.tolist())]
    assert found[2][0][1] is None
    with pytest.raises(InputError):
        backend.explain(module, sample=((X, X), {}))
