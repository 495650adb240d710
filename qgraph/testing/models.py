# SPDX-License-Identifier: Apache-2.0
"""Any of the models that this package draws."""

from __future__ import annotations

from hypothesis import strategies as st

from qgraph.testing.attention import attention_models
from qgraph.testing.case import Case
from qgraph.testing.convolutions import conv_models
from qgraph.testing.detectors import detectors
from qgraph.testing.graphs import graphs
from qgraph.testing.stacks import stacks
from qgraph.testing.two_towers import two_towers
from qgraph.testing.unets import unets


def models() -> st.SearchStrategy[Case]:
    """Random graphs, convolutions, attention, U-Nets, detectors, two towers, stacks of blocks."""
    return st.one_of(
        graphs(),
        conv_models(),
        attention_models(),
        unets(),
        detectors(),
        two_towers(),
        stacks(),
    )
