# SPDX-License-Identifier: Apache-2.0
"""Histograms with levels, sample masks and the sensitivity plot: right numbers, drawn, kept."""

from __future__ import annotations

import base64
import json
import struct
import zlib

import pytest
import torch

import qgraph
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.report import LayerRecord, Report
from qgraph.report.distributions import BINS, distribution_of
from qgraph.report.png import png
from qgraph.report.samples import SampleImage
from qgraph.report.sensitivity import SensitivityPoint
from qgraph.testing import Case, Program, UNet
from tests.report.test_html import checked


@pytest.fixture(scope="module")
def segmented() -> qgraph.QuantizedModel:
    case = Case(UNet(classes=1))
    return qgraph.compile(case.model(), case.loader(), "w4a4")


def test_every_operand_has_a_histogram_of_all_its_values(segmented):
    for layer in segmented.report.layers:
        shape = layer.distribution
        assert shape is not None
        assert len(shape.before) == len(shape.after) == BINS
        assert sum(shape.before) == sum(shape.after) > 0
        assert shape.num_levels <= 1 << layer.bits
        assert 0 <= shape.clipped < 0.5
        assert shape.in_scales is ("per channel" in layer.format)
        if layer.bits == 4:
            assert len(shape.levels) == shape.num_levels


def test_quantized_values_sit_on_the_levels(segmented):
    layer = next(r for r in segmented.report.layers if r.bits == 4 and r.role == "weight")
    shape = layer.distribution
    assert shape is not None
    width = (shape.last - shape.first) / BINS
    filled = [shape.first + (i + 0.5) * width for i, n in enumerate(shape.after) if n]
    assert all(min(abs(x - level) for level in shape.levels) <= width for x in filled)


def test_values_that_are_clipped_are_counted_and_fill_the_end_bins():
    encoding = AffineEncoding.per_tensor(0.1, 8, IntGrid(4, signed=False))
    before = torch.cat([torch.linspace(-0.8, 0.7, 90), torch.full((10,), 50.0)])
    shape = distribution_of(before, encoding.fake(before), encoding)
    assert shape.clipped == pytest.approx(0.1)
    assert shape.low == pytest.approx(-0.8)
    assert shape.high == 50.0
    assert shape.last < 1.0
    assert shape.before[-1] >= 10
    assert len(shape.levels) == 16


def test_masks_of_a_segmentation_model_are_shown_and_kept(segmented, tmp_path):
    images = segmented.report.images
    assert len(images) == 2
    assert all(0.5 < image.agreement <= 1 for image in images)
    page = segmented.report.to_html()
    checked(page)
    assert page.count("<img") == 8
    segmented.save(tmp_path / "m.qgraph")
    loaded = qgraph.load(tmp_path / "m.qgraph")
    assert isinstance(loaded, qgraph.QuantizedModel)
    assert loaded.report.images == images
    assert Report.from_dict(json.loads(segmented.report.to_json())).images == images


def test_models_without_masks_show_none():
    case = Case(Program())
    assert qgraph.compile(case.model(), case.loader(), "int8").report.images == ()


def test_a_picture_is_a_png_with_these_pixels():
    pixels = torch.arange(2 * 3 * 3).view(2, 3, 3)
    data = base64.b64decode(png(pixels))
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (3, 2)
    at = data.index(b"IDAT")
    size = struct.unpack(">I", data[at - 4 : at])[0]
    rows = zlib.decompress(data[at + 4 : at + 4 + size])
    assert list(rows) == [0, *range(9), 0, *range(9, 18)]


def test_a_picture_that_is_no_base64_is_refused():
    good = {"picture": "", "exact": "", "quantized": "", "difference": "", "agreement": 1.0}
    with pytest.raises(ValueError, match="base64"):
        SampleImage.from_dict({**good, "exact": '"><script>'})


def test_sensitivities_are_drawn_with_the_chosen_widths_and_kept():
    points = [
        SensitivityPoint(f"layer{i}", bits, 4.0**-bits * (i + 1), chosen=bits == 4)
        for i in range(3)
        for bits in (2, 4, 8)
    ]
    report = Report("x", (), (), ()).with_sensitivity(points)
    page = report.to_html()
    checked(page)
    assert page.count("<circle") == 3
    assert "Bits against sensitivity" in page
    assert Report.from_dict(json.loads(report.to_json())) == report


def test_many_histograms_keep_the_page_small(segmented):
    shape = segmented.report.layers[0].distribution
    layers = tuple(
        LayerRecord(f"n{i}", f"layers.{i}", "", "linear", "weight", 4, "int4 per channel", "x", "y",
                    20.0 + i % 7, shape)
        for i in range(3000)
    )  # fmt: skip
    page = Report("big", layers, (), ()).to_html()
    assert len(page.encode()) < 3 << 20
    assert "are left out" in page
