# SPDX-License-Identifier: Apache-2.0
"""Biases as int32: rounded half to even at the accumulator's scale, refused near the limit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from qgraph.formats import AffineEncoding, IntGrid
from qgraph.graph.plan import Site
from tests.backends.builders import quantize

X = torch.ones(2, 3)


def halves(site: Site, values: torch.Tensor) -> AffineEncoding:
    """Scales of 1/2 for data and weights: an accumulator in quarters."""
    return AffineEncoding.per_tensor(0.5, 0, IntGrid(8, signed=True))


def with_bias(bias: list[float], choose=halves) -> GraphModule:
    torch.manual_seed(0)
    model = nn.Linear(3, len(bias)).eval()
    with torch.no_grad():
        model.bias.copy_(torch.tensor(bias))
    return quantize(model, (X,), choose)


def codes_of(module: GraphModule) -> torch.Tensor:
    (codes,) = [b for n, b in module.named_buffers() if n.endswith("bias_codes")]
    return codes


def test_biases_are_rounded_half_to_even_and_not_down():
    module = with_bias([0.25, 0.375, 0.625, -0.375, 0.7, -0.7])
    codes = codes_of(module)
    assert codes.dtype == torch.int32
    assert codes.tolist() == [1, 2, 2, -2, 3, -3]


@pytest.mark.parametrize(("size", "stored"), [(2.0**27, True), (2.0**29, False)])
def test_a_bias_near_the_limit_of_int32_stays_in_float(size: float, stored: bool):
    module = with_bias([1.0, size])
    names = [n for n, _ in module.named_buffers() if n.endswith("bias_codes")]
    assert bool(names) is stored
