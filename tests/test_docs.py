# SPDX-License-Identifier: Apache-2.0
"""The documentation: every Python snippet runs, every page is in the menu, the site builds."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import qgraph

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
# Pages may use these names without defining them.
SHARED = ("model", "calib_loader", "images", "quantized")


def snippets(page: Path) -> list[tuple[int, str]]:
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 2, m.group(1)) for m in BLOCK.finditer(text)]


@pytest.fixture(scope="module")
def shared():
    """A tiny model, its data, and the result."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)]
    model = nn.Sequential(*layers).eval()
    loader = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    quantized = qgraph.compile(model, loader, "w4a8")
    values = (model, loader, loader[0], quantized)
    return {"torch": torch, "nn": nn, "qgraph": qgraph, **dict(zip(SHARED, values, strict=True))}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if snippets(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_snippet_of_a_page_runs_in_order(page, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages write files
    monkeypatch.syspath_prepend(str(ROOT))
    scope = {**shared, "__name__": "snippet"}
    sys.modules["snippet"] = type(sys)("snippet")  # dataclasses look their module up
    try:
        for line, code in snippets(page):
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), scope)
    finally:
        del sys.modules["snippet"]


def test_every_page_is_in_the_menu():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def files(entry):
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, list):
            for item in entry:
                yield from files(item)
        else:
            yield from files(list(entry.values()))

    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert set(files(menu)) == pages, "put new pages under nav: in mkdocs.yml"


def test_links_between_pages_lead_somewhere():
    link = re.compile(r"\]\((?!https?:)([^)#\s]+)")
    for page in PAGES:
        for target in link.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_pages_name_exist():
    name = re.compile(r"`((?:tests|passes|backends|docs|examples|benchmarks|qgraph)/[\w./-]+)`")
    for page in PAGES:
        for path in name.findall(page.read_text()):
            written_by_a_command = path.startswith("benchmarks/results/")
            assert written_by_a_command or (ROOT / path).exists(), f"{page.name}: {path}"


ROOMS = (
    "qgraph", "qgraph.passes", "qgraph.formats", "qgraph.report", "qgraph.testing",
    "qgraph.backends.integer", "qgraph.backends.onnx",
)  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_in_the_reference(room):
    listed = set(re.findall(r"^::: (\S+)", (ROOT / "docs/reference.md").read_text(), re.M))
    package = importlib.import_module(room)
    for name in package.__all__:
        home = getattr(getattr(package, name), "__module__", None)
        if isinstance(home, str) and home.startswith("qgraph.") and home != room:
            assert {home, f"{home}.{name}", f"{room}.{name}"} & listed, name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mkdocs") is None, reason="needs the extra [docs]")
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "assert_preserves" in (tmp_path / "site" / "reference.html").read_text()
