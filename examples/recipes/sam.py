# SPDX-License-Identifier: Apache-2.0
"""SAM: an image and points in, masks out (promptable segmentation)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import SamConfig, SamModel

from examples.recipes.recipe import Recipe, pixels


def tiny() -> nn.Module:
    """An encoder with two layers of 32 on images of 64 pixels."""
    config = SamConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
            "patch_size": 8, "output_channels": 16, "mlp_dim": 64, "window_size": 4,
            "global_attn_indexes": [1], "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32,
            "iou_head_hidden_dim": 16, "iou_head_depth": 2,
        },
    )  # fmt: skip
    model: nn.Module = SamModel(config)
    return model


def load(path: str) -> nn.Module:
    """Such as facebook/sam-vit-base."""
    return SamModel.from_pretrained(path)  # type: ignore[no-any-return]


def batch(model: nn.Module, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Images with one positive point each."""
    side = int(model.config.vision_config.image_size)  # type: ignore[union-attr, arg-type]
    points = torch.full((count, 1, 1, 2), side / 2.0)
    return {
        "pixel_values": pixels(count, side, seed), "input_points": points,
        "input_labels": torch.ones(count, 1, 1, dtype=torch.long),
    }  # fmt: skip


RECIPE = Recipe(tiny, load, batch, "sam_w8a8")
