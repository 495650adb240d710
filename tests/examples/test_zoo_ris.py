# SPDX-License-Identifier: Apache-2.0
"""Referring segmentation: sentences mean one object, the model exports, its weights work."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch

from examples.zoo.objects import COLOURS, DIGITS, KINDS, SIZES
from examples.zoo.ris import batches, evaluate, load_model
from examples.zoo.ris.data import make_sample
from examples.zoo.ris.model import Layout, Segmenter
from examples.zoo.ris.sentences import EXTREMES, RELATIONS, resolve
from examples.zoo.ris.text import MAX_TOKENS, tokenize
from examples.zoo.scenes import SceneObject
from examples.zoo.windows import SwinBlock, shift_mask

_RELATION_OF = {words: name for name, group in RELATIONS.items() for words in group}
_EXTREME_OF = {word: name for name, group in EXTREMES.items() for word in group}
# Longest first, so that "to the left of" is not read as "left of".
_RELATION_WORDS = "|".join(sorted(_RELATION_OF, key=len, reverse=True))


def _fits(words: list[str], thing: SceneObject) -> bool:
    """Read a noun phrase word by word, on its own terms."""
    for word in words:
        if word in COLOURS:
            ok = thing.colour == word
        elif word in SIZES:
            ok = thing.size == word
        elif word in KINDS:
            ok = thing.kind == word
        else:
            is_digit = thing.kind in DIGITS
            ok = {"digit": is_digit, "shape": not is_digit, "object": True}[word]
        if not ok:
            return False
    return True


def _meant(sentence: str, objects: Sequence[SceneObject]) -> list[int]:
    """Brute force: read the sentence and test it on every object."""

    def value(name: str, thing: SceneObject) -> float:
        (x, y), extent = thing.centre, thing.extent
        where = {"left": -x, "right": x, "above": -y, "below": y}
        return {**where, "big": extent, "little": -extent}[name]

    match = re.fullmatch(rf"the (.+?) ({_RELATION_WORDS}) the (.+)", sentence)
    if match:
        anchors = [o for o in objects if _fits(match[3].split(), o)]
        assert len(anchors) == 1, sentence
        name = _RELATION_OF[match[2]]
        return [
            i
            for i, o in enumerate(objects)
            if o is not anchors[0]
            and _fits(match[1].split(), o)
            and value(name, o) > value(name, anchors[0])
        ]
    words = sentence.removeprefix("the ").split()
    if words[0] in _EXTREME_OF:
        name = _EXTREME_OF[words[0]]
        fitting = [i for i, o in enumerate(objects) if _fits(words[1:], o)]
        best = max(value(name, objects[i]) for i in fitting)
        return [i for i in fitting if value(name, objects[i]) == best]
    return [i for i, o in enumerate(objects) if _fits(words, o)]


@pytest.mark.parametrize("split", ["train", "calibration", "development", "evaluation"])
def test_every_sentence_is_true_of_its_target_only(split):
    for index in range(150):
        sample = make_sample(split, index)
        assert _meant(sample.sentence, sample.scene.objects) == [sample.target]
        assert resolve(sample.expression, sample.scene.objects) == [sample.target]


def test_most_sentences_have_a_distractor_of_the_same_kind_or_colour():
    shared = 0
    for index in range(100):
        sample = make_sample("evaluation", index)
        target = sample.scene.objects[sample.target]
        others = [o for o in sample.scene.objects if o is not target]
        shared += any(o.kind == target.kind or o.colour == target.colour for o in others)
    assert shared >= 70


def test_samples_repeat_and_differ_from_their_neighbours():
    first, again = make_sample("development", 7), make_sample("development", 7)
    assert first.sentence == again.sentence
    assert first.target == again.target
    assert make_sample("development", 8).sentence != first.sentence


def test_no_sentence_is_cut_by_the_token_limit():
    longest = "the small purple triangle to the left of the large purple triangle"
    assert int(tokenize([longest])["attention_mask"].sum()) < MAX_TOKENS


def test_batches_cover_the_requested_samples_with_a_short_tail():
    found = list(batches("calibration", 5, 2))
    assert [len(masks) for _, masks in found] == [2, 2, 1]
    inputs, masks = found[0]
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
    assert masks.dtype == torch.bool
    assert tuple(masks.shape[1:]) == (1, 80, 80)
    assert masks.flatten(1).any(1).all()


def test_shifted_windows_do_not_let_opposite_borders_meet():
    torch.manual_seed(0)
    block = SwinBlock(8, 8, 4, shift=2, heads=2)
    x = torch.randn(1, 64, 8, requires_grad=True)
    block(x)[0, 0].sum().backward()
    assert x.grad is not None
    reached = x.grad.abs().sum(-1).view(8, 8) > 1e-20
    assert reached[:2, :2].all()
    assert not reached[2:].any()
    assert not reached[:, 2:].any()
    assert shift_mask(8, 4, 2).shape == (4, 16, 16)


def test_a_map_that_windows_do_not_tile_is_refused():
    with pytest.raises(ValueError, match="multiple of the window; got 10 and 4"):
        SwinBlock(8, 10, 4, shift=0, heads=2)


def test_trained_parameters_stay_within_two_million():
    assert sum(p.numel() for p in Segmenter(Layout()).parameters()) <= 2_000_000


@pytest.fixture(scope="module")
def model():
    return load_model()


def test_words_behind_the_padding_mask_do_not_matter(model):
    inputs, _ = next(iter(batches("development", 2, 2)))
    changed = dict(inputs)
    changed["input_ids"] = torch.where(inputs["attention_mask"] == 0, 2003, inputs["input_ids"])
    assert torch.allclose(model(**inputs), model(**changed), atol=1e-4)


def test_the_model_exports_with_a_dynamic_batch(model):
    inputs, _ = next(iter(batches("development", 2, 2)))
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {name: {0: batch} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    other, _ = next(iter(batches("development", 3, 3)))
    assert torch.allclose(program.module()(**other), model(**other), atol=1e-5)


def test_the_committed_weights_reach_the_stated_quality(model):
    result = evaluate(model, "development", 64, batch_size=16)
    assert len(result["per_sample"]) == 64
    assert result["miou"] > 0.8
