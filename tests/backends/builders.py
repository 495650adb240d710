# SPDX-License-Identifier: Apache-2.0
"""Tiny models, and a min-max quantizer of their traced graphs, for backend tests."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from qgraph import passes
from qgraph.context import Context
from qgraph.formats import AffineEncoding, Encoding, IntGrid
from qgraph.graph.canonicalize import canonicalize
from qgraph.graph.plan import Role, Site
from qgraph.graph.trace import trace
from qgraph.graph.verify import Sample

Chooser = Callable[[Site, Tensor], Encoding]


def affine(values: Tensor, bits: int = 8, *, signed: bool = False, shrink: float = 1.0) -> Encoding:
    """Per-tensor min-max encoding; `shrink` below 1 lets both ends saturate."""
    grid = IntGrid(bits, signed=signed)
    low, high = min(float(values.min()), 0.0) * shrink, max(float(values.max()), 0.0) * shrink
    scale = max((high - low) / (grid.qmax - grid.qmin), 1e-6)
    zero = min(max(round(grid.qmin - low / scale), grid.qmin), grid.qmax)
    return AffineEncoding.per_tensor(scale, zero, grid)


def per_channel(weight: Tensor, axis: int, bits: int = 8) -> AffineEncoding:
    """Symmetric min-max encoding per channel of `axis`."""
    grid = IntGrid(bits, signed=True, narrow=True)
    peak = weight.movedim(axis, 0).flatten(1).abs().amax(1).clamp_min(1e-6)
    return AffineEncoding.symmetric(peak / grid.qmax, grid, axis % weight.ndim)


def minmax(site: Site, values: Tensor) -> Encoding:
    """8 bits, weights per channel, activations per tensor with some saturation."""
    if site.role is Role.WEIGHT:
        if site.axis is None:
            return affine(values, signed=True)
        return per_channel(values, site.axis)
    return affine(values, shrink=0.8)


def signed(site: Site, values: Tensor) -> Encoding:
    """The same with signed activations."""
    return minmax(site, values) if site.role is Role.WEIGHT else affine(values, signed=True)


def quantize(
    model: nn.Module, inputs: tuple[Any, ...], choose: Chooser = minmax, *, pack: bool = True,
    hoist: bool = True, scope: str | tuple[str, ...] = "full",
) -> GraphModule:  # fmt: skip
    """Trace, canonicalise, and quantize every site of the plan from one batch."""
    module = copy.deepcopy(_traced(model, inputs))
    context = Context(sample=Sample(inputs), batches=[])
    passes.PlanSites(scope=scope).run(module, context)
    recorder = Interpreter(module, garbage_collect_values=False)
    with torch.no_grad():
        recorder.run(*inputs)
    shared: dict[tuple[Node, Role], Encoding] = {}
    for site in context.plan:
        key = (site.value, site.role)
        if key not in shared:
            shared[key] = choose(site, recorder.env[site.value])
        site.decide(shared[key], "test")
    steps: list[Any] = [passes.InsertQuantizers()]
    steps += [passes.HoistQuantizers()] if hoist else []
    steps += [passes.QuantizeBiases()]
    steps += [passes.PackWeights()] if pack else []
    for step in steps:
        step.run(module, context)
    module.graph.lint()
    module.recompile()
    return module


_TRACED: dict[nn.Module, GraphModule] = {}


def _traced(model: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    """Tracing takes longer than anything tested here, so once per model."""
    if model not in _TRACED:
        _TRACED[model] = trace(model.eval(), *inputs)
        canonicalize(_TRACED[model])
    return _TRACED[model]


class ConvNet(nn.Module):
    """conv-bn-relu, depthwise, dilated, grouped, strided, transposed, residual, concat, pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.wide = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.head = nn.Conv2d(20, 2, 1)
        self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
        self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = F.relu(self.norm(self.stem(x)))
        b = F.relu6(self.depthwise(a)) + a
        c = F.silu(self.dilated(b))
        d = self.up(F.relu(self.down(F.max_pool2d(c, 2))))
        d = F.interpolate(d, scale_factor=2.0, mode="nearest")
        e = self.wide(F.avg_pool2d(b, 2))
        return {"mask": self.head(torch.cat([d, b, e], 1)), "features": c}


class Attention(nn.Module):
    """A transformer block: fused qkv, attention, residuals, LayerNorm, GELU."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.last(x)))), weights


class Sequence(nn.Module):
    """conv1d, a constant right operand, a shared layer called twice, sigmoid between quantizers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.matrix: Tensor
        self.shared = nn.Linear(8, 8)
        self.register_buffer("matrix", torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).transpose(1, 2)
        y = torch.sigmoid(self.shared(torch.relu(self.shared(y))))
        return torch.tanh(y * 0.5) @ self.matrix


@functools.cache
def models() -> list[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    """Name, model and inputs, seeded; each bias is zero in one channel."""
    torch.manual_seed(0)
    made: list[tuple[str, nn.Module, tuple[Tensor, ...]]] = [
        ("convolutions", ConvNet(), (torch.randn(2, 3, 16, 16),)),
        ("attention", Attention(), (torch.randn(2, 10, 32),)),
        ("sequence", Sequence(), (torch.randn(2, 6, 12),)),
    ]
    for _, model, _ in made:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data[0] = 0.0
    return made
