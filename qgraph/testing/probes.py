# SPDX-License-Identifier: Apache-2.0
"""Inputs that show what one sample hides: other signs, sizes, batches, and awkward statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from qgraph.graph.verify import Sample
from qgraph.testing.tensors import awkward


def probes(sample: Sample, *, dynamic: bool = True) -> Iterator[tuple[str, Sample]]:
    """Named samples of the same shapes (and, where the batch is dynamic, of one sample and five).

    Integer and boolean inputs, such as token ids, only change places along the batch.
    """
    yield "as given", sample
    yield "negated", _float(sample, torch.neg)
    yield "all zero", _float(sample, torch.zeros_like)
    yield "ten times larger", _float(sample, lambda x: x * 10)
    yield "reversed batch", _every(sample, lambda x: x.flip(0) if x.ndim else x)
    yield "outlier channels", _float(sample, lambda x: _like(x, "outlier_channels"))
    yield "heavy tails", _float(sample, lambda x: _like(x, "heavy_tails").clamp(-50, 50))
    if dynamic:
        yield "one sample", _every(sample, lambda x: x[:1] if x.ndim else x)
        yield "five samples", _every(sample, lambda x: _grown(x, 5))


def _like(x: Tensor, kind: str) -> Tensor:
    return awkward(kind, x.shape, seed=7).to(x.dtype) if x.ndim else x


def _grown(x: Tensor, size: int) -> Tensor:
    if not x.ndim:
        return x
    repeats = -(-size // max(x.shape[0], 1))
    return torch.cat([x.roll(i, -1) if x.ndim > 1 else x for i in range(repeats)])[:size]


def _every(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    args: Any = tree_map_only(Tensor, change, sample.args)
    kwargs: Any = tree_map_only(Tensor, change, sample.kwargs)
    return Sample(args, kwargs)


def _float(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    return _every(sample, lambda x: change(x) if x.is_floating_point() else x)
