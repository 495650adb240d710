# SPDX-License-Identifier: Apache-2.0
"""The list of planted bugs fits the code: each names a place that exists once, and its tests."""

from __future__ import annotations

import ast

import pytest

from tests.mutation.generated import places_of, planted, sample
from tests.mutation.mutants import MUTANTS, Mutant
from tests.mutation.planting import ROOT
from tests.mutation.run import explained


def test_there_are_at_least_sixty():
    assert len(MUTANTS) >= 60
    assert len(set(MUTANTS)) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{m.file}-{i}" for i, m in enumerate(MUTANTS)])
def test_each_planted_bug_names_one_place_and_tests_that_exist(mutant: Mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert all((ROOT / path).exists() for path in mutant.tests.split())


def test_every_rule_finds_places_and_leaves_python_behind():
    found = [bug for place in places_of("qgraph/formats/affine.py") if (bug := planted(place))]
    assert {"comparison", "number", "sign", "extremum"} <= {g.rule for g in found}
    text = (ROOT / "qgraph/formats/affine.py").read_text()
    for each in found:
        start, end = each.change.start, each.change.end
        ast.parse(text[:start] + each.change.new + text[end:])
        assert each.old != each.new
        assert each.tests[0] == "tests/formats/test_affine.py"


def test_a_sample_is_the_same_again_and_a_larger_one_begins_with_it():
    few = sample(5, 1)
    assert few == sample(9, 1)[:5]
    assert few != sample(5, 2)
    assert all((ROOT / path).exists() for each in few for path in each.tests)


def test_explanations_are_of_bugs_and_say_why():
    assert all(len(why) > 20 for why in explained().values())
