# SPDX-License-Identifier: Apache-2.0
"""Scenes made once and kept as uint8 arrays on disk, so that training is not held up by drawing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from examples.zoo.objects import SIZES
from examples.zoo.scenes import Scene, colour_index, kind_index

MAX_OBJECTS = 8
# Columns of the object table: kind, colour, size, box (x0, y0, x1, y1).
COLUMNS = 7


def cache_folder() -> Path:
    """Return where caches lie: QGRAPH_ZOO_CACHE, or a folder of the user's cache."""
    default = Path.home() / ".cache" / "qgraph" / "zoo"
    return Path(os.environ.get("QGRAPH_ZOO_CACHE", str(default)))


@dataclass(frozen=True)
class SceneArrays:
    """Memory-mapped scenes: images uint8 [N, 3, H, W]; instances uint8 [N, H, W], 0 is background
    and k + 1 object k; objects int16 [N, MAX_OBJECTS, COLUMNS], unused rows are -1.
    """

    images: NDArray[np.uint8]
    instances: NDArray[np.uint8]
    objects: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.images)


def object_rows(scene: Scene) -> NDArray[np.int16]:
    """Return the object table of one scene."""
    rows = np.full((MAX_OBJECTS, COLUMNS), -1, dtype=np.int16)
    for row, thing in zip(rows, scene.objects, strict=False):
        names = (kind_index(thing.kind), colour_index(thing.colour), SIZES.index(thing.size))
        row[:] = (*names, *thing.box)
    return rows


def instance_map(scene: Scene) -> NDArray[np.uint8]:
    """Return uint8 [H, W] with the number of the object at each pixel, counted from 1."""
    instances = np.zeros(scene.image.shape[1:], dtype=np.uint8)
    for number, thing in enumerate(scene.objects, 1):
        instances[thing.mask] = number
    return instances


def cached_scenes(name: str, count: int, size: int, make: Callable[[int], Scene]) -> SceneArrays:
    """Return `count` scenes `make(0..count-1)` under `name`, drawing them only the first time."""
    folder = cache_folder() / f"{name}-{count}"
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "images": ((count, 3, size, size), np.uint8),
        "instances": ((count, size, size), np.uint8),
        "objects": ((count, MAX_OBJECTS, COLUMNS), np.int16),
    }
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        maps = {
            key: np.lib.format.open_memmap(folder / f"{key}.npy", "w+", dtype, shape)
            for key, (shape, dtype) in shapes.items()
        }
        for i in tqdm(range(count), desc=f"draw {name}", mininterval=5):
            scene = make(i)
            maps["images"][i] = np.round(scene.image * 255).astype(np.uint8)
            maps["instances"][i] = instance_map(scene)
            maps["objects"][i] = object_rows(scene)
        (folder / "done").touch()
    return SceneArrays(*(np.load(folder / f"{key}.npy", mmap_mode="r") for key in shapes))
