# SPDX-License-Identifier: Apache-2.0
"""What a compilation did, as text, JSON and pictures."""

from qgraph.report.accounting import Cost
from qgraph.report.graph_view import GraphNode
from qgraph.report.layers import LayerRecord, sqnr
from qgraph.report.report import Parity, Report

__all__ = ["Cost", "GraphNode", "LayerRecord", "Parity", "Report", "sqnr"]
