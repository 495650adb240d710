# SPDX-License-Identifier: Apache-2.0
"""compile() as users call it: real-shaped models, every backend, the caller's model untouched."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import qgraph
from qgraph.backends.parity import RUNTIME_RATE
from qgraph.pipelines import parse
from qgraph.report import sqnr


class UNet(nn.Module):
    """Conv-BN-ReLU, pooling, a skip, a transposed convolution."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.down = self._block(3, width)
        self.deep = self._block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge = self._block(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    def forward(self, x):
        down = self.down(x)
        deep = self.deep(nn.functional.max_pool2d(down, 2))
        return self.head(self.merge(torch.cat([down, self.up(deep)], 1)))


class TwoTower(nn.Module):
    """Keyword inputs, a module called twice, attention, a dictionary out."""

    def __init__(self):
        super().__init__()
        self.text = nn.Embedding(20, 16)
        self.shared = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, pixels, tokens):
        image = self.shared(pixels)
        text = self.shared(self.text(tokens))
        mixed, _ = self.attention(image, text, text, need_weights=False)
        return {"mixed": self.norm(image + mixed), "text": text}


@dataclass
class Case:
    model: nn.Module
    batches: Sequence[object]
    held_out: object


def unet_case() -> Case:
    torch.manual_seed(0)
    model = UNet()
    for _ in range(4):
        model(torch.randn(8, 3, 16, 16))
    batches = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    return Case(model.eval(), batches, torch.randn(5, 3, 16, 16))


def tower_case() -> Case:
    torch.manual_seed(0)

    def batch(size):
        return {"pixels": torch.randn(size, 9, 16), "tokens": torch.randint(0, 20, (size, 6))}

    return Case(TwoTower().eval(), [batch(4) for _ in range(3)], batch(3))


def call(model, inputs):
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)


@pytest.fixture(scope="module")
def unet():
    case = unet_case()
    return case, qgraph.compile(case.model, case.batches)


@pytest.fixture(scope="module")
def tower():
    case = tower_case()
    return case, qgraph.compile(case.model, case.batches)


def test_every_backend_stays_close_to_the_float_unet_at_another_batch_size(unet):
    case, quantized = unet
    wanted = call(case.model, case.held_out)
    for backend in ("reference", "integer", "onnx"):
        got = call(quantized.lower(backend), case.held_out)
        assert got.shape == wanted.shape
        assert sqnr(wanted, got) > 28, backend
    ours = call(quantized.lower("integer"), case.held_out)
    assert torch.equal(call(quantized, case.held_out), ours)


def test_integer_equals_reference_code_for_code_and_onnxruntime_agrees(unet, tower):
    for case, quantized in (unet, tower):
        held_out = case.held_out
        report = quantized.verify(held_out)
        assert report.codes > 1000
        assert report.mismatches == 0
        report.check()
        runs = [row.runtime_forced for row in quantized.verify().rows if row.runtime_forced]
        assert runs
        # given the same codes, onnxruntime rounds a few ties of float32 products the other way
        assert max(run.worst for run in runs) <= 1
        assert sum(run.mismatches for run in runs) <= 1 + report.codes * RUNTIME_RATE


def test_structure_of_inputs_and_outputs_is_the_models_own(tower):
    case, quantized = tower
    wanted, got = call(case.model, case.held_out), call(quantized, case.held_out)
    assert list(got) == list(wanted)
    for key, value in wanted.items():
        assert got[key].shape == value.shape
        assert sqnr(value, got[key]) > 25


def test_batch_one_works_and_gives_the_codes_it_has_in_a_larger_batch(unet):
    case, quantized = unet
    whole = call(quantized, case.held_out)
    assert torch.equal(call(quantized, case.held_out[:1]), whole[:1])


def test_the_callers_model_is_bit_identical_afterwards_even_after_an_error():
    case = unet_case()
    before = copy.deepcopy(case.model.state_dict())
    keys = set(vars(case.model))
    qgraph.compile(case.model, case.batches)
    with pytest.raises(qgraph.CalibrationError):
        qgraph.compile(case.model, [torch.full((4, 3, 16, 16), float("nan"))])
    after = case.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert set(vars(case.model)) == keys
    assert not any(m.training or m._forward_hooks for m in case.model.modules())


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_random_state_alone():
    case = unet_case()
    state = torch.get_rng_state()
    first, second = (qgraph.compile(case.model, case.batches).graph_module for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert str(first.graph) == str(second.graph)


@pytest.mark.parametrize("name", ["int4", "w4a8", "int6", "w3a5"])
def test_narrow_widths_lose_accuracy_in_order_and_keep_the_ends_at_eight_bits(name, unet):
    case, eight = unet
    quantized = qgraph.compile(case.model, case.batches, pipeline=name)
    wanted = call(case.model, case.held_out)
    assert sqnr(wanted, call(quantized, case.held_out)) < sqnr(wanted, call(eight, case.held_out))
    bits = {(r.node, r.role): r.bits for r in quantized.report.layers}
    assert bits["conv2d", "weight"] == 8
    assert bits["conv2d_3", "weight"] == 8
    assert bits["conv2d_1", "weight"] == int(name[3] if name.startswith("int") else name[1])
    assert quantized.verify(case.held_out).mismatches == 0


def test_ignored_layers_stay_in_float_and_the_report_says_so(unet):
    case, _ = unet
    quantized = qgraph.compile(case.model, case.batches, ignore=["deep", "conv_transpose"])
    assert not {"conv2d_1", "conv_transpose2d"} & {r.node for r in quantized.report.layers}
    kept = {d.site for d in quantized.report.decisions if d.outcome == "kept"}
    assert {"conv2d_1", "conv_transpose2d"} <= kept


def test_no_float_copy_of_a_quantized_weight_is_left(unet):
    _, quantized = unet
    floats = sum(
        t.numel() for t in quantized.graph_module.state_dict().values() if t.is_floating_point()
    )
    state = quantized.graph_module.state_dict().values()
    codes = sum(t.numel() for t in state if not t.is_floating_point())
    assert codes > 10 * floats


def test_a_pipeline_prints_as_text_that_parses_back():
    for name in qgraph.pipelines():
        built = qgraph.pipeline(name)
        assert parse(str(built)) == built
    edited = qgraph.pipeline("w4a8", method="minmax", scope=("linear", "matmul"), ends_bits=6)
    assert parse(str(edited)).passes == edited.passes


def test_the_report_serialises_and_fits_a_terminal(unet):
    _, quantized = unet
    assert '"layers"' in quantized.report.to_json()
    assert all(len(line) <= 100 for line in str(quantized.report).splitlines())
    assert all(r.sqnr > 20 for r in quantized.report.layers)
