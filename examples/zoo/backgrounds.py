# SPDX-License-Identifier: Apache-2.0
"""Backgrounds: photographs and textures that ship inside the scikit-image and scikit-learn wheels.

Each image is cut by a 64-pixel wide cross into four quadrants, one per split, so crops of two
splits are never closer than 64 pixels. Which quadrant goes to which split rotates from image to
image, so no split sees only skies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.zoo.splits import SPLITS, Split

GAP = 64

# (package, file): only files inside the wheels, nothing that scikit-image would download.
# Of the stereo pair one view is used: the other shows the same scene.
SOURCES: tuple[tuple[str, str], ...] = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/coins.png"),
    ("skimage", "data/brick.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/moon.png"),
)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Region:
    """A quadrant of a source image: file name and (left, top, right, bottom) in its pixels."""

    source: str
    box: Box


@dataclass(frozen=True)
class Background:
    """A crop: pixels uint8 [size, size, 3], where it was taken, and from which region."""

    pixels: NDArray[np.uint8]
    region: Region
    box: Box


@cache
def load_source(package: str, name: str) -> Image.Image:
    """Return a source image as RGB, read from the installed package."""
    with Image.open(Path(str(files(package))) / name) as image:
        return image.convert("RGB")


def quadrants(width: int, height: int) -> tuple[Box, Box, Box, Box]:
    """Return four boxes that keep `GAP` pixels from each other, in reading order."""
    left, right = (width - GAP) // 2, (width - GAP) // 2 + GAP
    top, bottom = (height - GAP) // 2, (height - GAP) // 2 + GAP
    return (
        (0, 0, left, top),
        (right, 0, width, top),
        (0, bottom, left, height),
        (right, bottom, width, height),
    )


@cache
def regions(split: Split) -> tuple[Region, ...]:
    """Return the regions of `split`, one of each source image."""
    found = []
    for number, (package, name) in enumerate(SOURCES):
        boxes = quadrants(*load_source(package, name).size)
        found.append(Region(name, boxes[(SPLITS.index(split) + number) % 4]))
    return tuple(found)


def sample_background(rng: np.random.Generator, split: Split, size: int) -> Background:
    """Crop a random square of one of the split's regions and resize it to `size`."""
    number = int(rng.integers(len(SOURCES)))
    region = regions(split)[number]
    left, top, right, bottom = region.box
    limit = min(right - left, bottom - top)
    side = int(rng.integers(min(64, limit), limit + 1))
    x = left + int(rng.integers(right - left - side + 1))
    y = top + int(rng.integers(bottom - top - side + 1))
    box = (x, y, x + side, y + side)
    # Cropping first keeps the resampling filter from reading across the region's edge.
    crop = load_source(*SOURCES[number]).crop(box)
    pixels = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return Background(pixels, region, box)
