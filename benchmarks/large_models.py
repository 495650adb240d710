# SPDX-License-Identifier: Apache-2.0
"""Larger image encoders with random weights: Swin-T, and the encoder of SAM ViT-B."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.onnx_models import Case, images


def _encoder(name: str, model: nn.Module, batches: list[dict[str, Tensor]], held: int) -> Case:
    """A model of ``pixel_values``; the last `held` batches are for evaluation."""
    return Case(
        name, model.eval(), batches[:-held], batches[-held:], lambda out: out.last_hidden_state,
        None, {},
    )  # fmt: skip


def swin(num_batches: int = 4) -> Case:
    """Swin-T, one image of 224 pixels a batch."""
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    model = SwinModel(SwinConfig(), add_pooling_layer=False)
    batches = [{"pixel_values": images(1, 3, 224, seed)} for seed in range(num_batches + 2)]
    return _encoder("swin-t", model, batches, 2)


def sam(num_batches: int = 2, *, size: int = 1024) -> Case:
    """The image encoder of SAM ViT-B, one image a batch."""
    from transformers import SamVisionConfig, SamVisionModel

    torch.manual_seed(0)
    # the class's own range, 1e-10, is below what some toolkits take for the smallest scale
    model = SamVisionModel(SamVisionConfig(image_size=size, initializer_range=0.02))
    batches = [{"pixel_values": images(1, 3, size, seed)} for seed in range(num_batches + 1)]
    return _encoder("sam", model, batches, 1)


LARGE: dict[str, Callable[[int], Case]] = {
    "swin": swin, "sam-512": functools.partial(sam, size=512),
}  # fmt: skip
