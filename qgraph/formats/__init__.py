# SPDX-License-Identifier: Apache-2.0
"""Number formats: pure tensor code, a scale times an integer level picked by a code."""

from qgraph.formats.affine import AffineEncoding, IntGrid, code_dtype
from qgraph.formats.base import Encoding, check_bits
from qgraph.formats.levels import LevelEncoding

__all__ = ["AffineEncoding", "Encoding", "IntGrid", "LevelEncoding", "check_bits", "code_dtype"]
