# SPDX-License-Identifier: Apache-2.0
"""Fixed sampling positions inside one sample.

Positions depend only on the shape of a sample, never on the batch, so a statistic over sampled
values is independent of batch order and split.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


@functools.lru_cache(maxsize=4096)
def stride_for(length: int, rate: int, floor: int, cap: int) -> int:
    """Stride that takes about ``length / rate`` of `length` elements.

    At least `floor` and at most `cap` elements are taken. The stride is a prime that does not
    divide `length`, hence coprime to every axis length: no channel is systematically skipped.
    """
    wanted = min(max(length // rate, floor, 1), cap)
    stride = -(-length // wanted)
    if stride <= 1:
        return 1
    while not _is_prime(stride) or length % stride == 0:
        stride += 1
    return stride


@functools.lru_cache(maxsize=4096)
def spread_positions(length: int, count: int) -> Tensor:
    """`count` distinct positions in ``range(length)``, evenly spread at every scale, ascending.

    A Kronecker sequence with a step near the golden ratio, made coprime to `length`.
    Returns int64 [min(count, length)].
    """
    if count >= length:
        return torch.arange(length)
    step = max(1, round(length * GOLDEN))
    while math.gcd(step, length) != 1:
        step += 1
    return (torch.arange(count) * step % length).sort().values


@functools.lru_cache(maxsize=1024)
def unravelled(
    shape: tuple[int, ...], positions: tuple[int, int], device: torch.device
) -> tuple[Tensor, ...]:
    """Indices, one tensor per axis of `shape`, of every ``stride``-th flat position.

    `positions` is (length, stride): flat positions 0, stride, 2 stride, ... below length.
    """
    flat = torch.arange(0, positions[0], positions[1], device=device)
    return torch.unravel_index(flat, shape)


@functools.lru_cache(maxsize=1024)
def spread_indices(
    shape: tuple[int, ...], count: int, device: torch.device
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Flat `spread_positions` over the axes `shape` and the same unravelled."""
    flat = spread_positions(math.prod(shape), count).to(device)
    return flat, torch.unravel_index(flat, shape)
