# SPDX-License-Identifier: Apache-2.0
"""Seeded infrared scenes with targets of 2 to 9 pixels.

Sample i of a split depends only on (seed, split, i): any subset can be generated in any order, on
any number of workers, and no two splits share a random stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from examples.zoo.sirst.backgrounds import Field, cloud, ground, sea

SIZE = 96
MIN_AREA, MAX_AREA = 2, 9
SPLITS = {"train": 11, "calibration": 22, "development": 33, "evaluation": 44}
_BACKGROUNDS = {"cloud": cloud, "sea": sea, "ground": ground}
_MARGIN = 4
_CLEARANCE = 10.0


@dataclass(frozen=True, slots=True)
class Scene:
    """One labelled image.

    Attributes:
        image: float32 [SIZE, SIZE] in [0, 1], on the 12-bit grid of the sensor.
        mask: bool [SIZE, SIZE], true on target pixels.
        kind: cloud, sea or ground.
        contrasts: signal-to-clutter ratio of each target: peak / local standard deviation.
    """

    image: NDArray[np.float32]
    mask: NDArray[np.bool_]
    kind: str
    contrasts: tuple[float, ...]


def generator(split: str, index: int, *, seed: int = 0) -> np.random.Generator:
    """Return the random stream of one sample.

    Raises:
        KeyError: the split is not one of `SPLITS`.
    """
    return np.random.default_rng([seed, SPLITS[split], index])


def spot(center: tuple[float, float], sigma: tuple[float, float], *, angle: float = 0.0) -> Field:
    """Return an elliptic Gaussian [SIZE, SIZE] with peak 1 at a sub-pixel (row, column)."""
    y, x = np.mgrid[:SIZE, :SIZE]
    dy, dx = y - center[0], x - center[1]
    along = dx * np.cos(angle) + dy * np.sin(angle)
    across = -dx * np.sin(angle) + dy * np.cos(angle)
    return np.asarray(np.exp(-0.5 * ((along / sigma[0]) ** 2 + (across / sigma[1]) ** 2)))


def _background(rng: np.random.Generator) -> tuple[str, Field]:
    kind = str(rng.choice(list(_BACKGROUNDS)))
    field = _BACKGROUNDS[kind](rng, SIZE)
    field = (field - field.mean()) / (field.std() + 1e-12)
    return kind, rng.uniform(0.25, 0.5) + rng.uniform(0.04, 0.12) * np.tanh(field / 2.5) * 2.5


def _distractors(rng: np.random.Generator) -> tuple[Field, list[tuple[float, float]]]:
    """Return hot things that are no targets (blobs, streaks, dead pixels) and their centres."""
    field, centers = np.zeros((SIZE, SIZE)), []
    for _ in range(int(rng.integers(0, 4))):
        center = (float(rng.uniform(0, SIZE)), float(rng.uniform(0, SIZE)))
        is_streak = rng.random() < 0.4
        narrow = rng.uniform(0.7, 1.1) if is_streak else rng.uniform(2.4, 4.5)
        sigma = (rng.uniform(4.0, 8.0) if is_streak else rng.uniform(2.4, 4.5), narrow)
        field += rng.uniform(0.08, 0.3) * spot(center, sigma, angle=rng.uniform(0, np.pi))
        centers.append(center)
    for _ in range(int(rng.integers(0, 3))):
        row, column = rng.integers(0, SIZE, 2)
        field[row, column] += rng.uniform(0.1, 0.3)
        centers.append((float(row), float(column)))
    return field, centers


def _place(rng: np.random.Generator, taken: list[tuple[float, float]]) -> tuple[float, float]:
    """Draw a centre away from the border and from everything in `taken`; the best of 50 draws."""
    best, distance = (SIZE / 2, SIZE / 2), -1.0
    for _ in range(50):
        row, column = rng.uniform(_MARGIN, SIZE - 1 - _MARGIN, 2)
        near = min((np.hypot(row - r, column - c) for r, c in taken), default=np.inf)
        if near > distance:
            best, distance = (float(row), float(column)), near
        if distance >= _CLEARANCE:
            break
    return best


def _target(
    rng: np.random.Generator, center: tuple[float, float]
) -> tuple[Field, NDArray[np.bool_]]:
    """Return the blurred profile with peak 1 and its mask, the pixels above half of the peak."""
    while True:
        sigma = (rng.uniform(0.6, 1.4), rng.uniform(0.6, 1.4))
        profile = spot(center, sigma, angle=rng.uniform(0, np.pi))
        profile /= profile.max()
        mask = profile >= 0.5
        if MIN_AREA <= int(mask.sum()) <= MAX_AREA:
            return profile, mask


def _local_deviation(field: Field) -> Field:
    mean = ndimage.uniform_filter(field, 15)
    variance = ndimage.uniform_filter(field**2, 15) - mean**2
    return np.asarray(np.sqrt(np.maximum(variance, 0.0)))


def _sensor(rng: np.random.Generator, noise: float) -> Field:
    """Return temporal noise plus the column pattern of an uncooled array."""
    columns = rng.normal(0.0, 0.3 * noise, (1, SIZE))
    return np.asarray(rng.normal(0.0, noise, (SIZE, SIZE)) + columns)


def scene(split: str, index: int, *, seed: int = 0) -> Scene:
    """Generate sample `index` of a split: background, vignetting, distractors, targets, noise."""
    rng = generator(split, index, seed=seed)
    kind, image = _background(rng)
    axis = np.linspace(-1.0, 1.0, SIZE) ** 2
    image = image * (1.0 - rng.uniform(0.0, 0.25) * (axis[:, None] + axis[None, :]) / 2)
    hot, taken = _distractors(rng)
    noise = float(rng.uniform(0.004, 0.012))
    image = image + hot + _sensor(rng, noise)
    deviation = np.maximum(_local_deviation(image), noise)
    mask, contrasts = np.zeros((SIZE, SIZE), dtype=np.bool_), []
    for _ in range(int(rng.choice(4, p=(0.1, 0.45, 0.3, 0.15)))):
        center = _place(rng, taken)
        taken.append(center)
        profile, inside = _target(rng, center)
        local = deviation[round(center[0]), round(center[1])]
        wanted = 2.0 + 6.0 * rng.beta(2.5, 1.2)
        peak = float(np.clip(wanted * local, 6.0 * noise, 0.5))
        image = image + peak * profile
        mask |= inside
        contrasts.append(float(peak / local))
    digital = np.round(np.clip(image, 0.0, 1.0) * 4095.0) / 4095.0
    return Scene(digital.astype(np.float32), mask, kind, tuple(contrasts))
