# SPDX-License-Identifier: Apache-2.0
"""Each op between two products in fixed-point mode: near the reference, and in integers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qgraph.backends import integer, parity, reference
from tests.backends.builders import quantize


class Tokens(nn.Module):
    """linear, the op, linear on [B, T, 8]."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x)) * self.weight + self.bias)
        return y


class Images(nn.Module):
    """conv, the op, conv on [B, 8, H, W]."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.norm(self.first(x))))
        return y


TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "one minus": lambda x: 1 - x,
    "minus one": lambda x: x - 1,
    "minus another": lambda x: x - x.flip(-1),
    "halved": lambda x: x / 2,
    "three factors": lambda x: x / 2 + x / 3 - x * 0.1,
    "divided": lambda x: x / (x.abs() + 1),
    "squared": lambda x: x * x,
    "clamped": lambda x: x.clamp(-0.5, 0.7),
    "at least": lambda x: x.clamp_min(-0.2),
    "at most": lambda x: x.clamp(max=0.2),
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "root mean square": lambda x: F.rms_norm(x, (8,), torch.ones(8) * 1.5),
    "root mean square alone": lambda x: F.rms_norm(x, (8,)),
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "root": lambda x: x.abs().sqrt(),
    "negated": torch.neg,
    "filled": lambda x: x.masked_fill(x > 0.3, 0.25),
    "chosen": lambda x: torch.where(x > 0, x, x.flip(0)),
    "mask as a number": lambda x: x * (x > 0).to(x.dtype),
    "like": lambda x: x + torch.full_like(x, 0.5),
    "softmax": lambda x: x.softmax(-1),
}
IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "pooled": lambda x: F.avg_pool2d(x, 2),
    "pooled with padding": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "pooled to one": lambda x: x + F.adaptive_avg_pool2d(x, 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "bilinear": lambda x: F.interpolate(x, (9, 7), mode="bilinear", align_corners=True),
}
FLOAT: dict[str, Callable[[Tensor], Tensor]] = {
    "a factor inside a sum": lambda x: torch.add(x, x.flip(-1), alpha=2),
    "a factor inside a difference": lambda x: torch.sub(x, x.flip(-1), alpha=2),
    "rounded division": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
}


def near(model: nn.Module, x: Tensor) -> list[object]:
    """Check a model in fixed point against exact products and the reference; return its islands."""
    module = quantize(model.eval(), (x,))
    assert parity.compare(module, ((x,), {}), mode="fixed_point").mismatches == 0
    lowered = integer.lower(module, mode="fixed_point")
    got, want = lowered(x), reference.lower(module)(x)
    assert torch.equal(got, integer.fixed_point_reference(module)(x))
    # few codes may differ by one where a value lies beside a tie
    assert float((got - want).abs().mean()) < 0.004 * float(want.abs().max())
    return list(lowered.explain().islands)


@pytest.mark.parametrize("name", TOKENS)
def test_ops_on_tokens_are_near_the_reference_in_integers(name: str) -> None:
    torch.manual_seed(0)
    assert near(Tokens(TOKENS[name]), torch.randn(3, 4, 6)) == []


@pytest.mark.parametrize("name", IMAGES)
def test_ops_on_images_are_near_the_reference_in_integers(name: str) -> None:
    torch.manual_seed(0)
    islands = near(Images(IMAGES[name]), torch.randn(2, 3, 8, 8))
    assert islands == []


@pytest.mark.parametrize("name", FLOAT)
def test_what_has_no_integer_form_is_an_island_and_right(name: str) -> None:
    torch.manual_seed(0)
    assert near(Tokens(FLOAT[name]), torch.randn(3, 4, 6))
