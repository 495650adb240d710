# SPDX-License-Identifier: Apache-2.0
"""One training loop for the zoo: AdamW, warm-up and cosine, weight mean, resume, time limit.

The schedule follows whichever is further, the step count or the CPU time spent, so a run that hits
its limit still ends with a decayed learning rate. The data of a step depends on (seed, step) only.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

StepLoss = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train. `minutes` limits CPU time; `average` is the decay of the mean weights."""

    steps: int
    peak_lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    average: float = 0.998
    clip: float = 1.0
    minutes: float | None = None
    checkpoint: Path | None = None
    checkpoint_every: int = 200


def learning_rate(progress: float, plan: Plan) -> float:
    """Return the rate at `progress` in [0, 1]: linear warm-up, then cosine to zero."""
    if progress < plan.warmup:
        return plan.peak_lr * progress / plan.warmup
    done = min((progress - plan.warmup) / (1 - plan.warmup), 1.0)
    return plan.peak_lr * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and kernels; leave biases, norms and position tables alone."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0}]


class WeightAverage:
    """Exponential mean of a module's weights; buffers are copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the current weights; early steps count more, so the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, value in zip(self.module.parameters(), model.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)
        for kept, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)


@dataclass
class _State:
    step: int
    seconds: float


def _save(path: Path, state: _State, parts: dict[str, Any]) -> None:
    """Write next to the target and rename, so that an interrupted write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    saved = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"step": state.step, "seconds": state.seconds, **saved}, partial)
    os.replace(partial, path)  # noqa: PTH105


def _restore(path: Path, parts: dict[str, Any]) -> _State:
    saved = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return _State(int(saved["step"]), float(saved["seconds"]))


def train(model: nn.Module, step_loss: StepLoss, plan: Plan) -> nn.Module:
    """Train `model` in place; return the averaged copy in eval mode.

    `step_loss(step)` computes the loss of one step. An existing checkpoint is resumed.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, plan.weight_decay), betas=(0.9, 0.98))
    average = WeightAverage(model, plan.average)
    parts = {"model": model, "average": average.module, "optimizer": optimizer}
    state = _State(0, 0.0)
    if plan.checkpoint is not None and plan.checkpoint.exists():
        state = _restore(plan.checkpoint, parts)
    model.train()
    bar = tqdm(total=plan.steps, initial=state.step, desc="train", mininterval=5)
    smooth, begun = 0.0, time.process_time() - state.seconds
    while state.step < plan.steps:
        state.seconds = time.process_time() - begun
        spent = state.seconds / (60 * plan.minutes) if plan.minutes else 0.0
        if spent >= 1.0:
            break
        rate = learning_rate(max(state.step / plan.steps, spent), plan)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = step_loss(state.step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        average.update(model, state.step)
        smooth = loss.item() if state.step == 0 else 0.98 * smooth + 0.02 * loss.item()
        state.step += 1
        bar.update()
        bar.set_postfix(
            loss=f"{smooth:.3f}", lr=f"{rate:.1e}", cpu=f"{state.seconds / 60:.1f}m", refresh=False
        )
        if plan.checkpoint is not None and state.step % plan.checkpoint_every == 0:
            _save(plan.checkpoint, state, parts)
    bar.close()
    if plan.checkpoint is not None:
        _save(plan.checkpoint, state, parts)
    return average.module.eval()


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy plus soft dice of mask logits against a 0/1 target, both [B, 1, H, W]."""
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, target)
    probability = logits.sigmoid().flatten(1)
    flat = target.flatten(1)
    overlap = 2 * (probability * flat).sum(1) + 1
    dice = 1 - overlap / (probability.sum(1) + flat.sum(1) + 1)
    return entropy + dice.mean()
