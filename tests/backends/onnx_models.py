# SPDX-License-Identifier: Apache-2.0
"""Tiny models and a short way from a model to a quantized graph, for the ONNX backend's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qgraph.calibration.sample import small_sample
from qgraph.context import Context
from qgraph.graph.trace import trace
from qgraph.pipeline import Fact, run_pipeline
from qgraph.pipelines import pipeline


def quantized(
    model: nn.Module, args: tuple[Any, ...], name: str = "int8",
    kwargs: dict[str, Any] | None = None, **options: Any,
) -> GraphModule:  # fmt: skip
    """The quantized graph of a model, calibrated on its sample."""
    module = trace(model.eval(), *args, **(kwargs or {}))
    context = Context(
        sample=small_sample(module, args, kwargs or {}, dynamic=True), batches=[None],
        adapt=lambda _: (args, kwargs or {}), facts=frozenset({Fact.TRACED}),
    )  # fmt: skip
    with torch.no_grad():
        run_pipeline(pipeline(name, **options), module, context)
    return module


class Mlp(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


class Attention(nn.Module):
    """Self attention, residual and norm on [B, T, C]."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape

        def split(t: Tensor) -> Tensor:
            return t.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = self.norm(x + self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        y: Tensor = x + self.mlp(x)
        return y


class ConvNet(nn.Module):
    """Conv-BN-ReLU, a residual block, a depthwise conv, pooling and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        x = torch.relu(x + self.b(self.a(x)))
        x = torch.relu(self.depth(nn.functional.max_pool2d(x, 2)))
        return {"features": x, "logits": self.head(x.mean((2, 3)))}


class Unet(nn.Module):
    """One level down, one up: transposed conv, concat of a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        deep = self.deep(nn.functional.max_pool2d(skip, 2))
        y: Tensor = self.last(torch.cat([self.up(deep), skip], 1))
        return y


class Embedded(nn.Module):
    """Token table, masked attention scores, several inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.block = Attention()

    def forward(self, input_ids: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(input_ids) * mask.unsqueeze(-1)
        y = self.block(x)
        return y, (y * mask.unsqueeze(-1)).sum(1)
