# SPDX-License-Identifier: Apache-2.0
"""How much each element of a region's output matters: squared gradients of a global objective."""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.calibration.region_problem import Problem


def importances(problem: Problem, *, batch: int) -> list[dict[str, Tensor]]:
    """Squared gradients of the objective at a region's quantized outputs (Reg-PTQ, equation 3).

    The gradient is that of the global loss, taken once per region at round-to-nearest, sample by
    sample; each output's importances are divided by their mean, so a loss weighted by them keeps
    its size. An output that the objective does not feel keeps importance 1.
    """
    suffix = problem.suffix
    assert suffix is not None
    assert suffix.objective is not None
    problem.student.eval()
    problem.student.set_weights()
    names = problem.ports.outputs
    found: list[dict[str, Tensor]] = []
    for number, bucket in enumerate(problem.streams.exact.buckets):
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for start in range(0, len(bucket.samples), batch):
            stop = min(start + batch, len(bucket.samples))
            picks = torch.arange(start, stop)
            inputs, _ = problem.streams.inputs(number, problem.ports.inputs, picks)
            with torch.no_grad():
                made = list(problem.student.graph(*inputs))[: len(names)]
            leaves = [value.detach().requires_grad_() for value in made]
            with torch.enable_grad():
                loss = problem.far(leaves, number, picks, 1.0)
                slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
            for name, leaf, slope in zip(names, leaves, slopes, strict=True):
                squared = torch.ones_like(leaf) if slope is None else slope.square()
                parts[name].append(squared.detach().unflatten(0, (stop - start, -1)))
        found.append({name: _relative(torch.cat(values)) for name, values in parts.items()})
    return found


def _relative(squared: Tensor) -> Tensor:
    """Importances with mean 1; all 1 where nothing is felt."""
    mean = squared.mean()
    return squared / mean if float(mean) > 0 else torch.ones_like(squared)
