# SPDX-License-Identifier: Apache-2.0
"""The full-size SAM example, on a SAM of the same code and a fraction of the size."""

from __future__ import annotations

import pytest
import torch

import qgraph
from examples.sam_vit_b import describe, inputs, random_model

pytest.importorskip("transformers")
SIZE = 64


def test_sam_compiles_and_every_attention_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import SamConfig

    model = random_model(
        SamConfig(
            vision_config={
                "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "mlp_dim": 64,
                "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8, "window_size": 3,
                "global_attn_indexes": [1], "num_pos_feats": 8,
            },
            prompt_encoder_config={
                "hidden_size": 16, "image_size": SIZE, "patch_size": 8, "mask_input_channels": 4,
            },
            mask_decoder_config={
                "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "iou_head_depth": 2,
                "num_attention_heads": 2, "iou_head_hidden_dim": 16,
            },
        )
    )  # fmt: skip
    data = inputs(2, SIZE)
    quantized = qgraph.compile(model, data, "sam_int8", progress=False)
    attentions = 2 + 3 + 1  # encoder; per decoder layer: self, to image, to tokens; the last look
    for name in ("center-keys", "fold-key-signs", "search-softmax-base"):
        assert len({d.site for d in quantized.report.decisions if d.by == name}) == attentions
    describe(quantized)
    assert "search-softmax-base" in capsys.readouterr().out
    with torch.no_grad():
        expected = model(**data[0]).pred_masks
        found = quantized.graph_module(**data[0]).pred_masks
    assert float((found - expected).square().sum() / expected.square().sum()) < 0.1
