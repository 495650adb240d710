# SPDX-License-Identifier: Apache-2.0
"""Detection samples: a scene of digits and shapes at many sizes, and the boxes of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.zoo.objects import KINDS
from examples.zoo.scenes import Scene, SceneConfig, kind_index, make_scene
from examples.zoo.splits import Split

CONFIG = SceneConfig(size=128, min_objects=2, max_objects=7, small=(0.13, 0.21), large=(0.26, 0.50))
IMAGE_SIZE = CONFIG.size
CLASSES = KINDS


@dataclass(frozen=True)
class Target:
    """What is in one image: boxes fp32 [K, 4] in pixels, labels int64 [K]."""

    boxes: Tensor
    labels: Tensor


def target_of(scene: Scene) -> Target:
    """Return the boxes and classes of a scene's objects."""
    boxes = torch.tensor([thing.box for thing in scene.objects], dtype=torch.float32)
    labels = torch.tensor([kind_index(thing.kind) for thing in scene.objects])
    return Target(boxes, labels)


def make_sample(split: Split, index: int, *, seed: int = 0) -> Scene:
    """Make sample `index` of a split."""
    return make_scene(split, index, seed=seed, config=CONFIG)


def normalize(images: Tensor) -> Tensor:
    """Map pixels in [0, 1] to the range the models were trained on."""
    return (images - 0.4) / 0.25


def batches(
    split: Split, num_samples: int, batch_size: int, seed: int = 0
) -> Iterator[tuple[dict[str, Tensor], list[Target]]]:
    """Yield (inputs, targets) of the first `num_samples` samples; the last batch may be short.

    Inputs: pixel_values fp32 [B, 3, H, W]. Targets: one per image.
    """
    for start in range(0, num_samples, batch_size):
        numbers = range(start, min(start + batch_size, num_samples))
        scenes = [make_sample(split, i, seed=seed) for i in numbers]
        images = torch.stack([torch.from_numpy(s.image) for s in scenes])
        yield {"pixel_values": normalize(images)}, [target_of(s) for s in scenes]
