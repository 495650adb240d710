# SPDX-License-Identifier: Apache-2.0
"""A model of one's own, from training to integers: find discs in noise.

python -m examples.my_model                 # trains for seconds, quantizes, writes out/
qgraph compile examples/my_model.py:build --data examples/my_model.py:loader -o out/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qgraph


class DiscFinder(nn.Module):
    """Images [B, 3, 32, 32] to mask logits [B, 1, 32, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.deep = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.head = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Two levels and a skip."""
        fine = F.relu(self.norm(self.stem(images)))
        coarse = F.gelu(self.deep(F.relu(self.down(fine))))
        mask: Tensor = self.head(torch.cat([fine, self.up(coarse)], 1))
        return mask


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images with a bright disc each, and their masks."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.rand(count, 3, 1, 1, generator=draw)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    distance = (rows - 6 - 20 * places[:, 0]) ** 2 + (columns - 6 - 20 * places[:, 1]) ** 2
    masks = (distance < (3 + 4 * places[:, 2]) ** 2).float()[:, None]
    return 0.4 * torch.randn(count, 3, 32, 32, generator=draw) + masks, masks


def build(steps: int = 120) -> nn.Module:
    """A trained model in eval mode; the same each time."""
    torch.manual_seed(0)
    model = DiscFinder()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(steps):
        images, masks = scenes(16, seed=step)
        loss = F.binary_cross_entropy_with_logits(model(images), masks)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def loader() -> Iterator[Tensor]:
    """Calibration batches: 64 images that the model was not trained on."""
    return (scenes(8, seed=10_000 + batch)[0] for batch in range(8))


def iou(logits: Tensor, masks: Tensor) -> float:
    """Intersection over union of the predicted masks."""
    found, wanted = logits > 0, masks > 0.5
    return float((found & wanted).sum() / (found | wanted).sum())


def main(out: Path = Path("out/my_model")) -> dict[str, float]:
    """Train, quantize, compare, write; returns the IoU of each."""
    out.mkdir(parents=True, exist_ok=True)
    model, (images, masks) = build(), scenes(64, seed=20_000)
    with torch.no_grad():
        scores = {"float": iou(model(images), masks)}
    for name in ("int8", "w4a8", "int4"):
        quantized = qgraph.compile(model, loader(), pipeline=name)
        scores[name] = iou(quantized(images), masks)
        quantized.report.to_html(out / f"{name}.html")
        quantized.to_onnx(out / f"{name}.onnx")
    return scores


if __name__ == "__main__":
    for name, score in main().items():
        print(f"{name:6} IoU {score:.3f}")
