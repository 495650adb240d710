# SPDX-License-Identifier: Apache-2.0
"""One validation case: a random model and pipeline by number, and all that must hold."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qgraph
from qgraph.backends import parity
from qgraph.errors import PassError, QGraphError
from qgraph.pipeline import Pipeline
from qgraph.testing import (
    Case,
    assert_exports,
    assert_parity,
    assert_survives_saving,
    models,
    pipelines,
)

T = TypeVar("T")
# onnxruntime takes most of a case's time.
ONNX_EVERY = 5


@dataclass(frozen=True)
class Outcome:
    """What one case gave.

    Attributes:
        number: of the case.
        kind: of the model: its recipe and what distinguishes it.
        pipeline: its name.
        codes: compared between integer and reference.
        refusal: the typed error, where qgraph said no.
        failure: what did not hold.
    """

    number: int
    kind: str
    pipeline: str
    codes: int = 0
    refusal: str = ""
    failure: str = ""


def drawn(strategy: st.SearchStrategy[T], number: int) -> T:
    """The same value for the same number; hypothesis gives the simplest one first, so the last."""
    found: list[T] = []

    @seed(number)
    @settings(
        max_examples=5, database=None, deadline=None, derandomize=False,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def collect(value: T) -> None:
        found.append(value)

    collect()
    return found[-1]


def kind_of(case: Case) -> str:
    """Recipe with its parameters, without sizes: what makes two architectures different."""
    recipe = case.recipe
    words = [
        f"{name}={value}" for name, value in sorted(vars(recipe).items())
        if isinstance(value, (str, bool))
    ]  # fmt: skip
    return " ".join([type(recipe).__name__, *words])


def check(number: int) -> Outcome:
    """Compile case `number` twice and compare everything that must be equal."""
    case, chosen = drawn(models(), number), drawn(pipelines(), number)
    kind = kind_of(case)
    try:
        codes = _check(case, chosen, with_onnx=number % ONNX_EVERY == 0)
    except PassError as error:  # a broken promise, or a pass that crashed
        return Outcome(number, kind, chosen.name, failure=f"{type(error).__name__}: {error}")
    except QGraphError as error:
        return Outcome(number, kind, chosen.name, refusal=f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001  any other error is what this looks for
        return Outcome(number, kind, chosen.name, failure=f"{type(error).__name__}: {error}")
    return Outcome(number, kind, chosen.name, codes=codes)


def _check(case: Case, chosen: Pipeline, *, with_onnx: bool) -> int:
    model = case.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = qgraph.compile(model, case.loader(), pipeline=chosen, progress=False)
    second = qgraph.compile(model, case.loader(), pipeline=chosen, progress=False)
    _assert_untouched(model, before)
    assert _bytes(first) == _bytes(second), "a second compilation gave another file"
    assert_survives_saving(first)
    call: tuple[Any, dict[str, Any]] = (case.inputs(7), {})
    report = parity.compare(first.graph_module, call)
    assert report.mismatches == 0, f"integer differs from reference: {report.first_difference}"
    fixed = parity.compare(first.graph_module, call, mode="fixed_point")
    assert fixed.mismatches == 0, f"fixed_point differs: {fixed.first_difference}"
    if with_onnx:
        assert_parity(first, case.inputs(7))
        assert_exports(first)
    return report.codes + fixed.codes


def _assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert before.keys() == after.keys(), "the caller's model has other parameters"
    for name, value in before.items():
        assert torch.equal(value, after[name]), f"the caller's {name} changed"


def _bytes(quantized: qgraph.QuantizedModel) -> bytes:
    """The saved file, which leaves times out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.qgraph"
        quantized.save(path)
        return path.read_bytes()
