# SPDX-License-Identifier: Apache-2.0
"""Random graphs: values read twice, operands repeated, weights tied, constants, several outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.errors import unknown_name
from qgraph.testing.case import Case, Inputs, Recipe

WIDTH = 4


def _move(x: Tensor) -> Tensor:
    return x.flip(1).roll(1, 1)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "sigmoid": torch.sigmoid, "negate": torch.neg,
    "scale": lambda x: x * 0.5, "softmax": lambda x: x.softmax(-1), "move": _move,
    "norm": lambda x: F.layer_norm(x, (WIDTH,)), "split": lambda x: torch.cat(x.chunk(2, -1), -1),
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "subtract": torch.sub, "multiply": torch.mul,
    "attend": lambda a, b: (a @ b.transpose(-1, -2) * 0.25).softmax(-1) @ b,
}  # fmt: skip
WITH_WEIGHTS = ("linear", "shared", "tied", "constant", "concat")


@dataclass(frozen=True)
class Step:
    """One op: its name and the earlier values that it reads (counted back from the last)."""

    op: str = "relu"
    first: int = 0
    second: int = 0


class _Program(nn.Module):
    def __init__(self, recipe: Program) -> None:
        super().__init__()
        self.steps = recipe.steps
        self.outputs = recipe.outputs
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.own = nn.ModuleDict()
        self.constants = nn.ParameterDict()
        for at, step in enumerate(recipe.steps):
            if step.op == "linear":
                self.own[str(at)] = nn.Linear(WIDTH, WIDTH, bias=at % 2 == 0)
            elif step.op == "concat":
                self.own[str(at)] = nn.Linear(2 * WIDTH, WIDTH)
            elif step.op == "constant":
                self.constants[str(at)] = nn.Parameter(torch.randn(WIDTH))
            elif step.op not in {*UNARY, *BINARY, *WITH_WEIGHTS}:
                what = "step"
                raise unknown_name(what, step.op, [*UNARY, *BINARY, *WITH_WEIGHTS])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for at, step in enumerate(self.steps):
            a = values[-1 - step.first % len(values)]
            b = values[-1 - step.second % len(values)]
            values.append(self._step(at, step.op, a, b))
        return tuple(values[-1 - i] for i in range(min(self.outputs, len(values))))

    def _step(self, at: int, op: str, a: Tensor, b: Tensor) -> Tensor:
        if op in UNARY:
            return UNARY[op](a)
        if op in BINARY:
            return BINARY[op](a, b)
        match op:
            case "linear":
                result = self.own[str(at)](a)
            case "shared":
                result = self.shared(a)
            case "tied":
                result = F.linear(a, self.shared.weight.t())
            case "concat":
                result = self.own[str(at)](torch.cat([a, b], -1))
            case _:
                result = a + self.constants[str(at)]
        return result  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Program(Recipe):
    """Steps over values [B, 3, 4]; the last `outputs` values leave."""

    steps: tuple[Step, ...] = (Step("linear"),)
    outputs: int = 1

    def build(self) -> nn.Module:  # noqa: D102
        return _Program(self)

    def inputs(self, batch: int) -> Inputs:  # noqa: D102
        return (torch.randn(batch, 3, WIDTH),)


def graphs(max_steps: int = 8) -> st.SearchStrategy[Case]:
    """Cases with random graphs; one linear is always there, so that they can be quantized."""
    step = st.builds(
        Step,
        op=st.sampled_from([*WITH_WEIGHTS, *UNARY, *BINARY]),
        first=st.integers(0, 4),
        second=st.integers(0, 4),
    )
    steps = st.lists(step, max_size=max_steps).map(lambda found: (Step("linear"), *found))
    programs = st.builds(Program, steps=steps, outputs=st.integers(1, 2))
    return st.builds(Case, recipe=programs, seed=st.integers(0, 99))
