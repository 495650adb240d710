# SPDX-License-Identifier: Apache-2.0
"""Encodings of every format, with all widths, zero points and granularities."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from qgraph.formats import AffineEncoding, Encoding, IntGrid, LevelEncoding
from qgraph.formats.dual_region import dual_region, signed_dual_region
from qgraph.formats.power_of_two import candidate_taus, power_of_two

_SCALES = st.floats(-20, 10).map(lambda exponent: 2.0**exponent)


@st.composite
def affine_encodings(
    draw: st.DrawFn, channels: int | None = None, axis: int = -1, *, symmetric: bool = False
) -> AffineEncoding:
    """Affine encodings of 2 to 8 bits.

    Args:
        draw: given by hypothesis.
        channels: one scale and zero point for each of so many channels; default: per tensor.
        axis: of the channels.
        symmetric: zero point 0 and as many codes below as above.
    """
    signed = symmetric or draw(st.booleans())
    grid = IntGrid(draw(st.integers(2, 8)), signed=signed, narrow=symmetric)
    zeros = st.just(0) if symmetric else st.integers(grid.qmin, grid.qmax)
    if channels is None:
        return AffineEncoding.per_tensor(draw(_SCALES), draw(zeros), grid)
    scales = draw(st.lists(_SCALES, min_size=channels, max_size=channels))
    points = draw(st.lists(zeros, min_size=channels, max_size=channels))
    return AffineEncoding(
        scale=torch.tensor(scales), zero_point=torch.tensor(points),
        qmin=grid.qmin, qmax=grid.qmax, axis=axis,
    )  # fmt: skip


@st.composite
def level_encodings(draw: st.DrawFn) -> LevelEncoding:
    """Tables: dual regions, power-of-two bases, and levels as they come."""
    bits = draw(st.integers(2, 6))
    match draw(st.sampled_from(["table", "dual region", "signed dual region", "power of two"])):
        case "dual region":
            return dual_region(bits, draw(st.integers(0, bits)), high=draw(_SCALES))
        case "signed dual region":
            scale = torch.tensor(draw(_SCALES))
            return signed_dual_region(bits, draw(st.integers(-bits, bits)), scale)
        case "power of two":
            bits = max(bits, 3)
            return power_of_two(bits, draw(st.sampled_from(candidate_taus(bits))), draw(_SCALES))
    chosen = draw(st.sets(st.integers(-300, 300), min_size=2, max_size=1 << bits))
    levels = torch.tensor(sorted(chosen), dtype=torch.int32)
    return LevelEncoding.nearest("table", torch.tensor(draw(_SCALES)), levels, storage_bits=bits)


def encodings(channels: int | None = None, axis: int = -1) -> st.SearchStrategy[Encoding]:
    """Encodings of every format; with `channels`, affine ones per channel of `axis` too."""
    found: list[st.SearchStrategy[Encoding]] = [affine_encodings(), level_encodings()]
    if channels is not None:
        found.append(affine_encodings(channels, axis))
    return st.one_of(found)
