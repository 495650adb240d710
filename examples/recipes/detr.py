# SPDX-License-Identifier: Apache-2.0
"""DETR: detection with object queries; boxes and classes leave apart, as they should."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from examples.recipes.recipe import Recipe, pixels


def tiny() -> nn.Module:
    """A small ResNet, one encoder and one decoder layer, five queries."""
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        out_features=["stage2"],
    )  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, num_queries=5, num_labels=4,
    )  # fmt: skip
    model: nn.Module = DetrForObjectDetection(config)
    return model


def load(path: str) -> nn.Module:
    """Such as facebook/detr-resnet-50."""
    return DetrForObjectDetection.from_pretrained(path)  # type: ignore[no-any-return]


def batch(model: nn.Module, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Images of one size, so no pixel mask is needed."""
    side = 64 if model.config.d_model < 64 else 480  # type: ignore[union-attr, operator]
    return {"pixel_values": pixels(count, side, seed)}


RECIPE = Recipe(tiny, load, batch, "int8")
