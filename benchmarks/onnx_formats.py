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
from qgraph.formats.channel_groups import grouped_encoding
from qgraph.formats.levels import by_channel
from qgraph.formats.log_affine import LogAffine, log_affine
from qgraph.formats.power_of_two import power_of_two
from qgraph.graph.build import insert_call
from qgraph.graph.dialect import DEQUANTIZE, DEQUANTIZE_LEVELS, QUANTIZE, QUANTIZE_LEVELS
from qgraph.graph.trace import trace
from qgraph.passes.insert_quantizers import parameter_nodes


class Mix(nn.Module):
    """Softmax of logits times values."""

    def forward(self, logits: Tensor, values: Tensor) -> Tensor:
        """[B, H, T, T] and [B, H, T, D] to [B, H, T, D]."""
        return torch.matmul(torch.softmax(logits, -1), values)


def formats(heads: int, tokens: int) -> dict[str, Encoding | None]:
    """Encodings of the attention map; None leaves it in float."""
    fine = list(range(128))
    ranges = torch.tensor([2.0 ** -(i % 4) for i in range(tokens)])
    sides = LogAffine(
        bits=8, slope=torch.full((1, 2), 12.0), offset=torch.full((1, 2), 127.0),
        centre=torch.zeros(1), reserve_zero=True,
    )  # fmt: skip
    tops = [2.0 ** -(i % 2) for i in range(heads)]
    return {
        "float": None,
        "affine 8 bits": AffineEncoding.per_tensor(1 / 255, 0, IntGrid(8, signed=False)),
        "affine 6 bits (Clip)": AffineEncoding.per_tensor(1 / 63, 0, IntGrid(6, signed=False)),
        "dual region 8 bits": LevelEncoding.nearest(
            "dual region", torch.tensor(2.0**-14),
            torch.tensor(sorted({*fine, *(c << 7 for c in fine)})), storage_bits=8,
        ),
        "power of two 8 bits": power_of_two(8, 16, 1.0),
        "power of two 6 bits": power_of_two(6, 4, 1.0),
        "power of two 4 bits": power_of_two(4, 1, 1.0),
        "the same, per head": by_channel([power_of_two(4, 1, top) for top in tops], 1),
        "log affine 8 bits": log_affine(sides, axis=None),
        "grouped, 4 tied scales": grouped_encoding(
            torch.zeros(tokens), ranges, 3 - torch.arange(tokens) % 4, 8
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
        for name, encoding in formats(options.heads, options.tokens).items():
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
