# SPDX-License-Identifier: Apache-2.0
"""Other toolkits at W8A8, each behind one function: prepare, compile, a callable on a batch.

A peer gets the float model, calibration batches, and hands back a function of a batch. What it does
before it sees data (export, tracing) is timed apart from the rest. Nothing is imported unless it
is asked for: each toolkit may be missing or fail alone.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.onnx_models import Case

Batch = dict[str, Tensor]
Run = Callable[[Batch], Tensor]


@dataclass
class Clock:
    """CPU seconds by stage: ``trace`` before data is seen, ``compile`` for the rest."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside."""
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


Peer = Callable[[Case, Clock], Run]


class Positional(nn.Module):
    """A model whose keyword inputs come in order, for toolkits that know no keywords."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model, self.names = copy.deepcopy(case.model), list(case.calibration[0])
        self.pick = case.output

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output that fidelity is measured on."""
        return self.pick(self.model(**dict(zip(self.names, inputs, strict=True))))


def _exported(case: Case) -> nn.Module:
    example = tuple(case.calibration[0].values())
    module: nn.Module = torch.export.export(Positional(case).eval(), example).module()
    return module


def _on_values(module: Callable[..., Tensor]) -> Run:
    return lambda batch: module(*batch.values())


def _on_names(case: Case, module: Callable[..., Any]) -> Run:
    return lambda batch: case.output(module(**batch))


def qgraph_int8(case: Case, clock: Clock, **options: str) -> Run:
    """This toolkit's default pipeline; replays after each pass are off, as peers have none."""
    import qgraph
    from qgraph.graph.trace import trace_sharing

    chosen = qgraph.pipeline("int8", **options)  # type: ignore[arg-type]
    with clock.stage("trace"):  # as compile() does it: qgraph.trace() copies the parameters
        traced = trace_sharing(case.model, (), case.calibration[0])
    with clock.stage("compile"):
        made = qgraph.compile(traced, case.calibration, chosen, verify=False, progress=False)
    return _on_names(case, made.graph_module)


def qgraph_linears(case: Case, clock: Clock) -> Run:
    """The same for layers with weights alone, as quanto and ModelOpt quantize."""
    return qgraph_int8(case, clock, scope="linear")


def qgraph_full_ranges(case: Case, clock: Clock) -> Run:
    """The same without a search of ranges: each holds all that was seen."""
    return qgraph_int8(case, clock, scope="linear", method="minmax")


def onnxruntime_static(case: Case, clock: Clock) -> Run:
    """quantize_static: QDQ, u8 activations, s8 weights per channel, min-max."""
    import onnxruntime

    from benchmarks.onnx import write_float, write_static

    folder = Path(tempfile.mkdtemp())
    with clock.stage("trace"):
        write_float(case, folder / "float.onnx")
    with clock.stage("compile"):
        write_static(case, folder / "float.onnx", folder / "static.onnx", None)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "static.onnx"), options)
    return lambda batch: torch.from_numpy(
        session.run(None, {name: value.numpy() for name, value in batch.items()})[0]
    )


def torchao_pt2e(case: Case, clock: Clock) -> Run:
    """PT2E with the X86 inductor quantizer; runs its quantize and dequantize nodes eagerly."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    with clock.stage("trace"):
        module = _exported(case)
    with clock.stage("compile"):
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(module, quantizer)
        for batch in case.calibration:
            prepared(*batch.values())
        converted = convert_pt2e(prepared)
    return _on_values(converted)


def nncf_fx(case: Case, clock: Clock) -> Run:
    """nncf.quantize on an exported graph, defaults (mixed preset, fast bias correction)."""
    import nncf

    with clock.stage("trace"):
        module = _exported(case)
    with clock.stage("compile"):
        data = nncf.Dataset(case.calibration, lambda batch: tuple(batch.values()))
        made = nncf.quantize(module, data, subset_size=len(case.calibration))
    return _on_values(made)


def modelopt_int8(case: Case, clock: Clock) -> Run:
    """mtq.quantize with INT8_DEFAULT_CFG."""
    import modelopt.torch.quantization as mtq

    model = copy.deepcopy(case.model)

    def loop(item: nn.Module) -> None:
        for batch in case.calibration:
            item(**batch)

    with clock.stage("compile"):
        made = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, loop)
    return _on_names(case, made)


def brevitas_layerwise(case: Case, clock: Clock) -> Run:
    """layerwise_quantize with its defaults, ranges from calibration_mode."""
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize

    with clock.stage("compile"):
        made = layerwise_quantize(copy.deepcopy(case.model)).eval()
        with calibration_mode(made):
            for batch in case.calibration:
                made(**batch)
    return _on_names(case, made)


def quanto_int8(case: Case, clock: Clock) -> Run:
    """quanto.quantize with qint8 weights and activations."""
    from optimum.quanto import Calibration, freeze, qint8, quantize

    model = copy.deepcopy(case.model)
    with clock.stage("compile"):
        quantize(model, weights=qint8, activations=qint8)
        with Calibration():
            for batch in case.calibration:
                model(**batch)
        freeze(model)

    def run(batch: Batch) -> Tensor:
        found = case.output(model(**batch))
        plain: Tensor = found.dequantize() if hasattr(found, "dequantize") else found
        return plain

    return run


def float_model(case: Case, clock: Clock) -> Run:
    """Nothing at all: what memory is compared with."""
    with clock.stage("compile"):
        for batch in case.calibration:
            case.model(**batch)
    return _on_names(case, case.model)


PEERS: dict[str, Peer] = {
    "float": float_model,
    "qgraph": qgraph_int8,
    "qgraph, layers only": qgraph_linears,
    "qgraph, layers only, full ranges": qgraph_full_ranges,
    "onnxruntime": onnxruntime_static,
    "torchao": torchao_pt2e,
    "nncf": nncf_fx,
    "modelopt": modelopt_int8,
    "brevitas": brevitas_layerwise,
    "quanto": quanto_int8,
}
PACKAGES = {
    "qgraph, layers only": "qgraph",
    "qgraph, layers only, full ranges": "qgraph",
    "modelopt": "nvidia-modelopt",
    "quanto": "optimum-quanto",
    "float": "torch",
}
