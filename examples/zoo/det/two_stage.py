# SPDX-License-Identifier: Apache-2.0
"""A small two-stage detector (Faster R-CNN-like): a head that judges proposed boxes.

Proposals come from the float one-stage detector, for training and for every quantized model alike,
so that what is measured is the second stage. Features of a proposal are pooled by two products with
bilinear weights, one per axis, which are inputs: the graph holds plain matrix products only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.zoo.det.boxes import anchor_boxes, decode_deltas
from examples.zoo.det.data import IMAGE_SIZE, Target, batches
from examples.zoo.det.model import STRIDES, Backbone, Layout, Pyramid
from examples.zoo.det.weights import WEIGHTS, load_model
from examples.zoo.splits import Split
from qgraph.calibration.boxes import Detections, detect, suppress

PROPOSALS, BINS, HIDDEN = 32, 5, 128
# Deltas are learned in these units (centre, size), so that both parts of the loss weigh alike.
SPREAD = (0.1, 0.1, 0.2, 0.2)
CANDIDATES, OVERLAP = 200, 0.7


class TwoStage(nn.Module):
    """Backbone and pyramid of the one-stage detector, and a head of two hidden layers."""

    def __init__(self, layout: Layout | None = None) -> None:
        super().__init__()
        layout = layout or Layout()
        self.backbone = Backbone(layout)
        self.neck = Pyramid(layout.stages[-3:], layout.pyramid)
        self.first = nn.Linear(layout.pyramid * BINS * BINS, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.classes = nn.Linear(HIDDEN, layout.classes + 1)
        self.boxes = nn.Linear(HIDDEN, 4 * layout.classes)

    def forward(
        self, pixel_values: Tensor, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Judge proposals.

        Args:
            pixel_values: fp32 [B, 3, H, W].
            rows, columns: pooling weights fp32 [B, K, BINS, H / 8] and [B, K, BINS, W / 8].

        Returns:
            Class logits [B, K, 1 + classes], 0 is background, and deltas [B, K * classes, 4], those
            of a proposal side by side.
        """
        return self.judge(self.neck(self.backbone(pixel_values))[0], rows, columns)

    def judge(self, level: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The second stage, on the finest map [B, C, H, W]."""
        batch, count = rows.shape[0], rows.shape[1]
        lines = level.permute(0, 2, 1, 3).flatten(2)  # [B, H, C * W]
        cut = torch.matmul(rows.flatten(1, 2), lines)
        cut = cut.reshape(batch, count, BINS * level.shape[1], level.shape[3])
        pooled = torch.matmul(cut, columns.transpose(2, 3)).flatten(2)
        hidden = torch.relu(self.second(torch.relu(self.first(pooled))))
        return self.classes(hidden), self.boxes(hidden).reshape(batch, -1, 4)


def pooling(boxes: Tensor, axis: int) -> Tensor:
    """Bilinear weights [..., BINS, size] that sample boxes [..., 4] along x (0) or y (1)."""
    size = IMAGE_SIZE // STRIDES[0]
    low, high = boxes[..., axis], boxes[..., axis + 2]
    share = (torch.arange(BINS) + 0.5) / BINS
    places = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * share
    places = (places / STRIDES[0] - 0.5).clamp(0, size - 1)
    return (1 - (places.unsqueeze(-1) - torch.arange(size)).abs()).clamp(min=0)


@torch.no_grad()
def propose(logits: Tensor, deltas: Tensor) -> Tensor:
    """The most promising boxes [B, PROPOSALS, 4] of one-stage outputs, whatever their class."""
    boxes = decode_deltas(deltas, anchor_boxes()).clamp(0, IMAGE_SIZE)
    found = []
    for scores, candidates in zip(logits.amax(-1), boxes, strict=True):
        top = torch.argsort(scores, descending=True, stable=True)[:CANDIDATES]
        kept = suppress(candidates[top], scores[top], OVERLAP)[:PROPOSALS]
        filled = torch.cat([kept, kept[-1:].expand(PROPOSALS - len(kept))])
        found.append(candidates[top][filled])
    return torch.stack(found)


def inputs_of(pixel_values: Tensor, proposals: Tensor) -> dict[str, Tensor]:
    """The model's inputs."""
    rows, columns = pooling(proposals, 1), pooling(proposals, 0)
    return {"pixel_values": pixel_values, "rows": rows, "columns": columns}


def proposed_batches(
    split: Split, num_samples: int, batch_size: int, seed: int = 0
) -> Iterator[tuple[dict[str, Tensor], list[Target], Tensor]]:
    """Yield (inputs, targets, proposals [B, PROPOSALS, 4]) of a split."""
    first = load_model("retinanet")
    for inputs, targets in batches(split, num_samples, batch_size, seed):
        with torch.no_grad():
            proposals = propose(*first(**inputs))
        yield inputs_of(inputs["pixel_values"], proposals), targets, proposals


def moved(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Corner boxes of (centre, size) anchors [..., 4] moved by a head's deltas [..., 4]."""
    made = decode_deltas((deltas * torch.tensor(SPREAD)).reshape(1, -1, 4), anchors.reshape(-1, 4))
    return made.reshape(deltas.shape)


def refined(deltas: Tensor, proposals: Tensor) -> Tensor:
    """Corner boxes [B, K * classes, 4] of proposals [B, K, 4], in the order of the deltas."""
    size = proposals[..., 2:] - proposals[..., :2]
    anchors = torch.cat([proposals[..., :2] + size / 2, size.clamp(min=1.0)], -1)
    return moved(deltas, anchors.repeat_interleave(deltas.shape[1] // anchors.shape[1], dim=1))


@torch.no_grad()
def two_stage_detections(
    outputs: tuple[Tensor, Tensor], proposals: Tensor
) -> list[Detections]:  # fmt: skip
    """Decode and suppress any backend's outputs; one `Detections` per image.

    A pair of proposal and class is a row, so that suppression sees the box of that class.
    """
    logits, deltas = (torch.as_tensor(x) for x in outputs)
    scores = logits.softmax(-1)[..., 1:]
    count = scores.shape[-1]
    rows = (scores.unsqueeze(-1) * torch.eye(count)).flatten(1, 2)
    return detect(rows, refined(deltas, proposals).clamp(0, IMAGE_SIZE))


def relative_predictions(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs for the filtered global loss: a row per proposal and class, one logit, one box.

    Boxes are relative to their proposal. Overlaps do not depend on where it lies, so it need not be
    known.
    """
    logits, deltas = outputs
    scores = logits.float().softmax(-1)[..., 1:].flatten(1).unsqueeze(-1)
    unit = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(deltas.shape)
    return torch.logit(scores, eps=1e-6), moved(deltas, unit)


def load_two_stage(weights: Path | None = None) -> TwoStage:
    """Return the trained detector in eval mode."""
    model = TwoStage()
    model.load_state_dict(load_file(weights or WEIGHTS / "two_stage.safetensors"))
    return model.requires_grad_(False).eval()
