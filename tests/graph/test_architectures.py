# SPDX-License-Identifier: Apache-2.0
"""Transformers' architectures, tiny and random: traced and canonical, at another batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils._pytree import tree_structure

from qgraph.graph.canonicalize import canonicalize
from qgraph.graph.trace import trace, trace_info
from tests.graph.rewriting import assert_close, at_batch, ops, randomize

Built = tuple[nn.Module, dict[str, Any]]
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
IMAGE = {"image_size": 32, "patch_size": 8}


def pixels(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side)


def tokens() -> dict[str, Any]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(2, 47, (2, 7)), "attention_mask": mask}


def bert(attention: str) -> Built:
    config = hf.BertConfig(
        vocab_size=50, max_position_embeddings=32, attn_implementation=attention, **SMALL
    )
    return hf.BertModel(config), tokens()


def vit() -> Built:
    return hf.ViTModel(hf.ViTConfig(**SMALL, **IMAGE)), {"pixel_values": pixels()}


def resnet() -> Built:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return hf.ResNetForImageClassification(config), {"pixel_values": pixels()}


def yolos() -> Built:
    config = hf.YolosConfig(
        **SMALL, image_size=[32, 32], patch_size=8, num_detection_tokens=4, num_labels=3
    )
    return hf.YolosForObjectDetection(config), {"pixel_values": pixels()}


def segformer() -> Built:
    config = hf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    return hf.SegformerForSemanticSegmentation(config), {"pixel_values": pixels()}


def swin() -> Built:
    config = hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return hf.SwinModel(config), {"pixel_values": pixels()}


def detr() -> Built:
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        out_features=["stage2"],
    )  # fmt: skip
    config = hf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, num_queries=5, num_labels=3,
    )  # fmt: skip
    mask = torch.ones(2, 32, 32, dtype=torch.long)
    return hf.DetrForObjectDetection(config), {"pixel_values": pixels(), "pixel_mask": mask}


def sam() -> Built:
    config = hf.SamConfig(
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32,
            "image_size": 64, "patch_size": 16, "num_pos_feats": 8, "global_attn_indexes": [1],
            "window_size": 3, "output_channels": 16,
        },
        prompt_encoder_config={
            "hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    return hf.SamModel(config), {
        "pixel_values": pixels(64), "input_points": torch.rand(2, 1, 2, 2) * 64,
    }  # fmt: skip


def clipseg() -> Built:
    config = hf.CLIPSegConfig(
        text_config={
            **SMALL, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 49,
            "bos_token_id": 48, "pad_token_id": 1,
        },
        vision_config={**SMALL, **IMAGE, "num_hidden_layers": 3},
        projection_dim=16, extract_layers=[1, 2], reduce_dim=8, decoder_num_attention_heads=2,
        decoder_intermediate_size=16, conditional_layer=0,
    )  # fmt: skip
    inputs = tokens()
    inputs["input_ids"][:, -1] = 49
    return hf.CLIPSegForImageSegmentation(config), {**inputs, "pixel_values": pixels()}


def heavy(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("build", "dynamic"),
    [
        (lambda: bert("sdpa"), True),
        heavy(lambda: bert("eager"), True),
        (vit, True),
        (resnet, True),
        heavy(yolos, True),
        heavy(segformer, True),
        heavy(swin, True),
        heavy(detr, True),
        heavy(sam, True),
        heavy(clipseg, False),  # its code takes len() of its inputs
    ],
    ids=["bert", "bert-eager", "vit", "resnet", "yolos", "segformer", "swin", "detr", "sam",
         "clipseg"],
)  # fmt: skip
def test_canonical_graphs_compute_what_the_model_does(
    build: Callable[[], Built], dynamic: bool
) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    model = randomize(model)
    module = trace(model, **inputs)
    assert trace_info(module).dynamic_batch is dynamic
    assert canonicalize(module) is True
    assert canonicalize(module) is False
    assert not {"scaled_dot_product_attention", "einsum", "view", "clone", "bmm"} & set(ops(module))
    for batch in (1, 3) if dynamic else (2,):
        other = at_batch(inputs, batch)
        with torch.no_grad():
            got, want = module(**other), model(**other)
        assert tree_structure(got) == tree_structure(want)
        # a few hundred float32 roundings in another order, on values of order one
        assert_close(got, want, 2e-5)
