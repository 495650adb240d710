# SPDX-License-Identifier: Apache-2.0
"""Shifted-window attention and patch merging (Swin Transformer, Liu et al. 2021, sections 3.1-3.2).

Written for a fixed map side, so that indices and masks are buffers and export sees no loops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relative_index(window: int) -> Tensor:
    """Return int64 [w*w, w*w]: which row of the bias table belongs to a pair of positions."""
    axis = torch.arange(window)
    where = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
    offset = where[:, :, None] - where[:, None, :] + window - 1
    return offset[0] * (2 * window - 1) + offset[1]


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """Return fp32 [windows, w*w, w*w]: -100 between positions a shift joined."""
    band = torch.zeros(side, dtype=torch.int64)
    band[side - window : side - shift] = 1
    band[side - shift :] = 2
    area = (band[:, None] * 3 + band[None, :]).float()
    count = side // window
    area = area.view(count, window, count, window).transpose(1, 2).reshape(count * count, -1)
    return (area[:, None, :] != area[:, :, None]).float() * -100.0


class WindowAttention(nn.Module):
    """Self attention inside windows with a learned relative position bias."""

    relation: Tensor

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.area = heads, dim // heads, window * window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.position = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.register_buffer("relation", relative_index(window).flatten(), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend in x [B, windows, w*w, C]; `mask` [windows, w*w, w*w] is added to the logits."""
        split = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        query, key, value = split.permute(3, 0, 1, 4, 2, 5).unbind(0)
        logits = query * self.head_dim**-0.5 @ key.transpose(-2, -1)
        bias = self.position[self.relation].view(self.area, self.area, self.heads)
        logits = logits + bias.permute(2, 0, 1)
        if mask is not None:
            logits = logits + mask[:, None]
        out = (logits.softmax(-1) @ value).transpose(2, 3).flatten(3)
        projected: Tensor = self.project(out)
        return projected


class SwinBlock(nn.Module):
    """Pre-norm block on a square map [B, side*side, C]: (shifted) window attention, then an MLP."""

    mask: Tensor | None

    def __init__(self, dim: int, side: int, window: int, *, shift: int, heads: int) -> None:
        super().__init__()
        if side % window:
            msg = f"the map side must be a multiple of the window; got {side} and {window}"
            raise ValueError(msg)
        self.side, self.window, self.shift = side, window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, window, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)
        mask = shift_mask(side, window, shift) if shift else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        x = x + self._attend(self.norm1(x))
        hidden: Tensor = self.contract(F.gelu(self.expand(self.norm2(x))))
        return x + hidden

    def _attend(self, x: Tensor) -> Tensor:
        batch, _, dim = x.shape
        count, window = self.side // self.window, self.window
        x = x.view(batch, self.side, self.side, dim)
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(batch, count, window, count, window, dim).transpose(2, 3)
        x = self.attention(x.reshape(batch, count * count, window * window, dim), self.mask)
        x = x.view(batch, count, count, window, window, dim).transpose(2, 3)
        x = x.reshape(batch, self.side, self.side, dim)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x.reshape(batch, self.side * self.side, dim)


class PatchMerging(nn.Module):
    """Halve the map: concatenate 2x2 neighbours, normalise, project [B, N, C] to [B, N/4, D]."""

    def __init__(self, dim: int, outputs: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Merge; the map side must be even."""
        batch, _, dim = x.shape
        half = self.side // 2
        x = x.view(batch, half, 2, half, 2, dim).transpose(2, 3)
        merged: Tensor = self.reduce(self.norm(x.reshape(batch, half * half, 4 * dim)))
        return merged
