# SPDX-License-Identifier: Apache-2.0
"""Saving and loading: the same bits come back, on every backend, and writing is all or nothing."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors
import torch
from torch import nn
from torch.utils import _pytree as pytree

import qgraph
from qgraph import artifact
from qgraph.artifact.structure import Output
from qgraph.context import Decision
from qgraph.graph.provenance import call_index, module_path, source_line
from qgraph.graph.verify import Sample
from qgraph.model import QuantizedModel
from qgraph.pipeline import Step
from qgraph.report import Report
from tests.backends.builders import Attention, ConvNet, quantize


class TwoInputs(nn.Module):
    """Keyword inputs, an integer input, a tied weight, an infinite mask, a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, image, tokens):
        x = self.mix(self.table(tokens))
        scores = (x @ image.transpose(1, 2)).masked_fill(tokens.unsqueeze(-1) == 0, float("-inf"))
        scores = scores.masked_fill(torch.isinf(scores), -3.0)
        return {"tokens": (self.out(x), [scores]), "sizes": image[:, 1:3]}


def quantized_model(model, inputs) -> QuantizedModel:
    report = Report(
        "test", (), (Decision("a", "b", "refused", "c", {"x": float("inf")}),),
        (Step("a", True, 1.0, 2.0, None, 3),), ("a note",),
    )  # fmt: skip
    return QuantizedModel(quantize(model, inputs), report, Sample(inputs))


def cases():
    torch.manual_seed(3)
    image, tokens = torch.randn(2, 5, 8), torch.randint(0, 11, (2, 7))
    yield "conv", ConvNet(), (torch.randn(2, 3, 8, 8),), (torch.randn(5, 3, 8, 8),)
    yield "attention", Attention(), (torch.randn(2, 6, 32),), (torch.randn(3, 6, 32),)
    yield "two", TwoInputs(), (image, tokens), (image[:1], tokens[1:])


CASES = {name: rest for name, *rest in cases()}


@pytest.fixture(scope="module", params=list(CASES))
def saved(request, tmp_path_factory):
    model, inputs, held_out = CASES[request.param]
    quantized = quantized_model(model, inputs)
    path = tmp_path_factory.mktemp("artifact") / "model.qgraph"
    quantized.save(path)
    loaded = qgraph.load(path)
    assert isinstance(loaded, QuantizedModel)
    return quantized, path, loaded, held_out


def equal(first, second) -> bool:
    ours, spec = pytree.tree_flatten(first)
    theirs, other = pytree.tree_flatten(second)
    return spec == other and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", ["reference", "integer"])
def test_a_loaded_model_gives_the_same_bits_at_another_batch_size(saved, backend):
    quantized, _, loaded, held_out = saved
    assert equal(quantized.lower(backend)(*held_out), loaded.lower(backend)(*held_out))


def test_a_loaded_model_exports_to_onnx_and_agrees_with_itself_everywhere(saved):
    quantized, _, loaded, held_out = saved
    assert loaded.verify().check().codes > 0
    assert equal(quantized.lower("onnx")(*held_out), loaded.lower("onnx")(*held_out))


def test_graph_names_origins_report_and_sample_come_back(saved):
    quantized, _, loaded, _ = saved
    ours, theirs = quantized.graph_module.graph, loaded.graph_module.graph
    assert str(ours) == str(theirs)
    for a, b in zip(ours.nodes, theirs.nodes, strict=True):
        assert module_path(a) == module_path(b)
        assert call_index(a) == call_index(b)
        assert source_line(a).split(": ")[0] == source_line(b).split(": ")[0]
    assert equal(quantized.sample.args, loaded.sample.args)
    assert loaded.report.decisions == quantized.report.decisions
    assert loaded.report.notes == ("a note",)
    assert loaded.report.steps[0].nodes == 3


def test_saving_again_gives_the_same_bytes(saved, tmp_path):
    quantized, path, loaded, _ = saved
    quantized.save(tmp_path / "again.qgraph")
    loaded.save(tmp_path / "loaded.qgraph")
    assert path.read_bytes() == (tmp_path / "again.qgraph").read_bytes()
    assert path.read_bytes() == (tmp_path / "loaded.qgraph").read_bytes()


def test_the_order_in_which_tied_tensors_were_registered_is_not_in_the_file(tmp_path):
    x = torch.randn(2, 4)
    module = qgraph.trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval(), x)
    early, late = (module.get_submodule(name) for name in "01")
    weight = early.get_parameter("weight")
    for owner in (early, late):
        del owner.weight
        owner.register_buffer("weight", weight)
    module.add_module("0", module._modules.pop("0"))  # registered last, read first
    quantized = QuantizedModel(module, Report("float", (), (), ()), Sample((x,)))
    quantized.save(tmp_path / "a.qgraph")
    loaded = qgraph.load(tmp_path / "a.qgraph")
    assert isinstance(loaded, QuantizedModel)
    loaded.save(tmp_path / "b.qgraph")
    assert (tmp_path / "a.qgraph").read_bytes() == (tmp_path / "b.qgraph").read_bytes()


def test_the_file_is_a_plain_safetensors_file_with_each_weight_once(saved):
    _, path, loaded, _ = saved
    with safetensors.safe_open(path, framework="pt") as file:
        names = set(file.keys())
        assert json.loads(file.metadata()["manifest"])["version"] == 1
    stored = {t.data_ptr() for t in loaded.graph_module.buffers()}
    assert len([n for n in names if n.startswith("t.")]) == len(stored)


