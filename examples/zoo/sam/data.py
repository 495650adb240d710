# SPDX-License-Identifier: Apache-2.0
"""Promptable-segmentation samples: a scene, one of its objects, a point or a box as prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.zoo.ris.data import CONFIG, normalize
from examples.zoo.scenes import make_scene
from examples.zoo.splits import Split, sample_rng

Prompt = Literal["point", "box", "mixed"]
IMAGE_SIZE = CONFIG.size

# Labels of prompt slots, as in SAM: nothing, point on the object, corners of a box.
EMPTY, POINT, TOP_LEFT, BOTTOM_RIGHT = -1, 1, 2, 3
SLOTS = 3


def point_prompt(
    rng: np.random.Generator, mask: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], list[int]]:
    """Return slots [3, 2] in pixels (x, y) with one random point of the mask, and their labels."""
    rows, columns = np.nonzero(mask)
    pick = int(rng.integers(len(rows)))
    slots = np.zeros((SLOTS, 2), dtype=np.float32)
    slots[0] = columns[pick] + 0.5, rows[pick] + 0.5
    return slots, [POINT, EMPTY, EMPTY]


def box_prompt(
    rng: np.random.Generator, box: tuple[int, int, int, int]
) -> tuple[NDArray[np.float32], list[int]]:
    """Return slots [3, 2] with the corners of the box, each moved by up to a pixel."""
    slots = np.zeros((SLOTS, 2), dtype=np.float32)
    slots[1:] = np.reshape(box, (2, 2)) + rng.uniform(-1, 1, (2, 2))
    return slots, [EMPTY, TOP_LEFT, BOTTOM_RIGHT]


def batches(
    split: Split, num_samples: int, batch_size: int, seed: int = 0, *, prompt: Prompt = "mixed"
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield (inputs, masks); "mixed" alternates points and boxes. The last batch may be short.

    Inputs: pixel_values fp32 [B, 3, H, W], points fp32 [B, 3, 2] in pixels, labels int64 [B, 3].
    Masks: bool [B, 1, H, W].
    """
    for start in range(0, num_samples, batch_size):
        images, points, labels, masks = [], [], [], []
        for index in range(start, min(start + batch_size, num_samples)):
            scene = make_scene(split, index, seed=seed, config=CONFIG)
            rng = sample_rng(seed, split, index, stream=200)
            thing = scene.objects[int(rng.integers(len(scene.objects)))]
            is_point = prompt == "point" or (prompt == "mixed" and index % 2 == 0)
            slots, kinds = point_prompt(rng, thing.mask) if is_point else box_prompt(rng, thing.box)
            images.append(scene.image)
            points.append(slots)
            labels.append(kinds)
            masks.append(thing.mask)
        inputs = {
            "pixel_values": normalize(torch.from_numpy(np.stack(images))),
            "points": torch.from_numpy(np.stack(points)),
            "labels": torch.tensor(labels),
        }
        yield inputs, torch.from_numpy(np.stack(masks))[:, None]
