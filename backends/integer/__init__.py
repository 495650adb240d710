# SPDX-License-Identifier: Apache-2.0
"""The integer backend: a quantized graph as torch ops on integer codes."""

from qgraph.backends.integer.explain import ExplainRow, Explanation
from qgraph.backends.integer.module import IntegerModel, Mode, fixed_point_reference, lower

__all__ = ["ExplainRow", "Explanation", "IntegerModel", "Mode", "fixed_point_reference", "lower"]
