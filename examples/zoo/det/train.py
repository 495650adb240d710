# SPDX-License-Identifier: Apache-2.0
"""Train a detector: `python -m examples.zoo.det.train --kind retinanet`.

Focal loss for classes; smooth L1 of deltas at anchors, or generalised IoU at locations. Objects go
to anchors by overlap (RetinaNet), or to the cells around their centre at the level of their size.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from examples.zoo.det.boxes import anchor_boxes, corners, decode_distances, encode_deltas, locations
from examples.zoo.det.data import IMAGE_SIZE, make_sample, normalize
from examples.zoo.det.weights import MODELS, WEIGHTS
from examples.zoo.scene_cache import SceneArrays, cache_folder, cached_scenes
from examples.zoo.training import Plan, train
from qgraph.calibration.boxes import aligned_iou, box_area, pairwise_iou

SCENES = 20_000
# Largest side, in pixels, of the objects a level of the anchor-free model sees.
_LEVEL_SIDES = {8.0: (0.0, 24.0), 16.0: (24.0, 46.0), 32.0: (46.0, 1e9)}


@dataclass(frozen=True)
class Batch:
    """Images [B, 3, H, W]; boxes [B, G, 4]; labels int64 [B, G], -1 where there is no object."""

    pixels: Tensor
    boxes: Tensor
    labels: Tensor


def make_batch(data: SceneArrays, step: int, size: int, seed: int) -> Batch:
    """Draw a batch: scenes moved by up to 12 pixels, with varied gain and tint."""
    rng = np.random.default_rng([seed, step])
    numbers = np.sort(rng.integers(0, len(data), size))
    images = torch.from_numpy(data.images[numbers]).float() / 255
    objects = torch.from_numpy(data.objects[numbers]).long()
    boxes, labels = objects[..., 3:].float(), objects[..., 0]
    padded = F.pad(images, (12, 12, 12, 12), mode="reflect")
    moves = rng.integers(0, 25, (size, 2))
    images = torch.stack(
        [
            p[:, y : y + IMAGE_SIZE, x : x + IMAGE_SIZE]
            for p, (x, y) in zip(padded, moves, strict=True)
        ]
    )
    shift = torch.from_numpy(12.0 - moves.astype(np.float32)).repeat(1, 2)[:, None]
    moved = (boxes + shift).clamp(0, IMAGE_SIZE)
    # An object that the move cut to less than half is no object any more.
    labels = torch.where(box_area(moved) >= 0.5 * box_area(boxes), labels, -1)
    gain = torch.from_numpy(rng.uniform(0.8, 1.2, (size, 3, 1, 1)).astype(np.float32))
    return Batch(normalize((images * gain).clamp(0, 1)), moved, labels)


def assign_anchors(batch: Batch, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Return per anchor the object number, -1 background, -2 neither, int64 [B, N], and overlaps.

    Overlap of at least 0.5 or an object's best anchor: object; below 0.4: background.
    """
    overlaps = pairwise_iou(corners(anchors), batch.boxes)
    overlaps = torch.where((batch.labels >= 0)[:, None], overlaps, -1.0)
    best, number = overlaps.max(-1)
    found = torch.where(best >= 0.5, number, torch.where(best >= 0.4, -2, -1))
    top = overlaps.argmax(1)
    images, things = torch.nonzero(batch.labels >= 0, as_tuple=True)
    found[images, top[images, things]] = things
    return found, best


def assign_locations(batch: Batch) -> Tensor:
    """Return per location the object number or -1, int64 [B, N]."""
    centres, strides = locations()
    low, high = torch.tensor([_LEVEL_SIDES[s] for s in strides.tolist()]).unbind(-1)
    side = (batch.boxes[..., 2:] - batch.boxes[..., :2]).amax(-1)[:, None]
    middle = (batch.boxes[..., :2] + batch.boxes[..., 2:]) / 2
    away = (centres[:, None] - middle[:, None]).abs().amax(-1) / strides[:, None]
    x, y = centres[:, 0, None], centres[:, 1, None]
    box = batch.boxes[:, None]
    inside = (x > box[..., 0]) & (x < box[..., 2]) & (y > box[..., 1]) & (y < box[..., 3])
    near = (away < 0.5) | ((away < 1.5) & inside)
    fits = (side >= low[:, None]) & (side < high[:, None]) & (batch.labels >= 0)[:, None]
    away = torch.where(near & fits, away, torch.inf)
    best, number = away.min(-1)
    return torch.where(best.isfinite(), number, -1)


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the sigmoid focal loss, alpha 0.25, gamma 2 (Lin et al. 2017, equation 5), summed."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    right = probability * target + (1 - probability) * (1 - target)
    weight = 0.25 * target + 0.75 * (1 - target)
    return (weight * (1 - right) ** 2 * entropy).sum()


