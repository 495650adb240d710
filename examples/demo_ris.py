# SPDX-License-Identifier: Apache-2.0
"""The demo's second part: the zoo's referring-segmentation model, as numbers and as a picture."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from examples.zoo.ris.data import batches, make_sample
from examples.zoo.ris.evaluate import evaluate
from examples.zoo.ris.quantize import compile_zoo
from examples.zoo.ris.weights import load_model

Row = tuple[object, ...]
SAMPLES, SHOWN, ZOOM = 64, 6, 2
MIB = 1024**2


def ris_rows(out: Path, pipelines: tuple[str, ...] = ("int8", "ris_int4")) -> list[Row]:
    """Compile with each pipeline, save ONNX files and a picture; a row per backend."""
    model = load_model()
    inputs, _ = next(iter(batches("development", 8, 8)))
    base, scores = latency(model, inputs), evaluate(model, "development", SAMPLES)
    size = sum(p.numel() * 4 for p in model.parameters()) / MIB
    rows: list[Row] = [_row("float", "", scores, f"{size:.1f}", 1.0, "")]
    for name in pipelines:
        quantized = compile_zoo(name)
        file = quantized.to_onnx(out / f"{name}.onnx")
        parity = quantized.verify(inputs)
        for backend in ("reference", "integer", "onnx"):
            runner = quantized.lower(backend)
            shown = f"{file.size / MIB:.1f}" if backend == "onnx" else ""
            off = f"{parity.mismatches} of {parity.codes}" if backend == "integer" else ""
            ratio = latency(runner, inputs) / base
            scores = evaluate(runner, "development", SAMPLES)
            rows.append(_row(backend, name, scores, shown, ratio, off))
        picture(model, quantized.lower("integer"), out / f"{name}.png")
    return rows


def _row(backend: str, name: str, scores: Any, size: str, ratio: float, off: str) -> Row:
    values = (f"{100 * scores['miou']:.2f}", f"{100 * scores['oiou']:.2f}")
    return (f"ris {name}".strip(), backend, *values, size, f"{ratio:.2f}", off)


def latency(model: Callable[..., Any], inputs: dict[str, Tensor], *, repeats: int = 3) -> float:
    """Median seconds of one batch."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.no_grad():
            model(**inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def picture(model: Callable[..., Any], quantized: Callable[..., Any], path: Path) -> None:
    """Image, sentence, float mask and quantized mask, one row per sample."""
    inputs, masks = next(iter(batches("development", SHOWN, SHOWN)))
    with torch.no_grad():
        ours, theirs = quantized(**inputs) > 0, model(**inputs) > 0
    side = inputs["pixel_values"].shape[-1] * ZOOM
    sheet = Image.new("RGB", (4 * side + 50, SHOWN * (side + 26) + 24), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", "truth", "float", "quantized")):
        draw.text((10 + column * (side + 10), 6), title, fill="black")
    for row in range(SHOWN):
        sample = make_sample("development", row)
        image = torch.from_numpy(sample.scene.image)
        top = 24 + row * (side + 26)
        for column, mask in enumerate((None, masks[row], theirs[row], ours[row])):
            tile = _tile(image, None if mask is None else mask[0], side)
            sheet.paste(tile, (10 + column * (side + 10), top))
        draw.text((10, top + side + 4), sample.sentence, fill="black")
    sheet.save(path)


def _tile(image: Tensor, mask: Tensor | None, side: int) -> Image.Image:
    shown = image.clone()
    if mask is not None:
        colour = torch.tensor([1.0, 0.1, 0.2])[:, None, None]
        shown = torch.where(mask, 0.35 * shown + 0.65 * colour, 0.6 * shown)
    pixels = (shown.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
