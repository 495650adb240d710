# SPDX-License-Identifier: Apache-2.0
"""The command line as a shell sees it: output, files, exit codes; configurations; packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph
from qgraph import config, plugins
from qgraph.cli import main
from qgraph.pipelines import make_pass, parse

MODEL = """
import torch
def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
def loader():
    torch.manual_seed(1)
    return [torch.randn(4, 8) for _ in range(3)]
def broken():
    raise RuntimeError("no weights here")
def empty():
    return []
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "model.py").write_text(MODEL)
    spec = folder / "model.py"
    code = main(["compile", f"{spec}:build", "--data", f"{spec}:loader", "-o", str(folder / "out")])
    assert code == 0
    return folder


def test_compile_writes_a_model_an_onnx_file_and_two_reports(project):
    out = project / "out"
    names = {"model.qgraph", "model.onnx", "report.json", "report.html"}
    assert {p.name for p in out.iterdir()} == names
    model, session = qgraph.load(out / "model.qgraph"), qgraph.load(out / "model.onnx")
    x = torch.randn(3, 8)
    assert torch.allclose(model(x), session(x), atol=0.1)
    assert json.loads((out / "report.json").read_text())["layers"]
    HTMLParser().feed((out / "report.html").read_text())


@pytest.mark.parametrize("command", ["explain", "verify", "report", "bench"])
def test_commands_on_a_saved_model_print_text_and_json(project, command, capsys):
    path = str(project / "out" / "model.qgraph")
    more = ["--repeat", "2"] if command == "bench" else []
    assert main([command, path, *more]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 100 for line in text.splitlines() if command in {"report", "explain"})
    assert main([command, path, "--json", *more]) == 0
    assert json.loads(capsys.readouterr().out)
    assert text.strip()


