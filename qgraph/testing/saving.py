# SPDX-License-Identifier: Apache-2.0
"""Law: a saved model comes back as the same model, and the same model gives the same file."""

from __future__ import annotations

from qgraph.errors import VerificationError
from qgraph.model import QuantizedModel
from qgraph.validation import check_saving


def assert_survives_saving(quantized: QuantizedModel) -> QuantizedModel:
    """Save, load, compare outputs bit for bit, save again and compare the bytes.

    Raises:
        AssertionError: names the output that differs.
    """
    try:
        return check_saving(quantized, quantized.sample)
    except VerificationError as error:
        raise AssertionError(str(error)) from error
