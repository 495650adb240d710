# SPDX-License-Identifier: Apache-2.0
"""SAM's image encoder, small: a ViT with windowed and global attention and decomposed relative
positions (Li et al. 2022, MViTv2, equation 4; Kirillov et al. 2023, appendix A).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.zoo.convolutions import ConvUnit

# Channels of the maps at a half and a quarter of the image's side.
DETAIL = (16, 32)


class Embedded(NamedTuple):
    """An encoded image: embedding [B, C, S, S], finer maps [B, 32, 2S, 2S], [B, 16, 4S, 4S]."""

    coarse: Tensor
    quarter: Tensor
    half: Tensor


class RelativeAttention(nn.Module):
    """Attention inside square windows; position bias = query times two tables."""

    rows: Tensor

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.side = heads, dim // heads, side
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.vertical = nn.Parameter(torch.zeros(2 * side - 1, self.head_dim))
        self.horizontal = nn.Parameter(torch.zeros(2 * side - 1, self.head_dim))
        axis = torch.arange(side)
        rows = axis[:, None] - axis[None, :] + side - 1
        self.register_buffer("rows", rows.flatten(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend in x [B, windows, side*side, C]."""
        split = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        query, key, value = split.permute(3, 0, 1, 4, 2, 5).unbind(0)
        logits = query * self.head_dim**-0.5 @ key.transpose(-2, -1) + self._positions(query)
        out = (logits.softmax(-1) @ value).transpose(2, 3).flatten(3)
        projected: Tensor = self.project(out)
        return projected

    def _positions(self, query: Tensor) -> Tensor:
        """Return the bias [B, windows, heads, side*side, side*side]."""
        side = self.side
        grid = query.unflatten(3, (side, side))  # [B, windows, heads, y, x, C]
        tall = self.vertical[self.rows].view(side, side, self.head_dim).transpose(1, 2)
        wide = self.horizontal[self.rows].view(side, side, self.head_dim).transpose(1, 2)
        by_row = grid @ tall
        by_column = (grid.transpose(3, 4) @ wide).transpose(3, 4)
        bias = by_row[..., :, None] + by_column[..., None, :]
        flat: Tensor = bias.flatten(5, 6).flatten(3, 4)
        return flat


class EncoderBlock(nn.Module):
    """Pre-norm block on a square map [B, side, side, C]; window == side means global attention."""

    def __init__(self, dim: int, heads: int, side: int, window: int) -> None:
        super().__init__()
        self.side, self.window = side, window
        self.norm1 = nn.LayerNorm(dim)
        self.attention = RelativeAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        x = x + self._attend(self.norm1(x))
        hidden: Tensor = self.contract(F.gelu(self.expand(self.norm2(x))))
        return x + hidden

    def _attend(self, x: Tensor) -> Tensor:
        batch, _, _, dim = x.shape
        count, window = self.side // self.window, self.window
        x = x.view(batch, count, window, count, window, dim).transpose(2, 3)
        x = self.attention(x.reshape(batch, count * count, window * window, dim))
        x = x.view(batch, count, count, window, window, dim).transpose(2, 3)
        return x.reshape(batch, self.side, self.side, dim)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position."""
        normed = super().forward(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class ImageEncoder(nn.Module):
    """Images [B, 3, H, W] to embeddings [B, outputs, H / patch, W / patch] and two finer maps.

    The finer maps, a half and a quarter of the image's side, serve the mask decoder (as in SAM 2):
    strokes of small digits are thinner than a patch.
    """

    def __init__(
        self,
        *,
        image: int,
        patch: int,
        dim: int,
        heads: int,
        windows: tuple[int, ...],
        outputs: int,
    ) -> None:
        super().__init__()
        side = image // patch
        self.to_half, self.to_quarter = (
            ConvUnit(3, DETAIL[0], stride=2),
            ConvUnit(*DETAIL, stride=2),
        )
        self.embed = nn.Conv2d(DETAIL[1], dim, patch // 4, stride=patch // 4)
        self.position = nn.Parameter(torch.zeros(1, side, side, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads, side, w) for w in windows))
        self.neck = nn.Sequential(
            nn.Conv2d(dim, outputs, 1, bias=False),
            ChannelNorm(outputs),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            ChannelNorm(outputs),
        )

    def forward(self, pixels: Tensor) -> Embedded:
        """Encode."""
        half = self.to_half(pixels)
        quarter = self.to_quarter(half)
        x = self.embed(quarter).permute(0, 2, 3, 1) + self.position
        return Embedded(self.neck(self.blocks(x).permute(0, 3, 1, 2)), quarter, half)
