# SPDX-License-Identifier: Apache-2.0
"""Tensors with the statistics that break quantizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from qgraph.errors import unknown_name

Filler = Callable[[Tensor, torch.Generator], Tensor]


def _outlier_channels(x: Tensor, generator: torch.Generator) -> Tensor:
    """A few channels of the last axis are a hundred times larger."""
    chosen = torch.rand(x.shape[-1], generator=generator) < 0.2
    chosen[int(torch.randint(x.shape[-1], (), generator=generator))] = True
    return torch.where(chosen, 100.0 * x, x)


def _dead_channels(x: Tensor, generator: torch.Generator) -> Tensor:
    """Channels that are 0 throughout."""
    dead = torch.rand(x.shape[-1], generator=generator) < 0.4
    dead[0] = True
    return torch.where(dead, 0.0, x)


def _bimodal(x: Tensor, generator: torch.Generator) -> Tensor:
    """Two clusters far from 0, each channel on one side."""
    side = torch.where(torch.rand(x.shape[-1], generator=generator) < 0.5, -4.0, 4.0)
    return 0.5 * x + side


def _heavy_tails(x: Tensor, generator: torch.Generator) -> Tensor:
    """Student's t with 1.5 degrees of freedom: no variance."""
    other = torch.randn(x.shape, generator=generator).abs().clamp(min=1e-2)
    return (x / other.pow(1 / 1.5)).clamp(-1e6, 1e6)


def _denormals(x: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers below 2^-126 among ordinary ones."""
    tiny = torch.rand(x.shape, generator=generator) < 0.5
    return torch.where(tiny, x * 1e-40, x)


def _spread(x: Tensor, generator: torch.Generator) -> Tensor:
    """Magnitudes over twenty octaves."""
    return x * torch.exp2(torch.empty(x.shape).uniform_(-20, 0, generator=generator))


def _ties(x: Tensor, generator: torch.Generator) -> Tensor:
    """Halves: they lie midway between codes of a scale of 1."""
    del generator
    return (x * 4).round() / 2


_KINDS: dict[str, Filler] = {
    "normal": lambda x, _: x,
    "zeros": lambda x, _: torch.zeros_like(x),
    "constant": lambda x, _: torch.full_like(x, float(x.flatten()[0])) if x.numel() else x,
    "one_sided": lambda x, _: x.abs(),
    "negative": lambda x, _: -x.abs() - 0.5,
    "outlier_channels": _outlier_channels,
    "dead_channels": _dead_channels,
    "bimodal": _bimodal,
    "heavy_tails": _heavy_tails,
    "denormals": _denormals,
    "spread": _spread,
    "ties": _ties,
    "huge": lambda x, _: x * 1e18,
    "tiny": lambda x, _: x * 1e-18,
}
KINDS: tuple[str, ...] = tuple(_KINDS)


def awkward(kind: str, shape: Sequence[int], seed: int = 0) -> Tensor:
    """A tensor of one kind.

    Args:
        kind: one of `KINDS`.
        shape: the last axis is the channel axis.
        seed: of its values.

    Raises:
        ConfigError: an unknown kind.

    >>> awkward("dead_channels", (2, 3))[:, 0].tolist()
    [0.0, 0.0]
    """
    if kind not in _KINDS:
        what = "kind of tensor"
        raise unknown_name(what, kind, _KINDS)
    generator = torch.Generator().manual_seed(seed)
    return _KINDS[kind](torch.randn(tuple(shape), generator=generator), generator)


@st.composite
def tensors(
    draw: st.DrawFn, shape: Sequence[int] | None = None, kinds: Sequence[str] = KINDS
) -> Tensor:
    """fp32 tensors of a shape (default: rank 2 to 4, up to 7 along each axis).

    Shrinks towards small shapes and the first kind.
    """
    size = tuple(shape or draw(st.lists(st.integers(1, 7), min_size=2, max_size=4)))
    return awkward(draw(st.sampled_from(list(kinds))), size, draw(st.integers(0, 99)))
