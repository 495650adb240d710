# SPDX-License-Identifier: Apache-2.0
"""Property tests for your own passes, formats and statistics: strategies, and laws to hold.

    from hypothesis import given
    from qgraph.testing import assert_preserves, models

    @given(case=models())
    def test_my_pass_keeps_the_function(case):
        assert_preserves(MyPass(), case.model(), case.inputs())

Strategies (they shrink to small things, and print as code):
    models, graphs, conv_models, attention_models, unets, detectors, two_towers,
        stacks    -> Case
    tensors (outliers, dead channels, two modes, heavy tails, denormals, ...)      -> Tensor
    encodings, affine_encodings, level_encodings, pipelines, loaders
Laws of passes: assert_preserves, assert_idempotent, assert_transports
Laws of quantizers: assert_monotone, assert_idempotent, assert_in_range, assert_nearest,
    assert_permutation_invariant, assert_sign_fold_invariant
Laws of statistics: assert_mergeable
Laws of quantized models: assert_parity, assert_survives_saving, assert_exports
Tools: graph_as_code, shrink, awkward, probes

Needs hypothesis: ``pip install "qgraph[testing]"``.
"""

from __future__ import annotations

try:
    import hypothesis as _hypothesis
except ImportError as error:
    _MESSAGE = 'qgraph.testing needs hypothesis: pip install "qgraph[testing]"'
    raise ImportError(_MESSAGE) from error

from qgraph.testing.attention import AttentionNet, attention_models
from qgraph.testing.case import Case, Recipe
from qgraph.testing.code import graph_as_code
from qgraph.testing.convolutions import ConvBlock, ConvNet, conv_models
from qgraph.testing.detectors import Detector, detectors
from qgraph.testing.failures import BrokenLawError
from qgraph.testing.graphs import Program, Step, graphs
from qgraph.testing.idempotent import assert_idempotent
from qgraph.testing.loaders import Loader, loaders
from qgraph.testing.models import models
from qgraph.testing.monotone import assert_monotone
from qgraph.testing.parity import assert_exports, assert_parity
from qgraph.testing.pipelines import pipelines
from qgraph.testing.preserves import assert_preserves
from qgraph.testing.probes import probes
from qgraph.testing.quantizers import affine_encodings, encodings, level_encodings
from qgraph.testing.ranges import assert_in_range, assert_nearest
from qgraph.testing.saving import assert_survives_saving
from qgraph.testing.shrinking import shrink
from qgraph.testing.stacks import Stack, stacks
from qgraph.testing.statistics import assert_mergeable, assert_transports
from qgraph.testing.symmetries import assert_permutation_invariant, assert_sign_fold_invariant
from qgraph.testing.tensors import KINDS, awkward, tensors
from qgraph.testing.two_towers import TwoTower, two_towers
from qgraph.testing.unets import UNet, unets

del _hypothesis

__all__ = [
    "KINDS",
    "AttentionNet",
    "BrokenLawError",
    "Case",
    "ConvBlock",
    "ConvNet",
    "Detector",
    "Loader",
    "Program",
    "Recipe",
    "Stack",
    "Step",
    "TwoTower",
    "UNet",
    "affine_encodings",
    "assert_exports",
    "assert_idempotent",
    "assert_in_range",
    "assert_mergeable",
    "assert_monotone",
    "assert_nearest",
    "assert_parity",
    "assert_permutation_invariant",
    "assert_preserves",
    "assert_sign_fold_invariant",
    "assert_survives_saving",
    "assert_transports",
    "attention_models",
    "awkward",
    "conv_models",
    "detectors",
    "encodings",
    "graph_as_code",
    "graphs",
    "level_encodings",
    "loaders",
    "models",
    "pipelines",
    "probes",
    "shrink",
    "stacks",
    "tensors",
    "two_towers",
    "unets",
]
