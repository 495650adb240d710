# SPDX-License-Identifier: Apache-2.0
"""Objects of the scenes: coloured handwritten digits and plain shapes, as coverage patches.

Shapes come from signed distances, digits from bicubic resampling of scikit-learn's 8x8 images;
both give a patch of coverage in [0, 1] with soft edges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "ring", "square", "triangle", "diamond", "cross", "star")
KINDS = DIGITS + SHAPES
SIZES = ("small", "large")

# Hues lie close on purpose (red, orange, yellow; cyan, blue): a coarse grid confuses them.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.08),
    "yellow": (0.97, 0.90, 0.15),
    "green": (0.12, 0.72, 0.20),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.15, 0.28, 0.92),
    "purple": (0.62, 0.18, 0.85),
    "white": (0.95, 0.95, 0.95),
}


def render_digit(
    image: Floats, side: int, angle: float, *, stretch: float = 1.0, shear: float = 0.0
) -> Floats:
    """Resample one 8x8 digit to [side, side] coverage, turned by `angle` radians.

    `stretch` narrows the digit, `shear` slants it (in radians of the vertical); both vary the
    few samples there are.
    """
    scale = 8.0 / side
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    centre = side / 2
    # Rows of the map from patch to source pixels: turn, then slant and stretch across.
    across = (stretch * (cos - shear * sin), stretch * (sin + shear * cos))
    matrix = (
        *(*across, 4.0 - centre * sum(across)),
        *(-sin, cos, 4.0 - centre * (cos - sin)),
    )
    padded = np.pad(image, 1)
    shifted = (*matrix[:2], matrix[2] + 1, *matrix[3:5], matrix[5] + 1)
    turned = Image.fromarray(padded).transform(
        (side, side), Image.Transform.AFFINE, shifted, Image.Resampling.BICUBIC
    )
    # A steeper edge than the 8x8 blur: half coverage stays where the grey value is one half.
    sharp: Floats = np.clip((np.asarray(turned, dtype=np.float32) - 0.5) * 2.5 + 0.5, 0.0, 1.0)
    return sharp


def _polygon(x: Floats, y: Floats, corners: int, radius: float, turn: float) -> Floats:
    """Signed distance to a regular polygon, up to the rounding outside its corners."""
    angles = turn + 2 * np.pi * (np.arange(corners) + 0.5) / corners
    apothem = radius * np.cos(np.pi / corners)
    distance: Floats = np.full_like(x, -np.inf)
    for a in angles:
        side = x * np.float32(np.cos(a)) + y * np.float32(np.sin(a)) - np.float32(apothem)
        distance = np.maximum(distance, side)
    return distance


def _star(x: Floats, y: Floats, radius: float, turn: float) -> Floats:
    angle = np.arctan2(y, x) - turn
    sector = 2 * np.pi / 5
    folded = np.abs((angle + sector / 2) % sector - sector / 2)
    r = np.hypot(x, y)
    px, py = r * np.cos(folded), r * np.sin(folded)
    # The edge from the tip (radius, 0) to the inner corner at half a sector.
    inner = 0.45 * radius
    ex, ey = inner * np.cos(sector / 2) - radius, inner * np.sin(sector / 2)
    distance: Floats = ((px - radius) * ey - py * ex) / np.hypot(ex, ey)
    return distance


def render_shape(shape: str, side: int, angle: float) -> Floats:
    """Return [side, side] coverage of a shape that spans its patch, turned by `angle` radians."""
    axis = np.arange(side, dtype=np.float32) + 0.5 - side / 2
    x, y = np.meshgrid(axis, axis)
    r = side / 2 - 1.0
    if shape == "circle":
        distance = np.hypot(x, y) - r
    elif shape == "ring":
        distance = np.abs(np.hypot(x, y) - 0.78 * r) - 0.22 * r
    elif shape == "square":
        distance = _polygon(x, y, 4, r * 1.2, angle + np.pi / 4)
    elif shape == "diamond":
        distance = _polygon(x, y, 4, r, angle)
    elif shape == "triangle":
        distance = _polygon(x, y - 0.25 * r, 3, r * 1.12, angle + np.pi / 6)
    elif shape == "cross":
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = np.abs(c * x + s * y), np.abs(c * y - s * x)
        arm, width = 0.95 * r, 0.32 * r
        distance = np.minimum(np.maximum(u - arm, v - width), np.maximum(v - arm, u - width))
    elif shape == "star":
        distance = _star(x, y, r * 1.05, angle - np.pi / 2)
    else:
        msg = f"no shape {shape!r}; known: {', '.join(SHAPES)}"
        raise ValueError(msg)
    coverage: Floats = np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)
    return coverage
