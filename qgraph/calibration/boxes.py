# SPDX-License-Identifier: Apache-2.0
"""Box arithmetic outside the graph: overlaps, and non-maximum suppression of any backend's outputs.

Suppression sorts and loops, so it stays out of the traced model; these functions run on the
decoded outputs of every backend alike. Boxes are (x0, y0, x1, y1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.errors import ConfigError


def box_area(boxes: Tensor) -> Tensor:
    """Return the areas [...] of boxes [..., 4]; an inverted box has area 0."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def aligned_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the overlap [...] of box i with box i, both [..., 4]; two empty boxes give 0."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    shared = box_area(torch.cat([low, high], dim=-1))
    union = box_area(first) + box_area(second) - shared
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the overlaps [..., N, M] of boxes [..., N, 4] with boxes [..., M, 4]."""
    return aligned_iou(first.unsqueeze(-2), second.unsqueeze(-3))


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return the indices int64 [K] that greedy suppression keeps, best score first.

    Args:
        boxes: [N, 4].
        scores: [N]; equal scores keep their order, so the answer depends on nothing else.
        threshold: a box that overlaps a kept one by more than this is dropped.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    overlaps = pairwise_iou(boxes[order], boxes[order]) > threshold
    alive = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for rank in range(len(order)):
        if alive[rank]:
            alive[rank + 1 :] &= ~overlaps[rank, rank + 1 :]
    return order[alive]


@dataclass(frozen=True)
class Detections:
    """The boxes of one image, best first: boxes [K, 4], scores [K], labels int64 [K]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def detect(
    scores: Tensor,
    boxes: Tensor,
    *,
    min_score: float = 0.05,
    threshold: float = 0.5,
    candidates: int = 300,
    limit: int = 100,
) -> list[Detections]:
    """Turn decoded outputs into detections, class by class as RetinaNet does.

    Args:
        scores: probabilities [B, N, classes].
        boxes: [B, N, 4].
        min_score: scores below it are no candidates.
        threshold: overlap above which the lesser box of the same class is dropped.
        candidates: how many (box, class) pairs of an image go into suppression.
        limit: how many detections of an image are kept.

    Raises:
        ConfigError: the shapes do not belong together.
    """
    if scores.shape[:2] != boxes.shape[:2] or boxes.shape[-1] != 4:
        msg = (
            f"scores {tuple(scores.shape)} and boxes {tuple(boxes.shape)} do not belong together;"
            " expected [B, N, classes] and [B, N, 4]"
        )
        raise ConfigError(msg)
    return [
        _detect_one(s, b, min_score, threshold, (candidates, limit))
        for s, b in zip(scores, boxes, strict=True)
    ]


def _detect_one(
    scores: Tensor, boxes: Tensor, min_score: float, threshold: float, limits: tuple[int, int]
) -> Detections:
    classes = scores.shape[1]
    flat = scores.flatten()
    order = torch.argsort(flat, descending=True, stable=True)[: limits[0]]
    order = order[flat[order] >= min_score]
    rows, labels = order // classes, order % classes
    picked = boxes[rows]
    # Classes are moved apart by more than the picture, so one suppression serves them all.
    extent = picked.abs().amax() * 2 + 1 if len(picked) else picked.new_ones(())
    moved = picked + (labels.to(picked.dtype) * extent).unsqueeze(1)
    kept = suppress(moved, flat[order], threshold)[: limits[1]]
    return Detections(picked[kept], flat[order][kept], labels[kept])
