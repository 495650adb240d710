# SPDX-License-Identifier: Apache-2.0
"""A model on CUDA is compiled there, to the codes of the CPU; `pytest -m cuda` runs this."""

from __future__ import annotations

import pytest
import torch

import qgraph
from qgraph.calibration.fused import build_statistics
from qgraph.calibration.sweep import collect
from qgraph.formats.affine import affine_encode
from qgraph.formats.levels import levels_decode, levels_encode, midpoints
from qgraph.graph.requests import Request
from qgraph.testing.chains import WIDTH, chain

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def batches(device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 4, WIDTH, generator=generator).to(device) for _ in range(3)]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_codes_are_those_of_the_cpu_bit_for_bit(bits):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(1 << 16, generator=generator) * 3
    scale, zero, high = torch.tensor(0.037), torch.tensor(1, dtype=torch.int32), (1 << bits) - 1
    host = affine_encode(x, scale, zero, 0, high)
    device = affine_encode(x.cuda(), scale.cuda(), zero.cuda(), 0, high)
    assert torch.equal(host, device.cpu())


def test_tables_of_levels_give_the_codes_and_values_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([0.0, 1, 2, 4, 8, 16, 32, 64])
    scale, x = torch.tensor(1 / 64), torch.rand(1 << 14, generator=generator)
    cuts = midpoints(levels)
    host = levels_encode(x, scale, cuts)
    there = levels_encode(x.cuda(), scale.cuda(), cuts.cuda())
    assert torch.equal(host, there.cpu())
    back = levels_decode(there, scale.cuda(), levels.cuda())
    assert torch.equal(levels_decode(host, scale, levels), back.cpu())


def test_the_sweep_stays_on_the_device_and_sees_the_same_numbers_of_values():
    found = {}
    for device in ("cpu", "cuda"):
        module = chain(2).to(device)
        nodes = [n for n in module.graph.nodes if n.op == "call_function"]
        kinds = ("Range", "Histogram", "Reservoir")
        statistics = build_statistics(Request(n, kind) for n in nodes for kind in kinds)
        collect(module, batches(device), statistics)
        for fused in statistics.values():
            assert all(
                t.device.type == device for s in fused.statistics for t in s.fields().values()
            )
        found[device] = [fused.range() for fused in statistics.values()]
    for host, there in zip(found["cpu"], found["cuda"], strict=True):
        assert torch.equal(*(seen.state()["count"].cpu() for seen in (host, there)))
        assert host.bounds() == pytest.approx(there.bounds(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("pipeline", ["int8", "ris_int4"])
def test_a_model_on_the_device_gets_the_weights_codes_of_the_cpu(pipeline):
    host = qgraph.compile(chain(2), batches("cpu"), pipeline, progress=False)
    there = qgraph.compile(chain(2).cuda(), batches("cuda"), pipeline, progress=False)
    mine, theirs = (dict(q.graph_module.state_dict()) for q in (host, there))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert theirs[name].device.type == "cuda"
        if value.dtype in {torch.int8, torch.uint8} and value.ndim == 2:
            assert torch.equal(value, theirs[name].cpu()), name
        elif value.is_floating_point():
            torch.testing.assert_close(theirs[name].cpu(), value, rtol=2e-2, atol=1e-6)
    x = batches("cpu")[0]
    expected, made = host.graph_module(x), there.graph_module(x.cuda()).cpu()
    step = float((expected.max() - expected.min()) / 255)
    assert float((expected - made).abs().max()) <= 4 * step
