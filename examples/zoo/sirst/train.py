# SPDX-License-Identifier: Apache-2.0
"""Train a network on generated scenes: `python -m examples.zoo.sirst.train --model resunet`.

Crops of 64 px, mostly around targets; binary cross-entropy plus soft IoU; AdamW under a OneCycle
schedule. Convolutions run in bfloat16, weights stay float32. About eight minutes on one CPU thread
with bfloat16 units. Scenes are generated once and kept in memory.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.zoo.sirst.scenes import SIZE, scene
from examples.zoo.sirst.scoring import MODELS, WEIGHTS, build, evaluate

CROP = 64
STEPS = {"resunet": 4400, "nested": 1700}
PEAK_RATE = 4e-3


@dataclass(frozen=True, slots=True)
class SceneCache:
    """Generated scenes in memory.

    Attributes:
        images: float32 [N, SIZE, SIZE].
        masks: bool [N, SIZE, SIZE].
    """

    images: NDArray[np.float32]
    masks: NDArray[np.bool_]

    @classmethod
    def generate(cls, count: int, *, seed: int = 0) -> SceneCache:
        """Generate the first `count` training scenes."""
        scenes = [scene("train", index, seed=seed) for index in range(count)]
        return cls(np.stack([s.image for s in scenes]), np.stack([s.mask for s in scenes]))

    def crops(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Return `count` flipped and turned crops, float32 [count, 1, CROP, CROP] twice."""
        images: list[NDArray[np.float32]] = []
        masks: list[NDArray[np.float32]] = []
        for index in rng.integers(0, len(self.images), count):
            top, left = self._corner(rng, self.masks[index])
            window = np.s_[top : top + CROP, left : left + CROP]
            turns, is_flipped = int(rng.integers(0, 4)), rng.random() < 0.5
            for out, field in ((images, self.images[index]), (masks, self.masks[index])):
                patch = np.rot90(field[window].astype(np.float32), turns)
                out.append(patch[:, ::-1] if is_flipped else patch)
        return (
            torch.from_numpy(np.stack(images)).unsqueeze(1),
            torch.from_numpy(np.stack(masks)).unsqueeze(1),
        )

    @staticmethod
    def _corner(rng: np.random.Generator, mask: NDArray[np.bool_]) -> tuple[int, int]:
        """Return the corner of a crop, which contains a target four times out of five."""
        room = SIZE - CROP
        if not mask.any() or rng.random() < 0.2:
            top, left = rng.integers(0, room + 1, 2)
            return int(top), int(left)
        row, column = rng.choice(np.argwhere(mask))
        draw = [int(at - rng.integers(4, CROP - 4)) for at in (row, column)]
        return min(max(draw[0], 0), room), min(max(draw[1], 0), room)


def soft_iou_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return 1 - IoU of the probabilities over the whole batch; one scalar."""
    probability = torch.sigmoid(logits)
    intersection = (probability * masks).sum()
    return 1.0 - (intersection + 1.0) / (probability.sum() + masks.sum() - intersection + 1.0)


def loss_of(logits: Tensor, masks: Tensor) -> Tensor:
    """Return soft IoU plus a cross-entropy that weighs target pixels ten times."""
    weight = torch.full((), 10.0)
    entropy = F.binary_cross_entropy_with_logits(logits, masks, pos_weight=weight)
    return soft_iou_loss(logits, masks) + 5.0 * entropy


def fit(model: nn.Module, cache: SceneCache, *, steps: int, batch_size: int, seed: int = 0) -> None:
    """Train in place for `steps` batches."""
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    rng, start, running = np.random.default_rng([seed, 99]), time.perf_counter(), 0.0
    for step in range(steps):
        images, masks = cache.crops(rng, batch_size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = loss_of(logits.float(), masks)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        running = 0.98 * running + 0.02 * float(loss.detach())
        if step % 100 == 99:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}/{steps} loss {running:.4f} {seconds:.0f} s", flush=True)
    model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def main() -> None:
    """Train, report development metrics and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="resunet")
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=0, help="0: the default of the model")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = build(options.model)
    cache = SceneCache.generate(options.scenes)
    steps = options.steps or STEPS[options.model]
    fit(model, cache, steps=steps, batch_size=options.batch_size)
    scores = evaluate(model, "development", 256)
    print({k: round(v, 6) for k, v in scores.items() if isinstance(v, float)})
    WEIGHTS.mkdir(exist_ok=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, WEIGHTS / f"{options.model}.safetensors")


if __name__ == "__main__":
    main()
