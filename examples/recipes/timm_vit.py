# SPDX-License-Identifier: Apache-2.0
"""A vision transformer of timm, where that is installed."""

from __future__ import annotations

import timm
import torch
from torch import nn

from examples.recipes.recipe import Recipe, pixels


def tiny() -> nn.Module:
    """Two blocks of 48 on images of 32 pixels."""
    return timm.create_model(  # type: ignore[no-any-return]
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3,
        num_classes=5,
    )  # fmt: skip


def load(path: str) -> nn.Module:
    """A checkpoint of vit_tiny_patch16_224."""
    return timm.create_model("vit_tiny_patch16_224", checkpoint_path=path)  # type: ignore[no-any-return]


def batch(model: nn.Module, count: int, seed: int) -> torch.Tensor:
    """Images of the size that the model was made for."""
    return pixels(count, int(model.patch_embed.img_size[0]), seed)  # type: ignore[union-attr, index]


RECIPE = Recipe(tiny, load, batch, "int8")
