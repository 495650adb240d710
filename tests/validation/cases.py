# SPDX-License-Identifier: Apache-2.0
"""One validation case: a random model and pipeline by number, and all that must hold."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule

import qgraph
from qgraph.backends import parity
from qgraph.errors import PassError, QGraphError
from qgraph.graph.verify import Sample
from qgraph.pipeline import Pipeline
from qgraph.testing import Case, models, pipelines
from qgraph.testing.stacks import Stack, stacks
from qgraph.validation import (
    check_export,
    check_fixed_point,
    check_repeated,
    check_saving,
    check_unchanged,
    fingerprint,
)

T = TypeVar("T")
# onnxruntime takes most of a case's time.
ONNX_EVERY = 5
PIPELINES_PER_MODEL = 4


@dataclass(frozen=True)
class Outcome:
    """What one case gave.

    Attributes:
        number: of the case.
        kinds: of the model: its recipe and what distinguishes it.
        pipeline: its name.
        codes: compared between integer and reference.
        refusal: the typed error, where qgraph said no.
        failure: what did not hold.
    """

    number: int
    kinds: tuple[str, ...]
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


def kinds_of(case: Case) -> tuple[str, ...]:
    """What makes two architectures different: recipe and its parameters, without sizes; a stack
    is of the kinds of its blocks.
    """
    recipe = case.recipe
    if isinstance(recipe, Stack):
        return tuple(sorted({f"Stack {name}" for name in (*recipe.image, *recipe.token)}))
    words = [
        f"{name}={value}" for name, value in sorted(vars(recipe).items())
        if isinstance(value, (str, bool))
    ]  # fmt: skip
    return (" ".join([type(recipe).__name__, *words]),)


@dataclass(frozen=True)
class Subject:
    """A drawn model, as the user has it and traced."""

    case: Case
    model: nn.Module
    traced: GraphModule


@functools.lru_cache(maxsize=1)
def subject(number: int) -> Subject:
    """Model `number`; tracing takes longer than all else, so neighbouring cases share it."""
    case = drawn(st.one_of(models(), stacks()), number)
    model = case.model()
    return Subject(case, model, qgraph.trace(model, *case.inputs()))


def check(number: int) -> Outcome:
    """Compile case `number` twice and compare everything that must be equal."""
    found, chosen = subject(number // PIPELINES_PER_MODEL), drawn(pipelines(), number)
    kinds = kinds_of(found.case)
    try:
        codes = check_case(found, chosen, with_onnx=number % ONNX_EVERY == 0)
    except PassError as error:  # a broken promise, or a pass that crashed
        return Outcome(number, kinds, chosen.name, failure=f"{type(error).__name__}: {error}")
    except QGraphError as error:
        return Outcome(number, kinds, chosen.name, refusal=f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001  any other error is what this looks for
        return Outcome(number, kinds, chosen.name, failure=f"{type(error).__name__}: {error}")
    return Outcome(number, kinds, chosen.name, codes=codes)


def check_case(found: Subject, chosen: Pipeline, *, with_onnx: bool) -> int:
    """Compile a model twice, once from its trace, and compare; return how many codes were.

    With ONNX the first compilation starts from the module itself.
    """
    model, loader = found.model if with_onnx else found.traced, found.case.loader()
    before = fingerprint(model), fingerprint(found.traced)
    first = qgraph.compile(model, loader, pipeline=chosen, progress=False)
    second = qgraph.compile(found.traced, loader, pipeline=chosen, progress=False)
    check_unchanged(model, before[0])
    check_unchanged(found.traced, before[1])
    check_repeated(first, second)
    batch = Sample(found.case.inputs(7))
    check_saving(first, batch)
    codes = parity.compare(first.graph_module, (batch.args, {})).check().codes
    check_fixed_point(first, batch)
    if with_onnx:
        first.verify(batch).check()
        check_export(first, batch)
    return 2 * codes
