# SPDX-License-Identifier: Apache-2.0
"""Train the classifiers: `python -m examples.zoo.vit.train --kind vit`."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from examples.zoo.scene_cache import cache_folder
from examples.zoo.training import Plan, train
from examples.zoo.vit.data import IMAGE_SIZE, NUM_CLASSES, make_sample, normalize
from examples.zoo.vit.model import BUILDERS, KINDS, Classifier, VisionTransformer
from examples.zoo.vit.weights import weights_path


@dataclass(frozen=True)
class TrainingSet:
    """Images uint8 [N, 3, 48, 48], labels int64 [N], boxes of the digits int16 [N, 4]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    boxes: NDArray[np.int16]


def training_set(count: int) -> TrainingSet:
    """Return the training samples, drawn the first time and read from the cache afterwards."""
    path = cache_folder() / f"vit-{count}.npz"
    if not path.exists():
        images = np.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
        labels, boxes = np.empty(count, dtype=np.int64), np.empty((count, 4), dtype=np.int16)
        for i in tqdm(range(count), desc="draw", mininterval=5):
            sample = make_sample("train", i)
            images[i] = np.round(sample.image * 255)
            labels[i], boxes[i] = sample.label, sample.box
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=images, labels=labels, boxes=boxes)
    stored = np.load(path)
    return TrainingSet(stored["images"], stored["labels"], stored["boxes"])


def token_labels(labels: Tensor, boxes: Tensor, count: int) -> Tensor:
    """Return the digit's class for tokens whose middle lies in its box, else NUM_CLASSES."""
    side = math.isqrt(count)
    middle = (torch.arange(side) + 0.5) * (IMAGE_SIZE / side)
    x0, y0, x1, y1 = (edge[:, None] for edge in boxes.unbind(1))
    inside_x, inside_y = (x0 <= middle) & (middle < x1), (y0 <= middle) & (middle < y1)
    inside = (inside_y[:, :, None] & inside_x[:, None, :]).flatten(1)
    return torch.where(inside, labels[:, None], NUM_CLASSES)


class Supervised(nn.Module):
    """A classifier with a training-only head that names what every token shows."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        self.name_tokens = nn.Linear(model.norm.normalized_shape[0], NUM_CLASSES + 1)

    def loss(self, pixels: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """Return cross entropy of the class plus half that of the tokens."""
        model = self.model
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = model.tokens(pixels)
            has_first = isinstance(model, VisionTransformer)
            logits = model.head(tokens[:, 0] if has_first else tokens.mean(1))
            named = self.name_tokens(tokens[:, 1:] if has_first else tokens)
        wanted = token_labels(labels, boxes, named.shape[1])
        aside = cross_entropy(named.float().flatten(0, 1), wanted.flatten())
        return cross_entropy(logits.float(), labels, label_smoothing=0.02) + 0.5 * aside


def main() -> None:
    """Train one model and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=45.0, help="limit of CPU time")
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data = training_set(args.images)
    torch.manual_seed(args.seed)
    model = Supervised(BUILDERS[args.kind]())
    checkpoint = cache_folder() / f"vit-{args.kind}.pt"
    plan = Plan(steps=args.steps, peak_lr=args.peak_lr, minutes=args.minutes, checkpoint=checkpoint)

    def step_loss(step: int) -> Tensor:
        epoch, part = divmod(step, len(data.images) // args.batch)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(data.images))
        picks = order[part * args.batch : (part + 1) * args.batch]
        pixels = normalize(torch.from_numpy(data.images[picks]).float() / 255)
        labels, boxes = torch.from_numpy(data.labels[picks]), torch.from_numpy(data.boxes[picks])
        return model.loss(pixels, labels, boxes)

    trained = cast(Supervised, train(model, step_loss, plan)).model
    out = args.out or weights_path(args.kind)
    save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
