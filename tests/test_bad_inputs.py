# SPDX-License-Identifier: Apache-2.0
"""Each bad input gets a typed error with a cure, or simply works."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qgraph


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


def batches(count=3, size=4):
    torch.manual_seed(1)
    return [torch.randn(size, 6) for _ in range(count)]


def spoilt(value):
    found = batches()
    found[1][2, 3] = value
    return found


class Dry:
    """Announces more than it gives."""

    def __len__(self):
        return 5

    def __iter__(self):
        return iter(batches(2))


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        ([], "gave 0 batches"),
        (iter(()), "gave 0 batches"),
        (Dry(), "ran dry: it gave 2 of the 5"),
        (spoilt(float("nan")), "batch 1: 1 non-finite.*in x"),
        (spoilt(float("inf")), "batch 1: 1 non-finite.*in x"),
        ([*batches(), torch.randn(4, 7)], "batch 3: input 'x' is float32.4, 7., the model takes"),
        ([*batches(), torch.randn(0, 6)], "batch 3: input 'x' is float32.0, 6."),
        ([batches()[0], "text"], "a batch of type builtins.str"),
        (3, "an int, which is not iterable|is a int, which is not iterable"),
    ],
    ids=["empty", "exhausted", "dry", "nan", "inf", "shape", "zero-size", "type", "not-iterable"],
)
def test_an_unusable_loader_is_named(model, loader, match):
    with pytest.raises(qgraph.CalibrationError, match=match):
        qgraph.compile(model, loader)


def test_nan_inside_the_network_names_the_node_and_its_source():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return self.linear(torch.log(x + 3))

    loader = [torch.zeros(4, 6), torch.full((4, 6), -9.0)]
    named = r"batch 1: 24 non-finite.*log.*test_bad_inputs"
    with pytest.raises(qgraph.CalibrationError, match=named):
        qgraph.compile(Root().eval(), loader)


def test_training_mode_is_refused_with_the_cure(model):
    model.train()
    with pytest.raises(qgraph.CaptureError, match=r"eval\(\)"):
        qgraph.compile(model, batches())
    assert model.training


def test_a_non_finite_weight_is_named(model):
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(qgraph.CaptureError, match=r"head\.weight"):
        qgraph.compile(model, batches())


def test_control_flow_on_data_names_the_line_and_a_way_out():
    class Branch(Net):
        def forward(self, x):
            if x.sum() > 0:
                return super().forward(x)
            return x

    with pytest.raises(qgraph.CaptureError, match=r"test_bad_inputs.py:\d+"):
        qgraph.compile(Branch().eval(), batches())


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("int88x", "unknown pipeline 'int88x'; did you mean 'int8'"),
        ("int1", "bits is 1; allowed: integers from 2 to 16"),
        ("int0", "bits is 0"),
        ("w17a8", "bits is 17"),
        ("", "unknown pipeline ''"),
    ],
)
def test_wrong_pipeline_names_and_bits_are_refused(model, name, match):
    with pytest.raises(qgraph.ConfigError, match=match):
        qgraph.compile(model, batches(), pipeline=name)


def test_wrong_options_are_refused_with_the_nearest_name():
    with pytest.raises(qgraph.ConfigError, match="did you mean 'method'"):
        qgraph.pipeline("int8", methd="mse")
    with pytest.raises(qgraph.ConfigError, match="did you mean 'minmax'"):
        qgraph.pipeline("int8", method="min-max")
    with pytest.raises(qgraph.ConfigError, match="unknown op kind 'linears'"):
        qgraph.pipeline("int8", scope=("linears",))


def test_an_ignore_pattern_that_matches_nothing_is_refused(model):
    with pytest.raises(qgraph.ConfigError, match="ignore pattern 'heads' matches nothing"):
        qgraph.compile(model, batches(), ignore="heads")


def test_ignoring_everything_is_refused(model):
    with pytest.raises(qgraph.ConfigError, match="nothing to quantize"):
        qgraph.compile(model, batches(), ignore="linear")


def test_a_batch_of_one_works_and_the_graph_stays_dynamic(model):
    quantized = qgraph.compile(model, batches(size=1))
    assert quantized(torch.randn(7, 6)).shape == (7, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_work_and_are_kept_at_the_borders(model, dtype):
    model = model.to(dtype)
    quantized = qgraph.compile(model, [b.to(dtype) for b in batches()])
    x = batches()[0].to(dtype)
    got = quantized(x)
    assert got.dtype == dtype
    assert (got.float() - model(x).float()).abs().max() < 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        torch.randn(4, 5),
        torch.randn(4, 6, 1),
        torch.zeros(4, 6, dtype=torch.int64),
        torch.randn(0, 6),
    ],
    ids=["width", "rank", "dtype", "empty"],
)
def test_wrong_inputs_at_run_time_are_refused_with_both_sides_shown(model, wrong):
    quantized = qgraph.compile(model, batches())
    both = r"input 'x' is .*the model takes float32\[s\d+, 6\]"
    with pytest.raises(qgraph.InputError, match=both):
        quantized(wrong)
    with pytest.raises(qgraph.InputError, match="the model takes"):
        quantized()


def test_the_wrong_device_is_named_on_both_sides(model):
    with pytest.raises(qgraph.QGraphError, match="meta"):
        qgraph.compile(model, [b.to("meta") for b in batches()])


@pytest.mark.parametrize(
    "adapt",
    [
        lambda b: (b,),
        lambda b: [b],
        lambda b: {"x": b},
        lambda b: (b, torch.zeros(len(b))),
        lambda b: ({"x": b}, torch.zeros(len(b))),
        lambda b: ((b,), {}),
    ],
    ids=["tuple", "list", "dict", "pair", "dict-pair", "args-kwargs"],
)
def test_loaders_may_yield_any_usual_kind_of_batch(model, adapt):
    plain = qgraph.compile(model, batches())
    other = qgraph.compile(model, [adapt(b) for b in batches()])
    x = torch.randn(5, 6)
    assert torch.equal(plain(x), other(x))


def test_a_transform_maps_batches_that_are_not_plain(model):
    loader = [{"image": b, "id": 7} for b in batches()]
    quantized = qgraph.compile(model, loader, transform=lambda b: b["image"])
    assert quantized(torch.randn(2, 6)).shape == (2, 3)


def test_a_loader_that_raises_passes_its_error_on(model):
    def loader():
        yield batches()[0]
        raise OSError("disk gone")

    class Reiterable:
        def __iter__(self):
            return loader()

    with pytest.raises((OSError, qgraph.PassError), match="disk gone"):
        qgraph.compile(model, Reiterable())


def test_one_absurd_value_is_reported_and_costs_little(model, caplog):
    spoilt = batches()
    spoilt[1][0, 0] = 1e30
    quantized = qgraph.compile(model, spoilt)
    doubts = [d for d in quantized.report.decisions if "times the median" in d.reason]
    assert doubts
    assert doubts[0].numbers["ratio"] > 1e29
    assert "check the calibration data" in caplog.text


def test_sound_data_is_not_doubted_nor_is_a_sharp_softmax(model, caplog):
    qgraph.compile(model, batches())

    class Sharp(nn.Module):
        def forward(self, x):
            return torch.softmax(1e3 * x, -1) @ x.transpose(0, 1)

    qgraph.compile(Sharp().eval(), [torch.randn(6, 6)], dynamic_shapes={"x": None})
    assert "times the median" not in caplog.text


def test_dead_channels_and_a_layer_of_zeros_stay_exact():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[0] = 0
    quantized = qgraph.compile(model, batches())
    x = torch.randn(5, 6)
    assert torch.isfinite(quantized(x)).all()
    zeros = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        for parameter in zeros.parameters():
            parameter.zero_()
    assert torch.equal(qgraph.compile(zeros, batches())(x), torch.zeros(5, 3))


@pytest.mark.parametrize("write", ["save", "to_onnx"])
def test_a_folder_that_is_missing_is_a_typed_error_that_names_it(model, tmp_path, write):
    quantized = qgraph.compile(model, batches())
    with pytest.raises(qgraph.QGraphError, match="absent"):
        getattr(quantized, write)(tmp_path / "absent" / "model.onnx")
