# SPDX-License-Identifier: Apache-2.0
"""Classification samples: one handwritten digit, placed, scaled and turned on a photograph.

Half of the images also hold a plain shape, so that "the bright thing" is no answer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.zoo.backgrounds import sample_background
from examples.zoo.objects import COLOURS, SHAPES, Floats, render_digit, render_shape
from examples.zoo.splits import Split, digit_images, digit_indices, sample_rng

IMAGE_SIZE = 48
NUM_CLASSES = 10
_MAX_ANGLE = 0.45


def _paint(rng: np.random.Generator, canvas: Floats, patch: Floats, opacity: float) -> None:
    """Blend a patch of coverage in a random colour at a random place."""
    side = patch.shape[0]
    x, y = rng.integers(0, canvas.shape[0] - side + 1, 2).tolist()
    palette = tuple(COLOURS.values())
    colour = np.asarray(palette[int(rng.integers(len(palette)))]) + rng.uniform(-0.1, 0.05, 3)
    window = canvas[y : y + side, x : x + side]
    window += opacity * patch[..., None] * (np.clip(colour, 0, 1).astype(np.float32) - window)


def make_sample(split: Split, index: int, *, seed: int = 0) -> tuple[Floats, int]:
    """Return an image float32 [3, 48, 48] in [0, 1] and its label; labels cycle with the index."""
    rng = sample_rng(seed, split, index, stream=100)
    pixels = sample_background(rng, split, IMAGE_SIZE).pixels
    gain = rng.uniform(0.35, 0.9) * rng.uniform(0.9, 1.1, 3) / 255
    canvas = pixels.astype(np.float32) * gain.astype(np.float32)
    if rng.random() < 0.5:
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        _paint(rng, canvas, render_shape(shape, int(rng.integers(10, 16)), 0.0), 0.8)
    label = index % NUM_CLASSES
    choices = digit_indices(split, label)
    image = digit_images()[0][choices[int(rng.integers(len(choices)))]]
    angle = float(rng.uniform(-_MAX_ANGLE, _MAX_ANGLE))
    digit = render_digit(image, int(rng.integers(22, 41)), angle)
    _paint(rng, canvas, digit, rng.uniform(0.8, 1.0))
    return np.ascontiguousarray(np.clip(canvas, 0, 1).transpose(2, 0, 1)), label


def normalize(images: Tensor) -> Tensor:
    """Map pixels in [0, 1] to the range the models were trained on."""
    return (images - 0.4) / 0.25


def batches(
    split: Split, num_samples: int, batch_size: int, seed: int = 0
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield ({pixel_values: fp32 [B, 3, 48, 48]}, labels int64 [B]); the last may be short."""
    for start in range(0, num_samples, batch_size):
        numbers = range(start, min(start + batch_size, num_samples))
        images, labels = zip(*(make_sample(split, i, seed=seed) for i in numbers), strict=True)
        pixels = torch.from_numpy(np.stack(images))
        yield {"pixel_values": normalize(pixels)}, torch.tensor(labels)


def draw_images(split: Split, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the first `count` samples as uint8 images [count, 3, 48, 48] and labels."""
    images = np.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    for i in range(count):
        image, labels[i] = make_sample(split, i)
        images[i] = np.round(image * 255)
    return images, labels
