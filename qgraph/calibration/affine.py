# SPDX-License-Identifier: Apache-2.0
"""From a range of values to scale and zero point."""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.errors import ConfigError

# The product of two scales at this floor is the smallest normal fp32 number, 2^-126.
MIN_SCALE = 2.0**-63
MAX_SCALE = 2.0**63


def affine_parameters(
    low: float | Tensor, high: float | Tensor, qmin: int, qmax: int, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale (fp32) and zero point (int32) whose grid covers ``[low, high]`` widened to hold 0.

    Asymmetric: ``scale = (high - low) / (qmax - qmin)``, ``zero_point = clamp(round(qmin - low /
    scale))``, computed in fp64. Symmetric: zero point 0 and the smallest scale that covers both
    ends (negative ends are given up where qmin is 0). A range of width 0 gets scale 1. Scales are
    kept inside [2^-63, 2^63], so products of two stay normal fp32 numbers.

    Shapes: `low` and `high` broadcast; the results have that shape.

    Raises:
        ConfigError: if an end is not finite, low > high, or 0 is no code of a symmetric format.

    >>> [t.item() for t in affine_parameters(-1.0, 3.0, 0, 255, symmetric=False)]
    [0.01568627543747425, 64]
    """
    device = next((end.device for end in (low, high) if isinstance(end, Tensor)), None)
    first, second = (torch.as_tensor(end, device=device).double() for end in (low, high))
    below, above = torch.broadcast_tensors(first, second)
    if not bool((torch.isfinite(below) & torch.isfinite(above) & (below <= above)).all()):
        msg = f"range [{below.tolist()}, {above.tolist()}]; allowed: finite ends, low <= high"
        raise ConfigError(msg)
    below, above = below.clamp(max=0.0), above.clamp(min=0.0)
    if symmetric:
        if not qmin <= 0 < qmax:
            msg = f"a symmetric format needs 0 among its codes, got [{qmin}, {qmax}]"
            raise ConfigError(msg)
        scale = above / qmax
        scale = torch.maximum(scale, below / qmin) if qmin < 0 else scale
    else:
        scale = (above - below) / (qmax - qmin)
    scale = torch.where(scale > 0, scale.clamp(MIN_SCALE, MAX_SCALE), 1.0).float()
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = torch.round(qmin - below / scale.double()).clamp(qmin, qmax)
    return scale, zero_point.to(torch.int32)
