# SPDX-License-Identifier: Apache-2.0
"""IoU, nIoU, Pd and Fa of small-target segmentation as one mergeable accumulator.

IoU  = sum_i I_i / sum_i U_i over the data set (pixel totals).
nIoU = mean over images of I_i / U_i; images with U_i = 0 (no target, no prediction) are left out.
Pd   = matched targets / all targets; components are 8-connected, a match is a predicted component
       whose centroid is closer than 3 px to the target's, one to one, nearest pairs first.
Fa   = pixels of unmatched predicted components / all pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]
MATCH_DISTANCE = 3.0
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.int64)


def components(mask: Mask) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return centroids [n, 2] and areas [n] of the 8-connected components of a [H, W] mask."""
    labels, count = ndimage.label(mask, _EIGHT_NEIGHBOURS)
    if not count:
        return np.zeros((0, 2)), np.zeros(0, dtype=np.int64)
    index = np.arange(1, count + 1)
    centroids = np.asarray(ndimage.center_of_mass(mask, labels, index), dtype=np.float64)
    return centroids, np.bincount(labels.ravel(), minlength=count + 1)[1:].astype(np.int64)


def match(truth: NDArray[np.float64], found: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Pair centroids [n, 2] and [m, 2] one to one, nearest first, below `MATCH_DISTANCE`."""
    distance = np.linalg.norm(truth[:, None, :] - found[None, :, :], axis=-1)
    order = sorted((float(distance[i, j]), i, j) for i, j in np.ndindex(*distance.shape))
    pairs: list[tuple[int, int]] = []
    for value, i, j in order:
        is_free = all(i != a and j != b for a, b in pairs)
        if value < MATCH_DISTANCE and is_free:
            pairs.append((i, j))
    return pairs


@dataclass(slots=True)
class SegmentationCounts:
    """Counts per image; `merge` concatenates, so totals do not depend on the order.

    Attributes:
        intersection, union, matched, targets, false_pixels, pixels: one int per image.
    """

    intersection: list[int]
    union: list[int]
    matched: list[int]
    targets: list[int]
    false_pixels: list[int]
    pixels: list[int]

    @classmethod
    def empty(cls) -> SegmentationCounts:
        """Return counts of no image."""
        return cls([], [], [], [], [], [])

    def update(self, predicted: Iterable[Mask], truth: Iterable[Mask]) -> None:
        """Add images: two equally long iterables of bool [H, W].

        Raises:
            ValueError: the shapes of a pair or the lengths differ.
        """
        for guess, real in zip(predicted, truth, strict=True):
            if guess.shape != real.shape:
                msg = f"prediction {guess.shape} and mask {real.shape} differ in shape"
                raise ValueError(msg)
            self._add(guess, real)

    def _add(self, guess: Mask, real: Mask) -> None:
        target_centroids, _ = components(real)
        found_centroids, found_areas = components(guess)
        pairs = match(target_centroids, found_centroids)
        true_area = sum(int(found_areas[j]) for _, j in pairs)
        self.intersection.append(int((guess & real).sum()))
        self.union.append(int((guess | real).sum()))
        self.matched.append(len(pairs))
        self.targets.append(len(target_centroids))
        self.false_pixels.append(int(found_areas.sum()) - true_area)
        self.pixels.append(int(real.size))

    def merge(self, other: SegmentationCounts) -> SegmentationCounts:
        """Return the counts of both sets of images, this one's first."""
        return SegmentationCounts(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        )

    def result(self) -> dict[str, float]:
        """Return iou, niou, pd, fa; nan where a denominator is zero."""
        ratios = [i / u for i, u in zip(self.intersection, self.union, strict=True) if u]
        return {
            "iou": _ratio(sum(self.intersection), sum(self.union)),
            "niou": _ratio(math.fsum(ratios), len(ratios)),
            "pd": _ratio(sum(self.matched), sum(self.targets)),
            "fa": _ratio(sum(self.false_pixels), sum(self.pixels)),
        }

    def per_image(self) -> dict[str, NDArray[np.int64]]:
        """Return every count as an int64 array, one entry per image (for a bootstrap)."""
        return {f.name: np.asarray(getattr(self, f.name), dtype=np.int64) for f in fields(self)}


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
