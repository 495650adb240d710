# SPDX-License-Identifier: Apache-2.0
"""Train the second stage: `python -m examples.zoo.det.train_two_stage`.

Backbone and pyramid are those of the trained one-stage detector and stay as they are; its boxes,
and objects moved a little, are the proposals. Cross entropy for classes, smooth L1 for deltas.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from examples.zoo.det.boxes import encode_deltas
from examples.zoo.det.data import CLASSES, IMAGE_SIZE, make_sample
from examples.zoo.det.train import SCENES, Batch, make_batch
from examples.zoo.det.two_stage import SPREAD, TwoStage, pooling, propose
from examples.zoo.det.weights import WEIGHTS, load_model
from examples.zoo.scene_cache import cache_folder, cached_scenes
from examples.zoo.training import Plan, train
from qgraph.calibration.boxes import pairwise_iou

POSITIVE = 0.5  # overlap from which a proposal belongs to an object
MOVED = 3  # moved copies of each object among the proposals


def moved_objects(batch: Batch, generator: torch.Generator) -> Tensor:
    """Copies [B, MOVED * G, 4] of the objects, each side moved by up to a sixth of the box."""
    boxes = batch.boxes.repeat(1, MOVED, 1)
    size = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    noise = torch.rand(boxes.shape, generator=generator) - 0.5
    return (boxes + noise * size / 3).clamp(0, IMAGE_SIZE)


def head_loss(outputs: tuple[Tensor, Tensor], proposals: Tensor, batch: Batch) -> Tensor:
    """Class and box loss of proposals [B, K, 4]; each box moves by the deltas of its own class."""
    logits, deltas = (x.float() for x in outputs)
    overlaps = pairwise_iou(proposals, batch.boxes)
    overlaps = torch.where((batch.labels >= 0)[:, None], overlaps, -1.0)
    best, number = overlaps.max(-1)
    positive = best >= POSITIVE
    labels = torch.where(positive, batch.labels.gather(1, number) + 1, 0)
    classes = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    wanted = batch.boxes.gather(1, number.unsqueeze(-1).expand(-1, -1, 4))[positive]
    size = (proposals[..., 2:] - proposals[..., :2]).clamp(min=1.0)
    anchors = torch.cat([(proposals[..., :2] + proposals[..., 2:]) / 2, size], -1)[positive]
    target = encode_deltas(wanted, anchors) / torch.tensor(SPREAD)
    own = deltas.unflatten(1, (-1, len(CLASSES)))[positive]
    made = own[torch.arange(len(own)), labels[positive] - 1]
    return classes + F.smooth_l1_loss(made, target, beta=0.25)


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=12.0, help="limit of CPU time")
    args = parser.parse_args()
    data = cached_scenes("det-train", args.scenes, IMAGE_SIZE, lambda i: make_sample("train", i))
    torch.manual_seed(0)
    first, model = load_model("retinanet"), TwoStage()
    kept = {k: v for k, v in first.state_dict().items() if k.startswith(("backbone", "neck"))}
    model.load_state_dict(kept, strict=False)
    model.backbone.requires_grad_(False).eval()
    model.neck.requires_grad_(False)
    plan = Plan(
        steps=args.steps, peak_lr=1e-3, minutes=args.minutes,
        checkpoint=cache_folder() / "det-two-stage.pt",
    )  # fmt: skip

    def step_loss(step: int) -> Tensor:
        batch = make_batch(data, step, args.batch, 1)
        model.backbone.eval()  # its batch norms stay as they are
        with torch.no_grad():
            proposals = propose(*first(batch.pixels))
            moved = moved_objects(batch, torch.Generator().manual_seed(step))
            boxes = torch.cat([proposals, moved], 1)
            level = model.neck(model.backbone(batch.pixels))[0]
        outputs = model.judge(level, pooling(boxes, 1), pooling(boxes, 0))
        return head_loss(outputs, boxes, batch)

    trained = train(model, step_loss, plan)
    out = WEIGHTS / "two_stage.safetensors"
    save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