def class_targets(found: Tensor, batch: Batch, classes: int) -> Tensor:
    """Return one-hot targets [B, N, classes]; rows without an object are zero."""
    labels = batch.labels.gather(1, found.clamp(min=0))
    target = F.one_hot(labels.clamp(min=0), classes).float()
    return target * (found >= 0).unsqueeze(-1)


def generalised_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the generalised IoU [...] of aligned boxes (Rezatofighi et al. 2019)."""
    low = torch.minimum(first[..., :2], second[..., :2])
    high = torch.maximum(first[..., 2:], second[..., 2:])
    hull = box_area(torch.cat([low, high], -1)).clamp(min=1e-6)
    overlap = aligned_iou(first, second)
    union = (box_area(first) + box_area(second)) / (1 + overlap)
    return overlap - (hull - union) / hull


def anchor_loss(outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """Return the RetinaNet loss: focal plus smooth L1, over the number of positive anchors."""
    logits, deltas = outputs[0].float(), outputs[1].float()
    anchors = anchor_boxes()
    found, _ = assign_anchors(batch, anchors)
    used = (found != -2).unsqueeze(-1)
    target = class_targets(found, batch, logits.shape[-1])
    # A logit of -30 contributes nothing to a zero target.
    classes = focal_loss(torch.where(used, logits, -30.0), target * used)
    positive = found >= 0
    wanted = batch.boxes.gather(1, found.clamp(min=0).unsqueeze(-1).expand(-1, -1, 4))
    wanted = encode_deltas(wanted, anchors)[positive]
    boxes = F.smooth_l1_loss(deltas[positive], wanted, beta=0.05, reduction="sum")
    return (classes + 2 * boxes) / positive.sum().clamp(min=1)


def location_loss(outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """Return the FCOS loss: focal, generalised IoU, and the quality logit against the overlap."""
    logits, distances, quality = (x.float() for x in outputs)
    found = assign_locations(batch)
    classes = focal_loss(logits, class_targets(found, batch, logits.shape[-1]))
    positive = found >= 0
    wanted = batch.boxes.gather(1, found.clamp(min=0).unsqueeze(-1).expand(-1, -1, 4))[positive]
    boxes = decode_distances(distances)[positive]
    overlap = aligned_iou(boxes, wanted).detach()
    far = (1 - generalised_iou(boxes, wanted)).sum()
    told = F.binary_cross_entropy_with_logits(quality[positive][:, 0], overlap, reduction="sum")
    return (classes + 2 * far + told) / positive.sum().clamp(min=1)


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=sorted(MODELS), default="retinanet")
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--minutes", type=float, default=28.0, help="limit of CPU time")
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = cached_scenes("det-train", args.scenes, IMAGE_SIZE, lambda i: make_sample("train", i))
    torch.manual_seed(args.seed)
    model = MODELS[args.kind]()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss_of = anchor_loss if args.kind == "retinanet" else location_loss
    plan = Plan(
        steps=args.steps,
        peak_lr=args.peak_lr,
        minutes=args.minutes,
        checkpoint=cache_folder() / f"det-{args.kind}.pt",
    )

    def step_loss(step: int) -> Tensor:
        batch = make_batch(data, step, args.batch, args.seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(batch.pixels.contiguous(memory_format=torch.channels_last))
        return loss_of(outputs, batch)

    trained = train(model, step_loss, plan)
    out = Path(WEIGHTS) / f"{args.kind}.safetensors"
    out.parent.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
