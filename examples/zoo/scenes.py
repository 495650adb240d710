# SPDX-License-Identifier: Apache-2.0
"""A seeded generator of scenes: coloured digits and shapes on photographic backgrounds.

Sample i of a split depends only on (seed, split, i, config). Objects never overlap, so a mask is
the object's whole silhouette. `share` makes later objects repeat the kind or the colour of an
earlier one, which is what makes a referring sentence or a detector work for its answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.zoo.backgrounds import Background, sample_background
from examples.zoo.objects import COLOURS, DIGITS, KINDS, SHAPES, SIZES, render_digit, render_shape
from examples.zoo.splits import Split, digit_images, digit_indices, sample_rng

Floats = NDArray[np.float32]
_COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """What scenes look like; lengths are in pixels or as shares of the image side."""

    size: int = 80
    min_objects: int = 4
    max_objects: int = 7
    digit_share: float = 0.6
    share: float = 0.75
    small: tuple[float, float] = (0.18, 0.23)
    large: tuple[float, float] = (0.30, 0.38)
    max_angle: float = 0.2
    margin: int = 2


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is, its tight box (x0, y0, x1, y1) in pixels, its mask bool [H, W].

    `extent` is the side of the patch it was drawn in, `digit` the scikit-learn sample number.
    """

    kind: str
    colour: str
    size: str
    extent: int
    box: tuple[int, int, int, int]
    mask: NDArray[np.bool_]
    digit: int | None

    @property
    def centre(self) -> tuple[float, float]:
        """Return the middle of the box as (x, y)."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """An image float32 [3, H, W] in [0, 1], its objects, and where the background came from."""

    image: Floats
    objects: tuple[SceneObject, ...]
    background: Background


@dataclass(frozen=True)
class _Plan:
    kind: str
    colour: str
    size: str


def _plan(rng: np.random.Generator, earlier: list[_Plan], config: SceneConfig) -> _Plan:
    names = DIGITS if rng.random() < config.digit_share else SHAPES
    kind = names[int(rng.integers(len(names)))]
    colour = _COLOUR_NAMES[int(rng.integers(len(_COLOUR_NAMES)))]
    size = SIZES[int(rng.integers(len(SIZES)))]
    if earlier and rng.random() < config.share:
        model = earlier[int(rng.integers(len(earlier)))]
        what = rng.random()
        if what < 0.7:
            kind = model.kind
        if what > 0.6:
            colour = model.colour
    return _Plan(kind, colour, size)


def _patch(
    rng: np.random.Generator, plan: _Plan, split: Split, config: SceneConfig
) -> tuple[Floats, int | None]:
    low, high = config.small if plan.size == "small" else config.large
    side = round(rng.uniform(low, high) * config.size)
    angle = float(rng.uniform(-config.max_angle, config.max_angle))
    if plan.kind in SHAPES:
        return render_shape(plan.kind, side, angle), None
    choices = digit_indices(split, DIGITS.index(plan.kind))
    number = int(choices[int(rng.integers(len(choices)))])
    return render_digit(digit_images()[0][number], side, angle), number


def _place(
    rng: np.random.Generator, side: int, taken: list[tuple[int, int, int]], config: SceneConfig
) -> tuple[int, int] | None:
    """Find a free corner for a patch of this side, or None after a few tries."""
    for x, y in rng.integers(0, config.size - side + 1, size=(25, 2)).tolist():
        if all(
            x >= u + w + config.margin
            or u >= x + side + config.margin
            or y >= v + w + config.margin
            or v >= y + side + config.margin
            for u, v, w in taken
        ):
            return x, y
    return None


def _paint(
    rng: np.random.Generator, canvas: Floats, patch: Floats, at: tuple[int, int], colour: str
) -> None:
    side = patch.shape[0]
    jitter = rng.uniform(-0.06, 0.06, 3) + rng.uniform(-0.08, 0.02)
    paint = np.clip(np.asarray(COLOURS[colour]) + jitter, 0, 1).astype(np.float32)
    window = canvas[at[1] : at[1] + side, at[0] : at[0] + side]
    window += patch[..., None] * (paint - window)


def _tight_box(solid: NDArray[np.bool_], at: tuple[int, int]) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(solid.any(0)), np.flatnonzero(solid.any(1))
    return (
        at[0] + int(columns[0]),
        at[1] + int(rows[0]),
        at[0] + int(columns[-1]) + 1,
        at[1] + int(rows[-1]) + 1,
    )


def make_scene(
    split: Split, index: int, *, seed: int = 0, config: SceneConfig | None = None
) -> Scene:
    """Make sample `index` of `split`; at least one object is always placed."""
    config = config or SceneConfig()
    rng = sample_rng(seed, split, index)
    background = sample_background(rng, split, config.size)
    gain = (rng.uniform(0.35, 0.85) * rng.uniform(0.9, 1.1, 3) / 255).astype(np.float32)
    canvas = background.pixels.astype(np.float32) * gain
    plans: list[_Plan] = []
    taken: list[tuple[int, int, int]] = []
    objects: list[SceneObject] = []
    for _ in range(int(rng.integers(config.min_objects, config.max_objects + 1))):
        plan = _plan(rng, plans, config)
        patch, digit = _patch(rng, plan, split, config)
        side = patch.shape[0]
        at = _place(rng, side, taken, config)
        if at is None:
            continue
        _paint(rng, canvas, patch, at, plan.colour)
        solid = patch > 0.5
        mask = np.zeros((config.size, config.size), dtype=np.bool_)
        mask[at[1] : at[1] + side, at[0] : at[0] + side] = solid
        taken.append((*at, side))
        plans.append(plan)
        box = _tight_box(solid, at)
        objects.append(SceneObject(plan.kind, plan.colour, plan.size, side, box, mask, digit))
    image = np.ascontiguousarray(np.clip(canvas, 0, 1).transpose(2, 0, 1))
    return Scene(image, tuple(objects), background)


def kind_index(name: str) -> int:
    """Return the class number of a kind, digits first."""
    return KINDS.index(name)


def colour_index(name: str) -> int:
    """Return the class number of a colour."""
    return _COLOUR_NAMES.index(name)
