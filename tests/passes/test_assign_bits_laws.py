# SPDX-License-Identifier: Apache-2.0
"""Bits from sensitivities that a test makes up: limits, the best answer, clips, shared stores."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.errors import BudgetInfeasibleError, ConfigError
from qgraph.graph.bit_units import stored_bytes
from qgraph.graph.plan import Role, Site
from qgraph.passes import AssignBits, PlanSites, assign_bits
from qgraph.passes.assign_bits import RESOURCES
from qgraph.pipeline import Pass, Pipeline, Promise
from qgraph.sensitivity import observe
from tests.passes.assigning import (
    CHOICES,
    Made,
    assigned,
    bits_of,
    cost_of,
    fresh,
    limits_of,
    observed,
    units_of,
)
from tests.small_unet import images


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.floats(0.1, 0.3), st.floats(0.02, 0.08))
def test_no_other_choice_within_the_budget_has_a_smaller_omega(seed, size, bops):
    made = Made(seed)
    item = AssignBits(budget={"size": size, "bops": bops}, **CHOICES)
    try:
        units, context = assigned("unet", item, made)
    except BudgetInfeasibleError:
        return
    free = [u.name for u in units.units if u.pinned is None]
    limits = {"size": size * units.floats["size"], "bops": bops * units.floats["bops"]}
    chosen = bits_of(units)
    pairs = list(itertools.product((2, 8), (4, 8)))
    fixed = {r: cost_of(units, {u.name: u.pinned or (0, 0) for u in units.units}, r)
             for r in limits}  # fmt: skip
    costs = {u.name: {p: u.costs(p) for p in pairs} for u in units.units if u.pinned is None}
    best = min(
        sum(made.found[n].omega(p) for n, p in zip(free, choice, strict=True))
        for choice in itertools.product(pairs, repeat=len(free))
        if all(fixed[r] + sum(costs[n][p][r] for n, p in zip(free, choice, strict=True)) <= limit
               for r, limit in limits.items())
    )  # fmt: skip
    assert sum(made.found[n].omega(chosen[n]) for n in free) == pytest.approx(best)
    assert all(cost_of(units, chosen, r) <= limit for r, limit in limits.items())
    assert all(chosen[u.name] == u.pinned for u in units.units if u.pinned is not None)
    (line,) = [d for d in context.decisions if d.site == "network"]
    real = {r: cost_of(units, chosen, r) / units.floats[r] for r in limits}
    assert {r: line.numbers[r] for r in real} == {r: round(share, 5) for r, share in real.items()}


def test_the_measurement_gets_ranges_choices_method_and_the_users_own_adapter():
    _module, context = fresh("unet")
    context.seed, context.cache_dir = 7, None
    mine: Any = lambda batch: ((batch,), {})  # noqa: E731
    progress = lambda *_: None  # noqa: E731
    context.adapt, context.progress = mine, progress
    context.loss = lambda output, batch: output.sum()
    item = AssignBits(sensitivity="sqnr", output="sigmoid", rows=3, **CHOICES)
    made = Made()
    units, _ = assigned("unet", item, made, context)
    call, how = made.call, made.call["how"]
    assert call["adapt"] is mine
    assert call["batches"] is context.batches
    assert call["progress"] is progress
    assert call["widths"] == ((2, 8), (4, 8))
    assert (how.method, how.output, how.rows, how.seed) == ("sqnr", "sigmoid", 3, 7)
    assert how.loss is context.loss
    free = [u for u in units.units if u.pinned is None]
    wanted = {s.value: context.statistics[s.value].range().bounds()
              for u in free for s in u.activations}  # fmt: skip
    assert len(free) == 4
    assert call["ranges"] == wanted
    other = fresh("unet")[1]
    other.adapt = None
    assigned("unet", item, made, other)
    args, kwargs = made.call["adapt"](images(1)[0])
    assert torch.equal(args[0], images(1)[0])
    assert not kwargs
    assert made.call["how"].loss is None


def test_a_budget_up_to_one_is_a_share_and_above_an_amount():
    _, context = fresh("unet")
    floats = units_of(*fresh("unet")).floats
    for resource in ("size", "bops", "activations"):
        for given_limit, wanted in (
            (0.5, 0.5 * floats[resource]), (1, floats[resource]), (1.5, 1.5), (10**9, 1e9),
        ):  # fmt: skip
            item = AssignBits(budget={resource: given_limit}, **CHOICES)
            assert limits_of("unet", item) == {resource: pytest.approx(wanted)}
    assert AssignBits(budget={"ms": 0.5})._limits(units_of(*fresh("unet"))) == {"ms": 0.5}
    assert set(floats) == set(RESOURCES) - {"ms"}
    assert context.latency is None


@pytest.mark.parametrize("effort", [0, 0.25, 1])
def test_effort_lies_between_the_cheapest_and_the_dearest_on_a_geometric_scale(effort):
    units = units_of(*fresh("unet"))
    ends = [
        {u.name: u.pinned or bits for u in units.units} for bits in ((2, 4), (8, 8))
    ]  # fmt: skip
    found = limits_of("unet", AssignBits(effort=effort, **CHOICES))
    assert set(found) == {"size", "bops"}
    for resource, limit in found.items():
        low, high = (cost_of(units, bits, resource) for bits in ends)
        assert low < high
        assert limit == pytest.approx(low ** (1 - effort) * high**effort, rel=1e-6)
        assert limit >= low ** (1 - effort) * high**effort
    tighter = limits_of("unet", AssignBits(effort=effort, budget={"size": 2.0}, **CHOICES))
    assert tighter["size"] == 2.0
    looser = limits_of("unet", AssignBits(effort=effort, budget={"size": 10**9}, **CHOICES))
    assert looser["size"] == found["size"]


def test_effort_of_a_network_without_weights_limits_its_operations_alone():
    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(-1, -2)).softmax(-1) @ x

    module, context = observe(Products().eval(), [torch.randn(2, 5, 6)], bits=(8, 8))
    for site in context.plan:
        site.encoding = None
    found: Any = []
    real = assign_bits.problem_of  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign_bits, "measure_units", Made())
        patch.setattr(assign_bits, "problem_of",
                      lambda *a, **k: (found.append(dict(a[3])), real(*a, **k))[1])  # fmt: skip
        AssignBits(effort=0.5, **CHOICES).run(module, context)
    assert set(found[0]) == {"bops"}
    (line,) = [d for d in context.decisions if d.site == "network"]
    assert "size" not in line.numbers, "a share of nothing"
    assert 0 < line.numbers["bops"] < 1


def test_a_budget_that_is_met_exactly_is_met():
    made = Made()
    units, context = assigned("unet", AssignBits(**CHOICES), made)
    module = observed("unet")[0]
    assert set(bits_of(units).values()) == {(8, 8)}
    exact = {r: cost_of(units, bits_of(units), r) for r in ("size", "bops")}
    exact["activations"] = stored_bytes(module, context.plan)
    again, _ = assigned("unet", AssignBits(budget=exact, **CHOICES), Made())
    assert bits_of(again) == bits_of(units)


@pytest.mark.parametrize("share", [0.2, 0.21, 0.23])
def test_stored_activations_are_counted_on_the_plan_and_as_wide_as_the_budget_lets_them(share):
    item = AssignBits(budget={"activations": share}, weight_choices=(8,),
                      activation_choices=(3, 4, 5, 6, 8))  # fmt: skip
    units, context = assigned("unet", item, Made(3))
    module = observed("unet")[0]
    limit = share * units.floats["activations"]
    real = stored_bytes(module, context.plan)
    assert 0.85 * limit <= real <= limit
    (line,) = [d for d in context.decisions if d.site == "network"]
    assert line.numbers["activations"] == round(real / units.floats["activations"], 5)


@dataclass(frozen=True)
class Named(Pass):
    """Something else of that name, without widths."""

    name: ClassVar[str] = "plan-sites"
    promise: ClassVar[Promise] = Promise.IDENTICAL

    def run(self, module: GraphModule, context: Context) -> bool:
        return False


@pytest.mark.parametrize("bits", [(8, 9), (9, 8), (8, 8)])
@pytest.mark.parametrize("passes", [None, (), (Named(),), (PlanSites(),)])
def test_what_has_more_bits_than_were_asked_for_was_raised_and_keeps_them(bits, passes):
    module, context = fresh("unet", bits)
    context.pipeline = None if passes is None else Pipeline("test", passes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign_bits, "measure_units", Made())
        AssignBits(weight_choices=(2,), activation_choices=(3,)).run(module, context)
    inner = [s for s in context.plan if s.edge.consumer.name == "conv2d_2"]
    got = {s.role: s.bits for s in inner}
    wanted = (2, 3) if bits == (8, 8) else bits
    assert (got[Role.WEIGHT], got[Role.ACTIVATION]) == wanted


@pytest.mark.parametrize("bits", [(9, 8), (8, 9)])
def test_widths_that_plan_sites_was_asked_for_are_free(bits):
    module, context = fresh("unet", bits)
    item = PlanSites(weight_bits=bits[0], activation_bits=bits[1])
    context.pipeline = Pipeline("test", (Named(), item)[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign_bits, "measure_units", Made())
        AssignBits(weight_choices=(2,), activation_choices=(3,)).run(module, context)
    inner: list[Site] = [s for s in context.plan if s.edge.consumer.name == "conv2d_2"]
    assert sorted(s.bits for s in inner) == [2, 3]


@pytest.mark.parametrize(
    ("options", "fine"),
    [
        ({"effort": 0}, True), ({"effort": 1}, True), ({"effort": -0.01}, False),
        ({"effort": 1.01}, False), ({"budget": {"size": 1e-9}}, True),
        ({"budget": {"size": math.inf}}, False), ({"budget": {"bops": math.nan}}, False),
        ({"budget": {"bops": -1.0}}, False), ({"budget": {"ms": 0.0}}, False),
        ({"weight_choices": ()}, False),
        ({"activation_choices": ()}, False), ({"weight_choices": (17,)}, False),
        ({"activation_choices": (1,)}, False), ({"mode": "spmix_delta"}, True),
    ],
)  # fmt: skip
def test_options_are_checked_right_at_their_limits(options, fine):
    if fine:
        AssignBits(**options)
    else:
        with pytest.raises(ConfigError):
            AssignBits(**options)


@pytest.mark.parametrize("met_at", [1, 2, 5, 12, 13])
def test_what_was_overrun_is_tightened_by_half_of_it_twelve_times_at_most(met_at, monkeypatch):
    given_limits: list[dict[str, float]] = []
    real = [{"size": 130.0 - n, "bops": 40.0, "activations": 60.0} for n in range(20)]
    real[met_at - 1]["size"] = 100.0
    costs = [{"size": 90.0 - 3 * n, "bops": 40.0, "activations": 50.0} for n in range(20)]

    def solve(problem: Any, *, mode: str) -> Any:
        given_limits.append(dict(problem.budgets))
        assert mode == "greedy"
        return SimpleNamespace(costs=costs[len(given_limits) - 1])

    monkeypatch.setattr(assign_bits, "solve", solve)
    monkeypatch.setattr(
        assign_bits, "problem_of", lambda *_, **__: SimpleNamespace(groups=(), budgets={})
    )
    monkeypatch.setattr(AssignBits, "_count", lambda *_: real[len(given_limits) - 1])
    limits = {"size": 100.0, "activations": 70.0}
    item = AssignBits(mode="greedy")
    module, context = fresh("unet")
    solved = lambda: item._solve(module, context, Any, {}, limits)  # type: ignore[arg-type]  # noqa: E731
    if met_at <= 12:
        assert solved().costs is costs[met_at - 1]
    else:
        with pytest.raises(BudgetInfeasibleError) as caught:
            solved()
        assert (caught.value.resource, caught.value.best_possible) == ("size", real[11]["size"])
    wanted = [100.0]
    for at in range(min(met_at, 12) - 1):
        wanted.append(min(wanted[-1], costs[at]["size"]) - (real[at]["size"] - 100.0) / 2)
    assert [each["size"] for each in given_limits] == wanted
    assert {each["activations"] for each in given_limits} == {70.0}
