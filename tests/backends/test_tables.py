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
