# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files: one typed error, quickly, in bounded memory, and no code is run."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import qgraph
from qgraph.artifact import container, read, write_file
from qgraph.graph.verify import Sample
from qgraph.model import QuantizedModel
from qgraph.report import Report
from tests.backends.builders import quantize


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    inputs = (torch.randn(2, 6),)
    path = tmp_path_factory.mktemp("hostile") / "model.qgraph"
    QuantizedModel(quantize(model, inputs), Report("x", (), (), ()), Sample(inputs)).save(path)
    return path


def refused(path: Path) -> str:
    with pytest.raises(qgraph.ArtifactError) as caught:
        qgraph.load(path)
    return str(caught.value)


def test_each_of_a_thousand_flipped_bits_is_noticed(whole, tmp_path):
    original = whole.read_bytes()
    rng = random.Random(0)
    path = tmp_path / "m.qgraph"
    places = rng.sample(range(8 * len(original)), 1000)
    for place in [*range(64), *places]:
        data = bytearray(original)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(qgraph.ArtifactError):
            container.read(path)


def test_truncation_at_any_byte_is_noticed_and_so_are_trailing_bytes(whole, tmp_path):
    data = whole.read_bytes()
    path = tmp_path / "m.qgraph"
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for size in [
        *range(200),
        *range(200, header, 37),
        *range(header - 4, len(data), 11),
        len(data) - 1,
    ]:
        path.write_bytes(data[:size])
        refused(path)
    path.write_bytes(data + b"\0")
    assert "follow the last tensor" in refused(path)


def forged(whole: Path, path: Path, change) -> Path:
    """A file with sound digests whose manifest or tensors were changed."""
    content = container.read(whole)
    manifest = copy.deepcopy(content.manifest)
    tensors = {name: tensor.clone() for name, tensor in content.tensors.items()}
    change(manifest, tensors)
    write_file(path, container.chunks(manifest, tensors))
    return path


def node(manifest, kind: str):
    return next(n for n in manifest["graph"]["nodes"] if kind in {n["op"], n["target"]})


def calls(target):
    def change(manifest, tensors):
        node(manifest, "aten::linear.default")["target"] = target

    return change


def sets(kind, key, value):
    def change(manifest, tensors):
        node(manifest, kind)[key] = value

    return change


def puts(where, value):
    def change(manifest, tensors):
        for name, tensor in tensors.items():
            if where in name:
                tensor.fill_(value)

    return change


def graph_key(key, value):
    def change(manifest, tensors):
        manifest["graph"][key] = value

    return change


def duplicate(manifest, tensors):
    manifest["graph"]["nodes"].insert(1, dict(manifest["graph"]["nodes"][0]))


def nested(manifest, tensors):
    value: object = 1
    for _ in range(200):
        value = [value]
    node(manifest, "aten::linear.default")["args"] = [value]


def arguments(value):
    def change(manifest, tensors):
        manifest["graph"]["calling"]["arguments"] = value

    return change


def outputs(value):
    def change(manifest, tensors):
        manifest["graph"]["calling"]["outputs"] = value

    return change


def inserts(target, *args, value=None):
    """One call more, in front of the output."""
    call = {"name": "more", "op": "call_function", "target": target, "args": args, "kwargs": {}}

    def change(manifest, tensors):
        manifest["graph"]["nodes"].insert(-1, {**call, "value": value})

    return change


def powers_of_powers(manifest, tensors):
    size: object = next(iter(manifest["graph"]["symbols"]))
    for _ in range(8):
        size = ["**", size, 16]
    node(manifest, "aten::linear.default")["value"] = {"dtype": "int8", "shape": [size]}


def reshaped(where):
    def change(manifest, tensors):
        name = next(name for name in tensors if where in name)
        tensors[name] = torch.stack([tensors[name]] * 2, -1)

    return change


def cast(where, dtype):
    def change(manifest, tensors):
        for name in tensors:
            if where in name:
                tensors[name] = tensors[name].to(dtype)

    return change


