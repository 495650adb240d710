# SPDX-License-Identifier: Apache-2.0
"""A ViT (Dosovitskiy et al. 2021) and a Swin-like classifier, both under four MiB of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.zoo.convolutions import ConvUnit
from examples.zoo.vit.data import IMAGE_SIZE, NUM_CLASSES
from examples.zoo.windows import PatchMerging, SwinBlock

Kind = Literal["vit", "swin"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Attention(nn.Module):
    """Multi-head self attention over tokens [B, N, C] with one fused projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        split = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query * self.head_dim**-0.5 @ key.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.project((weights @ value).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        x = x + self.attention(self.norm1(x))
        hidden: Tensor = self.contract(F.gelu(self.expand(self.norm2(x))))
        return x + hidden


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, blocks, a linear head on the class token."""

    def __init__(self, *, dim: int = 96, depth: int = 6, heads: int = 4, patch: int = 6) -> None:
        super().__init__()
        tokens = (IMAGE_SIZE // patch) ** 2
        # Two early convolutions; from bare patches a thousand digits teach strokes only slowly.
        self.stem = nn.Sequential(ConvUnit(3, 16, stride=2), ConvUnit(16, 32))
        self.embed = nn.Conv2d(32, dim, patch // 2, stride=patch // 2)
        self.first = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, tokens + 1, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, NUM_CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return class logits [B, 10] for images [B, 3, 48, 48]."""
        logits: Tensor = self.head(self.tokens(pixel_values)[:, 0])
        return logits

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """Return normalised tokens [B, 65, dim], the class token first."""
        patches = self.embed(self.stem(pixel_values)).flatten(2).transpose(1, 2)
        first = self.first.expand(patches.shape[0], -1, -1)
        x = self.blocks(torch.cat([first, patches], dim=1) + self.position)
        normed: Tensor = self.norm(x)
        return normed


class SwinClassifier(nn.Module):
    """Shifted-window stages with patch merging between them, mean pooling, a linear head."""

    def __init__(
        self,
        *,
        dims: tuple[int, ...] = (48, 96, 144),
        depths: tuple[int, ...] = (2, 2, 2),
        patch: int = 3,
        window: int = 4,
        head_dim: int = 16,
    ) -> None:
        super().__init__()
        self.stem = ConvUnit(3, 16)
        self.embed = nn.Conv2d(16, dims[0], patch, stride=patch)
        self.embed_norm = nn.LayerNorm(dims[0])
        layers: list[nn.Module] = []
        side = IMAGE_SIZE // patch
        for number, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if number:
                layers.append(PatchMerging(dims[number - 1], dim, side))
                side //= 2
            for i in range(depth):
                shift = (i % 2) * (window // 2) if side > window else 0
                layers.append(SwinBlock(dim, side, window, shift=shift, heads=dim // head_dim))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], NUM_CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return class logits [B, 10] for images [B, 3, 48, 48]."""
        logits: Tensor = self.head(self.tokens(pixel_values).mean(1))
        return logits

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """Return normalised tokens [B, 16, dim]."""
        x = self.embed_norm(self.embed(self.stem(pixel_values)).flatten(2).transpose(1, 2))
        normed: Tensor = self.norm(self.layers(x))
        return normed


Classifier = VisionTransformer | SwinClassifier
BUILDERS: dict[Kind, Callable[[], Classifier]] = {
    "vit": VisionTransformer,
    "swin": SwinClassifier,
}
