# SPDX-License-Identifier: Apache-2.0
"""Infrared backgrounds: structured cloud, sea and ground clutter.

Every function maps a random generator and a side length to a float64 [size, size] radiance field
in arbitrary units; `scenes` normalises it. Clutter is built at several scales from 1/f noise,
because a detector that only removes white noise must not be enough.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Field = NDArray[np.float64]


def fractal(rng: np.random.Generator, size: int, *, beta: float, stretch: float = 1.0) -> Field:
    """Return a 1/f**beta power noise field [size, size], zero mean, unit variance.

    `stretch` > 1 lengthens the structures along the rows (wind, waves).
    """
    fy = np.fft.fftfreq(size)[:, None]
    fx = np.fft.rfftfreq(size)[None, :] * stretch
    radius = np.sqrt(fy**2 + fx**2 + 1.0 / size**2)
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * radius ** (-beta / 2)
    field = np.fft.irfft2(spectrum, s=(size, size))
    return np.asarray((field - field.mean()) / (field.std() + 1e-12))


def _ramp(rng: np.random.Generator, size: int) -> Field:
    """Return a linear gradient of random direction and strength."""
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.8)
    axis = np.linspace(-1.0, 1.0, size)
    return np.asarray(strength * (np.cos(angle) * axis[:, None] + np.sin(angle) * axis[None, :]))


def cloud(rng: np.random.Generator, size: int) -> Field:
    """Soft-edged cloud banks over a sky gradient, textured at three scales."""
    shape = fractal(rng, size, beta=rng.uniform(3.0, 4.0), stretch=rng.uniform(1.0, 2.5))
    cover = 1.0 / (1.0 + np.exp(-(shape - rng.uniform(-0.6, 0.9)) / rng.uniform(0.15, 0.5)))
    texture = fractal(rng, size, beta=rng.uniform(2.4, 3.2))
    wisps = fractal(rng, size, beta=1.8)
    body = rng.uniform(0.8, 2.0) + rng.uniform(0.2, 0.6) * texture + rng.uniform(0.03, 0.12) * wisps
    return np.asarray(_ramp(rng, size) + cover * body)


def sea(rng: np.random.Generator, size: int) -> Field:
    """Waves in perspective with glint below a horizon, a faint sky above."""
    horizon = int(rng.integers(-size // 3, size // 2))
    depth = np.arange(size) - horizon
    waves = fractal(rng, size, beta=rng.uniform(1.2, 2.0), stretch=rng.uniform(3.0, 7.0))
    rows = size * np.log1p(np.maximum(depth, 0) / 12.0) / np.log1p(size / 12.0)
    grid = np.meshgrid(rows, np.arange(size), indexing="ij")
    waves = ndimage.map_coordinates(waves, np.stack(grid), order=1, mode="grid-wrap")
    patch = np.maximum(fractal(rng, size, beta=3.0), 0.0)
    glint = np.maximum(waves - rng.uniform(1.2, 1.9), 0.0) * patch
    water = rng.uniform(0.3, 0.8) * waves + rng.uniform(0.5, 2.0) * glint
    sky = rng.uniform(-1.5, 1.5) + 0.3 * fractal(rng, size, beta=3.0) + 0.3 * _ramp(rng, size)
    below = 1.0 / (1.0 + np.exp(-depth / rng.uniform(0.4, 1.5)))[:, None]
    return np.asarray(below * water + (1.0 - below) * sky)


def _block(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """Return the inside of one rotated rectangle: a roof, a field or (long and thin) a road."""
    angle, (cy, cx) = rng.uniform(0, np.pi), rng.uniform(0, size, 2)
    is_road = rng.random() < 0.25
    half = (size, rng.uniform(0.8, 2.0)) if is_road else tuple(rng.uniform(3.0, size / 4, 2))
    y, x = np.mgrid[:size, :size]
    along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    across = -(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle)
    return np.asarray((np.abs(along) < half[0]) & (np.abs(across) < half[1]))


def ground(rng: np.random.Generator, size: int) -> Field:
    """Blocks, roads and vegetation: hard edges at every scale, slightly blurred by the optics."""
    field = 0.5 * fractal(rng, size, beta=2.5)
    for _ in range(int(rng.integers(8, 22))):
        field = np.where(_block(rng, size), rng.normal(0.0, 1.0) + 0.25 * field, field)
    vegetation = np.maximum(fractal(rng, size, beta=2.8), 0.0)
    field = field + rng.uniform(0.1, 0.4) * vegetation * fractal(rng, size, beta=1.4)
    return np.asarray(ndimage.gaussian_filter(field, rng.uniform(0.5, 0.9)))
