# SPDX-License-Identifier: Apache-2.0
"""How codes are stored between ops: 8-bit codes as uint8 whatever their sign, others as is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.formats import AffineEncoding, Encoding, code_dtype
from qgraph.formats.levels import rank_dtype


@dataclass(frozen=True, slots=True)
class Storage:
    """Stored integers are ``code + offset`` in `dtype`."""

    dtype: torch.dtype
    offset: int = 0

    @classmethod
    def of(cls, encoding: Encoding) -> Storage:
        """Where codes of an encoding are kept."""
        if isinstance(encoding, AffineEncoding):
            dtype = code_dtype(encoding.qmin, encoding.qmax)
            if dtype is torch.int8:
                return cls(torch.uint8, max(-encoding.qmin, 0))
            return cls(dtype)
        return cls(rank_dtype(encoding.table().shape[-1]))

    def unpack(self, stored: Tensor) -> Tensor:
        """int32 codes."""
        return stored.to(torch.int32) - self.offset

    def pack(self, codes: Tensor) -> Tensor:
        """Stored integers of codes."""
        return (codes.to(torch.int32) + self.offset).to(self.dtype)
