# SPDX-License-Identifier: Apache-2.0
"""What statistics cost, as a share of the plain float forward (CPU time, medians of ratios).

First each statistic against the linear layer that consumes the value, at the shapes of MiniLM;
then a whole sweep over a stack of such layers against running the same graph without taps.

    OMP_NUM_THREADS=1 python -m benchmarks.statistics [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.fx import Node

from qgraph.calibration import FusedStatistics, collect, make_statistic
from qgraph.graph.trace import trace

SETS: dict[str, tuple[str, ...]] = {
    "Range": ("Range",),
    "ChannelRange": ("ChannelRange",),
    "Range+Histogram": ("Range", "Histogram"),
    "Range+Histogram+Reservoir": ("Range", "Histogram", "Reservoir"),
    "ChannelRange+Histogram": ("ChannelRange", "Histogram"),
    "ChannelHistogram": ("ChannelHistogram",),
    "Moments": ("Moments",),
    "Gram": ("Gram",),
}


class Block(nn.Module):
    """The feed-forward half of a MiniLM layer, with a projection in front."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(384, 384)
        self.up, self.down = nn.Linear(384, 1536), nn.Linear(1536, 384)
        self.norm = nn.LayerNorm(384)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 384] -> [B, T, 384]."""
        x = x + self.projection(x)
        out: Tensor = self.norm(x + self.down(nn.functional.gelu(self.up(x))))
        return out


def seconds(action: Callable[[], object]) -> float:
    """CPU seconds of all threads of the process."""
    start = time.process_time()
    action()
    return time.process_time() - start


def ratio(action: Callable[[], object], base: Callable[[], object], repeats: int) -> float:
    """Median of ratios, each of two runs directly after each other."""
    action()
    base()
    return statistics.median(seconds(action) / seconds(base) for _ in range(repeats))


def layer_ratios(repeats: int) -> dict[str, dict[str, float]]:
    """Statistics of a layer's input against the layer."""
    found: dict[str, dict[str, float]] = {}
    for features, outputs in ((384, 384), (384, 1536), (1536, 384)):
        x, layer = torch.randn(8, 64, features), nn.Linear(features, outputs)
        row = found.setdefault(f"8x64x{features} -> {outputs}", {})
        for name, kinds in SETS.items():
            fused = FusedStatistics([make_statistic(kind) for kind in kinds])
            row[name] = ratio(
                lambda fused=fused, x=x: [fused.update(x) for _ in range(10)],  # type: ignore[misc]
                lambda layer=layer, x=x: [layer(x) for _ in range(10)],  # type: ignore[misc]
                repeats,
            )
    return found


def sweep_ratios(repeats: int) -> dict[str, float]:
    """A whole sweep against the plain graph; "none" is the runner's own overhead."""
    model = nn.Sequential(*(Block() for _ in range(6))).eval()
    batches = [torch.randn(8, 64, 384) for _ in range(4)]
    module = trace(model, batches[0])
    values = [n.args[0] for n in module.graph.nodes if "linear" in str(n.target)]

    def plain() -> None:
        for batch in batches:
            module(batch)

    found = {"none": ratio(lambda: collect(module, batches, {}), plain, repeats)}
    for name, kinds in SETS.items():
        if name != "Gram":
            wanted = _wanted(values, kinds)
            found[name] = ratio(
                lambda wanted=wanted: collect(module, batches, wanted),  # type: ignore[misc]
                plain,
                repeats,
            )
    return found


def _wanted(values: list[object], kinds: tuple[str, ...]) -> Mapping[Node, FusedStatistics]:
    nodes = [value for value in values if isinstance(value, Node)]
    return {node: FusedStatistics([make_statistic(k) for k in kinds]) for node in nodes}


@torch.no_grad()
def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    layers, sweep = layer_ratios(options.repeats), sweep_ratios(options.repeats)
    if options.json:
        print(json.dumps({"layers": layers, "sweep": sweep}))
        return
    print("statistics of a layer's input, CPU time over the layer's float forward")
    for shape, row in layers.items():
        print(f"  {shape}")
        for name, value in row.items():
            print(f"    {name:28s} {value:7.1%}")
    print("a sweep with statistics on every linear input, CPU time over the plain graph")
    for name, value in sweep.items():
        print(f"    {name:28s} {value:7.3f}")


if __name__ == "__main__":
    main()
