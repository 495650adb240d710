# SPDX-License-Identifier: Apache-2.0
"""The integer backend: a quantized graph as torch ops on integer codes."""

from qgraph.backends.integer.module import IntegerModel, lower

__all__ = ["IntegerModel", "lower"]
