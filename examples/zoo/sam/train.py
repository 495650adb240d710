# SPDX-License-Identifier: Apache-2.0
"""Train the promptable-segmentation model: `python -m examples.zoo.sam.train`.

Each step encodes a batch of scenes once and decodes several prompts per scene.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, mse_loss

from examples.zoo.ris.data import make_sample, normalize
from examples.zoo.sam.data import IMAGE_SIZE, box_prompt, point_prompt
from examples.zoo.sam.encoder import Embedded
from examples.zoo.sam.model import PromptableSegmentation
from examples.zoo.sam.weights import WEIGHTS
from examples.zoo.scene_cache import SceneArrays, cache_folder, cached_scenes
from examples.zoo.training import Plan, train

SCENES = 24_000


def candidate_losses(masks: Tensor, target: Tensor) -> Tensor:
    """Return cross entropy plus dice of each candidate, [B, candidates]; target [B, 1, H, W]."""
    target = target.expand_as(masks)
    entropy = binary_cross_entropy_with_logits(masks, target, reduction="none").mean((2, 3))
    probability = masks.sigmoid()
    overlap = 2 * (probability * target).sum((2, 3)) + 1
    return entropy * 4 + 1 - overlap / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)


def prompt_loss(masks: Tensor, quality: Tensor, target: Tensor) -> Tensor:
    """Train the best candidate (and the others a little) and the predicted IoU of all.

    The loss is taken on the decoder's own grid, half the image's side, against mean coverage.
    """
    target = avg_pool2d(target, 2)
    losses = candidate_losses(masks, target)
    with torch.no_grad():
        found, real = masks > 0, target > 0.5
        both = (found & real).sum((2, 3)).float()
        iou = both / (found | real).sum((2, 3)).clamp(min=1)
    return losses.amin(1).mean() + 0.1 * losses.mean() + mse_loss(quality, iou)


def make_batch(
    scenes: SceneArrays, rng: np.random.Generator, size: int, prompts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images [B, 3, H, W] and B * prompts points, labels and targets, scene by scene."""
    picks = np.sort(rng.choice(len(scenes), size, replace=False))
    points, labels, targets = [], [], []
    for pick in picks:
        count = int((scenes.objects[pick, :, 0] >= 0).sum())
        for number in rng.integers(count, size=prompts).tolist():
            mask = scenes.instances[pick] == number + 1
            x0, y0, x1, y1 = scenes.objects[pick, number, 3:].tolist()
            slots, kinds = (
                point_prompt(rng, mask) if rng.random() < 0.5 else box_prompt(rng, (x0, y0, x1, y1))
            )
            points.append(slots)
            labels.append(kinds)
            targets.append(mask)
    return (
        normalize(torch.from_numpy(scenes.images[picks]).float() / 255),
        torch.from_numpy(np.stack(points)),
        torch.tensor(labels),
        torch.from_numpy(np.stack(targets)).float()[:, None],
    )


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=18.0, help="limit of CPU time")
    parser.add_argument("--peak-lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=cache_folder() / "sam.pt")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    scenes = cached_scenes(
        "ris-train", args.scenes, IMAGE_SIZE, lambda i: make_sample("train", i).scene
    )
    torch.manual_seed(args.seed)
    model = PromptableSegmentation()
    plan = Plan(
        steps=args.steps, peak_lr=args.peak_lr, minutes=args.minutes, checkpoint=args.checkpoint
    )

    def step_loss(step: int) -> Tensor:
        rng = np.random.default_rng([args.seed, step])
        pixels, points, labels, target = make_batch(scenes, rng, args.batch, args.prompts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            once = model.encoder(pixels)
            embedded = Embedded(*(part.repeat_interleave(args.prompts, 0) for part in once))
            masks, quality = model.decode(embedded, points, labels)
        return prompt_loss(masks.float(), quality.float(), target)

    trained = train(model, step_loss, plan)
    save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
