# SPDX-License-Identifier: Apache-2.0
"""The report as a page: well formed, self-contained, small, escaped, complete."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import qgraph
from qgraph.context import Decision
from qgraph.graph.verify import Sample
from qgraph.pipeline import Step
from qgraph.report import Cost, GraphNode, LayerRecord, Parity, Report
from qgraph.report.graph_view import cost_of, graph_view
from qgraph.report.pictures import error_bars
from tests.backends.builders import Attention, ConvNet, quantize

VOID = {"meta", "input", "br", "path", "rect", "img"}


class Checker(HTMLParser):
    """Tags nest, nothing is loaded, ids are distinct and links lead to them."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert tag not in {"script", "link", "iframe", "object"}
        assert tag == "img" or "src" not in given
        assert given.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert not {"onclick", "onload", "srcset"} & given.keys()
        if "href" in given:
            assert given["href"].startswith("#")
            self.links.append(given["href"][1:])
        if "id" in given:
            self.ids.append(given["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(checker.links) <= set(checker.ids)
    assert "://" not in page
    assert "@import" not in page
    assert "url(" not in page
    return checker


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    return qgraph.compile(model.eval(), [torch.randn(4, 3, 8, 8)] * 2, "w4a8", verify="full")


def test_the_page_of_a_compilation_is_well_formed_and_tells_every_site(compiled):
    page = compiled.report.to_html()
    text = "".join(checked(page).text)
    assert len(page.encode()) < 3 << 20
    for layer in compiled.report.layers:
        assert layer.node in text
        assert layer.reason in text
    for step in compiled.report.steps:
        assert step.name in text
    assert "Parity" in text
    assert compiled.report.parity.mismatches == 0


def test_hostile_names_are_escaped():
    bad = "<script>alert('x')</script>&\""
    layer = LayerRecord(bad, bad, bad, bad, bad, 8, bad, bad, bad, 3.0)
    report = Report(
        bad, (layer,), (Decision(bad, bad, "kept", bad, {bad: 1.0}),),
        (Step(bad, True, 0.1, 0.1, None, 1),), (bad,),
        (GraphNode(bad, bad, bad, (), 8, 8, 1, 1, 3.0),),
    )  # fmt: skip
    page = report.to_html()
    checked(page)
    assert "<script" not in page


def test_an_empty_report_and_one_of_odd_numbers_are_pages_too():
    checked(Report("float:", (), (), ()).to_html())
    layers = tuple(
        LayerRecord(f"n{i}", "", "", "linear", "weight", 8, "int8", "x", "", value)
        for i, value in enumerate((math.inf, -math.inf, math.nan, -3.0, 1e9))
    )
    report = Report("odd", layers, (), (Step("a", False, math.nan, math.nan, None, 0),))
    checked(report.to_html())
    assert json.loads(report.to_json())["layers"][0]["sqnr"] == "inf"
    back = Report.from_dict(json.loads(report.to_json()))
    assert back.layers[:2] == layers[:2]
    assert math.isnan(back.layers[2].sqnr)


def test_a_large_model_stays_under_three_mebibytes():
    layers = tuple(
        LayerRecord(
            f"linear_{i}", f"encoder.layers.{i}.attention.query", "model.py:12, in forward: x",
            "linear", "weight", 4, "int4 per channel", "choose-weight-scales",
            "clip by MSE search", 20.0,
        )
        for i in range(4000)
    )  # fmt: skip
    nodes = tuple(
        GraphNode(
            f"n{i}", "linear", f"layers.{i}", tuple(range(max(0, i - 2), i)), 4, 8, 10, 10, 20.0
        )
        for i in range(4000)
    )
    decisions = tuple(Decision("pass", f"site{i}", "refused", "because " * 8) for i in range(4000))
    page = Report("big", layers, decisions, (), (), nodes).to_html()
    checked(page)
    assert len(page.encode()) < 3 << 20


def test_a_report_comes_back_from_json_whole(compiled):
    report = compiled.report
    assert Report.from_dict(json.loads(report.to_json())) == report


def test_the_terminal_table_fits_and_starts_with_what_matters(compiled):
    lines = str(compiled.report).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("pipeline w4a8: 4 quantized operands")
    assert any(line.startswith("lowest SQNR") for line in lines[:8])


def test_the_cost_of_a_plain_network_is_what_one_counts_by_hand():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    cost = cost_of(quantize(model, (torch.randn(2, 6),)))
    macs = 6 * 5 + 5 * 3
    assert isinstance(cost, Cost)
    assert cost.mean_weight_bits == 8
    assert cost.weight_bytes == macs
    assert cost.bias_bytes == 4 * 8
    assert cost.scale_bytes == 4 * 8
    assert cost.bit_operations == macs * 64
    assert cost.bit_operations_ratio == 16


def test_the_graph_has_ops_that_compute_and_edges_through_quantizers():
    module = quantize(ConvNet(), (torch.randn(2, 3, 8, 8),))
    nodes = graph_view(module, {"conv2d": 12.5})
    by_name = {node.name: (i, node) for i, node in enumerate(nodes)}
    first = by_name["conv2d"][1]
    assert (first.weight_bits, first.activation_bits, first.sqnr) == (8, 8, 12.5)
    assert first.inputs == ()
    cat = next(node for node in nodes if node.op == "cat")
    assert len(cat.inputs) == 3
    assert all(i < by_name[node.name][0] for node in nodes for i in node.inputs)
    assert not {node.op for node in nodes} & {"move", "other"}


def test_products_of_activations_have_no_weight_bits():
    nodes = graph_view(quantize(Attention(), (torch.randn(2, 6, 32),)), {})
    for node in nodes:
        if node.op == "matmul":
            assert node.weight_bits is None
            assert node.activation_bits == 8
            assert node.macs > 0
            assert node.parameters == 0


def test_bars_grow_with_the_ratio_and_stay_inside():
    widths = [
        float(part.split('width="')[2].split('"')[0])
        for part in (
            error_bars([("a", "a", value)]).split("<g>")[1] for value in (-5.0, 10.0, 30.0, 90.0)
        )
    ]
    assert widths == sorted(widths)
    assert widths[-1] == 240


def test_parity_of_the_backends_is_summed():
    quantized = qgraph.QuantizedModel(
        quantize(nn.Sequential(nn.Linear(6, 5)), (torch.randn(2, 6),)),
        Report("x", (), (), ()),
        Sample((torch.randn(2, 6),)),
    )
    report = quantized.report.with_parity(quantized.verify())
    assert isinstance(report.parity, Parity)
    assert report.parity.codes == 12
    assert report.parity.runtime_codes == 12


def test_a_path_that_cannot_be_written_is_a_typed_error(compiled, tmp_path):
    for write in (compiled.report.to_html, compiled.report.to_json):
        with pytest.raises(qgraph.ExportError, match="cannot be written"):
            write(tmp_path / "missing" / "report")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_the_page_offline(compiled, tmp_path):
    compiled.report.to_html(tmp_path / "r.html")
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu",
        "--host-resolver-rules=MAP * 0.0.0.0",
        f"--screenshot={tmp_path}/r.png", "--window-size=1300,2200", f"file://{tmp_path}/r.html",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "r.png").stat().st_size > 30_000
