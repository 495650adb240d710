# SPDX-License-Identifier: Apache-2.0
"""Swin: image classification with attention in shifted windows."""

from __future__ import annotations

import torch
from torch import nn
from transformers import SwinConfig, SwinForImageClassification

from examples.recipes.recipe import Recipe, pixels


def tiny() -> nn.Module:
    """Two stages on images of 32 pixels."""
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4,
        num_labels=5,
    )  # fmt: skip
    model: nn.Module = SwinForImageClassification(config)
    return model


def load(path: str) -> nn.Module:
    """Such as microsoft/swin-tiny-patch4-window7-224."""
    return SwinForImageClassification.from_pretrained(path)  # type: ignore[no-any-return]


def batch(model: nn.Module, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Images of the size that the model was made for."""
    return {"pixel_values": pixels(count, int(model.config.image_size), seed)}  # type: ignore[union-attr, arg-type]


RECIPE = Recipe(tiny, load, batch, "int8")
