# SPDX-License-Identifier: Apache-2.0
"""The trained zoo as benchmark cases: the model, batches of its splits, its metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from benchmarks.onnx_models import Case
from examples.zoo import ris, sam, sirst, vit
from examples.zoo.splits import Split

Batches = Iterable[tuple[dict[str, Tensor], Any]]
Metric = Callable[[Callable[..., Any], Split, int], float]


def _images(split: str, count: int, size: int) -> Batches:
    for image, mask in sirst.batches(split, count, size):
        yield {"image": image}, mask


# Model, its data, images of a batch.
_ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[..., Batches], int]] = {
    "zoo-ris": (ris.load_model, ris.batches, 16),
    "zoo-vit": (lambda: vit.load_model("vit"), vit.batches, 32),
    "zoo-sam": (sam.load_model, sam.batches, 16),
    "zoo-sirst": (lambda: sirst.load_model("resunet"), _images, 8),
}


def _case(name: str, num_batches: int) -> Case:
    load, batches, size = _ZOO[name]
    return Case(
        name, load(), [inputs for inputs, _ in batches("calibration", size * num_batches, size)],
        [inputs for inputs, _ in batches("development", 2 * size, size)],
        lambda out: cast(Tensor, out[0] if isinstance(out, tuple) else out), None, {},
    )  # fmt: skip


ZOO: dict[str, Callable[[int], Case]] = {name: partial(_case, name) for name in _ZOO}
METRICS: dict[str, Metric] = {  # percent
    "zoo-ris": lambda model, split, count: 100 * ris.evaluate(model, split, count)["miou"],
    "zoo-vit": lambda model, split, count: 100 * vit.evaluate(model, split, count)["accuracy"],
    "zoo-sam": lambda model, split, count: 100 * sam.evaluate(model, split, count)["miou"],
    "zoo-sirst": lambda model, split, count: 100 * sirst.evaluate(model, split, count, 8)["iou"],
}
