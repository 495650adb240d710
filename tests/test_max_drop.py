# SPDX-License-Identifier: Apache-2.0
"""compile(metric_fn=, max_drop=): the cheapest that holds, and always something."""

from __future__ import annotations

import math

import pytest
import torch

import qgraph
from qgraph.errors import ConfigError
from qgraph.max_drop import STEPS, cheapest_within, with_effort
from qgraph.passes import AssignBits
from tests.small_unet import images, tiny_unet


class Stand:
    """A quantized model that only knows its effort."""

    def __init__(self, effort: float):
        self.effort: float | None = effort
        self.report = qgraph.compile(tiny_unet(), images(1), "int8", verify=False).report


def assigning(pipeline: qgraph.Pipeline) -> AssignBits:
    item = pipeline["assign-bits"]
    assert isinstance(item, AssignBits)
    return item


def search(drop_of, max_drop: float):
    """Search with a given drop by effort; returns the answer and the efforts tried."""
    tried: list[float | None] = []
    base = Stand(0.0).report

    def build(pipeline):
        model = Stand.__new__(Stand)
        model.effort, model.report = assigning(pipeline).effort, base
        tried.append(model.effort)
        return model

    found = cheapest_within(
        build, qgraph.pipeline("int8"), lambda m: 1.0 - drop_of(m.effort),  # type: ignore[attr-defined]
        reference=1.0, max_drop=max_drop,
    )  # fmt: skip
    return found, tried


@pytest.mark.parametrize("step", [0, 1, 7, 16, 31, 32])
def test_the_search_ends_at_the_first_effort_that_holds(step):
    found, tried = search(lambda effort: 1.0 if effort < step / STEPS else 0.0, 0.5)
    assert found.effort == step / STEPS
    assert len(tried) <= 7
    assert "holds" in found.report.notes[-1]


def test_the_smallest_drop_is_returned_where_nothing_holds():
    found, tried = search(lambda effort: 2.0 - effort, 0.5)
    assert found.effort == 1.0
    assert tried == [1.0]
    assert "is missed" in found.report.notes[-1]


def test_an_interrupted_search_returns_the_best_so_far():
    def drop_of(effort: float) -> float:
        if effort < 0.3:
            raise KeyboardInterrupt
        return 0.0

    found, _ = search(drop_of, 0.5)
    assert found.effort == 15 / STEPS


def test_a_metric_that_is_not_a_number_never_wins():
    found, _ = search(lambda effort: math.nan if effort < 1 else 0.0, 0.5)
    assert found.effort == 1.0


def test_compile_returns_a_cheaper_model_for_a_looser_limit():
    model, data = tiny_unet(), images(2)
    with torch.no_grad():
        exact = model(data[0])

    def metric(callable_model) -> float:
        error = (callable_model(data[0]) - exact).square().mean() / exact.square().mean()
        return -float(error)

    costs, drops = [], []
    for limit in (0.3, 0.003):
        found = qgraph.compile(
            model, data, "sirst_mixed", metric_fn=metric, max_drop=limit, verify=False
        )
        assert found.report.cost is not None
        costs.append(found.report.cost.bit_operations)
        drops.append(-metric(found))
    assert drops[0] <= 0.3
    assert costs[0] < costs[1]


def test_effort_goes_into_any_pipeline_and_keeps_its_budget():
    item = assigning(with_effort(qgraph.pipeline("ris_int4", {"size": 0.2}), 0.25))
    assert item.effort == 0.25
    assert item.budget == {"size": 0.2}
    uniform = assigning(with_effort(qgraph.pipeline("sirst_int4"), 0.5))
    assert len(uniform.weight_choices) > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_drop": 0.1}, "metric_fn and max_drop belong together; only max_drop"),
        ({"metric_fn": float}, "only metric_fn was given"),
        ({"metric_fn": float, "max_drop": -1.0}, "max_drop is -1.0; allowed: 0 or more"),
    ],
)
def test_half_a_limit_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        qgraph.compile(tiny_unet(), images(1), "int8", **given)