CODE = "x=__import__('os').system('touch hacked')"
FORGERIES = {
    "unknown op": (calls("aten::nothing.default"), "unknown op"),
    "op of another namespace": (calls("prims::sin.default"), "unknown op"),
    "op outside torch": (calls("os::system.default"), "unknown op"),
    "dotted op": (calls("aten::linear.default.__globals__"), "unknown op"),
    "op attribute": (calls("aten::linear.__class__"), "unknown op"),
    "function": (calls("operator.attrgetter"), "unknown op"),
    "op that maps files": (calls("aten::from_file.default"), "not allowed"),
    "op that reinterprets memory": (calls("aten::as_strided.default"), "not allowed"),
    "op that shows old memory": (calls("aten::empty.memory_format"), "not allowed"),
    "op that writes": (calls("aten::add_.Tensor"), "not allowed"),
    "op without checks": (calls("aten::_unsafe_index.Tensor"), "not allowed"),
    "op that is no string": (calls(["aten::linear.default"]), "unknown op"),
    "too many arguments": (sets("aten::linear.default", "args", [1] * 9), "is called with"),
    "code as a keyword": (sets("aten::linear.default", "kwargs", {CODE: 1}), "is called with"),
    "code as a node name": (sets("placeholder", "name", CODE), "identifier"),
    "code as an input name": (sets("placeholder", "target", f"x={CODE}"), "identifier"),
    "code as a tensor name": (sets("get_attr", "target", f"a;{CODE}"), "identifiers"),
    "code as an argument name": (arguments([f"self, a={CODE}"]), "identifier"),
    "fewer argument names than inputs": (arguments([]), "given by place"),
    "keyword as an input name": (sets("placeholder", "target", "lambda"), "identifier"),
    "self as an input name": (sets("placeholder", "target", "self"), "identifier"),
    "dunder as a tensor name": (sets("get_attr", "target", "__class__.x"), "identifiers"),
    "method as a tensor name": (sets("get_attr", "target", "forward"), "malformed"),
    "two tensors of one name": (duplicate, "twice"),
    "unknown node": (sets("aten::linear.default", "args", [{"node": "ghost"}] * 2), "unknown node"),
    "unknown kind": (sets("aten::linear.default", "args", [{"pickle": "x"}] * 2), "pickle"),
    "unknown dtype": (sets("aten::linear.default", "args", [{"dtype": "load"}] * 2), "dtype"),
    "deep nesting": (nested, "nested"),
    "node kind": (sets("get_attr", "op", "call_module"), "may not stand there"),
    "absurd shape": (
        sets("aten::linear.default", "value", {"dtype": "int8", "shape": [2**40, 2**20]}), "absurd",
    ),
    "negative shape": (
        sets("aten::linear.default", "value", {"dtype": "float32", "shape": [-1]}), "absurd",
    ),
    "size bomb": (
        sets("aten::linear.default", "value", {"dtype": "int8", "shape": [["**", 10, 10**9]]}),
        "unreadable size",
    ),
    "symbol": (graph_key("symbols", {"__import__('os')": 2}), "symbol"),
    "symbol's value": (graph_key("symbols", {"s0": -5}), "symbol"),
    "no nodes": (graph_key("nodes", []), "no output"),
    "nodes are no list": (graph_key("nodes", 7), "malformed"),
    "strides": (graph_key("strides", {"t.ghost": [5, 5]}), "strides"),
    "structure": (outputs({"kind": "os.system", "items": []}), "unknown structure"),
    "wrong number of outputs": (outputs({"kind": "tuple", "items": [None] * 3}), "outputs"),
    "nan scale": (puts("scale", float("nan")), "scale"),
    "zero scale": (puts("scale", 0.0), "scale"),
    "negative scale": (puts("scale", -1.0), "scale"),
    "infinite scale": (puts("scale", float("inf")), "scale"),
    "zero point": (puts("zero_point", 1000), "zero point"),
    "codes": (puts("weight_codes", -128), "codes"),
    "version": (lambda m, t: m.update(version=99), "version 1"),
    "no version": (lambda m, t: m.pop("version"), "version"),
    "no graph": (lambda m, t: m.pop("graph"), "graph"),
    "report": (lambda m, t: m.update(report={"pipeline": 3}), "malformed"),
    "sample": (lambda m, t: m.update(sample=[{"tensor": 99}]), "sample.99"),
    "no trace": (graph_key("trace", {}), "dynamic_batch"),
    "trace of other types": (
        lambda m, t: m["graph"]["trace"].update(dynamic_batch="yes"), "dynamic_batch",
    ),
    "powers of powers": (powers_of_powers, "larger than any tensor"),
    "a huge power": (inserts("operator.pow", 7, 10**8), "exponent"),
    "a huge product": (inserts("operator.mul", 2**60, 2**60), "larger than"),
    "a repeated list": (inserts("operator.mul", [1], 10**10), "is called with"),
    "a repeated tensor": (inserts("operator.mul", {"node": "linear"}, 10**10), "sizes"),
    "billions of pieces": (
        lambda m, t: [
            inserts("aten::zeros.default", [2**33])(m, t),
            m["graph"]["nodes"][-2].update(name="zeros"),
            inserts("aten::unbind.int", {"node": "zeros"})(m, t),
        ], "more than 4096 tensors",
    ),
    "a tensor of another shape": (reshaped("bias_codes"), "computes float32[5, 2]"),
    "another shape than computed": (
        sets("aten::linear.default", "value", {"dtype": "float32", "shape": [4, 5]}), "computes",
    ),
    "another dtype than computed": (
        sets("qgraph::quantize.default", "value", {"dtype": "int8", "shape": [4, 6]}), "computes",
    ),
    "a sample of another shape": (reshaped("sample.0"), "sample inputs do not fit"),
    "a sample of an unknown kind": (lambda m, t: m.update(sample=[{"slice": [1]}]), "given as"),
    "scales in double": (cast("scale", torch.float64), "float64"),
    "zero points in int64": (cast("zero_point", torch.int64), "int64"),
    "codes in int64": (cast("weight_codes", torch.int64), "int64"),
    "values nobody reads": (lambda m, t: m.update(hidden=1), "unknown"),
    "node values nobody reads": (sets("get_attr", "hidden", 1), "unknown"),
    "tensors nobody reads": (lambda m, t: t.update({"t.x": torch.ones(1)}), "unknown"),
    "numbers for text in the report": (
        lambda m, t: m["report"].update(notes=[8]), "report",
    ),
    "a list as text in the report": (lambda m, t: m["report"].update(pipeline=[]), "report"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_with_sound_digests_is_refused_by_what_it_says(
    whole, tmp_path, name, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    change, words = FORGERIES[name]
    assert words in refused(forged(whole, tmp_path / "m.qgraph", change))
    assert not (tmp_path / "hacked").exists()


def raw(header: object, data: bytes = b"") -> bytes:
    """A file with these header values and a sound header digest."""
    text = header if isinstance(header, bytes) else json.dumps(header).replace(" ", "").encode()
    prefix = b'{"__metadata__":{"digest":"'
    body = prefix + b"0" * 64 + b'"' + text
    length = struct.pack("<Q", len(body))
    return length + body.replace(b"0" * 64, container._header_digest(length, body), 1) + data


ENTRY = '"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
HEADERS = {
    "not JSON": (b"nonsense", b""),
    "recursion": (b',"a":' + b"[" * 200_000, b""),
    "duplicate names": (f',"manifest":"{{}}"}},{ENTRY},{ENTRY}}}'.encode(), b"1234"),
    "a gap": (
        b',"manifest":"{}"},"a":{"dtype":"U8","shape":[4],"data_offsets":[1,5]}}', b"12345",
    ),
    "more than there is": (
        b',"manifest":"{}"},"a":{"dtype":"U8","shape":[4096],"data_offsets":[0,4096]}}', b"1234",
    ),
    "shape and bytes": (
        b',"manifest":"{}"},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}', b"1234",
    ),
    "shape overflow": (
        b',"manifest":"{}"},"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "negative shape": (
        b',"manifest":"{}"},"a":{"dtype":"U8","shape":[-2,-2],"data_offsets":[0,4]}}', b"1234",
    ),
    "boolean shape": (
        b',"manifest":"{}"},"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', b"1",
    ),
    "unknown dtype": (
        b',"manifest":"{}"},"a":{"dtype":"object","shape":[4],"data_offsets":[0,4]}}', b"1234",
    ),
    "digest missing": (f',"manifest":"{{}}"}},{ENTRY}}}'.encode(), b"1234"),
    "manifest missing": (b"}," + ENTRY.encode() + b"}", b"1234"),
    "nan": (f',"x":NaN}},{ENTRY}}}'.encode(), b"1234"),
    "huge number": (b',"x":' + b"9" * 10_000 + b"}}", b""),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, name):
    path = tmp_path / "m.qgraph"
    path.write_bytes(raw(*HEADERS[name]))
    assert refused(path)


@pytest.mark.parametrize("length", [0, 1, 90, 2**26 + 1, 2**40, 2**64 - 1])
def test_a_header_length_that_lies_costs_no_memory(tmp_path, length):
    path = tmp_path / "m.qgraph"
    path.write_bytes(struct.pack("<Q", length) + b"{}" * 100)
    tracemalloc.start()
    refused(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_missing_files_folders_links_to_nothing_and_foreign_files_are_typed_errors(tmp_path):
    (tmp_path / "link.qgraph").symlink_to(tmp_path / "nothing")
    (tmp_path / "text.qgraph").write_text("hello " * 100)
    (tmp_path / "empty.qgraph").touch()
    for name in ("missing.qgraph", ".", "link.qgraph", "text.qgraph", "empty.qgraph"):
        assert refused(tmp_path / name)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300), forge=st.booleans())
def test_no_bytes_at_all_give_anything_but_the_typed_error(tmp_path_factory, data, forge):
    path = tmp_path_factory.mktemp("bytes") / "m.qgraph"
    path.write_bytes(raw(data) if forge else data)
    with pytest.raises(qgraph.ArtifactError):
        read(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_single_changed_value_of_the_graph_gives_anything_but_the_typed_error(
    whole, tmp_path_factory, data
):
    """Deeper than bytes: digests are made sound again, so every check behind them is reached."""

    def change(manifest, tensors):
        place, key = manifest, data.draw(st.sampled_from(["graph", "report", "sample"]))
        while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.integers(0, 4)):
            place = place[key]
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
        scalars: st.SearchStrategy[object] = st.one_of(
            st.none(), st.integers(-(2**70), 2**70), st.text(max_size=8), st.just([])
        )
        place[key] = data.draw(
            st.one_of(scalars, st.just({}), st.floats(allow_nan=False, allow_infinity=False))
        )

    path = forged(whole, tmp_path_factory.mktemp("values") / "m.qgraph", change)
    try:
        qgraph.load(path)
    except qgraph.ArtifactError:
        return  # a change may also be harmless: another note, another source line


def test_an_onnx_file_cannot_make_torch_import_a_module(whole, tmp_path, monkeypatch):
    """torch's own reader of structures imports what an enumeration in them names."""
    loaded = qgraph.load(whole)
    assert isinstance(loaded, QuantizedModel)
    loaded.to_onnx(tmp_path / "m.onnx")
    (tmp_path / "lurking_module.py").write_text("import pathlib; pathlib.Path('hacked').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    model = onnx.load(tmp_path / "m.onnx")
    entry = next(p for p in model.metadata_props if p.key == "qgraph")
    data = json.loads(entry.value)
    leaf: dict[str, object] = {"type": None, "context": None, "children_spec": []}
    enum = json.dumps([{"__enum__": True, "fqn": "lurking_module:Kind", "name": "a"}])
    spec = {"type": "builtins.dict", "context": enum, "children_spec": [leaf]}
    data["signature"]["out_spec"] = json.dumps([1, spec])
    entry.value = json.dumps(data)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(qgraph.ArtifactError, match="enumerations"):
        qgraph.load(tmp_path / "m.onnx")
    with contextlib.suppress(Exception):  # the danger is real: torch itself does import it
        pytree.treespec_loads(data["signature"]["out_spec"])
    assert (tmp_path / "hacked").exists()


def test_loading_unpickles_nothing_and_starts_no_process(whole):
    program = (
        "import sys, torch, qgraph\n"
        "def watch(event, _):\n"
        "    if event in {'pickle.find_class', 'os.system', 'subprocess.Popen'}: sys.exit(event)\n"
        "sys.addaudithook(watch)\n"
        "qgraph.load(sys.argv[1])\n"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", program, str(whole)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
