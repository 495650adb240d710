# SPDX-License-Identifier: Apache-2.0
"""COCO's mean average precision: ten overlaps from 0.50 to 0.95, 101 recall points.

Images are matched one by one and only (score, hit) pairs are kept, so image sets of any length
can be scored, resampled and compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from examples.zoo.det.data import Target
from qgraph.calibration.boxes import Detections, pairwise_iou

THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Matches:
    """One class in one image: scores [K], hits bool [10, K], how many objects there are."""

    scores: NDArray[np.float64]
    hits: NDArray[np.bool_]
    objects: int


def match(overlaps: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Match detections (rows, best first) to objects (columns) at every threshold.

    Each detection takes the free object it overlaps most, as COCO's evaluation does.
    """
    hits = np.zeros((len(THRESHOLDS), overlaps.shape[0]), dtype=np.bool_)
    for t, threshold in enumerate(THRESHOLDS):
        free = np.ones(overlaps.shape[1], dtype=np.bool_)
        for d, row in enumerate(overlaps):
            candidates = np.where(free & (row >= min(threshold, 1 - 1e-10)), row, -1.0)
            if candidates.size and candidates.max() >= 0:
                # The last of equals, which is what COCO's loop ends with.
                free[len(candidates) - 1 - int(candidates[::-1].argmax())] = False
                hits[t, d] = True
    return hits


def average_precision(parts: Sequence[Matches]) -> float | None:
    """Return the mean AP over the ten thresholds, or None when no image has the class."""
    objects = sum(p.objects for p in parts)
    if objects == 0:
        return None
    scores = np.concatenate([p.scores for p in parts])
    order = np.argsort(-scores, kind="mergesort")
    hits = np.concatenate([p.hits for p in parts], axis=1)[:, order]
    if not len(scores):
        return 0.0
    found = hits.cumsum(1)
    recall = found / objects
    precision = found / np.arange(1, len(scores) + 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    values = []
    for r, p in zip(recall, precision, strict=True):
        at = np.searchsorted(r, _RECALLS, side="left")
        values.append(np.where(at < len(p), p[np.minimum(at, len(p) - 1)], 0.0).mean())
    return float(np.mean(values))


@dataclass
class BoxScores:
    """Collects images; `mean_average_precision` averages the classes that occur."""

    classes: int
    images: list[dict[int, Matches]] = field(default_factory=list)

    def add(self, found: Detections, target: Target) -> None:
        """Add one image."""
        parts: dict[int, Matches] = {}
        for label in torch.cat([found.labels, target.labels]).unique().tolist():
            mine, theirs = found.labels == label, target.labels == label
            overlaps = pairwise_iou(found.boxes[mine].double(), target.boxes[theirs].double())
            scores = found.scores[mine].double().numpy()
            parts[label] = Matches(scores, match(overlaps.numpy()), int(theirs.sum()))
        self.images.append(parts)

    def mean_average_precision(self, picked: Sequence[int] | None = None) -> float:
        """Return mAP over all images, or over a resample of them by number."""
        images = self.images if picked is None else [self.images[i] for i in picked]
        values = [
            average_precision([image[label] for image in images if label in image])
            for label in range(self.classes)
        ]
        present = [v for v in values if v is not None]
        return float(np.mean(present)) if present else 0.0
