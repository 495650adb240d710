# SPDX-License-Identifier: Apache-2.0
"""Referring sentences with a meaning: an expression resolves to the objects it is true of.

A sentence is used only if it is true of exactly one object, and if no other object comes close
to satisfying it (positions and sizes differ by a margin). Attributes that are not needed are
mostly left out, so the answer depends on every word that is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from examples.zoo.objects import DIGITS
from examples.zoo.scenes import SceneObject

RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
EXTREMES: dict[str, tuple[str, ...]] = {
    "left": ("leftmost",),
    "right": ("rightmost",),
    "above": ("top", "highest"),
    "below": ("bottom", "lowest"),
    "big": ("biggest",),
    "little": ("smallest",),
}
# Smallest difference that decides: pixels between centres, pixels between extents.
POSITION_MARGIN = 4.0
EXTENT_MARGIN = 3.0

_FAMILIES = ("attributes", "relation", "extreme")
_FAMILY_SHARES = (0.45, 0.30, 0.25)


@dataclass(frozen=True)
class Phrase:
    """A noun phrase; None leaves the attribute open. `noun` is a kind or a collective word."""

    noun: str
    colour: str | None = None
    size: str | None = None

    def holds(self, thing: SceneObject) -> bool:
        """Return whether the phrase is true of `thing`."""
        return (
            _noun_holds(self.noun, thing.kind)
            and self.colour in {None, thing.colour}
            and self.size in {None, thing.size}
        )

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.noun) if word)


@dataclass(frozen=True)
class Expression:
    """A phrase, narrowed by at most one of: a relation to another phrase, an extreme."""

    phrase: Phrase
    relation: str | None = None
    anchor: Phrase | None = None
    extreme: str | None = None


def _noun_holds(noun: str, kind: str) -> bool:
    if noun == "digit":
        return kind in DIGITS
    if noun == "shape":
        return kind not in DIGITS
    return noun in {"object", kind}


def _value(thing: SceneObject, direction: str) -> float:
    """Return a number that is larger the further `thing` lies in `direction`."""
    if direction in {"big", "little"}:
        return float(thing.extent if direction == "big" else -thing.extent)
    x0, y0, x1, y1 = thing.box
    along = (x0 + x1) / 2 if direction in {"left", "right"} else (y0 + y1) / 2
    return along if direction in {"right", "below"} else -along


def resolve(expression: Expression, objects: Sequence[SceneObject]) -> list[int] | None:
    """Return the numbers of the objects the expression is true of.

    None means that it cannot be decided: the anchor is not unique, or a margin is too small.
    """
    fitting = [i for i, thing in enumerate(objects) if expression.phrase.holds(thing)]
    if expression.relation is not None and expression.anchor is not None:
        anchors = [i for i, thing in enumerate(objects) if expression.anchor.holds(thing)]
        if len(anchors) != 1:
            return None
        origin = _value(objects[anchors[0]], expression.relation)
        others = [i for i in fitting if i != anchors[0]]
        gaps = {i: _value(objects[i], expression.relation) - origin for i in others}
        if any(abs(gap) < POSITION_MARGIN for gap in gaps.values()):
            return None
        return [i for i, gap in gaps.items() if gap > 0]
    if expression.extreme is not None:
        return _most(fitting, objects, expression.extreme)
    return fitting


def _most(fitting: list[int], objects: Sequence[SceneObject], extreme: str) -> list[int] | None:
    if len(fitting) < 2:
        return fitting
    ranked = sorted(fitting, key=lambda i: _value(objects[i], extreme), reverse=True)
    gap = _value(objects[ranked[0]], extreme) - _value(objects[ranked[1]], extreme)
    margin = EXTENT_MARGIN if extreme in {"big", "little"} else POSITION_MARGIN
    return ranked[:1] if gap >= margin else None


def _phrases(thing: SceneObject) -> list[Phrase]:
    collective = "digit" if thing.kind in DIGITS else "shape"
    nouns = (thing.kind, collective, "object")
    return [
        Phrase(noun, colour, size)
        for noun, colour, size in product(nouns, (None, thing.colour), (None, thing.size))
        if noun == thing.kind or colour is not None or size is not None
    ]


def _length(phrase: Phrase) -> int:
    return (phrase.colour is not None) + (phrase.size is not None)


def _minimal(own: list[Phrase], objects: Sequence[SceneObject]) -> list[Phrase]:
    """Keep the unique phrases that lose uniqueness when any attribute is left out."""
    unique = {p for p in own if sum(map(p.holds, objects)) == 1}
    return [
        p
        for p in own
        if p in unique
        and not (p.colour and replace(p, colour=None) in unique)
        and not (p.size and replace(p, size=None) in unique)
    ]


def _candidates(
    rng: np.random.Generator, family: str, target: int, objects: Sequence[SceneObject]
) -> Iterator[Expression]:
    """Yield expressions of a family about `target` in random order, most without idle words."""
    own = _phrases(objects[target])
    own = sorted((own[i] for i in rng.permutation(len(own))), key=_length)
    if family == "attributes":
        minimal = _minimal(own, objects)
        # The longer of the minimal phrases need more to be told apart, so they are preferred.
        yield from map(Expression, reversed(minimal) if rng.random() < 0.8 else minimal)
        return
    # A phrase that is already unique would make the rest of the sentence idle.
    loose = [p for p in own if sum(map(p.holds, objects)) > 1]
    if family == "extreme":
        names = list(EXTREMES)
        for phrase in loose:
            for i in rng.permutation(len(names)):
                yield Expression(phrase, extreme=names[i])
        return
    relations = list(RELATIONS)
    for phrase in loose:
        for i in rng.permutation(len(objects)):
            if i == target:
                continue
            anchors = sorted(_phrases(objects[i]), key=lambda p: (_length(p), rng.random()))
            for anchor in anchors[:8]:
                for j in rng.permutation(4):
                    yield Expression(phrase, relation=relations[j], anchor=anchor)


def sample_expression(
    rng: np.random.Generator, objects: Sequence[SceneObject]
) -> tuple[Expression, int] | None:
    """Draw an unambiguous expression and its target; None if the scene allows none."""
    start = int(rng.choice(3, p=_FAMILY_SHARES))
    families = [_FAMILIES[start], *(f for f in _FAMILIES if f != _FAMILIES[start])]
    for family in families:
        for target in rng.permutation(len(objects)).tolist():
            for expression in _candidates(rng, family, target, objects):
                if resolve(expression, objects) == [target]:
                    return expression, target
    return None


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def phrase_sentence(rng: np.random.Generator, expression: Expression) -> str:
    """Put an expression into words, with a random choice among synonyms."""
    phrase = str(expression.phrase)
    if expression.relation is not None:
        return f"the {phrase} {_pick(rng, RELATIONS[expression.relation])} the {expression.anchor}"
    if expression.extreme is not None:
        return f"the {_pick(rng, EXTREMES[expression.extreme])} {phrase}"
    return f"the {phrase}"
