# SPDX-License-Identifier: Apache-2.0
"""Sample images of segmentation models: the float model's mask beside the quantized one's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from qgraph.graph.verify import Sample
from qgraph.report.png import png

SIDE, MOST = 128, 3
_COLOURS = torch.tensor([
    [0, 0, 0], [31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189],
    [140, 86, 75], [227, 119, 194], [188, 189, 34], [23, 190, 207],
], dtype=torch.float32)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SampleImage:
    """One image; pictures are base64 PNG.

    Attributes:
        picture: the input. exact, quantized: it with the masks. difference: where they differ.
        agreement: share of pixels with the same class.
    """

    picture: str
    exact: str
    quantized: str
    difference: str
    agreement: float

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SampleImage:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: the data is something else, or no base64 text.
        """
        pictures = {k: str(data[k]) for k in ("picture", "exact", "quantized", "difference")}
        for text in pictures.values():
            if not set(text) <= _BASE64:
                msg = "a picture is no base64 text"
                raise ValueError(msg)
        return cls(**pictures, agreement=float(data["agreement"]))


_BASE64 = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")


def sample_images(
    reference: GraphModule, quantized: GraphModule, sample: Sample
) -> tuple[SampleImage, ...]:
    """Up to three images with both models' masks; empty for other models."""
    pair = next(_pairs(quantized), None)
    if pair is None:
        return ()
    inputs = tree_leaves((sample.args, sample.kwargs))
    with torch.no_grad():
        exact = tree_leaves(reference(*sample.args, **sample.kwargs))[pair[1]]
        got = tree_leaves(quantized(*sample.args, **sample.kwargs))[pair[1]]
    image = inputs[pair[0]]
    if exact.shape != got.shape or exact.shape[0] < image.shape[0]:
        return ()
    masks = zip(image, _classes(exact), _classes(got), strict=False)
    return tuple(_shown(*each) for each, _ in zip(masks, range(MOST), strict=False))


def _pairs(module: GraphModule) -> Iterator[tuple[int, int]]:
    """(place among the inputs, place among the outputs) of images and maps."""
    holders = [n for n in module.graph.nodes if n.op == "placeholder"]
    output = next(n for n in module.graph.nodes if n.op == "output")
    images = [(i, n.meta.get("val")) for i, n in enumerate(holders)]
    results = tree_leaves(output.args[0])
    for at, image in images:
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] not in {1, 3}:
            continue
        tall, wide = (_int(s) for s in image.shape[-2:])
        if min(tall, wide) < 16:
            continue
        for place, node in enumerate(results):
            value = getattr(node, "meta", {}).get("val")
            if _is_map(value, tall, wide):
                yield at, place


def _is_map(value: object, tall: int, wide: int) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim not in {3, 4}:
        return False
    rows, columns = (_int(s) for s in value.shape[-2:])
    if min(rows, columns) < 8 or rows * wide != columns * tall:
        return False
    return value.ndim == 3 or _int(value.shape[1]) <= 32


def _int(size: Any) -> int:
    return size if isinstance(size, int) else 0


def _classes(logits: Tensor) -> Tensor:
    """int64 [B, h, w]: the largest channel; of one, above 0, or above 1/2 for probabilities."""
    logits = logits.float()
    if logits.ndim == 4 and logits.shape[1] > 1:
        return logits.argmax(1)
    plane = logits if logits.ndim == 3 else logits[:, 0]
    inside = bool((plane >= 0).all()) and bool((plane <= 1).all())
    return (plane > (0.5 if inside else 0.0)).long()


def _shown(image: Tensor, exact: Tensor, got: Tensor) -> SampleImage:
    picture = image.detach().float().cpu()
    low, high = picture.amin(), picture.amax()
    picture = ((picture - low) / (high - low).clamp(min=1e-12)).expand(3, -1, -1)
    tall, wide = picture.shape[-2:]
    size = (max(1, SIDE * tall // max(tall, wide)), max(1, SIDE * wide // max(tall, wide)))
    picture = F.interpolate(picture[None], size=size, mode="area")[0].movedim(0, -1) * 255
    first, second = (_resized(mask, size) for mask in (exact, got))
    wrong = torch.where((first != second)[..., None], torch.tensor([255.0, 0, 60]), picture * 0.35)
    return SampleImage(
        picture=png(picture), exact=png(_painted(picture, first)),
        quantized=png(_painted(picture, second)), difference=png(wrong),
        agreement=float((exact == got).double().mean()),
    )  # fmt: skip


def _resized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(mask[None, None].float().cpu(), size=size, mode="nearest")[0, 0].long()


def _painted(picture: Tensor, mask: Tensor) -> Tensor:
    colour = _COLOURS[torch.where(mask > 0, (mask - 1) % 9 + 1, 0)]
    return torch.where((mask > 0)[..., None], 0.45 * picture + 0.55 * colour, picture * 0.8)
