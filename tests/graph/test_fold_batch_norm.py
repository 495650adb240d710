# SPDX-License-Identifier: Apache-2.0
"""Batch norms move into the product before them, or become a mul and an add."""

# mypy: disable-error-code="no-any-return,operator,index,assignment"
# Attributes and calls of nn.Module are Tensor | Module, or Any, to the type checker.
from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from qgraph.graph.canonicalize import canonicalize
from qgraph.graph.fold_batch_norm import fold_batch_norm, fold_channel_affine
from qgraph.graph.trace import trace
from tests.graph.rewriting import assert_rewrites, ops, randomize

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_convolution_takes_its_batch_norm(dims, transposed):
    kind = (TRANSPOSED if transposed else CONVS)[dims]
    branches = []
    for groups, bias, affine, eps in ((1, True, True, 1e-5), (2, False, True, 0.5),
                                      (4, True, False, 1e-3), (4, False, False, 0.1)):  # fmt: skip
        conv = kind(4, 8, 3, stride=2, padding=1, groups=groups, bias=bias)
        branches.append(nn.Sequential(conv, NORMS[dims](8, eps=eps, affine=affine)))
    module = assert_rewrites(
        randomize(Branches(branches)), (torch.randn(2, 4, *[5] * dims),), fold_batch_norm
    )
    assert sum(ops(module).values()) == len(branches)


class Branches(nn.Module):
    def __init__(self, branches: list[nn.Sequential]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.branches]


def test_linear_takes_its_batch_norm_only_over_its_own_channels():
    module = assert_rewrites(
        randomize(nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6))),
        (torch.randn(2, 4),),
        fold_batch_norm,
    )
    assert ops(module) == Counter(linear=1)
    # over [batch, channels, features] the norm runs over axis 1, the linear over axis 2
    other = assert_rewrites(
        randomize(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5))),
        (torch.randn(2, 5, 4),),
        fold_batch_norm,
    )
    assert ops(other) == Counter(linear=1, mul=1, add=1)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.norm(y), y


def test_a_convolution_with_other_readers_keeps_its_weight():
    module = assert_rewrites(randomize(TwoReaders()), (torch.randn(2, 3, 4, 4),))
    assert ops(module) == Counter(conv2d=1, mul=1, add=1)


class SharedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.two(self.conv(self.one(self.conv(x)))))


def test_a_shared_weight_is_scaled_for_one_call_only():
    module = assert_rewrites(randomize(SharedWeight()), (torch.randn(2, 3, 4, 4),))
    assert ops(module) == Counter(conv2d=3)
    convs = [n for n in module.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert len({n.args[1].target for n in convs}) == 3


def test_a_batch_norm_behind_anything_else_becomes_mul_and_add():
    model = randomize(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1)))
    module = assert_rewrites(model, (torch.randn(2, 3, 4, 4),))
    assert ops(module) == Counter(mul=1, add=1, relu=1, conv2d=1)


def test_batch_statistics_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    module = trace(model.eval(), torch.randn(2, 3, 4, 4))
    assert fold_batch_norm(module) is False


class FrozenNorm(nn.Module):
    """Batch norm as detectors write it: plain arithmetic on buffers."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.conv = kind(4, 6, 3, groups=2, bias=False)
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            getattr(self, name).reshape(1, -1, 1, 1) for name in ("weight", "bias", "mean", "var")
        )
        scale = weight * (var + 1e-5).rsqrt()
        return self.conv(x) * scale + (bias - mean * scale)


@pytest.mark.parametrize("transposed", [False, True])
def test_frozen_batch_norms_fold_as_well(transposed):
    model = randomize(FrozenNorm(transposed))
    assert sum(ops(assert_rewrites(model, (torch.randn(2, 4, 5, 5),))).values()) == 1


class LayerScale(nn.Module):
    def __init__(self, operation: str) -> None:
        super().__init__()
        self.linear, self.scale, self.operation = nn.Linear(4, 6), torch.ones(6), operation
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return {
            "mul": lambda: self.scale * y,
            "add": lambda: y + self.scale,
            "sub": lambda: y - self.scale,
            "rsub": lambda: self.scale - y,
            "div": lambda: y / self.scale,
        }[self.operation]()


@pytest.mark.parametrize("operation", ["mul", "add", "sub", "rsub", "div"])
def test_per_channel_arithmetic_folds_into_linear(operation):
    model = randomize(LayerScale(operation))
    module = assert_rewrites(model, (torch.randn(2, 3, 4),), fold_channel_affine)
    assert ops(module) == Counter(linear=1)


def test_constants_that_vary_along_other_axes_stay():
    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.table = nn.Linear(4, 6), nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.table

    module = assert_rewrites(
        randomize(Position()), (torch.randn(2, 3, 4),), fold_channel_affine, changes=False
    )
    assert ops(module) == Counter(linear=1, add=1)


class Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
        )


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = Block(3, 4), Block(4, 8), Block(8, 4)
        self.grow, self.head = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        low = self.middle(nn.functional.max_pool2d(skip, 2))
        return self.head(self.up(torch.cat([skip, self.grow(low)], 1)))


def test_a_unet_loses_all_its_norms_at_any_batch():
    for batch in (1, 3):
        module = assert_rewrites(randomize(UNet()), (torch.randn(2, 3, 8, 8),), batch=batch)
        assert ops(module) == Counter(conv2d=4, relu=3, max_pool2d=1, conv_transpose2d=1, cat=1)


def test_folding_keeps_the_source_tensors_and_drops_unread_ones():
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    module = trace(model, torch.randn(2, 3, 4, 4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    kept = dict(module.state_dict())
    canonicalize(module)
    for name, tensor in kept.items():
        assert torch.equal(tensor, before[name])
    assert len(module.state_dict()) == 2
    assert all(a in model.state_dict() for a in itertools.chain(before))
