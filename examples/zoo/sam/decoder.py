# SPDX-License-Identifier: Apache-2.0
"""SAM's prompt encoder and two-way mask decoder, small (Kirillov et al. 2023, appendix A)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.zoo.sam.encoder import DETAIL, ChannelNorm, Embedded


class PromptEncoder(nn.Module):
    """Random Fourier features of coordinates plus a learned vector per slot label."""

    frequencies: Tensor

    def __init__(self, dim: int, image: int) -> None:
        super().__init__()
        self.image = image
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", torch.randn(2, dim // 2, generator=generator))
        # Rows: empty slot, background point, object point, top left, bottom right corner.
        self.kinds = nn.Embedding(5, dim)

    def positions(self, points: Tensor) -> Tensor:
        """Return features [..., dim] of pixel coordinates [..., 2]."""
        angles = (points * (2.0 / self.image) - 1.0) @ self.frequencies * (2 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        """Return prompt tokens [B, slots, dim]."""
        used = (labels >= 0).to(points.dtype)[..., None]
        kinds: Tensor = self.kinds(labels + 1)
        return self.positions(points) * used + kinds

    def grid(self, side: int) -> Tensor:
        """Return features [1, side*side, dim] of the middles of a map's cells."""
        axis = (torch.arange(side) + 0.5) * (self.image / side)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        return self.positions(torch.stack([x, y], dim=-1).flatten(0, 1))[None]


class CrossAttention(nn.Module):
    """Attention with separate projections and an inner width of `inner`."""

    def __init__(self, dim: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, inner // heads
        self.query = nn.Linear(dim, inner)
        self.key = nn.Linear(dim, inner)
        self.value = nn.Linear(dim, inner)
        self.project = nn.Linear(inner, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [B, queries, dim]."""
        split = (self.heads, self.head_dim)
        q = self.query(query).unflatten(-1, split).transpose(1, 2)
        k = self.key(key).unflatten(-1, split).transpose(1, 2)
        v = self.value(value).unflatten(-1, split).transpose(1, 2)
        weights = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.project((weights @ v).transpose(1, 2).flatten(2))
        return out


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves and to the image, then the image attends to the tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.among = CrossAttention(dim, dim, heads)
        self.look = CrossAttention(dim, dim // 2, heads)
        self.answer = CrossAttention(dim, dim // 2, heads)
        self.expand, self.contract = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))

    def forward(
        self, tokens: Tensor, image: Tensor, prompt: Tensor, grid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return tokens and image; `prompt` and `grid` are their positions."""
        placed = tokens + prompt
        tokens = self.norms[0](tokens + self.among(placed, placed, tokens))
        tokens = self.norms[1](tokens + self.look(tokens + prompt, image + grid, image))
        tokens = self.norms[2](tokens + self.contract(F.relu(self.expand(tokens))))
        image = self.norms[3](image + self.answer(image + grid, tokens + prompt, tokens))
        return tokens, image


class Perceptron(nn.Sequential):
    """Three linear layers with ReLU between them."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, outputs)
        )


class MaskDecoder(nn.Module):
    """Image embedding and prompt tokens to candidate masks at four times the map's side."""

    def __init__(self, dim: int, heads: int, depth: int, candidates: int) -> None:
        super().__init__()
        self.candidates = candidates
        self.outputs = nn.Embedding(candidates + 1, dim)
        self.blocks = nn.ModuleList(TwoWayBlock(dim, heads) for _ in range(depth))
        self.last = CrossAttention(dim, dim // 2, heads)
        self.last_norm = nn.LayerNorm(dim)
        self.enlarge1 = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        self.enlarge2 = nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)
        self.enlarge_norm = ChannelNorm(dim // 2)
        self.to_quarter, self.to_half = (
            nn.Conv2d(DETAIL[1], dim // 2, 1),
            nn.Conv2d(DETAIL[0], dim // 4, 1),
        )
        self.kernels = nn.ModuleList(Perceptron(dim, dim // 4) for _ in range(candidates))
        self.quality = Perceptron(dim, candidates)

    def forward(self, image: Embedded, prompt: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Return mask logits [B, candidates, 4S, 4S] and predicted IoU [B, candidates]."""
        batch, _, side, _ = image.coarse.shape
        learned = self.outputs.weight[None].expand(batch, -1, -1)
        start = torch.cat([learned, prompt], dim=1)
        tokens, pixels = start, image.coarse.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens, pixels = block(tokens, pixels, start, grid)
        tokens = self.last_norm(tokens + self.last(tokens + start, pixels + grid, pixels))
        detail = self._detail(pixels.transpose(1, 2).unflatten(2, (side, side)), image)
        kernels = torch.stack([k(tokens[:, i + 1]) for i, k in enumerate(self.kernels)], dim=1)
        masks = (kernels @ detail.flatten(2)).unflatten(2, (4 * side, 4 * side))
        return masks, self.quality(tokens[:, 0]).sigmoid()

    def _detail(self, pixels: Tensor, image: Embedded) -> Tensor:
        """Enlarge the answered map by four, adding the encoder's finer maps on the way."""
        x = self.enlarge_norm(self.enlarge1(pixels) + self.to_quarter(image.quarter))
        return F.gelu(self.enlarge2(F.gelu(x)) + self.to_half(image.half))
