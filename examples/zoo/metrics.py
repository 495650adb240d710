# SPDX-License-Identifier: Apache-2.0
"""Segmentation metrics and paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor


def intersection_and_union(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return pixel counts int64 [B] each, of bool masks [B, ...]."""
    predicted, target = predicted.flatten(1), target.flatten(1)
    return (predicted & target).sum(1), (predicted | target).sum(1)


class MaskResult(TypedDict):
    """Mean IoU over samples, pooled IoU, and every sample's IoU in order."""

    miou: float
    oiou: float
    per_sample: list[float]


@dataclass
class MaskScores:
    """Collects per-sample counts; mIoU averages samples, oIoU pools pixels."""

    intersections: list[int]
    unions: list[int]

    @classmethod
    def empty(cls) -> MaskScores:
        """Return scores without samples."""
        return cls([], [])

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """Add a batch of bool masks [B, ...]."""
        both, either = intersection_and_union(predicted, target)
        self.intersections += both.tolist()
        self.unions += either.tolist()

    @property
    def per_sample(self) -> list[float]:
        """Return the IoU of every sample; two empty masks agree fully."""
        pairs = zip(self.intersections, self.unions, strict=True)
        return [both / either if either else 1.0 for both, either in pairs]

    @property
    def miou(self) -> float:
        """Return the mean of the samples' IoU."""
        return float(np.mean(self.per_sample))

    @property
    def oiou(self) -> float:
        """Return the pooled IoU: summed intersections over summed unions."""
        return sum(self.intersections) / max(sum(self.unions), 1)

    def result(self) -> MaskResult:
        """Return all of it as plain values."""
        return {"miou": self.miou, "oiou": self.oiou, "per_sample": self.per_sample}


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of per-sample values and its percentile interval.

    For a paired comparison pass per-sample differences: see `paired_bootstrap`.
    """
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(data), size=(draws, len(data)))
    low, high = np.quantile(data[picks].mean(1), (0.025, 0.975))
    return Interval(float(data.mean()), float(low), float(high))


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, draws: int = 2000, seed: int = 0
) -> Interval:
    """Return mean and interval of `first - second` over the same samples in the same order."""
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return bootstrap(difference.tolist(), draws=draws, seed=seed)


def correct(logits: Tensor, labels: Tensor) -> list[float]:
    """Return 1.0 or 0.0 per sample for class logits [B, C] and labels [B]."""
    return torch.eq(logits.argmax(1), labels).double().tolist()
