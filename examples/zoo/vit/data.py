# SPDX-License-Identifier: Apache-2.0
"""Classification samples: one handwritten digit, placed, scaled and turned on a photograph.

Half of the images also hold a plain shape, so that "the bright thing" is no answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.zoo.backgrounds import sample_background
from examples.zoo.objects import COLOURS, SHAPES, Floats, render_digit, render_shape
from examples.zoo.splits import Split, digit_images, digit_indices, sample_rng

IMAGE_SIZE = 48
NUM_CLASSES = 10
_MAX_ANGLE = 0.3
# Smallest distance of a digit's colour from the mean of what it covers, in RGB.
_MIN_CONTRAST = 0.4


@dataclass(frozen=True)
class Sample:
    """An image float32 [3, 48, 48] in [0, 1], its label, and where the digit's patch lies."""

    image: Floats
    label: int
    box: tuple[int, int, int, int]


def _paint(
    rng: np.random.Generator, canvas: Floats, patch: Floats, opacity: float
) -> tuple[int, int, int, int]:
    """Blend a patch of coverage in a contrasting colour at a random place; return its box."""
    side = patch.shape[0]
    x, y = rng.integers(0, canvas.shape[0] - side + 1, 2).tolist()
    window = canvas[y : y + side, x : x + side]
    below = window.mean((0, 1))
    palette = np.asarray(tuple(COLOURS.values()), dtype=np.float32)
    palette = palette[np.linalg.norm(palette - below, axis=1) >= _MIN_CONTRAST]
    colour = palette[int(rng.integers(len(palette)))] + rng.uniform(-0.1, 0.05, 3)
    window += opacity * patch[..., None] * (np.clip(colour, 0, 1).astype(np.float32) - window)
    return x, y, x + side, y + side


def make_sample(split: Split, index: int, *, seed: int = 0) -> Sample:
    """Make sample `index` of a split; labels cycle with the index.

    Only training digits are slanted and stretched: there are about a hundred per class.
    """
    rng = sample_rng(seed, split, index, stream=100)
    pixels = sample_background(rng, split, IMAGE_SIZE).pixels
    gain = rng.uniform(0.35, 0.85) * rng.uniform(0.9, 1.1, 3) / 255
    canvas = pixels.astype(np.float32) * gain.astype(np.float32)
    if rng.random() < 0.5:
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        _paint(rng, canvas, render_shape(shape, int(rng.integers(10, 16)), 0.0), 0.8)
    label = index % NUM_CLASSES
    choices = digit_indices(split, label)
    image = digit_images()[0][choices[int(rng.integers(len(choices)))]]
    angle = float(rng.uniform(-_MAX_ANGLE, _MAX_ANGLE))
    stretch, shear = (1.0, 0.0)
    if split == "train":
        stretch, shear = float(rng.uniform(0.9, 1.2)), float(rng.uniform(-0.2, 0.2))
    side = int(rng.integers(26, 43))
    digit = render_digit(image, side, angle, stretch=stretch, shear=shear)
    box = _paint(rng, canvas, digit, rng.uniform(0.85, 1.0))
    return Sample(np.ascontiguousarray(np.clip(canvas, 0, 1).transpose(2, 0, 1)), label, box)


def normalize(images: Tensor) -> Tensor:
    """Map pixels in [0, 1] to the range the models were trained on."""
    return (images - 0.4) / 0.25


def batches(
    split: Split, num_samples: int, batch_size: int, seed: int = 0
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield ({pixel_values: fp32 [B, 3, 48, 48]}, labels int64 [B]); the last may be short."""
    for start in range(0, num_samples, batch_size):
        numbers = range(start, min(start + batch_size, num_samples))
        samples = [make_sample(split, i, seed=seed) for i in numbers]
        pixels = torch.from_numpy(np.stack([s.image for s in samples]))
        yield {"pixel_values": normalize(pixels)}, torch.tensor([s.label for s in samples])
