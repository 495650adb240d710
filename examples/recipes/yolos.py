# SPDX-License-Identifier: Apache-2.0
"""YOLOS: detection with a plain vision transformer."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import YolosConfig, YolosForObjectDetection

from examples.recipes.recipe import Recipe, pixels


def tiny() -> nn.Module:
    """Two layers of 32, five detection tokens, images of 32 pixels."""
    config = YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=4,
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    # Tokens start at zero, which no trained detector's are: beside patches of size one their
    # rows would be a handful of steps of any scale per tensor.
    for token in (model.vit.embeddings.cls_token, model.vit.embeddings.detection_tokens):
        nn.init.normal_(token)
    return cast(nn.Module, model)


def load(path: str) -> nn.Module:
    """Such as hustvl/yolos-tiny."""
    return YolosForObjectDetection.from_pretrained(path)  # type: ignore[no-any-return]


def batch(model: nn.Module, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Square images as wide as the model was made for."""
    side = int(model.config.image_size[-1])  # type: ignore[union-attr, index]
    return {"pixel_values": pixels(count, side, seed)}


RECIPE = Recipe(tiny, load, batch, "int8")
