# SPDX-License-Identifier: Apache-2.0
"""The terms that a region is judged by: its outputs, values inside, and the network's end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-12


@dataclass(frozen=True, slots=True)
class Ports:
    """Which values a region reads and is judged by.

    Attributes:
        inputs: read, in order.
        outputs: judged outputs.
        inside: judged values inside: products.
        rows: judged values inside that are probabilities.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    inside: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()

    @property
    def observed(self) -> tuple[str, ...]:
        """Everything that student and teacher compute."""
        return (*self.outputs, *self.inside, *self.rows)


def counted(value: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of [B, T, ...] that a mask [B, T] keeps; other shapes count in full."""
    if mask is None or value.ndim < 3 or value.shape[:2] != mask.shape:
        return value
    return value[mask]


def output_loss(
    made: list[Tensor], wanted: list[Tensor], mask: Tensor | None = None,
    importance: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Mean over ports of the squared error relative to the port's mean square, fp32.

    `importance` weighs each element's error, such as a squared gradient (diagonal Fisher).
    """
    if importance is not None:
        made, wanted = (
            [v * w.sqrt() for v, w in zip(values, importance, strict=True)]
            for values in (made, wanted)
        )
    pairs = [(counted(a, mask), counted(b, mask)) for a, b in zip(made, wanted, strict=True)]
    terms = [F.mse_loss(a, b) / b.square().mean().clamp_min(FLOOR) for a, b in pairs]
    return torch.stack(terms).mean()


def inside_loss(ports: Ports, made: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Mean over values inside of MSE by variance, and of the KL divergence of probabilities."""
    terms = []
    for number, (a, b) in enumerate(zip(made, wanted, strict=True)):
        if number < len(ports.inside):
            terms.append(F.mse_loss(a, b) / b.var().clamp_min(FLOOR))
        else:
            ratio = b.clamp_min(FLOOR).log() - a.clamp_min(FLOOR).log()
            terms.append((b * ratio).sum(-1).mean())
    return torch.stack(terms).mean()


def final_loss(made: Tensor, wanted: Tensor, temperature: float | None) -> Tensor:
    """KL of logits softened by `temperature`; None: squared error relative to the variance."""
    if temperature is None:
        return F.mse_loss(made, wanted) / wanted.var().clamp_min(FLOOR)
    soft = F.log_softmax(wanted / temperature, -1)
    mine = F.log_softmax(made / temperature, -1)
    divergence = F.kl_div(mine, soft, log_target=True, reduction="none").sum(-1).mean()
    return divergence * temperature**2