def test_channels_last_weights_keep_their_memory_layout(tmp_path):
    model = nn.Conv2d(4, 4, 3)
    model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
    inputs = (torch.randn(2, 4, 6, 6),)
    quantized = QuantizedModel(
        qgraph.trace(model.eval(), *inputs), Report("float", (), (), ()), Sample(inputs)
    )
    quantized.save(tmp_path / "m.qgraph")
    loaded = qgraph.load(tmp_path / "m.qgraph")
    assert isinstance(loaded, QuantizedModel)
    strides = [b.stride() for b in loaded.graph_module.buffers() if b.ndim == 4]
    assert strides == [model.weight.stride()]
    assert equal(quantized.lower("reference")(*inputs), loaded.lower("reference")(*inputs))


class Rows(nn.Module):
    """A view that only inputs with channels last allow."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).view(x.shape[0], -1) * 2


def test_views_that_need_a_memory_layout_of_the_inputs_come_back(tmp_path):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    module = qgraph.trace(Rows().eval(), x)
    sample = Sample((x,))
    QuantizedModel(module, Report("float", (), (), ()), sample).save(tmp_path / "m.qgraph")
    loaded = qgraph.load(tmp_path / "m.qgraph")
    assert isinstance(loaded, QuantizedModel)
    assert torch.equal(loaded.lower("reference")(x), Rows()(x))


@dataclass
class Result:
    logits: torch.Tensor
    features: torch.Tensor | None = None


class GivesResult(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return Result(logits=self.layer(x), features=x.relu())


def test_a_dataclass_comes_back_as_itself_here_and_as_a_dict_with_attributes_elsewhere(tmp_path):
    inputs = (torch.randn(2, 4),)
    quantized = quantized_model(GivesResult(), inputs)
    quantized.save(tmp_path / "m.qgraph")
    here = qgraph.load(tmp_path / "m.qgraph")(*inputs)
    assert type(here) is Result
    torch.save(here.logits, tmp_path / "logits.pt")
    torch.save(inputs[0], tmp_path / "x.pt")
    program = (
        "import sys, torch, qgraph; folder = sys.argv[1]\n"
        "result = qgraph.load(folder + '/m.qgraph')(torch.load(folder + '/x.pt'))\n"
        "assert torch.equal(result.logits, torch.load(folder + '/logits.pt'))\n"
        "assert list(result) == ['logits', 'features'], result\n"
        "assert not any('test_artifact' in name for name in sys.modules)\n"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_output_has_entries_as_attributes_and_names_what_it_has():
    with pytest.raises(AttributeError, match="it has logits"):
        _ = Output(logits=1).hidden


def test_an_onnx_path_loads_as_a_session_with_the_models_signature(saved, tmp_path):
    quantized, _, _, held_out = saved
    quantized.to_onnx(tmp_path / "model.onnx")
    session = qgraph.load(tmp_path / "model.onnx")
    assert equal(quantized.lower("onnx")(*held_out), session(*held_out))


def test_a_graph_with_an_op_that_loading_would_refuse_is_refused_when_saved(tmp_path):
    class Writes(nn.Module):
        def forward(self, x):
            return torch.empty_like(x).fill_(1.0) + x

    inputs = (torch.randn(2, 3),)
    module = qgraph.trace(Writes().eval(), *inputs)
    node = next(n for n in module.graph.nodes if n.op == "call_function")
    node.target = torch.ops.aten.empty_like.default
    node.args, node.kwargs = (node.all_input_nodes or [next(iter(module.graph.nodes))])[:1], {}
    with pytest.raises(qgraph.ExportError, match="uninitialised"):
        QuantizedModel(module, Report("x", (), (), ()), Sample(inputs)).save(tmp_path / "m.qgraph")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    target = tmp_path / "m.qgraph"
    target.write_bytes(b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(qgraph.ExportError, match="No space left"):
        artifact.write_file(target, [b"new"])
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupt_while_writing_leaves_the_old_file_and_no_rubbish(tmp_path):
    target = tmp_path / "m.qgraph"
    target.write_bytes(b"old")

    def pieces():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifact.write_file(target, pieces())
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_leftovers_of_killed_writers_are_swept_and_those_of_living_ones_kept(tmp_path):
    dead = tmp_path / ".m.qgraph.999999999-0123abcd.tmp"
    living = tmp_path / f".m.qgraph.{os.getpid()}-0123abcd.tmp"
    other = tmp_path / ".n.qgraph.999999999-0123abcd.tmp"
    for path in (dead, living, other):
        path.touch()
    artifact.write_file(tmp_path / "m.qgraph", [b"x"])
    assert {p.name for p in tmp_path.iterdir()} == {"m.qgraph", living.name, other.name}


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "no folder", "file as folder"])
def test_targets_that_are_no_regular_files_are_refused_early_and_left_alone(tmp_path, kind):
    target = tmp_path / "m.qgraph"
    if kind == "folder":
        target.mkdir()
    elif kind == "link":
        (tmp_path / "real").touch()
        target.symlink_to(tmp_path / "real")
    elif kind == "pipe":
        os.mkfifo(target)
    elif kind == "no folder":
        target = tmp_path / "missing" / "m.qgraph"
    else:
        target.touch()
        target = target / "m.qgraph"
    before = target.lstat().st_mode if target.parent.is_dir() else None
    for attempt in (artifact.probe, lambda p: artifact.write_file(p, [b"x"])):
        with pytest.raises(qgraph.ExportError, match=r"m\.qgraph"):
            attempt(target)
    if before is not None:
        assert stat.S_IFMT(target.lstat().st_mode) == stat.S_IFMT(before)
