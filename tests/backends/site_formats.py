# SPDX-License-Identifier: Apache-2.0
"""Ways to choose formats for all sites of a network, each with a kind of format at its heart."""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.formats import AffineEncoding, Encoding, LevelEncoding
from qgraph.graph.ops import OpKind
from qgraph.graph.plan import Role as PlanRole
from qgraph.graph.plan import Site
from tests.backends.builders import affine, minmax


def dual_region(site: Site, values: Tensor) -> Encoding:
    """Fine steps near zero, coarse beyond, on both signs."""
    if site.role is PlanRole.WEIGHT or site.kind not in {OpKind.LINEAR, OpKind.MATMUL, OpKind.CONV}:
        return minmax(site, values)
    fine = torch.arange(0, 64)
    levels = torch.cat([fine, fine << 4]).unique()
    levels = torch.cat([-levels[1:].flip(0), levels])
    scale = values.abs().max() / levels.max()
    return LevelEncoding.nearest("dual region", scale, levels, storage_bits=8)


def power_of_two(site: Site, values: Tensor) -> Encoding:
    """15 fractional bits: levels that need int16 and products that need more than 24 bits."""
    if site.role is PlanRole.WEIGHT or site.kind is not OpKind.MATMUL:
        return minmax(site, values)
    exponents = torch.arange(0, 32, dtype=torch.float64) / 2
    positive = torch.round(2.0**15 * 2.0**-exponents).to(torch.int64).unique()
    levels = torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.int64), positive])
    scale = values.abs().max() / 2**15
    return LevelEncoding.nearest("power of two", scale, levels, storage_bits=8)


def logarithmic(site: Site, values: Tensor) -> Encoding:
    """The same levels, thresholds in the logarithm: not on half steps."""
    nearest = power_of_two(site, values)
    if not isinstance(nearest, LevelEncoding):
        return nearest
    levels = nearest.levels.double()
    low, high = levels[:-1], levels[1:]
    middle = torch.sqrt(low.abs() * high.abs()) * high.sign()
    middle = torch.where(low * high == 0, nearest.thresholds.double(), middle)
    thresholds = middle.clamp(low, high - 0.25).float()
    return LevelEncoding(
        name="log", scale=nearest.scale, levels=nearest.levels, thresholds=thresholds,
        storage_bits=8,
    )  # fmt: skip


def wide(site: Site, values: Tensor) -> Encoding:
    """16-bit activations."""
    return minmax(site, values) if site.role is PlanRole.WEIGHT else affine(values, 16, signed=True)


def narrow(site: Site, values: Tensor) -> Encoding:
    """4-bit activations, narrow enough to saturate often."""
    return minmax(site, values) if site.role is PlanRole.WEIGHT else affine(values, 4, shrink=0.5)


def grouped(site: Site, values: Tensor, *, tied: bool, qmax: int = 260) -> Encoding:
    """One scale per channel group along the contraction of linears and convolutions."""
    plain = minmax(site, values)
    axis = site.axis
    if (
        site.role is PlanRole.WEIGHT
        or axis is None
        or site.kind not in {OpKind.LINEAR, OpKind.CONV}
    ):
        return plain
    channels = values.shape[axis]
    assert isinstance(plain, AffineEncoding)
    steps = torch.tensor([1.0, 2.0, 8.0] if tied else [1.0, 1.7, 5.3])
    order = torch.arange(channels) % 3
    return AffineEncoding(
        scale=plain.scale * steps[order] / 8,
        zero_point=(plain.zero_point + order.int()).clamp(0, 255),
        qmin=min(0, 255 - qmax), qmax=qmax, axis=axis % values.ndim,
    ) if channels > 3 else plain  # fmt: skip


def tied_groups(site: Site, values: Tensor) -> Encoding:
    return grouped(site, values, tied=True)


def tied_bytes(site: Site, values: Tensor) -> Encoding:
    return grouped(site, values, tied=True, qmax=255)


def free_bytes(site: Site, values: Tensor) -> Encoding:
    return grouped(site, values, tied=False, qmax=255)


def free_groups(site: Site, values: Tensor) -> Encoding:
    return grouped(site, values, tied=False)


CHOICES = [
    dual_region,
    power_of_two,
    logarithmic,
    wide,
    narrow,
    tied_groups,
    free_groups,
    tied_bytes,
    free_bytes,
]
