# SPDX-License-Identifier: Apache-2.0
"""Law: a saved model comes back as the same model, and the same model gives the same file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qgraph.model import QuantizedModel, load


def assert_survives_saving(quantized: QuantizedModel) -> QuantizedModel:
    """Save, load, compare outputs bit for bit, save again and compare the bytes.

    Raises:
        AssertionError: names the output that differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first.qgraph", Path(folder) / "second.qgraph"
        quantized.save(first)
        loaded = load(first)
        assert isinstance(loaded, QuantizedModel), f"loading gave a {type(loaded).__name__}"
        loaded.save(second)
        assert first.read_bytes() == second.read_bytes(), "a second save gave other bytes"
    call = (quantized.sample.args, quantized.sample.kwargs)
    for backend in ("reference", "integer"):
        want = _tensors(quantized.lower(backend)(*call[0], **call[1]))
        got = _tensors(loaded.lower(backend)(*call[0], **call[1]))
        assert len(want) == len(got), f"{backend}: {len(got)} outputs, before {len(want)}"
        for number, (a, b) in enumerate(zip(want, got, strict=True)):
            same = torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(
                a.nan_to_num(), b.nan_to_num()
            ))  # fmt: skip
            assert same, f"{backend}: output {number} differs after loading"
    return loaded


def _tensors(result: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
