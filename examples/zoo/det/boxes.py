# SPDX-License-Identifier: Apache-2.0
"""From raw outputs to boxes: anchors, decoding, and what the two detectors call a score.

Everything is plain differentiable torch on [B, N, ...] rows, in the order the models emit them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from examples.zoo.det.data import IMAGE_SIZE
from examples.zoo.det.model import ANCHORS, STRIDES
from qgraph.calibration.boxes import Detections, detect

# An anchor's side in strides, and the largest growth a delta may ask for.
_BASE = 1.75
_MAX_GROWTH = math.log(8.0)


@cache
def locations(size: int = IMAGE_SIZE) -> tuple[Tensor, Tensor]:
    """Return the centres [N, 2] of all levels' cells and their strides [N]."""
    centres, strides = [], []
    for stride in STRIDES:
        axis = (torch.arange(size // stride) + 0.5) * stride
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        centres.append(torch.stack([x, y], -1).reshape(-1, 2))
        strides.append(torch.full((x.numel(),), float(stride)))
    return torch.cat(centres), torch.cat(strides)


@cache
def anchor_boxes(size: int = IMAGE_SIZE) -> Tensor:
    """Return square anchors [N, 4] as (centre x, centre y, width, height), three per cell."""
    centres, strides = locations(size)
    octaves = 2.0 ** (torch.arange(ANCHORS) / ANCHORS)
    sides = (_BASE * strides[:, None] * octaves)[..., None].expand(-1, -1, 2)
    where = centres[:, None].expand(-1, ANCHORS, 2)
    return torch.cat([where, sides], -1).reshape(-1, 4)


def corners(boxes: Tensor) -> Tensor:
    """Turn (centre, size) boxes [..., 4] into corner boxes."""
    half = boxes[..., 2:] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)


def encode_deltas(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return the deltas [..., 4] that decode to corner `boxes` at (centre, size) `anchors`."""
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)
    centre = (boxes[..., 2:] + boxes[..., :2]) / 2
    moved = (centre - anchors[..., :2]) / anchors[..., 2:]
    return torch.cat([moved, torch.log(size / anchors[..., 2:])], -1)


def decode_deltas(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Return corner boxes [B, N, 4] in pixels."""
    centre = anchors[:, :2] + deltas[..., :2] * anchors[:, 2:]
    size = anchors[:, 2:] * deltas[..., 2:].clamp(max=_MAX_GROWTH).exp()
    return corners(torch.cat([centre, size], -1))


def decode_distances(distances: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """Return corner boxes [B, N, 4] in pixels from side distances in strides."""
    centres, strides = locations(size)
    reach = distances * strides[:, None]
    return torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], -1)


@dataclass(frozen=True)
class Decoded:
    """Decoded outputs of a batch: probabilities [B, N, classes] and corner boxes [B, N, 4]."""

    scores: Tensor
    boxes: Tensor


def decode(outputs: tuple[Tensor, ...]) -> Decoded:
    """Decode either detector's outputs; a third output is the quality logit."""
    logits, values = outputs[0], outputs[1]
    if len(outputs) == 2:
        return Decoded(logits.sigmoid(), decode_deltas(values, anchor_boxes()))
    scores = (logits.sigmoid() * outputs[2].sigmoid()).sqrt()
    return Decoded(scores, decode_distances(values))


@torch.no_grad()
def detections(outputs: tuple[Tensor, ...]) -> list[Detections]:
    """Decode and suppress the outputs of any backend; one `Detections` per image."""
    found = decode(tuple(torch.as_tensor(x) for x in outputs))
    return detect(found.scores, found.boxes.clamp(0, IMAGE_SIZE))
