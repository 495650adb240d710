# SPDX-License-Identifier: Apache-2.0
"""The trained zoo as benchmark cases: the model, batches of its splits, its metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn

from benchmarks.onnx_models import Case
from examples.zoo import ris, sam, sirst, vit

Batches = Iterable[tuple[dict[str, Tensor], Any]]
Metric = Callable[[Callable[..., Any], int], float]


def _case(name: str, model: nn.Module, calibration: Batches, held_out: Batches) -> Case:
    return Case(
        name, model, [inputs for inputs, _ in calibration], [inputs for inputs, _ in held_out],
        lambda out: cast(Tensor, out[0] if isinstance(out, tuple) else out), None, {},
    )  # fmt: skip


def zoo_ris(num_batches: int = 4) -> Case:
    """Referring segmentation, 16 images a batch."""
    count = 16 * num_batches
    return _case(
        "zoo-ris", ris.load_model(), ris.batches("calibration", count, 16),
        ris.batches("development", 32, 16),
    )  # fmt: skip


def zoo_vit(num_batches: int = 4) -> Case:
    """Digit classification, 32 images a batch."""
    count = 32 * num_batches
    return _case(
        "zoo-vit", vit.load_model("vit"), vit.batches("calibration", count, 32),
        vit.batches("development", 64, 32),
    )  # fmt: skip


def zoo_sam(num_batches: int = 4) -> Case:
    """Promptable segmentation, 16 images a batch."""
    count = 16 * num_batches
    return _case(
        "zoo-sam", sam.load_model(), sam.batches("calibration", count, 16),
        sam.batches("development", 32, 16),
    )  # fmt: skip


def zoo_sirst(num_batches: int = 4) -> Case:
    """Infrared targets, residual U-Net, 8 images a batch."""

    def inputs(split: str, count: int) -> Batches:
        for image, mask in sirst.batches(split, count, 8):
            yield {"image": image}, mask

    return _case(
        "zoo-sirst", sirst.load_model("resunet"), inputs("calibration", 8 * num_batches),
        inputs("development", 16),
    )  # fmt: skip


ZOO: dict[str, Callable[[int], Case]] = {
    "zoo-ris": zoo_ris, "zoo-vit": zoo_vit, "zoo-sam": zoo_sam, "zoo-sirst": zoo_sirst,
}  # fmt: skip
METRICS: dict[str, Metric] = {
    "zoo-ris": lambda model, count: 100 * ris.evaluate(model, "development", count)["miou"],
    "zoo-vit": lambda model, count: 100 * vit.evaluate(model, "development", count)["accuracy"],
    "zoo-sam": lambda model, count: 100 * sam.evaluate(model, "development", count)["miou"],
    "zoo-sirst": lambda model, count: 100 * sirst.evaluate(model, "development", count, 8)["iou"],
}
