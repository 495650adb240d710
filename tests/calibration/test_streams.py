# SPDX-License-Identifier: Apache-2.0
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qgraph.calibration.loader import adapter
from qgraph.calibration.streams import ROW_MASK, Batching, Shelf, Stream, begin, split
from qgraph.errors import CalibrationError
from qgraph.graph.extract import extract
from qgraph.graph.trace import trace


class Windows(nn.Module):
    """Deals each sample out into four rows, as window attention does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x, scale):
        rows = self.first(x).unflatten(1, (4, -1)).flatten(0, 1)
        return self.second(rows.relu() * scale).unflatten(0, (-1, 4)).flatten(1, 2)


@cache
def graph():
    torch.manual_seed(0)
    return trace(Windows().eval(), torch.randn(2, 8, 3), torch.ones(2, 1, 1)[:1])


def ports(module):
    nodes = list(module.graph.nodes)
    inputs = [n.name for n in nodes if n.op == "placeholder"]
    relu = next(n for n in nodes if n.name.startswith("relu"))
    return inputs, relu.name


def batches(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(sum(sizes), 8, 3, generator=generator)
    return [(part, torch.full((1, 1, 1), 2.0)) for part in data.split(sizes)], data


def stream_of(module, loader, shelf=None, **options):
    return begin(module, loader, adapter(module), shelf or Shelf(), **options)


@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(2, 7), min_size=1, max_size=4), batch=st.integers(1, 9))
def test_streams_do_not_depend_on_how_samples_are_batched(sizes, batch):
    module = graph()
    inputs, relu = ports(module)
    loader, data = batches(sizes)
    stream = stream_of(module, loader)
    part = module_part(module, inputs, relu)
    stream.advance(part, inputs, [relu], batch=batch)
    (bucket,) = stream.buckets
    assert bucket.samples == list(range(len(data)))
    want = part(data, torch.full((1, 1, 1), 2.0))[0]
    got = bucket.rows(relu, torch.arange(len(data)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def module_part(module, inputs, relu):
    return extract(module, inputs, [relu])


def test_rows_of_a_sample_stay_together():
    module = graph()
    inputs, relu = ports(module)
    loader, data = batches([3, 2])
    stream = stream_of(module, loader)
    part = module_part(module, inputs, relu)
    stream.advance(part, inputs, [relu])
    picks = torch.tensor([4, 1])
    want = part(data[picks], torch.full((1, 1, 1), 2.0))[0]
    torch.testing.assert_close(stream.buckets[0].rows(relu, picks), want, rtol=0, atol=1e-6)


def test_shared_inputs_are_stored_once():
    module = graph()
    loader, _ = batches([3, 2])
    (bucket,) = stream_of(module, loader).buckets
    (name,) = bucket.shared
    assert bucket.values[name].shape[0] == 1
    assert float(bucket.rows(name, torch.tensor([1]))) == 2.0


def test_values_beyond_the_budget_lie_in_files_and_are_equal():
    module = graph()
    inputs, relu = ports(module)
    loader, _ = batches([5, 4])
    part = module_part(module, inputs, relu)
    kept = {}
    for budget in (1 << 30, 0):
        shelf = Shelf(max_memory=budget)
        stream = stream_of(module, loader, shelf)
        stream.advance(part, inputs, [relu])
        kept[budget] = stream.buckets[0].values[relu].clone()
        assert (shelf.on_disk == 0) is (budget > 0)
        assert (shelf.in_memory == 0) is (budget == 0)
    assert torch.equal(kept[0], kept[1 << 30])


def test_batches_do_not_wait_in_memory_beyond_the_budget(tmp_path):
    module = graph()
    data, _ = batches([4] * 6)
    budget = 2 * data[0][0].nbytes
    shelf = Shelf(tmp_path, max_memory=budget)
    on_disk = []

    def loader():
        for batch in data:
            yield batch
            on_disk.append(shelf.on_disk)
            assert shelf.in_memory <= budget

    stream = stream_of(module, loader(), shelf)
    assert on_disk[-1] >= 4 * data[0][0].nbytes
    whole = stream_of(module, data)
    for name, value in whole.buckets[0].values.items():
        assert torch.equal(stream.buckets[0].values[name], value)
    assert not [file for file in tmp_path.iterdir() if "batch" in file.name]


def test_dropping_a_port_gives_its_memory_back():
    module = graph()
    inputs, relu = ports(module)
    loader, _ = batches([5])
    shelf = Shelf()
    stream = stream_of(module, loader, shelf)
    before = shelf.in_memory
    stream.advance(module_part(module, inputs, relu), inputs, [relu])
    assert shelf.in_memory > before
    stream.drop([relu])
    assert shelf.in_memory == before


def test_a_stream_comes_back_from_its_files(tmp_path):
    module = graph()
    loader, data = batches([5])
    stream = stream_of(module, loader, Shelf(tmp_path, persistent=True))
    saved = stream.manifest()
    del stream
    again = Stream("float", Shelf(tmp_path, persistent=True), Batching(module), [])
    again.restore(saved)
    name = next(n for n in again.buckets[0].values if n not in again.buckets[0].shared)
    assert torch.equal(again.buckets[0].rows(name, slice(None)), data)


def test_max_samples_cuts_and_an_empty_loader_is_refused():
    module = graph()
    loader, _ = batches([4, 4, 4])
    stream = stream_of(module, loader, max_samples=6)
    assert stream.buckets[0].samples == list(range(6))
    with pytest.raises(CalibrationError, match="0 batches"):
        stream_of(module, [])


def test_one_sample_of_eight_is_held_out_and_no_one_twice():
    module = graph()
    loader, _ = batches([9, 8])
    stream = stream_of(module, loader)
    train, guard = split(stream, seed=3)
    assert len(guard[0]) == 3
    assert sorted(train[0] + guard[0]) == list(range(17))
    assert split(stream, seed=3) == (train, guard)
    assert split(stream, seed=4) != (train, guard)


def test_masks_of_rows_are_kept_beside_the_inputs():
    module = graph()
    loader, data = batches([3, 2])

    def masks(args, kwargs):
        return args[0][:, :, 0] > 0

    (bucket,) = stream_of(module, loader, row_masks=masks).buckets
    picks = torch.tensor([4, 0])
    assert torch.equal(bucket.rows(ROW_MASK, picks), data[picks][:, :, 0] > 0)
