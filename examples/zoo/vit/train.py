# SPDX-License-Identifier: Apache-2.0
"""Train the classifiers: `python -m examples.zoo.vit.train --kind vit`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.zoo.scene_cache import cache_folder
from examples.zoo.training import Plan, train
from examples.zoo.vit.data import draw_images, normalize
from examples.zoo.vit.model import BUILDERS, KINDS
from examples.zoo.vit.weights import weights_path


def training_images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the training samples, drawn the first time and read from the cache afterwards."""
    path = cache_folder() / f"vit-{count}.npz"
    if not path.exists():
        images, labels = draw_images("train", count)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=images, labels=labels)
    stored = np.load(path)
    return stored["images"], stored["labels"]


def main() -> None:
    """Train one model and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=15.0, help="limit of CPU time")
    parser.add_argument("--peak-lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    images, labels = training_images(args.images)
    torch.manual_seed(args.seed)
    model = BUILDERS[args.kind]()
    checkpoint = cache_folder() / f"vit-{args.kind}.pt"
    plan = Plan(steps=args.steps, peak_lr=args.peak_lr, minutes=args.minutes, checkpoint=checkpoint)

    def step_loss(step: int) -> Tensor:
        epoch, part = divmod(step, len(images) // args.batch)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(images))
        picks = order[part * args.batch : (part + 1) * args.batch]
        pixels = normalize(torch.from_numpy(images[picks]).float() / 255)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(pixels)
        target = torch.from_numpy(labels[picks])
        return cross_entropy(logits.float(), target, label_smoothing=0.05)

    trained = train(model, step_loss, plan)
    out = args.out or weights_path(args.kind)
    save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
