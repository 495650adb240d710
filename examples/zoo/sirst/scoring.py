# SPDX-License-Identifier: Apache-2.0
"""Build, load and score the two networks; `examples.zoo.sirst` re-exports this as its interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.zoo.sirst.metrics import SegmentationCounts
from examples.zoo.sirst.models import NestedUNet, ResUNet
from examples.zoo.sirst.scenes import scene

MODELS: dict[str, Callable[[], nn.Module]] = {"resunet": ResUNet, "nested": NestedUNet}
WEIGHTS = Path(__file__).parent / "weights"


class Evaluation(TypedDict):
    """Metrics of a data set and the counts of each image (int64 arrays)."""

    iou: float
    niou: float
    pd: float
    fa: float
    per_image: dict[str, NDArray[np.int64]]


def build(name: str) -> nn.Module:
    """Return an untrained model: resunet or nested.

    Raises:
        ValueError: the name is not one of `MODELS`.
    """
    if name not in MODELS:
        msg = f"unknown model {name!r}; allowed: {', '.join(sorted(MODELS))}"
        raise ValueError(msg)
    return MODELS[name]()


def load_model(name: str = "resunet") -> nn.Module:
    """Return a trained model in eval mode, [B, 1, H, W] -> logits [B, 1, H, W], float32.

    Raises:
        ValueError: the name is not one of `MODELS`.
    """
    model = build(name)
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return model.eval()


def batches(
    split: str, num_samples: int, batch_size: int, *, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and masks, float32 [b, 1, SIZE, SIZE], in index order; the last may be short."""
    for start in range(0, num_samples, batch_size):
        indices = range(start, min(start + batch_size, num_samples))
        samples = [scene(split, index, seed=seed) for index in indices]
        images = torch.from_numpy(np.stack([s.image for s in samples]))
        masks = torch.from_numpy(np.stack([s.mask for s in samples]))
        yield images.unsqueeze(1), masks.unsqueeze(1).float()


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor],
    split: str,
    num_samples: int,
    batch_size: int = 16,
    *,
    seed: int = 0,
) -> Evaluation:
    """Score a callable that maps images to logits; a pixel is positive where its logit is > 0."""
    counts = SegmentationCounts.empty()
    for images, masks in batches(split, num_samples, batch_size, seed=seed):
        predicted = (model(images) > 0).squeeze(1).cpu().numpy()
        counts.update(list(predicted), list(masks.squeeze(1).bool().numpy()))
    values = counts.result()
    return Evaluation(
        iou=values["iou"],
        niou=values["niou"],
        pd=values["pd"],
        fa=values["fa"],
        per_image=counts.per_image(),
    )
