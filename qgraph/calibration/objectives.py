# SPDX-License-Identifier: Apache-2.0
"""Scalar objectives whose squared gradients weigh errors: a task's loss, or what outputs mean.

Without labels, random projections of the outputs stand in: with v drawn so that ``E[v v^T]`` is the
curvature of the output distance, ``(v^T J e)^2`` estimates the distance that an error e causes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qgraph.errors import CalibrationError, unknown_name

OUTPUTS = ("plain", "sigmoid", "softmax")
Loss = Callable[[Any, Any], Tensor]


def check_output(name: str) -> None:
    """Raise `ConfigError` for an unknown kind of output."""
    if name not in OUTPUTS:
        what = "kind of output"
        raise unknown_name(what, name, OUTPUTS)


def float_leaves(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output."""
    leaves = pytree.tree_leaves(outputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def class_axis(output: Tensor) -> int:
    """Axis of the classes: 1 for images [B, C, H, W], the last one otherwise."""
    return 1 if output.ndim == 4 else -1


def probe(outputs: Any, kind: str, generator: torch.Generator) -> Tensor:
    """A random projection of all outputs, fp32 [].

    ``plain``: relative squared error; ``sigmoid`` and ``softmax``: KL divergence to second order.
    """
    total: list[Tensor] = []
    for y in float_leaves(outputs):
        exact = y.detach()
        signs = torch.randint(0, 2, exact.shape, generator=generator).to(exact) * 2 - 1
        match kind:
            case "sigmoid":
                p = exact.sigmoid()
                direction = signs * (p * (1 - p)).sqrt()
            case "softmax":
                direction = _softmax_direction(exact, generator)
            case _:
                direction = signs / exact.square().sum().sqrt().clamp(min=1e-12)
        total.append((direction * y).sum())
    if not total:
        msg = "the model returns no floating-point tensor"
        raise CalibrationError(msg)
    return torch.stack([t.float() for t in total]).sum()


def _softmax_direction(exact: Tensor, generator: torch.Generator) -> Tensor:
    """One-hot of a class drawn from the softmax, minus the softmax: variance diag(p) - p p^T."""
    axis = class_axis(exact)
    p = exact.softmax(axis).movedim(axis, -1)
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
    hot = torch.zeros_like(p).view(-1, p.shape[-1]).scatter_(1, drawn, 1.0).view_as(p)
    return (hot - p).movedim(-1, axis)


def distance(exact: Any, other: Any, kind: str) -> Tensor:
    """Distance of two outputs, fp64 []: normalised squared error, or KL(exact, other)."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(float_leaves(exact), float_leaves(other), strict=True):
        x, y = a.double(), b.double()
        match kind:
            case "sigmoid":
                p = x.sigmoid()
                gap = torch.nn.functional.softplus(y) - torch.nn.functional.softplus(x)
                total += (gap - p * (y - x)).sum().clamp(min=0)
            case "softmax":
                axis = class_axis(x)
                p, q = x.log_softmax(axis), y.log_softmax(axis)
                total += (p.exp() * (p - q)).sum().clamp(min=0)
            case _:
                total += (x - y).square().sum() / x.square().sum().clamp(min=1e-12)
    return total


def target_mask(outputs: Any, batch: Any, targets: Callable[[Any, Any], Tensor] | None) -> Tensor:
    """bool [B, 1, H, W] of the pixels that matter: the caller's, or where the first output is > 0.

    Raises:
        CalibrationError: the mask is not of rank 4.
    """
    mask = float_leaves(outputs)[0] > 0 if targets is None else targets(outputs, batch)
    if mask.ndim != 4:
        msg = f"a target mask has shape [B, 1, H, W], got {list(mask.shape)}; pass targets="
        raise CalibrationError(msg)
    return mask.bool().any(1, keepdim=True)


def pooled_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask at another resolution, any pixel counts, grown by one pixel; bool."""
    pooled = torch.nn.functional.adaptive_max_pool2d(mask.float(), size)
    grown: Tensor = torch.nn.functional.max_pool2d(pooled, 3, 1, 1)
    return grown > 0