def test_verify_takes_own_data_and_report_writes_a_page(project, capsys, tmp_path):
    path, spec = str(project / "out" / "model.qgraph"), project / "model.py"
    assert main(["verify", path, "--data", f"{spec}:loader"]) == 0
    assert main(["report", path, "--html", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["bench", str(project / "out" / "model.onnx"), "--data", f"{spec}:loader"]) == 0
    assert "median" in capsys.readouterr().out


def test_bisect_names_the_costliest_layer_and_bench_tells_times_and_sizes(project, capsys):
    spec = project / "model.py"
    source = [f"{spec}:build", "--data", f"{spec}:loader"]
    assert main(["bisect", *source, "--pipeline", "w2a8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pass_name"] == "insert-quantizers"
    assert found["nodes"][0]["node"].startswith("linear")
    assert main(["bisect", *source, "--pipeline", "itn8"]) == 2
    assert "did you mean" in capsys.readouterr().err
    path = project / "out" / "model.qgraph"
    assert main(["bench", str(path), "--repeat", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {r["backend"] for r in rows} == {"integer", "onnx"}
    assert all(r["fastest"] <= r["ms"] <= r["slowest"] for r in rows)
    assert all(r["bytes"] == path.stat().st_size for r in rows)


def test_a_failed_verification_gives_exit_code_one(project, capsys, monkeypatch):
    def differs(self, inputs=None):
        raise qgraph.VerificationError("integer differs from reference at linear")

    monkeypatch.setattr(qgraph.QuantizedModel, "verify", differs)
    assert main(["verify", str(project / "out" / "model.qgraph")]) == 1
    assert "differs" in capsys.readouterr().err


def test_errors_give_exit_code_two_and_one_line_or_json(project, capsys, tmp_path):
    spec, out = project / "model.py", str(tmp_path / "o")
    good = [f"{spec}:build", "--data", f"{spec}:loader", "-o", out]
    (tmp_path / "damaged.qgraph").write_bytes(b"x" * 300)
    wrong = {
        "unknown pipeline": ["compile", *good, "--pipeline", "itn8"],
        "no weights here": ["compile", f"{spec}:broken", *good[1:]],
        "0 batches": ["compile", good[0], "--data", f"{spec}:empty", "-o", out],
        "no such file": ["compile", "nowhere.py:build", *good[1:]],
        "of the form": ["compile", "model.py", *good[1:]],
        "nothing_here": ["compile", f"{spec}:nothing_here", *good[1:]],
        "no_such_module": ["compile", "no_such_module:build", *good[1:]],
        "damaged": ["report", str(tmp_path / "damaged.qgraph")],
        "missing.qgraph": ["verify", str(tmp_path / "missing.qgraph")],
        "holds no quantized graph": ["explain", str(project / "out" / "model.onnx")],
        "give --data": ["bench", str(project / "out" / "model.onnx")],
        "at least 1": ["bench", str(project / "out" / "model.qgraph"), "--repeat", "0"],
        "ending of a configuration": ["compile", *good, "--config", "pipe.ini"],
        "unknown pass": ["passes", "no-such-pass"],
    }
    for words, command in wrong.items():
        assert main([*command, "--json"]) == 2, words
        captured = capsys.readouterr()
        assert words in captured.err
        assert len(captured.err.strip().splitlines()) == 1 or "unknown" not in words
        assert words in json.loads(captured.out)["message"]


def test_wrong_usage_gives_exit_code_two_and_help_has_examples(capsys):
    wrong: list[list[str]] = [[], ["no-such"], ["compile"], ["pipelines", "--format", "ini"]]
    for command in wrong:
        assert main(command) == 2
    capsys.readouterr()
    assert main(["--help"]) == 0
    assert "examples:" in capsys.readouterr().out
    for name in (
        "compile",
        "explain",
        "verify",
        "report",
        "pipelines",
        "passes",
        "bench",
        "bisect",
    ):
        assert main([name, "--help"]) == 0
        assert f"example:\n  qgraph {name}" in capsys.readouterr().out


def test_the_output_is_refused_before_any_work(project, capsys, tmp_path):
    (tmp_path / "model.qgraph").mkdir()
    spec = project / "model.py"
    code = main(["compile", f"{spec}:broken", "--data", f"{spec}:loader", "-o", str(tmp_path)])
    assert code == 2
    assert "folder" in capsys.readouterr().err


def test_no_bar_is_drawn_when_nobody_watches_a_terminal(project, tmp_path):
    spec, root = project / "model.py", Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "qgraph", "compile", f"{spec}:build", "--data", f"{spec}:loader",
         "-o", str(tmp_path), "--no-onnx", "--json"],
        cwd=root, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr
    assert "%|" not in done.stderr
    assert json.loads(done.stdout)["files"]["model.qgraph"] > 0


@pytest.mark.parametrize("form", config.FORMATS)
def test_every_pipeline_comes_back_from_its_configuration(form, capsys):
    for name in ("int8", "w3a5", "ris_int4", "sam_w4a8"):
        built = qgraph.pipeline(name, scope=("linear", "matmul"))
        assert config.loads(config.dumps(built, form), form).passes == built.passes
    assert main(["pipelines", "--show", "w4a8", "--format", form]) == 0
    assert config.loads(capsys.readouterr().out, form) == qgraph.pipeline("w4a8")


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(qgraph.pipelines())),
    scope=st.sampled_from(["full", ("linear",), ("conv",), ("linear", "conv")]),
    bits=st.integers(2, 16),
)  # fmt: skip
def test_options_come_back_from_configurations_and_from_printed_text(name, scope, bits):
    built = qgraph.pipeline(name, scope=scope, ends_bits=bits)
    for form in config.FORMATS:
        assert config.loads(config.dumps(built, form), form).passes == built.passes
    assert parse(str(built)).passes == built.passes


def test_a_named_pipeline_with_options_is_a_configuration_too(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('pipeline = "w4a8"\n[options]\nscope = ["linear"]\n')
    assert (
        config.read(path)["plan-sites"] == qgraph.pipeline("w4a8", scope=("linear",))["plan-sites"]
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pipeline = 'itn8'", "int8"), ("nonsense = 1", "unknown configuration key"),
        ("[[passes]]\nname = 'x'", "no 'pass'"), ("[[passes]]\npass = 'plan-site'", "plan-sites"),
        ("[[passes]]\npass = 'plan-sites'\nweight_bit = 3", "weight_bits"), ("= 3", "not TOML"),
        ("name = 'x'", "lists passes"), ("pipeline = 'int8'\nname = 'x'", "name"),
    ],
)  # fmt: skip
def test_wrong_configurations_say_what_is_wrong(text, words):
    with pytest.raises(qgraph.ConfigError, match=words):
        config.loads(text)


def test_listings_name_every_pass_and_pipeline(capsys):
    assert main(["passes"]) == 0
    assert "plan-sites" in capsys.readouterr().out
    assert main(["passes", "plan-sites"]) == 0
    assert "weight_bits" in capsys.readouterr().out
    assert main(["pipelines", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == qgraph.pipelines().keys()


@dataclass(frozen=True)
class Foreign(qgraph.Pass):
    """A pass of another package."""

    name: ClassVar[str] = "foreign-pass"
    strength: int = 1

    def run(self, module, context):
        del module, context
        return False


FOREIGN = qgraph.Pipeline("foreign", (*qgraph.pipeline("int8").passes, Foreign(2)))


@dataclass
class Distribution:
    name: str = "qgraph-extras"
    version: str = "1.2"


@pytest.fixture
def extras(monkeypatch):
    """An installed package that offers a pass and pipelines, some of them broken."""
    values = {
        plugins.PASSES: {"foreign-pass": "Foreign", "no-pass": "MODEL", "gone": "Missing"},
        plugins.PIPELINES: {"foreign": "FOREIGN", "no-pipeline": "MODEL", "raises": "raises"},
    }

    def found(group, name=None):
        for key, value in values[group].items():
            if name in {None, key}:
                point = EntryPoint(key, f"{__name__}:{value}", group)
                vars(point)["dist"] = Distribution()
                yield point

    monkeypatch.setitem(
        sys.modules, __name__, sys.modules.get(__name__) or sys.modules["tests.test_cli"]
    )
    monkeypatch.setattr(plugins, "entry_points", lambda **options: list(found(**options)))


def raises():
    raise RuntimeError("out of order")


def test_passes_and_pipelines_of_other_packages_are_found_by_name(extras, capsys):
    assert qgraph.pipeline("foreign").passes == FOREIGN.passes
    assert qgraph.pipeline("foreign", strength=3)["foreign-pass"] == Foreign(3)
    assert config.loads(config.dumps(FOREIGN)).passes == FOREIGN.passes
    assert parse(str(FOREIGN)).passes == FOREIGN.passes
    assert main(["passes"]) == 0
    assert "qgraph-extras" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: make_pass("no-pass", {}), "no Pass"),
        (lambda: make_pass("gone", {}), "AttributeError"),
        (lambda: qgraph.pipeline("no-pipeline"), "TypeError"),
        (lambda: qgraph.pipeline("raises"), "out of order"),
    ],
)  # fmt: skip
def test_a_broken_offer_is_an_error_that_names_the_package(extras, ask, words):
    with pytest.raises(qgraph.ConfigError, match=rf"qgraph-extras 1\.2.*{words}"):
        ask()


def test_importing_qgraph_looks_no_entry_points_up():
    program = (
        "import importlib.metadata as m\n"
        "def refuse(**k):\n"
        "    if str(k.get('group', '')).startswith('qgraph'): raise SystemExit('looked up')\n"
        "    return []\n"
        "m.entry_points = refuse\n"
        "import qgraph; qgraph.pipeline('int8')\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
