# SPDX-License-Identifier: Apache-2.0
"""A small SAM: image encoder, prompt encoder, two-way mask decoder with an IoU head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.zoo.sam.data import IMAGE_SIZE
from examples.zoo.sam.decoder import MaskDecoder, PromptEncoder
from examples.zoo.sam.encoder import Embedded, ImageEncoder

# Window sides on the 10x10 map; 10 is global attention.
WINDOWS = (5, 5, 10, 5, 5, 10)


class PromptableSegmentation(nn.Module):
    """Forward takes pixel_values, points and labels (see `examples.zoo.sam.data`)."""

    def __init__(self, *, dim: int = 128, heads: int = 4, outputs: int = 96) -> None:
        super().__init__()
        self.encoder = ImageEncoder(
            image=IMAGE_SIZE, patch=8, dim=dim, heads=heads, windows=WINDOWS, outputs=outputs
        )
        self.prompts = PromptEncoder(outputs, IMAGE_SIZE)
        self.no_mask = nn.Parameter(torch.zeros(1, outputs, 1, 1))
        self.decoder = MaskDecoder(outputs, heads=4, depth=2, candidates=3)

    def forward(
        self, pixel_values: Tensor, points: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mask logits fp32 [B, 3, H, W] and the IoU predicted for each, [B, 3]."""
        masks, quality = self.decode(self.encoder(pixel_values), points, labels)
        size = (IMAGE_SIZE, IMAGE_SIZE)
        return F.interpolate(masks, size=size, mode="bilinear", align_corners=False), quality

    def decode(self, embedded: Embedded, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Decode prompts on embeddings [B, C, 10, 10] to masks [B, 3, 40, 40] and quality."""
        grid = self.prompts.grid(IMAGE_SIZE // 8)
        prompt = self.prompts(points, labels)
        image = embedded._replace(coarse=embedded.coarse + self.no_mask)
        masks, quality = self.decoder(image, prompt, grid)
        return masks, quality


def best_mask(masks: Tensor, quality: Tensor) -> Tensor:
    """Return the candidate with the highest predicted IoU, bool [B, 1, H, W]."""
    pick = quality.argmax(1)[:, None, None, None].expand(-1, 1, *masks.shape[2:])
    return masks.gather(1, pick) > 0
