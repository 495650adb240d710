# SPDX-License-Identifier: Apache-2.0
"""CLIPSeg: an image and a sentence in, a mask out (referring segmentation)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from examples.recipes.recipe import Recipe, pixels, words


def tiny() -> nn.Module:
    """Both towers with two layers of 32, decoder on the first."""
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    config = CLIPSegConfig(
        text_config={**tower, "vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 59,
                     "bos_token_id": 58, "pad_token_id": 1},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16, reduce_dim=16, extract_layers=[0, 1], decoder_num_attention_heads=2,
        decoder_intermediate_size=32, conditional_layer=0,
    )  # fmt: skip
    model: nn.Module = CLIPSegForImageSegmentation(config)
    return model


def load(path: str) -> nn.Module:
    """Such as CIDAS/clipseg-rd64-refined."""
    return CLIPSegForImageSegmentation.from_pretrained(path)  # type: ignore[no-any-return]


def batch(model: nn.Module, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Images with sentences that end in the end token, by which the text is pooled."""
    vision, text = model.config.vision_config, model.config.text_config  # type: ignore[union-attr]
    ids = words(count, 8, int(text.vocab_size), seed)  # type: ignore[union-attr, arg-type]
    ids[:, -1] = int(text.vocab_size) - 1  # type: ignore[union-attr, arg-type]
    return {
        "pixel_values": pixels(count, int(vision.image_size), seed),  # type: ignore[union-attr, arg-type]
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
    }  # fmt: skip


RECIPE = Recipe(tiny, load, batch, "ris_w8a8")
