# SPDX-License-Identifier: Apache-2.0
"""Sensitivity tables: rankings that make sense, sums that survive a kill, lists to compile with."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import qgraph
from qgraph.calibration.sensitivity_state import State
from qgraph.errors import BudgetInfeasibleError, CalibrationError, ConfigError
from qgraph.sensitivity import SensitivityTable
from tests.small_unet import images, tiny_unet

WIDTHS: Any = {"weight_bits": (2, 4, 8), "activation_bits": (2, 4, 8)}


def weakest(method: str, **options) -> SensitivityTable:
    """A network in which one convolution matters a hundred times more than its neighbour."""
    torch.manual_seed(0)
    quiet, loud = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
    with torch.no_grad():
        quiet.weight *= 0.01

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.quiet, self.loud = nn.Conv2d(1, 4, 1), quiet, loud
            self.head = nn.Conv2d(4, 1, 1)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.head(torch.relu(self.quiet(x)) + torch.relu(self.loud(torch.tanh(x))))

    return qgraph.sensitivity(Sum().eval(), images(2), method=method, **WIDTHS, **options)


def square(outputs, batch):
    return ((outputs - batch) ** 2).mean()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fisher", {}), ("fisher", {"output": "sigmoid"}), ("fisher", {"loss": square}),
        ("output", {}), ("output", {"output": "sigmoid"}),
    ],
)  # fmt: skip
def test_the_layer_that_matters_more_ranks_higher(method, options):
    found = weakest(method, **options)
    names = [row.name for row in found.rows]
    assert names.index("loud") < names.index("quiet")
    for row in found.rows:
        assert row.weights[2] >= row.weights[8]


def test_a_loss_that_is_a_distance_ranks_as_the_distance_does():
    model, data = tiny_unet(), images(1)
    with torch.no_grad():
        exact = model(data[0])
    by_loss = qgraph.sensitivity(
        model, data, method="loss", loss=lambda y, x: (y - exact).square().sum(), **WIDTHS
    )
    by_output = qgraph.sensitivity(model, data, method="output", **WIDTHS)
    assert [row.name for row in by_loss.rows] == [row.name for row in by_output.rows]


def test_omegas_fall_with_bits_for_weights_and_inputs():
    found = qgraph.sensitivity(tiny_unet(), images(), **WIDTHS)
    for row in found.rows:
        assert row.weights[2] > row.weights[4] > row.weights[8] > 0
        assert row.activations[2] > row.activations[4] > row.activations[8] > 0


def test_more_rows_and_seeds_agree_with_each_other():
    first, second = (
        qgraph.sensitivity(tiny_unet(), images(), rows=128, seed=seed, **WIDTHS) for seed in (0, 1)
    )
    other = {row.name: row for row in second.rows}
    for row in first.rows:
        assert row.weights[2] == pytest.approx(other[row.name].weights[2], rel=0.75)


def test_targets_alone_count_in_the_target_aware_ratio():
    def mask(outputs, batch):
        found = torch.zeros_like(batch, dtype=torch.bool)
        found[:, :, 4:6, 4:6] = True
        return found

    plain = qgraph.sensitivity(tiny_unet(), images(), method="sqnr", targets=mask, **WIDTHS)
    assert all(row.weights[2] > row.weights[8] > 0 for row in plain.rows)
    with pytest.raises(CalibrationError, match=r"shape \[B, 1, H, W\]"):
        qgraph.sensitivity(
            tiny_unet(), images(), method="sqnr", targets=lambda y, x: y.flatten() > 0, **WIDTHS
        )


def test_the_ignore_list_goes_into_compile_and_keeps_its_layers_in_float():
    model, data = tiny_unet(), images(2)
    found = qgraph.sensitivity(model, data, **WIDTHS)
    names = found.ignore(share=0.5)
    assert names[: len(found.rows[0].nodes)] == list(found.rows[0].nodes)
    assert 0 < len(names) < 7
    quantized = qgraph.compile(model, data, "int4", ignore=names)
    assert not {layer.node for layer in quantized.report.layers} & set(names)
    assert found.ignore(share=0.0) == []
    assert len(found.ignore(share=1.0, bits=4)) == 7


def test_a_killed_measurement_goes_on_and_ends_with_the_same_bits(tmp_path):
    class Killed:
        """Breaks off at the third batch once it is armed."""

        def __init__(self, batches: list[torch.Tensor]):
            self.batches, self.is_armed = batches, False

        def __len__(self) -> int:
            return len(self.batches)

        def __iter__(self):
            for number, batch in enumerate(self.batches):
                if number == 2 and self.is_armed:
                    raise KeyboardInterrupt
                yield batch

    model, whole = tiny_unet(), images(3)
    expected = qgraph.sensitivity(model, whole, **WIDTHS)
    loader, reads = Killed(whole), []

    def arm(what, done, total):  # ranges need all batches, so only the second reading breaks off
        reads.append(what)
        loader.is_armed |= what == "calibrate" and done == total

    path = tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        qgraph.sensitivity(model, loader, state_file=path, progress=arm, **WIDTHS)
    assert json.loads(path.read_text())["done"] == [0, 1]
    loader.is_armed = False
    again = qgraph.sensitivity(model, loader, state_file=path, progress=lambda *_: None, **WIDTHS)
    assert again.rows == expected.rows
    assert "sensitivity" in reads


def test_a_state_of_other_settings_is_not_used(tmp_path):
    path = tmp_path / "state.json"
    qgraph.sensitivity(tiny_unet(), images(1), state_file=path, **WIDTHS)
    key = json.loads(path.read_text())["key"]
    other = qgraph.sensitivity(tiny_unet(), images(1), state_file=path, rows=4, **WIDTHS)
    assert json.loads(path.read_text())["key"] != key
    assert other == qgraph.sensitivity(tiny_unet(), images(1), rows=4, **WIDTHS)


def test_ranks_share_the_batches_and_their_sums_add_up(monkeypatch):
    parts = []
    for rank in range(2):
        monkeypatch.setattr(
            "qgraph.calibration.sensitivity_state.rank_and_size", lambda r=rank: (r, 2)
        )
        state = State()
        mine = [number for number in range(5) if state.wants(number)]
        for number in mine:
            state.add(number, {"a": torch.tensor([float(number), 1.0])})
        parts.append((mine, state.sums["a"]))
    assert sorted(parts[0][0] + parts[1][0]) == list(range(5))
    assert [a + b for a, b in zip(parts[0][1], parts[1][1], strict=True)] == [10.0, 5.0]


def test_the_table_survives_json_and_prints_every_unit():
    found = qgraph.sensitivity(tiny_unet(), images(1), **WIDTHS)
    again = SensitivityTable.from_json(found.to_json())
    assert again.rows == found.rows
    assert again.ignore() == found.ignore()
    text = str(found)
    assert all(row.name in text for row in found.rows)
    assert found.to_svg().count("<rect") > len(found.by_block()) * 6


def test_fronts_fall_strictly_and_free_is_below_uniform():
    found = qgraph.sensitivity(tiny_unet(), images(1), **WIDTHS)
    front = found.front("size", points=6)
    omegas, costs = [a.omega for a in front], [a.costs["size"] for a in front]
    assert omegas == sorted(omegas, reverse=True)
    assert costs == sorted(costs)
    uniform = found.front("size", mode="uniform", points=6)
    assert front[-1].omega <= uniform[-1].omega
    assert "<path" in found.front_svg("bops")
    with pytest.raises(BudgetInfeasibleError, match="budget bops"):
        found.front("size", budget={"bops": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hessian"}, "unknown sensitivity method"),
        ({"output": "logits"}, "unknown kind of output"),
        ({"weight_bits": (1,)}, "bits is 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        qgraph.sensitivity(tiny_unet(), images(1), **options)


def test_a_loss_that_does_not_depend_on_the_model_is_refused():
    with pytest.raises(CalibrationError, match="does not depend on the model"):
        qgraph.sensitivity(tiny_unet(), images(1), loss=lambda y, x: x.sum(), **WIDTHS)
    with pytest.raises(CalibrationError, match="needs loss="):
        qgraph.sensitivity(tiny_unet(), images(1), method="loss", **WIDTHS)
    with pytest.raises(CalibrationError, match=r"gradient at .* is not finite"):
        qgraph.sensitivity(tiny_unet(), images(1), loss=lambda y, x: (y * 1e30).sum(), **WIDTHS)
