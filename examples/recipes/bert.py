# SPDX-License-Identifier: Apache-2.0
"""BERT: text encoders. Outlier channels are grouped; padding does not count in statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

from examples.recipes.recipe import Recipe, words


def tiny() -> nn.Module:
    """Two layers of 32."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model


def load(path: str) -> nn.Module:
    """Any BERT checkpoint."""
    return BertModel.from_pretrained(path, add_pooling_layer=False)  # type: ignore[no-any-return]


def batch(model: nn.Module, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Token ids and a mask; put tokenized sentences of your own here."""
    ids = words(count, 12, int(model.config.vocab_size), seed)  # type: ignore[union-attr, arg-type]
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def real_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """bool [B, T]: tokens that are not padding."""
    del args
    mask: torch.Tensor = kwargs["attention_mask"].bool()
    return mask


RECIPE = Recipe(tiny, load, batch, "ris_w8a8", options=(("row_masks", real_tokens),))
