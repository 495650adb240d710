# SPDX-License-Identifier: Apache-2.0
"""Laws: the integer backend computes the reference's codes, and so does the ONNX file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from qgraph.backends.onnx import Session
from qgraph.errors import VerificationError
from qgraph.model import QuantizedModel, load


def assert_parity(quantized: QuantizedModel, inputs: Any = None) -> None:
    """Integer equals reference in every code; onnxruntime within its stated contract.

    Args:
        quantized: what `qgraph.compile` gave.
        inputs: as for `QuantizedModel.verify`; default: the sample.

    Raises:
        AssertionError: names the first quantizer that differs.
    """
    try:
        quantized.verify(inputs).check()
    except VerificationError as error:
        raise AssertionError(str(error)) from error


def assert_exports(
    quantized: QuantizedModel, container: Literal["int8", "native"] = "int8"
) -> Session:
    """The written file loads and gives what the ONNX backend gives, bit for bit.

    Returns the session of the loaded file.

    Raises:
        AssertionError: names the output that differs.
    """
    call = (quantized.sample.args, quantized.sample.kwargs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantized.to_onnx(path, container=container)
        session = load(path)
        assert isinstance(session, Session), f"loading gave a {type(session).__name__}"
        got = tree_leaves(session(*call[0], **call[1]))
    want = tree_leaves(quantized.lower("onnx")(*call[0], **call[1]))
    assert len(want) == len(got), f"{len(got)} outputs, the model has {len(want)}"
    if container == "int8":
        for number, (a, b) in enumerate(zip(want, got, strict=True)):
            same = np.array_equal(torch.as_tensor(a).numpy(), torch.as_tensor(b).numpy(), True)
            assert same, f"output {number} of the file differs from the ONNX backend"
    return session
