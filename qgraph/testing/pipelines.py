# SPDX-License-Identifier: Apache-2.0
"""Pipelines: every family, all widths, some options."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

from qgraph.pipeline import Pipeline
from qgraph.pipelines import FAMILIES, pipeline


@st.composite
def pipelines(draw: st.DrawFn, *, reconstruction: bool = False) -> Pipeline:
    """Named pipelines with widths of 2 to 8 bits.

    Args:
        draw: given by hypothesis.
        reconstruction: also those that learn rounding, which take longer.
    """
    families = sorted(n for n in FAMILIES if n != "vit" or reconstruction)
    family = draw(st.sampled_from(families))
    weights, activations = draw(st.integers(2, 8)), draw(st.integers(2, 8))
    tail = "_recon" if reconstruction and draw(st.booleans()) else ""
    name = f"{family + '_' if family else ''}w{weights}a{activations}{tail}"
    options: dict[str, object] = {}
    if draw(st.booleans()):
        options["scope"] = draw(st.sampled_from(["full", "linear"]))
    if draw(st.booleans()):
        options["ends_bits"] = draw(st.sampled_from([2, 4, 8]))
    built = pipeline(name)
    planned = dataclasses.replace(built["plan-sites"], **options)
    return built.replace("plan-sites", planned)
