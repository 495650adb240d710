# SPDX-License-Identifier: Apache-2.0
"""A small network with attention, its pipeline up to the quantizers, and its reconstruction."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.calibration.loader import adapter
from qgraph.calibration.sample import small_sample
from qgraph.context import Context
from qgraph.graph.build import attribute, shallow_copy
from qgraph.graph.trace import trace
from qgraph.passes import PackWeights, ReconstructBlocks
from qgraph.pipeline import run_pipeline
from qgraph.pipelines import pipeline

FAST: dict[str, Any] = {"steps": 30, "batch": 8, "lr": 5e-2, "warm_start": False}


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 2 * dim)
        self.contract = nn.Linear(2 * dim, dim)

    def forward(self, x):
        y = self.norm(x)
        x = x + (y @ y.transpose(-2, -1)).softmax(-1) @ y
        return x + self.contract(F.gelu(self.expand(x)))


class Mixer(nn.Module):
    """Two residual blocks over tokens, with a softmax inside, and a head."""

    def __init__(self, dim=12):
        super().__init__()
        self.embed = nn.Linear(6, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.head = nn.Linear(dim, 4)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@cache
def model():
    torch.manual_seed(0)
    built = Mixer().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(1.5)
    return built


@cache
def traced():
    return trace(model(), data()[0])


def data(sizes=(16, 16, 16, 13), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(sum(sizes), 5, 6, generator=generator).split(sizes))


def prefix():
    built = pipeline("w3a4", ends_bits=4)
    return dataclasses.replace(built, passes=built.passes[: built.index("insert-quantizers") + 1])


@cache
def inserted():
    """The graph behind insert-quantizers."""
    module = shallow_copy(traced())
    context = context_of(module)
    run_pipeline(prefix(), module, context)
    return module, context.facts


def context_of(module, **options):
    return Context(
        sample=small_sample(module, (data()[0],), {}, dynamic=True),
        adapt=adapter(module), facts=frozenset({"traced"}), **{"batches": data(), **options},
    )  # fmt: skip


def reconstructed(**options):
    """Run only the pass, on a copy of the quantized graph."""
    start, facts = inserted()
    module = shallow_copy(start)
    keys = ("cache_dir", "seed", "max_memory", "progress", "batches")
    given = {k: options.pop(k) for k in keys if k in options}
    context = context_of(module, **given)
    context.facts = facts
    item = ReconstructBlocks(**{**FAST, **options})
    changed = item.run(module, context)
    module.recompile()
    return module, context, changed


def outcomes(context):
    return [d for d in context.decisions if d.by == "reconstruct-blocks" and d.numbers]


def weight_codes(module):
    """Codes of all weights, packed or still to be packed."""
    packed = shallow_copy(module)
    PackWeights().run(packed, context_of(packed))
    return {
        n.name.partition("_codes")[0]: attribute(packed, str(n.target))
        for n in packed.graph.nodes
        if n.op == "get_attr" and "_codes" in str(n.target)
    }


def same(left, right):
    return all(torch.equal(left(b), right(b)) for b in data(seed=1))
