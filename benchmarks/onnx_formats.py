# SPDX-License-Identifier: Apache-2.0
"""What each number format costs on onnxruntime: softmax, quantize, decode, attention product.

python -m benchmarks.onnx_formats [--heads 6] [--tokens 197] [--runs 15]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qgraph.backends.onnx.export import export
from qgraph.backends.onnx.session import session_options
from qgraph.formats import AffineEncoding, Encoding, IntGrid, LevelEncoding
from qgraph.graph.build import insert_call
from qgraph.graph.dialect import DEQUANTIZE, DEQUANTIZE_LEVELS, QUANTIZE, QUANTIZE_LEVELS
from qgraph.graph.trace import trace
from qgraph.passes.insert_quantizers import parameter_nodes


class Mix(nn.Module):
    """Softmax of logits times values."""

    def forward(self, logits: Tensor, values: Tensor) -> Tensor:
        """[B, H, T, T] and [B, H, T, D] to [B, H, T, D]."""
        return torch.matmul(torch.softmax(logits, -1), values)


def formats() -> dict[str, Encoding | None]:
    """Encodings of the attention map; None leaves it in float."""
    fine = list(range(128))
    pow2 = sorted({round(2**15 * 2 ** (-c / 4)) for c in range(64)})
    return {
        "float": None,
        "affine 8 bits": AffineEncoding.per_tensor(1 / 255, 0, IntGrid(8, signed=False)),
        "affine 6 bits (Clip)": AffineEncoding.per_tensor(1 / 63, 0, IntGrid(6, signed=False)),
        "dual region 8 bits": LevelEncoding.nearest(
            "dual region", torch.tensor(2.0**-14),
            torch.tensor(sorted({*fine, *(c << 7 for c in fine)})), storage_bits=8,
        ),
        "power of two 6 bits": LevelEncoding.nearest(
            "power of two", torch.tensor(2.0**-15), torch.tensor([0, *pow2][-64:]), storage_bits=6
        ),
        "power of two 4 bits": LevelEncoding.nearest(
            "power of two", torch.tensor(2.0**-15),
            torch.tensor([0, *(2 ** (15 - c) for c in reversed(range(15)))]), storage_bits=4,
        ),
    }  # fmt: skip


def quantized(encoding: Encoding | None, logits: Tensor, values: Tensor) -> GraphModule:
    """The graph with that format on the map, and 8-bit affine values where it is quantized."""
    module = trace(Mix().eval(), logits, values)
    product = next(n for n in module.graph.nodes if str(n.target).startswith("aten.matmul"))
    if encoding is not None:
        _insert(module, product, 0, encoding)
        _insert(module, product, 1, AffineEncoding.per_tensor(0.03, 128, IntGrid(8, signed=False)))
        module.recompile()
    return module


def _insert(module: GraphModule, product: Node, position: int, encoding: Encoding) -> None:
    value = product.args[position]
    affine = isinstance(encoding, AffineEncoding)
    parameters = parameter_nodes(module, f"operand{position}", encoding, before=product)
    codes = insert_call(
        module, QUANTIZE if affine else QUANTIZE_LEVELS, value, *parameters,
        like=product, before=product,
    )  # fmt: skip
    decoded = insert_call(
        module, DEQUANTIZE if affine else DEQUANTIZE_LEVELS, codes, *parameters,
        like=product, before=product,
    )  # fmt: skip
    product.update_arg(position, decoded)


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_formats", description=__doc__)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    logits = torch.randn(2, options.heads, options.tokens, options.tokens) * 3
    values = torch.randn(2, options.heads, options.tokens, 64)
    feed = {"logits": logits.numpy(), "values": values.numpy()}
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, encoding in formats().items():
            path = Path(folder) / "m.onnx"
            export(quantized(encoding, logits, values), path)
            sessions[name] = onnxruntime.InferenceSession(
                str(path), session_options(threads=1), providers=["CPUExecutionProvider"]
            )
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(options.runs):
        for name, session in sessions.items():
            start = time.process_time()
            session.run(None, feed)
            times[name].append(time.process_time() - start)
    base = float(np.median(times["float"]))
    for name, spent in times.items():
        median = float(np.median(spent))
        print(f"{name:<24}{median * 1e3:>9.2f} ms{median / base:>8.2f} of float")


if __name__ == "__main__":
    main()
