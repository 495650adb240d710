# SPDX-License-Identifier: Apache-2.0
"""The list of planted bugs fits the code: each names a place that exists once, and its tests."""

from __future__ import annotations

import ast
import json

import pytest

from tests.mutation.generated import places_of, planted, sample
from tests.mutation.history import open_bugs, summary
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


def test_only_the_first_result_of_a_bug_tells_how_good_the_tests_are(tmp_path):
    bug = {"file": "passes/x.py", "new": "b", "tests": "t"}
    lines = [
        {**bug, "old": "one", "why": "all tests passed", "draw": 3},
        {**bug, "old": "two", "why": "", "draw": 3},
        {**bug, "old": "three", "why": "all tests passed", "draw": 3},
        {**bug, "old": "one", "why": ""},
        {**bug, "old": "", "why": "all tests passed"},
        {"file": MUTANTS[0].file, "old": MUTANTS[0].old, "new": MUTANTS[0].new, "why": ""},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert summary(log, {("passes/x.py", "three", "b")}) == (
        "draw 3: 3 run, 1 no bugs (explained); of 2: 1 caught at first sight (50%), 2 by now"
    )


def test_a_survivor_is_planted_again_where_its_line_stands(tmp_path):
    file = "qgraph/formats/affine.py"
    text = (ROOT / file).read_text()
    line = next(x.strip() for x in text.splitlines() if "return" in x and text.count(x) == 1)
    log = tmp_path / "log.jsonl"
    found = {"file": file, "old": line, "new": "pass", "why": "all tests passed", "draw": 1}
    others = {**found, "old": "no such line"}, {**found, "new": "known"}
    log.write_text("".join(json.dumps(each) + "\n" for each in (found, *others)))
    ((change, old, new),) = open_bugs(log, {(file, line, "known")})
    assert text[change.start : change.end] == old == line
    assert change.new == new == "pass"
