# SPDX-License-Identifier: Apache-2.0
"""qgraph: post-training quantization as verified graph passes.

quantized = qgraph.compile(model, calib_loader, pipeline="int8")
"""

import logging

from qgraph.bisect import Bisection, bisect
from qgraph.calibration.filtered_loss import FilteredGlobalLoss
from qgraph.compiler import compile  # noqa: A004
from qgraph.context import Context
from qgraph.errors import (
    ArtifactError,
    BudgetInfeasibleError,
    CalibrationError,
    CaptureError,
    ConfigError,
    ExportError,
    InputError,
    PassError,
    QGraphError,
    UnsupportedOpError,
    VerificationError,
)
from qgraph.graph.trace import trace
from qgraph.model import QuantizedModel, load
from qgraph.pipeline import Fact, Pass, Pipeline, Promise
from qgraph.pipelines import pipeline, pipelines
from qgraph.rewrite import Rewrite
from qgraph.sensitivity import SensitivityTable, sensitivity

logging.getLogger("qgraph").addHandler(logging.NullHandler())

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "Bisection",
    "BudgetInfeasibleError",
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "Context",
    "ExportError",
    "Fact",
    "FilteredGlobalLoss",
    "InputError",
    "Pass",
    "PassError",
    "Pipeline",
    "Promise",
    "QGraphError",
    "QuantizedModel",
    "Rewrite",
    "SensitivityTable",
    "UnsupportedOpError",
    "VerificationError",
    "bisect",
    "compile",
    "load",
    "pipeline",
    "pipelines",
    "sensitivity",
    "trace",
]
