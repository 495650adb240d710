# SPDX-License-Identifier: Apache-2.0
"""A small LAVT-like model: a windowed vision encoder that reads the sentence at every stage.

Stages of shifted-window blocks (Swin), each followed by cross attention from pixels to words
whose result is gated into the pixel stream (LAVT, PWAM and language gate), then a decoder of
3x3 conv, batch norm, ReLU and bilinear upsampling over the stages' fused maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.zoo.convolutions import ConvUnit
from examples.zoo.ris.text import TEXT_DIM
from examples.zoo.windows import PatchMerging, SwinBlock


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the model; `image` must be 4 * 2^(stages-1) times an integer."""

    image: int = 80
    window: int = 5
    dims: tuple[int, ...] = (48, 96, 160)
    depths: tuple[int, ...] = (2, 2, 2)
    head_dim: int = 16
    decoder: tuple[int, ...] = (64, 48, 16, 8)


class WordAttention(nn.Module):
    """Pixel-word attention: pixels [B, N, C] and words [B, T, 384] to language maps [B, N, C]."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = dim // head_dim, head_dim
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(TEXT_DIM, dim)
        self.value = nn.Linear(TEXT_DIM, dim)
        self.visual = nn.Linear(dim, dim)
        self.mix = nn.Linear(dim, dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, pixels: Tensor, words: Tensor, bias: Tensor) -> Tensor:
        """Attend; `bias` [B, 1, 1, T] is 0 for words and very negative for padding."""
        normed = self.norm(pixels)
        query = self.query(normed).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        key = self.key(words).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        value = self.value(words).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        logits = query @ key.transpose(-2, -1) * self.head_dim**-0.5 + bias
        said = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        said = self.mix(said)
        projected: Tensor = self.project(F.gelu(F.gelu(self.visual(normed)) * said))
        return projected


class Stage(nn.Module):
    """Window blocks on a square map, then the language gate."""

    def __init__(self, dim: int, depth: int, side: int, window: int, head_dim: int) -> None:
        super().__init__()
        shifts = [(i % 2) * (window // 2) if side > window else 0 for i in range(depth)]
        self.blocks = nn.ModuleList(
            SwinBlock(dim, side, window, shift=shift, heads=dim // head_dim) for shift in shifts
        )
        self.words = WordAttention(dim, head_dim)
        self.gate = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.Tanh())

    def forward(self, x: Tensor, words: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the visual map, the language map and the gated sum, each [B, N, C]."""
        for block in self.blocks:
            x = block(x)
        said = self.words(x, words, bias)
        return x, said, x + self.gate(said) * said


class Decoder(nn.Module):
    """Joins maps from coarse to fine; each step upsamples by two and adds a finer map."""

    def __init__(
        self, maps: tuple[int, ...], widths: tuple[int, ...], sides: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.sides = sides
        inputs = (maps[0], *widths[:-1])
        self.units = nn.ModuleList(
            nn.Sequential(ConvUnit(before + extra, width), ConvUnit(width, width))
            if number < 2
            else ConvUnit(before + extra, width)
            for number, (before, extra, width) in enumerate(
                zip(inputs, maps[1:], widths, strict=True)
            )
        )
        self.head = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return logits [B, 1, H, W]."""
        logits: Tensor = self.head(self.steps(maps)[-1])
        return logits

    def steps(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the maps after every step that `maps` has a finer map for."""
        x, steps = maps[0], []
        for unit, extra, side in zip(self.units, maps[1:], self.sides, strict=False):
            x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
            x = unit(torch.cat([x, extra], dim=1))
            steps.append(x)
        return steps


class Maps(NamedTuple):
    """The encoder's token maps before fusion, and maps for the decoder, coarse first."""

    visual: list[Tensor]
    fused: list[Tensor]


class Segmenter(nn.Module):
    """The trained part: image and word features to mask logits."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        dims, image = layout.dims, layout.image
        self.sides = [image // (4 * 2**i) for i in range(len(dims))]
        self.detail = ConvUnit(3, 8)
        self.detail_half = ConvUnit(8, 16, stride=2)
        # Early convolutions: with a bare patch embedding the digits' classes are learned late.
        self.stem = nn.Sequential(ConvUnit(16, 32, stride=2), ConvUnit(32, 48))
        self.embed = nn.Conv2d(48, dims[0], 1)
        self.embed_norm = nn.LayerNorm(dims[0])
        self.stages = nn.ModuleList(
            Stage(dim, depth, side, layout.window, layout.head_dim)
            for dim, depth, side in zip(dims, layout.depths, self.sides, strict=True)
        )
        self.merges = nn.ModuleList(
            PatchMerging(dims[i], dims[i + 1], self.sides[i]) for i in range(len(dims) - 1)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        finer = (*self.sides[-2::-1], image // 2, image)
        self.decoder = Decoder((*dims[::-1], 16, 8), layout.decoder, finer)

    def forward(self, pixels: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Return mask logits [B, 1, H, W]; `words` [B, T, 384], `mask` [B, T] with 1 for words."""
        logits: Tensor = self.decoder(self.encode(pixels, words, mask).fused)
        return logits

    def encode(self, pixels: Tensor, words: Tensor, mask: Tensor) -> Maps:
        """Run everything before the decoder."""
        bias = ((1.0 - mask.to(words.dtype)) * -10000.0)[:, None, None, :]
        detail = self.detail(pixels)
        half = self.detail_half(detail)
        x = self.embed_norm(self.embed(self.stem(half)).flatten(2).transpose(1, 2))
        visual, fused = [], []
        for number, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            seen, said, x = stage(x, words, bias)
            visual.append(seen)
            fused.append(self._to_map(norm(said), number))
            if number < len(self.merges):
                x = self.merges[number](x)
        return Maps(visual, [*fused[::-1], half, detail])

    def _to_map(self, tokens: Tensor, number: int) -> Tensor:
        side = self.sides[number]
        grid: Tensor = tokens.transpose(1, 2).unflatten(2, (side, side))
        return grid


class ReferringSegmentation(nn.Module):
    """Sentence and image to mask logits; the text encoder is frozen and always in eval mode."""

    def __init__(self, text: nn.Module, layout: Layout | None = None) -> None:
        super().__init__()
        self.layout = layout or Layout()
        self.text = text
        self.segmenter = Segmenter(self.layout)

    def train(self, mode: bool = True) -> ReferringSegmentation:
        """Switch the trained part only."""
        super().train(mode)
        self.text.eval()
        return self

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits fp32 [B, 1, H, W] for images [B, 3, H, W] and tokens int64 [B, T]."""
        words = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.segmenter(pixel_values, words, attention_mask)
        return logits
