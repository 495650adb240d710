# SPDX-License-Identifier: Apache-2.0
"""The architectures people bring, tiny and random, compiled at int8 and run on every backend.

From transformers: text, vision, detection, promptable and referring segmentation. By hand: a
convolutional U-Net, a module called twice, tied weights, several inputs, tuples and dictionaries.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_structure

import qgraph
import tests.test_compile
from qgraph.graph.trace import trace_info
from qgraph.report import sqnr
from tests.graph.rewriting import at_batch
from tests.graph.test_architectures import (
    bert,
    clipseg,
    detr,
    heavy,
    resnet,
    sam,
    segformer,
    swin,
    vit,
    yolos,
)
from tests.test_artifact import TwoInputs


def unet():
    return tests.test_compile.unet_case().model, {"x": torch.randn(2, 3, 16, 16)}


def called_twice():
    case = tests.test_compile.tower_case()
    return case.model, case.held_out


def tied_pair():
    return TwoInputs(), {"image": torch.randn(2, 5, 8), "tokens": torch.randint(0, 11, (2, 7))}


@pytest.mark.parametrize(
    "build",
    [
        unet,
        called_twice,
        tied_pair,
        lambda: bert("sdpa"),
        resnet,
        heavy(vit),
        heavy(yolos),
        heavy(segformer),
        heavy(swin),
        heavy(detr),
        heavy(sam),
        heavy(clipseg),
    ],
    ids=[
        "unet",
        "called twice",
        "tied pair",
        "bert",
        "resnet",
        "vit",
        "yolos",
        "segformer",
        "swin",
        "detr",
        "sam",
        "clipseg",
    ],
)
def test_every_backend_runs_the_architecture_and_they_agree(build):
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    batches = [at_batch(inputs, 4), at_batch(inputs, 2)]
    if model.__class__.__name__.startswith("CLIPSeg"):
        batches = [inputs, inputs]
    quantized = qgraph.compile(model, batches, pipeline="int8", example_inputs=inputs)
    dynamic = trace_info(quantized.graph_module).dynamic_batch
    held_out = at_batch(inputs, 3) if dynamic else inputs
    with torch.no_grad():
        wanted = model(**held_out)
    for backend in ("reference", "integer", "onnx"):
        got = quantized.lower(backend)(**held_out)
        assert tree_structure(got) == tree_structure(wanted)
        for ours, theirs in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
            if not isinstance(theirs, torch.Tensor):
                assert ours == theirs
                continue
            assert ours.shape == theirs.shape
            if ours.is_floating_point() and ours.numel():
                assert sqnr(theirs, ours) > 8, (backend, ours.shape)
    report = quantized.verify(held_out)
    assert report.codes > 400
    assert report.mismatches == 0, report.first_difference
