# SPDX-License-Identifier: Apache-2.0
"""What the strategies draw: models that trace, print as code and come out the same again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

import qgraph
from qgraph import testing
from qgraph.formats import AffineEncoding, LevelEncoding
from qgraph.pipelines import parse
from qgraph.testing import Case, ConvNet, Program, Step, awkward, models, tensors
from qgraph.testing.attention import KINDS as ATTENTIONS
from qgraph.testing.attention import AttentionNet

slow_to_draw = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@slow_to_draw
@given(models())
def test_a_case_traces_and_its_printed_form_builds_the_same_model(case):
    module = case.graph()
    again = eval(repr(case), vars(testing))
    assert again == case
    for a, b in zip(case.inputs(), again.inputs(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(case.model().parameters(), again.model().parameters(), strict=True):
        assert torch.equal(a, b)
    assert [n.op for n in module.graph.nodes].count("placeholder") == len(case.inputs())


@pytest.mark.parametrize("kind", sorted(ATTENTIONS))
def test_every_kind_of_attention_builds(kind):
    case = Case(AttentionNet(kind))
    with torch.no_grad():
        case.model()(*case.inputs())
    if kind in testing.attention.SINGLE:
        boxed = Case(AttentionNet(kind, block=True))
        with torch.no_grad():
            assert boxed.model()(*boxed.inputs()).shape == boxed.inputs()[0].shape


def test_misspelt_recipes_are_refused_with_the_nearest_name():
    with pytest.raises(qgraph.ConfigError, match="did you mean 'Separate'"):
        AttentionNet("Seperate").build()
    with pytest.raises(qgraph.ConfigError, match="did you mean 'relu'"):
        Program((Step("reluu"),)).build()
    with pytest.raises(qgraph.ConfigError, match="did you mean 'bimodal'"):
        awkward("bimodel", (2, 2))


def test_failures_shrink_to_the_smallest_model():
    def wide(case):
        return isinstance(case.recipe, ConvNet) and case.recipe.channels >= 4

    assert find(testing.conv_models(), wide).recipe == ConvNet(blocks=(find_block(),))


def find_block():
    return find(testing.convolutions.conv_blocks(), lambda _: True)


@pytest.mark.parametrize("kind", testing.KINDS)
def test_each_kind_of_tensor_has_its_property(kind):
    x = awkward(kind, (64, 8), seed=3)
    assert x.shape == (64, 8)
    assert bool(x.isfinite().all())
    assert torch.equal(x, awkward(kind, (64, 8), seed=3))
    reach = x.abs().amax(0)
    holds = {
        "zeros": not x.any(),
        "constant": x.unique().numel() == 1,
        "one_sided": bool((x >= 0).all()),
        "negative": bool((x < 0).all()),
        "outlier_channels": float(reach.max() / reach.min()) > 30,
        "dead_channels": not x[:, 0].any() and bool(x.any()),
        "bimodal": float(x.abs().min()) > 1.5 and x.mean(0).sign().unique().numel() == 2,
        "heavy_tails": float(x.abs().max() / x.abs().median()) > 20,
        "denormals": bool(((x != 0) & (x.abs() < 2**-126)).any()),
        "spread": float(x.abs().max() / x.abs().median()) > 50,
        "ties": torch.equal(x * 2, (x * 2).round()),
        "huge": float(x.abs().max()) > 1e18,
        "tiny": float(x.abs().max()) < 1e-17,
    }
    assert holds.get(kind, True)


@given(tensors(shape=(3, 4)), tensors())
def test_tensors_have_the_shape_asked_for(fixed, free):
    assert fixed.shape == (3, 4)
    assert 2 <= free.ndim <= 4


def test_all_formats_and_granularities_are_drawn():
    seen = set()

    @settings(max_examples=200, database=None, deadline=None)
    @given(testing.encodings(channels=3))
    def draw(encoding):
        name = encoding.name if isinstance(encoding, LevelEncoding) else "affine"
        seen.add((name, encoding.scale.ndim))
        if isinstance(encoding, AffineEncoding) and encoding.scale.ndim:
            assert encoding.scale.shape == (3,)

    draw()
    formats = {"table", "dual region", "dual region signed", "affine"}
    assert {(name, 0) for name in formats} < seen
    assert ("affine", 1) in seen
    assert any("power" in name for name, _ in seen)


@given(testing.pipelines())
def test_pipelines_are_valid_and_print_as_text_that_parses_back(pipeline):
    pipeline.check({qgraph.Fact.TRACED})
    assert parse(str(pipeline)).passes == pipeline.passes


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_every_form_of_loader_calibrates(data):
    case = Case(Program((Step("linear"), Step("add", 0, 1))))
    loader = data.draw(testing.loaders(case))
    quantized = qgraph.compile(
        case.model(), loader.batches(), "int8", example_inputs=case.inputs(), verify=False
    )
    assert quantized.report.layers


def test_without_hypothesis_the_import_says_what_to_install():
    program = "import sys; sys.modules['hypothesis'] = None; import qgraph; import qgraph.testing"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert 'pip install "qgraph[testing]"' in done.stderr
