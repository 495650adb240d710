# SPDX-License-Identifier: Apache-2.0
"""Runs assign-bits on small networks with sensitivities that a test makes up."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qgraph.calibration.sensitivities import Sensitivity
from qgraph.context import Context
from qgraph.errors import BudgetInfeasibleError
from qgraph.graph.bit_units import Units, find_units
from qgraph.graph.encoder_decoder import find_structure
from qgraph.graph.plan import Plan, Role
from qgraph.passes import AssignBits, assign_bits
from qgraph.sensitivity import observe
from tests.small_unet import images, tiny_unet

CHOICES: dict[str, Any] = {"weight_choices": (2, 8), "activation_choices": (4, 8)}


class Forked(nn.Module):
    """A value that a convolution reads, and a pool with another behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.near = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.far, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        far = self.far(nn.functional.max_pool2d(x, 2))
        both = [torch.relu(self.near(x)), nn.functional.interpolate(far, scale_factor=2.0)]
        out: Tensor = self.head(torch.relu(torch.cat(both, 1)))
        return out


@functools.cache
def observed(kind: str) -> tuple[GraphModule, Context]:
    if kind == "unet":
        return observe(tiny_unet(), images(1), bits=(8, 8))
    torch.manual_seed(0)
    return observe(Forked().eval(), images(1), bits=(8, 8))


def fresh(kind: str, bits: tuple[int, int] = (8, 8)) -> tuple[GraphModule, Context]:
    """The module, and a context of its own with an undecided plan."""
    module, context = observed(kind)
    widths = {Role.WEIGHT: bits[0], Role.ACTIVATION: bits[1]}
    sites = [
        dataclasses.replace(s, bits=widths[s.role], encoding=None, decided_by="")
        for s in context.plan
    ]
    return module, dataclasses.replace(
        context, plan=Plan(sites), decisions=[], sensitivity=[], pipeline=None
    )


def units_of(module: GraphModule, context: Context) -> Units:
    return find_units(module, context.plan, find_structure(module), (8, 8))


class Made:
    """Stands for `measure_units`: sensitivities from a seed, or as given; remembers the call."""

    def __init__(self, seed: int = 0, clips: dict[str, dict[int, float]] | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.clips = clips or {}
        self.call: dict[str, Any] = {}
        self.found: dict[str, Sensitivity] = {}
        self.given: dict[str, tuple[dict[int, float], dict[int, float]]] = {}

    def __call__(self, module, units, ranges, widths, how, **options):
        self.call = {"units": units, "ranges": ranges, "widths": widths, "how": how, **options}
        for unit in units:
            weights, activations = self.given.get(unit.name) or (
                dict(zip(w, sorted(self._some(len(w)), reverse=True), strict=True)) for w in widths
            )
            self.found[unit.name] = Sensitivity(
                name=unit.name, block=unit.block, level=unit.level, side=unit.side,
                nodes=tuple(n.name for n in unit.products), parameters=unit.parameters,
                macs=unit.macs, elements=unit.elements, weights=weights, activations=activations,
                clips=self.clips.get(unit.name, {}), pinned=unit.pinned,
            )  # fmt: skip
        return self.found

    def _some(self, count: int) -> list[float]:
        return torch.rand(count, generator=self.generator).tolist()


def assigned(
    kind: str, item: AssignBits, made: Made, context: Context | None = None
) -> tuple[Units, Context]:
    module, own = fresh(kind)
    context = context or own
    units = units_of(module, context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign_bits, "measure_units", made)
        assert item.run(module, context) is False
    return units, context


def limits_of(kind: str, item: AssignBits) -> dict[str, float]:
    """The absolute limits that the solver is given first."""
    found = []
    real = assign_bits.problem_of  # type: ignore[attr-defined]

    def spy(units, sensitivities, pairs, budgets, **options):
        found.append(dict(budgets))
        return real(units, sensitivities, pairs, budgets, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign_bits, "problem_of", spy)
        with contextlib.suppress(BudgetInfeasibleError):
            assigned(kind, item, Made())
    return found[0]


def bits_of(units: Units) -> dict[str, tuple[int, int]]:
    return {u.name: (u.weights[0].bits, u.activations[0].bits) for u in units.units}


def cost_of(units: Units, bits: dict[str, tuple[int, int]], resource: str) -> float:
    return units.rest[resource] + sum(u.costs(bits[u.name])[resource] for u in units.units)
