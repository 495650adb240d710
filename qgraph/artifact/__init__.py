# SPDX-License-Identifier: Apache-2.0
"""Saved models: one safetensors file that holds tensors, the graph as JSON, and digests of both.

No pickle, no code, no imports named by the file: reading one never runs what others wrote.
"""

from qgraph.artifact.file import Loaded, read, write
from qgraph.atomic import probe, write_file

__all__ = ["Loaded", "probe", "read", "write", "write_file"]
