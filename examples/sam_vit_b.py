# SPDX-License-Identifier: Apache-2.0
"""SAM ViT-B at full size with `sam_int6`: `python -m examples.sam_vit_b`.

Builds the real transformers SamModel. Its weights are random unless `--weights` names a local
folder or a hub id with real ones; time and memory are those of the real thing either way.
Prints where the time goes, what each attention was given, and how far outputs moved. What tracing,
folding and searching cost is in CPU seconds of all threads, which a busy machine does not blur.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter

import torch
from torch import Tensor
from transformers import SamConfig, SamModel

import qgraph
from qgraph.model import QuantizedModel

PASSES = ("center-keys", "fold-key-signs", "search-softmax-base")


def full_size(size: int) -> SamConfig:
    """SAM ViT-B's configuration for images of another size."""
    config = SamConfig()
    config.vision_config.image_size = config.prompt_encoder_config.image_size = size
    side = size // config.vision_config.patch_size
    config.prompt_encoder_config.image_embedding_size = side
    return config


@torch.no_grad()
def random_model(config: SamConfig) -> SamModel:
    """SAM in eval mode with random weights at which signals survive.

    The library's own start is 1e-10 for the image encoder, and zero for its position tables.
    """
    torch.manual_seed(0)
    model = SamModel(config).eval()
    for name, parameter in model.vision_encoder.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02 if "rel_pos" in name else parameter[0].numel() ** -0.5)
    return model


def load_model(weights: str | None, size: int) -> SamModel:
    """Real weights where a folder or hub id is given, else random ones at `size` pixels."""
    if weights is not None:
        return SamModel.from_pretrained(weights).eval()
    return random_model(full_size(size))


def inputs(count: int, size: int, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of one image with one point each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.randn(1, 3, size, size, generator=generator),
            "input_points": torch.rand(1, 1, 1, 2, generator=generator) * size,
        }
        for _ in range(count)
    ]


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def describe(quantized: QuantizedModel) -> None:
    """Print time per pass and what was decided."""
    for step in quantized.report.steps:
        print(f"  {step.name:22s} {step.seconds:7.1f} s  {step.nodes} nodes")
    for name in PASSES:
        counts = Counter(d.outcome for d in quantized.report.decisions if d.by == name)
        print(f"  {name:22s} {dict(counts)}")


@torch.no_grad()
def main() -> None:
    """Compile, time, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="sam_int6")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--weights", default=None)
    args = parser.parse_args()

    model = load_model(args.weights, args.size)
    size = model.config.vision_config.image_size
    data = inputs(args.images, size)
    start, cpu = time.perf_counter(), time.process_time()
    expected = model(**data[0]).pred_masks
    forward, busy = time.perf_counter() - start, time.process_time() - cpu
    print(f"SAM ViT-B at {size} pixels: {forward:.1f} s per float forward, {peak_gib():.1f} GiB")

    start, cpu = time.perf_counter(), time.process_time()
    quantized = qgraph.compile(model, data, args.pipeline, progress=False)
    total, spent = time.perf_counter() - start, time.process_time() - cpu
    print(f"{args.pipeline}: {total:.1f} s in all, {peak_gib():.1f} GiB at most")
    print(
        f"traced, folded, searched and written: {spent - len(data) * busy:.1f} s of CPU without "
        f"the {len(data)} forwards of the calibration ({len(data) * busy:.1f} s)"
    )
    describe(quantized)

    found = quantized.graph_module(**data[0]).pred_masks
    noise = (found - expected).square().sum() / expected.square().sum()
    print(f"mask logits: {-10 * torch.log10(noise).item():.1f} dB")


if __name__ == "__main__":
    main()
