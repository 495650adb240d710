# SPDX-License-Identifier: Apache-2.0
"""The three models of the ONNX benchmark: real MiniLM, a ViT-S, a conv U-Net."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Case:
    """A model with its data.

    Attributes:
        name: for the table.
        model: in eval mode.
        calibration, evaluation: batches of keyword inputs, disjoint.
        output: picks the tensor that fidelity is measured on.
        mask: rows of that tensor that count, or None for all.
        static_ops: op types handed to onnxruntime's quantize_static for an equal set, by scope.
    """

    name: str
    model: nn.Module
    calibration: list[dict[str, Tensor]]
    evaluation: list[dict[str, Tensor]]
    output: Callable[[Any], Tensor]
    mask: Callable[[dict[str, Tensor]], Tensor] | None
    static_ops: dict[str, list[str] | None]


def minilm(num_batches: int = 16) -> Case:
    """MiniLM-L6 on docstring sentences, 8 x 64 tokens."""
    from examples.minilm import calibration_batches, evaluation_batches, load_model

    return Case(
        "minilm", load_model("eager"), calibration_batches(num_batches), evaluation_batches(4),
        lambda out: out.last_hidden_state, lambda batch: batch["attention_mask"].bool(),
        {"matmul": ["MatMul", "Gemm"], "full": None},
    )  # fmt: skip


def images(count: int, channels: int, size: int, seed: int) -> Tensor:
    """Images [count, channels, size, size] with a 1/f spectrum, zero mean, unit variance."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, channels, size, size, generator=generator)
    rows = torch.fft.fftfreq(size)[:, None]
    columns = torch.fft.rfftfreq(size)[None, :]
    amplitude = 1 / (rows.square() + columns.square()).sqrt().clamp_min(1 / size)
    picture = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(size, size))
    normal: Tensor = (picture - picture.mean()) / picture.std()
    return normal


def vit(num_batches: int = 4) -> Case:
    """A ViT-S/16 with random weights: 224 x 224, 12 blocks, width 384."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536,
        attn_implementation="eager",
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).eval()
    batches = [{"pixel_values": images(2, 3, 224, seed)} for seed in range(num_batches + 2)]
    return Case(
        "vit-s", model, batches[:-2], batches[-2:], lambda out: out.last_hidden_state, None,
        {"matmul": ["MatMul", "Gemm", "Conv"], "full": None},
    )  # fmt: skip


class _Double(nn.Sequential):
    def __init__(self, c_in: int, c_out: int) -> None:
        layers: list[nn.Module] = []
        for channels in (c_in, c_out):
            layers += [
                nn.Conv2d(channels, c_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
            ]
        super().__init__(*layers)


class UNet(nn.Module):
    """A conv-BN-ReLU U-Net of four levels with transposed convolutions, 1.9 million weights."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(_Double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.merge = nn.ModuleList(_Double(2 * b, b) for _, b in pairs)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 1, H, W] of images [B, 3, H, W]."""
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        logits: Tensor = self.head(x)
        return logits


def unet(num_batches: int = 4) -> Case:
    """The U-Net on 2 x 3 x 256 x 256, batch-norm statistics of its own data."""
    torch.manual_seed(0)
    model = UNet()
    for item in model.modules():
        if isinstance(item, nn.Conv2d):
            nn.init.normal_(item.weight, std=math.sqrt(2 / (item.weight[0].numel())))
    batches = [{"x": images(2, 3, 256, seed)} for seed in range(num_batches + 2)]
    with torch.no_grad():
        for batch in batches[:2]:
            model.train()(**batch)
    return Case(
        "unet", model.eval(), batches[:-2], batches[-2:], lambda out: out, None, {"full": None}
    )


CASES: dict[str, Callable[..., Case]] = {"minilm": minilm, "vit": vit, "unet": unet}
