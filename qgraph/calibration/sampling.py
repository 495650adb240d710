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

RUN = 16  # fp32 values of one line of a processor's cache
CACHED = 64  # shapes whose positions are remembered; those of one take up to 512 KiB an axis
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


@functools.lru_cache(maxsize=4096)
def stride_for(length: int, rate: int, floor: int, cap: int) -> int:
    """Distance between runs of `RUN` elements that take about ``length / rate`` of `length`.

    At least about `floor` and at most `cap` elements are taken; 1 says all. The distance is a
    prime that does not divide `length`, hence coprime to every axis length: no channel is
    systematically skipped. Memory comes in lines, so a stride over single elements reads them all.
    """
    wanted = min(max(length // rate, floor, 1), cap)
    if wanted >= length or length <= RUN:
        return 1
    stride = max(RUN, -(-length // max(1, wanted // RUN)))
    while not _is_prime(stride) or length % stride == 0:
        stride += 1
    return stride


def run_count(length: int, stride: int) -> int:
    """How many whole runs a `stride` > 1 takes of `length` > RUN elements."""
    return (length - RUN) // stride + 1


@functools.lru_cache(maxsize=CACHED)
def run_positions(length: int, stride: int, device: torch.device) -> Tensor:
    """int64: the positions in ``range(length)`` that `stride_for` takes, ascending."""
    if stride == 1:
        return torch.arange(length, device=device)
    starts = torch.arange(run_count(length, stride), device=device) * stride
    return (starts[:, None] + torch.arange(RUN, device=device)).flatten()


@functools.lru_cache(maxsize=CACHED)
def run_rows(length: int, stride: int, width: int, device: torch.device) -> Tensor:
    """int64: the rows, of `width` elements, in which the `run_positions` lie."""
    return run_positions(length, stride, device) // width


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


@functools.lru_cache(maxsize=CACHED)
def unravelled(shape: tuple[int, ...], stride: int, device: torch.device) -> tuple[Tensor, ...]:
    """Indices, one tensor per axis of `shape`, of the `run_positions` over it."""
    return torch.unravel_index(run_positions(math.prod(shape), stride, device), shape)


@functools.lru_cache(maxsize=1024)
def spread_indices(
    shape: tuple[int, ...], count: int, device: torch.device
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Flat `spread_positions` over the axes `shape` and the same unravelled."""
    flat = spread_positions(math.prod(shape), count).to(device)
    return flat, torch.unravel_index(flat, shape)
