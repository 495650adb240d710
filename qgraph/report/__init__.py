# SPDX-License-Identifier: Apache-2.0
"""What a compilation did, as text, JSON and pictures."""

from qgraph.report.layers import LayerRecord, sqnr
from qgraph.report.report import Report

__all__ = ["LayerRecord", "Report", "sqnr"]
