# SPDX-License-Identifier: Apache-2.0
"""Tables over all codes are read at the code, whatever the lowest code is."""

from __future__ import annotations

import pytest
import torch

from qgraph.backends.levels import Levels
from qgraph.backends.tables import all_codes, lookup
from qgraph.formats import AffineEncoding, IntGrid


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 8])
def test_each_code_finds_its_own_entry(signed: bool, bits: int) -> None:
    encoding = AffineEncoding.per_tensor(0.5, 1, IntGrid(bits, signed=signed))
    levels = Levels(encoding, None)
    every = all_codes(levels)
    assert every.tolist() == list(range(encoding.qmin, encoding.qmax + 1))
    assert torch.equal(lookup(every * 3, every, levels), every * 3)
    narrow = every.to(torch.int8 if signed else torch.uint8)
    assert torch.equal(lookup(every * 3, narrow, levels), every * 3)


@pytest.mark.parametrize("ends", [(-127, 127), (3, 100), (-100, 20), (-7, 0), (-2, 30)])
def test_codes_of_lopsided_ranges_find_their_own_entries(ends: tuple[int, int]) -> None:
    zero = torch.tensor(ends[0] + 1)
    encoding = AffineEncoding(scale=torch.tensor(0.5), zero_point=zero, qmin=ends[0], qmax=ends[1])
    levels = Levels(encoding, None)
    every = all_codes(levels)
    assert every.tolist() == list(range(ends[0], ends[1] + 1))
    assert lookup(every * 3, every, levels).tolist() == [3 * c for c in every.tolist()]
