# SPDX-License-Identifier: Apache-2.0
"""Codes are stored in the smallest type, 8 bits without a sign, and come back as they were."""

from __future__ import annotations

import pytest
import torch

from qgraph.backends.integer.storage import Storage
from qgraph.formats import AffineEncoding, Encoding, LevelEncoding

U8, I16, I32 = torch.uint8, torch.int16, torch.int32


def affine(qmin: int, qmax: int) -> Encoding:
    zero = torch.tensor(min(max(0, qmin), qmax))
    return AffineEncoding(scale=torch.tensor(0.1), zero_point=zero, qmin=qmin, qmax=qmax)


def table(count: int, channels: int = 0) -> Encoding:
    """Levels of the tensor, or of each of few channels."""
    rows = torch.arange(count).repeat(channels, 1) if channels else torch.arange(count)
    scale = torch.full((channels,), 0.1) if channels else torch.tensor(0.1)
    axis = 0 if channels else None
    return LevelEncoding.nearest("any", scale, rows, storage_bits=8, axis=axis)


CASES = [
    (affine(0, 255), U8, 0), (affine(-128, 127), U8, 128), (affine(-127, 127), U8, 127),
    (affine(-8, 7), U8, 8), (affine(0, 127), U8, 0), (affine(3, 100), U8, 0),
    (affine(-1, 128), I16, 0), (affine(-129, 0), I16, 0), (affine(0, 256), I16, 0),
    (affine(-32768, 32767), I16, 0), (affine(0, 32768), I32, 0), (affine(0, 65535), I32, 0),
    (table(2), U8, 0), (table(256), U8, 0), (table(257), I16, 0),
    (table(3, channels=300), U8, 0), (table(257, channels=2), I16, 0),
]  # fmt: skip


@pytest.mark.parametrize(("encoding", "dtype", "offset"), CASES)
def test_codes_survive_storage_in_the_smallest_type(encoding, dtype, offset) -> None:
    storage = Storage.of(encoding)
    assert (storage.dtype, storage.offset) == (dtype, offset)
    if isinstance(encoding, AffineEncoding):
        low, high = encoding.qmin, encoding.qmax
    else:
        low, high = 0, encoding.table().shape[-1] - 1
    codes = torch.arange(low, high + 1, dtype=torch.int32)
    stored = storage.pack(codes)
    assert stored.dtype is dtype
    assert torch.equal(stored.to(torch.int64), codes.to(torch.int64) + offset)
    assert storage.unpack(stored).dtype is torch.int32
    assert torch.equal(storage.unpack(stored), codes)


def test_nothing_is_added_unless_asked() -> None:
    assert Storage(U8) == Storage(U8, 0)
