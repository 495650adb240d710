# SPDX-License-Identifier: Apache-2.0
"""Referring-segmentation samples: a scene, a sentence that is true of one object, its mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.zoo.ris.sentences import Expression, phrase_sentence, sample_expression
from examples.zoo.ris.text import tokenize
from examples.zoo.scenes import Scene, SceneConfig, make_scene
from examples.zoo.splits import Split, sample_rng

CONFIG = SceneConfig()
IMAGE_SIZE = CONFIG.size

# Index step between retries of a scene that allows no sentence; far beyond any split's size.
_RETRY = 10_000_000


@dataclass(frozen=True)
class Sample:
    """One sample: the scene, the sentence, what it means, and which object it is true of."""

    scene: Scene
    sentence: str
    expression: Expression
    target: int


def make_sample(split: Split, index: int, *, seed: int = 0) -> Sample:
    """Make sample `index` of a split."""
    attempt = index
    while True:
        scene = make_scene(split, attempt, seed=seed, config=CONFIG)
        rng = sample_rng(seed, split, attempt, stream=1)
        found = sample_expression(rng, scene.objects)
        if found is not None:
            return Sample(scene, phrase_sentence(rng, found[0]), *found)
        attempt += _RETRY


def normalize(images: Tensor) -> Tensor:
    """Map pixels in [0, 1] to the range the model was trained on."""
    return (images - 0.4) / 0.25


def batches(
    split: Split, num_samples: int, batch_size: int, seed: int = 0
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield (inputs, masks) batches of the first `num_samples` samples; the last may be short.

    Inputs: pixel_values fp32 [B, 3, H, W], input_ids and attention_mask int64 [B, T].
    Masks: bool [B, 1, H, W].
    """
    for start in range(0, num_samples, batch_size):
        numbers = range(start, min(start + batch_size, num_samples))
        samples = [make_sample(split, i, seed=seed) for i in numbers]
        images = torch.stack([torch.from_numpy(s.scene.image) for s in samples])
        masks = torch.stack([torch.from_numpy(s.scene.objects[s.target].mask) for s in samples])
        tokens = tokenize([s.sentence for s in samples])
        yield {"pixel_values": normalize(images), **tokens}, masks.unsqueeze(1)
