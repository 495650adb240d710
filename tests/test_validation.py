# SPDX-License-Identifier: Apache-2.0
"""compile(..., verify="full"): what it checks, and that each check can fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import qgraph
from qgraph import validation
from qgraph.errors import VerificationError
from qgraph.graph.verify import Sample
from qgraph.model import QuantizedModel


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def loader() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(7, 6) for _ in range(2)]


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    return qgraph.compile(model(), loader(), "int8", progress=False)


@pytest.fixture(scope="module")
def other() -> QuantizedModel:
    return qgraph.compile(model(5), loader(), "int8", progress=False)


def test_a_full_verification_is_told_in_the_report_and_uses_the_whole_first_batch():
    found = qgraph.compile(model(), loader(), "int8", verify="full", progress=False)
    assert found.report.parity is not None
    assert found.report.parity.codes == 7 * (6 + 5)  # the sample itself holds two rows
    assert "a second compilation gives the same bytes" in found.report.notes[-1]


def test_an_exported_program_and_a_one_shot_loader_are_validated_too():
    dim = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model(), (torch.randn(4, 6),), dynamic_shapes=({0: dim},))
    found = qgraph.compile(program, iter(loader()), "int8", verify="full", progress=False)
    assert found.report.notes[-1].startswith("validated")


def test_a_model_that_changed_is_named():
    mine = model()
    before = validation.fingerprint(mine)
    validation.check_unchanged(mine, before)
    changes: dict[str, Callable[[nn.Module], object]] = {
        "2.bias": lambda m: m.get_parameter("2.bias").data.add_(1e-6),
        "requires_grad of 0.weight": lambda m: m.get_parameter("0.weight").requires_grad_(False),
        "training of 1": lambda m: m.get_submodule("1").train(),
        "extra": lambda m: m.register_buffer("extra", torch.zeros(1)),
    }
    for name, change in changes.items():
        changed = copy.deepcopy(mine)
        change(changed)
        with pytest.raises(VerificationError, match=name):
            validation.check_unchanged(changed, before)


def test_another_second_compilation_is_refused_with_the_first_tensor(quantized, other):
    validation.check_repeated(quantized, quantized)
    with pytest.raises(VerificationError, match="second compilation gave another model, first at"):
        validation.check_repeated(quantized, other)


def test_files_that_come_back_as_another_model_are_refused(quantized, other, monkeypatch):
    batch = Sample((torch.randn(3, 6),))
    validation.check_saving(quantized, batch)
    validation.check_export(quantized, batch)
    real = qgraph.load
    monkeypatch.setattr(validation, "load", lambda path: other)
    with pytest.raises(VerificationError, match="other bytes"):
        validation.check_saving(quantized, batch)

    def wrong_onnx(path):
        other.to_onnx(path)
        return real(path)

    monkeypatch.setattr(validation, "load", wrong_onnx)
    with pytest.raises(VerificationError, match="the ONNX file: output 0 differs"):
        validation.check_export(quantized, batch)


def test_an_output_after_loading_that_differs_is_named(quantized, monkeypatch):
    changed = QuantizedModel(quantized.graph_module, quantized.report, quantized.sample)
    monkeypatch.setattr(changed, "lower", lambda _: lambda x: x)
    monkeypatch.setattr(validation, "load", lambda path: changed)
    with pytest.raises(VerificationError, match="reference after loading: output 0 differs"):
        validation.check_saving(quantized, Sample((torch.randn(3, 6),)))


def test_validation_runs_every_check(quantized, monkeypatch):
    batch = Sample((torch.randn(3, 6),))
    ran: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: ran.append(name)

    checks = ("check_fixed_point", "check_saving", "check_export", "check_repeated")
    for name in checks:
        monkeypatch.setattr(validation, name, note(name))
    validation.validate(quantized, batch, lambda: quantized, partial(ran.append, "unchanged"))
    assert ran == [*checks, "unchanged"]


def test_an_unknown_value_of_verify_is_refused():
    with pytest.raises(qgraph.ConfigError, match="'full'"):
        qgraph.compile(model(), loader(), verify="half")  # type: ignore[arg-type]
