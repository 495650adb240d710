# SPDX-License-Identifier: Apache-2.0
"""SegFormer: semantic segmentation with a hierarchical transformer."""

from __future__ import annotations

import torch
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from examples.recipes.recipe import Recipe, pixels


def tiny() -> nn.Module:
    """Two stages."""
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=32, num_labels=4,
    )  # fmt: skip
    model: nn.Module = SegformerForSemanticSegmentation(config)
    return model


def load(path: str) -> nn.Module:
    """Such as nvidia/segformer-b0-finetuned-ade-512-512."""
    return SegformerForSemanticSegmentation.from_pretrained(path)  # type: ignore[no-any-return]


def batch(model: nn.Module, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Images; 512 pixels for checkpoints, 64 for the small one."""
    side = 64 if len(model.config.depths) < 4 else 512  # type: ignore[union-attr, arg-type]
    return {"pixel_values": pixels(count, side, seed)}


RECIPE = Recipe(tiny, load, batch, "int8")
