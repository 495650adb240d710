# SPDX-License-Identifier: Apache-2.0
"""What sensitivities cost, in float sweeps: `python -m benchmarks.sensitivity_cost`.

A bottleneck residual network of 50 layers (3, 4, 6, 3 blocks), four widths for weights and inputs.
One sweep is a float forward and a backward to all inputs and weights over the same batches. CPU
time of the measurement alone, weights quantized at every width included, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import time

import torch
from torch import Tensor, nn

from qgraph.calibration.loader import adapter
from qgraph.calibration.measure_units import measure_units
from qgraph.calibration.unit_sweep import Probing
from qgraph.graph.bit_units import find_units
from qgraph.graph.encoder_decoder import find_structure
from qgraph.sensitivity import observe, ranges_of, unpinned

WIDTHS = (2, 3, 4, 8)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1), nn.ReLU(),
            nn.Conv2d(width, outputs, 1),
        )  # fmt: skip
        is_same = inputs == outputs and stride == 1
        self.short = nn.Identity() if is_same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, 4 width, H / stride, W / stride]."""
        return torch.relu(self.body(x) + self.short(x))


def network() -> nn.Module:
    """49 convolutions on the main path and a linear; four shortcuts beside."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, (count, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)):
        for block in range(count):
            stride = 2 if stage and not block else 1
            layers.append(Bottleneck(inputs, width, stride))
            inputs = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    return nn.Sequential(*layers).eval()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--side", type=int, default=160)
    parser.add_argument("--rows", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = network()
    shape = (options.batch_size, 3, options.side, options.side)
    data = [torch.randn(*shape) for _ in range(options.batches)]
    start = time.process_time()
    for images in data:
        model(images).square().sum().backward()
    sweep = time.process_time() - start
    model.zero_grad()
    module, context = observe(model, data[:1], bits=(8, 8))
    found = find_units(module, context.plan, find_structure(module), (8, 8))
    units = unpinned(found)
    start = time.process_time()
    measure_units(
        module, units.units, ranges_of(units, context), (WIDTHS, WIDTHS),
        Probing(rows=options.rows), batches=data, adapt=adapter(module),
    )  # fmt: skip
    spent = time.process_time() - start
    line = {
        "products": sum(len(u.products) for u in units.units), "widths": len(WIDTHS),
        "images": options.batches * options.batch_size, "side": options.side,
        "sweep_seconds": round(sweep, 2), "sensitivity_seconds": round(spent, 2),
        "sweeps": round(spent / sweep, 2), "host": platform.processor() or platform.machine(),
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
