# SPDX-License-Identifier: Apache-2.0
"""The command line. Exit codes: 0 done, 1 a verification failed, 2 wrong usage or a typed error."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import qgraph
from qgraph import artifact, config, passes, plugins
from qgraph.backends.onnx import Session
from qgraph.calibration.ranks import job
from qgraph.errors import ConfigError, QGraphError, VerificationError
from qgraph.pipelines import make_pass
from qgraph.report.plain import plain
from qgraph.report.text import table

OK, FAILED, WRONG = 0, 1, 2
_EXAMPLES = """examples:
  qgraph compile model.py:build --data calib.py:loader --pipeline w4a8 -o out/
  qgraph compile model.py:build --data calib.py:loader --config mine.toml -o out/
  torchrun --nproc-per-node 4 -m qgraph compile model.py:build --data calib.py:loader
  qgraph verify out/model.qgraph
  qgraph explain out/model.qgraph --runtime onnxruntime
  qgraph report out/model.qgraph --html report.html
  qgraph bench out/model.qgraph out/model.onnx --data calib.py:loader
  qgraph bisect model.py:build --data calib.py:loader --pipeline w4a4
  qgraph pipelines --show int8 > mine.toml

exit codes: 0 done, 1 a verification failed, 2 wrong usage or an error with a message
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    parser = _parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has told why
        return WRONG if stop.code else OK
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        return command(options)
    except QGraphError as error:
        if options.json:
            _say(json.dumps({"error": type(error).__name__, "message": str(error)}))
        sys.stderr.write(f"qgraph: {type(error).__name__}: {error}\n")
        return FAILED if isinstance(error, VerificationError) else WRONG
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return OK


def _parser() -> argparse.ArgumentParser:
    plain_help = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="qgraph", description="Quantize trained models without retraining.",
        epilog=_EXAMPLES, formatter_class=plain_help,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"qgraph {qgraph.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=f"example:\n  qgraph {example}",
            formatter_class=plain_help,
        )  # fmt: skip
        sub.add_argument("--json", action="store_true", help="print JSON instead of text")
        sub.set_defaults(run=run)
        return sub

    _add_compile(add)
    for name, run, text in (
        ("explain", _explain, "tell per op which kernel runs it, and what stayed in float and why"),
        ("verify", _verify, "compare the backends code by code; exit code 1 if they differ"),
        ("report", _report, "show what was decided and where accuracy went"),
    ):
        sub = add(name, run, text, f"{name} out/model.qgraph")
        sub.add_argument("model", type=Path, help="a .qgraph file")
        if name == "explain":
            sub.add_argument("--runtime", choices=["onnxruntime"], help="ask onnxruntime itself")
        if name == "verify":
            sub.add_argument("--data", help="file.py:function or module:function with batches")
        if name == "report":
            sub.add_argument("--html", type=Path, help="also write one HTML page here")
    sub = add("pipelines", _pipelines, "list pipelines, or show one", "pipelines --show w4a8")
    sub.add_argument("--show", metavar="NAME", help="print a pipeline as a configuration file")
    sub.add_argument("--format", choices=config.FORMATS, default="toml")
    sub = add("passes", _passes, "list passes with their options", "passes plan-sites")
    sub.add_argument("name", nargs="?", help="show the options of one pass")
    sub = add(
        "bisect", _bisect, "name the pass and the layer that cost most; exit code 1 if one broke",
        "bisect model.py:build --data calib.py:loader --pipeline w4a4",
    )  # fmt: skip
    _add_source(sub)
    sub = add("bench", _bench, "measure latency of saved models", "bench out/model.qgraph")
    sub.add_argument("models", type=Path, nargs="+", help=".qgraph or .onnx files")
    sub.add_argument("--data", help="inputs for .onnx files; default: the saved sample")
    sub.add_argument("--repeat", type=int, default=10, help="runs, of which the median counts")
    return parser


def _add_source(sub: argparse.ArgumentParser) -> None:
    """What commands take that run a pipeline over a model."""
    sub.add_argument("model", help="file.py:function or module:function; returns the model")
    sub.add_argument("--data", required=True, help="the same for calibration batches")
    choice = sub.add_mutually_exclusive_group()
    choice.add_argument("--pipeline", default="int8", help="a name; see `qgraph pipelines`")
    choice.add_argument("--config", type=Path, help="a pipeline as .toml, .yaml or .json file")
    sub.add_argument("--ignore", action="append", default=[], help="what stays in float; a glob")
    sub.add_argument("--seed", type=int, default=0, help="of every random choice")


def _add_compile(add: Callable[..., argparse.ArgumentParser]) -> None:
    sub = add(
        "compile", _compile, "quantize a model and write it, its ONNX file and its report",
        "compile model.py:build --data calib.py:loader --pipeline w4a8 -o out/",
    )  # fmt: skip
    _add_source(sub)
    sub.add_argument("-o", "--output", type=Path, default=Path("out"), help="folder to write to")
    sub.add_argument("--verify", choices=["on", "off", "full"], default="on")
    sub.add_argument("--no-onnx", action="store_true", help="write no ONNX file")


def _pipeline_of(options: argparse.Namespace) -> qgraph.Pipeline:
    return (
        qgraph.pipeline(options.pipeline) if options.config is None else config.read(options.config)
    )


def _compile(options: argparse.Namespace) -> int:
    pipeline = _pipeline_of(options)
    with job() as ranks:
        if not ranks.writes:
            _compiled(options, pipeline)
            return OK
        names = _files(options)
        quantized = _compiled(options, pipeline)
    return _write(options, pipeline, quantized, names)


def _files(options: argparse.Namespace) -> list[str]:
    """Names of the files to write, once it is known that they can be."""
    out: Path = options.output
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{out}: cannot be made: {error}"
        raise ConfigError(msg) from error
    names = [
        "model.qgraph",
        "report.json",
        "report.html",
        *([] if options.no_onnx else ["model.onnx"]),
    ]
    for name in names:
        artifact.probe(out / name)
    return names


def _compiled(options: argparse.Namespace, pipeline: qgraph.Pipeline) -> qgraph.QuantizedModel:
    model, loader = _call(options.model), _call(options.data)
    if isinstance(model, torch.nn.Module):
        model.eval()
    return qgraph.compile(
        model, loader, pipeline, ignore=options.ignore, seed=options.seed,
        verify="full" if options.verify == "full" else options.verify == "on",
    )  # fmt: skip


def _write(
    options: argparse.Namespace, pipeline: qgraph.Pipeline, quantized: qgraph.QuantizedModel,
    names: list[str],
) -> int:  # fmt: skip
    out: Path = options.output
    if not options.no_onnx:
        quantized.to_onnx(out / "model.onnx")
    quantized.save(out / "model.qgraph")
    quantized.report.to_json(out / "report.json")
    quantized.report.to_html(out / "report.html")
    files = {name: (out / name).stat().st_size for name in names}
    layers = [r.sqnr for r in quantized.report.layers if r.sqnr == r.sqnr]
    if options.json:
        _say(json.dumps(plain({"pipeline": pipeline.name, "files": files, "folder": str(out),
                               "worst_db": min(layers, default=None)})))  # fmt: skip
    else:
        _say(quantized.report.summary())
        _say(table(("file", "bytes"), [(str(out / n), f"{s:,}") for n, s in files.items()]))
    return OK


def _explain(options: argparse.Namespace) -> int:
    found = _quantized(options.model).explain(runtime=options.runtime)
    _say(found.to_json() if options.json else str(found))
    return OK


def _verify(options: argparse.Namespace) -> int:
    quantized = _quantized(options.model)
    found = quantized.verify(None if options.data is None else _first(options.data))
    _say(found.to_json() if options.json else str(found))
    return FAILED if found.mismatches else OK


def _report(options: argparse.Namespace) -> int:
    quantized = _quantized(options.model)
    if options.html is not None:
        quantized.report.to_html(options.html)
    _say(quantized.report.to_json() if options.json else str(quantized.report))
    return OK


def _offered(group: str) -> dict[str, str]:
    return {name: f"from {package}" for name, package in plugins.names(group).items()}


def _list(head: str, found: dict[str, str], options: argparse.Namespace) -> int:
    rows = list(found.items())
    _say(json.dumps(found, indent=1) if options.json else table((head, "purpose"), rows))
    return OK


def _pipelines(options: argparse.Namespace) -> int:
    if options.show is not None:
        form = "json" if options.json else options.format
        _say(config.dumps(qgraph.pipeline(options.show), form).rstrip())
        return OK
    found = dict(qgraph.pipelines())
    return _list("pipeline", found | _offered(plugins.PIPELINES), options)


def _passes(options: argparse.Namespace) -> int:
    if options.name is not None:
        return _one_pass(options)
    found = {cls.name: _purpose(cls) for cls in passes.ALL}
    return _list("pass", found | _offered(plugins.PASSES), options)


def _one_pass(options: argparse.Namespace) -> int:
    item = make_pass(options.name, {})
    rows = [(f.name, f.type, repr(getattr(item, f.name))) for f in dataclasses.fields(item)]
    if options.json:
        _say(
            json.dumps(
                {name: {"type": str(kind), "default": default} for name, kind, default in rows}
            )
        )
        return OK
    _say(f"{item.name}: {_purpose(type(item))}\npromise: {item.promise.value}")
    _say(table(("option", "type", "default"), rows) if rows else "no options")
    return OK


def _purpose(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


def _bench(options: argparse.Namespace) -> int:
    if options.repeat < 1:
        msg = f"--repeat is {options.repeat}; at least 1"
        raise ConfigError(msg)
    rows: list[tuple[str, str, list[float]]] = []
    given = None if options.data is None else _first(options.data)
    for path in options.models:
        loaded = qgraph.load(path)
        if isinstance(loaded, Session):
            call = _arguments(given, path)
            rows.append((str(path), "onnx", _times(loaded, call, options.repeat)))
            continue
        call = (
            (loaded.sample.args, loaded.sample.kwargs) if given is None else _arguments(given, path)
        )
        for backend in ("integer", "onnx"):
            lowered = loaded.lower(backend)
            rows.append((str(path), backend, _times(lowered, call, options.repeat)))
    found = [
        {"model": m, "backend": b, "ms": statistics.median(t), "fastest": min(t), "slowest": max(t),
         "repeat": len(t), "threads": torch.get_num_threads(), "bytes": Path(m).stat().st_size}
        for m, b, t in rows
    ]  # fmt: skip
    if options.json:
        _say(json.dumps(found))
        return OK
    lines = [
        (r["model"], r["backend"], f"{r['ms']:.2f}", f"{r['fastest']:.2f} … {r['slowest']:.2f}",
         f"{r['bytes']:,}")
        for r in found
    ]  # fmt: skip
    _say(table(("model", "backend", "median ms", "range", "bytes"), lines))
    return OK


def _bisect(options: argparse.Namespace) -> int:
    pipeline = _pipeline_of(options)
    model, loader = _call(options.model), _call(options.data)
    if isinstance(model, torch.nn.Module):
        model.eval()
    found = qgraph.bisect(pipeline, model, loader, ignore=options.ignore, seed=options.seed)
    _say(found.to_json() if options.json else str(found))
    return FAILED if found.broken else OK


def _times(model: Callable[..., Any], call: tuple[Any, Any], repeat: int) -> list[float]:
    """Milliseconds of each run."""
    model(*call[0], **call[1])  # the first run is another thing
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        model(*call[0], **call[1])
        times.append(1000 * (time.perf_counter() - start))
    return times


def _arguments(batch: Any, path: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if batch is None:
        msg = f"{path}: an ONNX file holds no inputs; give --data"
        raise ConfigError(msg)
    if isinstance(batch, dict):
        return (), batch
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _quantized(path: Path) -> qgraph.QuantizedModel:
    loaded = qgraph.load(path)
    if isinstance(loaded, Session):
        msg = f"{path}: an ONNX file holds no quantized graph; give the .qgraph file"
        raise ConfigError(msg)
    return loaded


def _first(spec: str) -> Any:
    for batch in _call(spec):
        return batch
    msg = f"{spec} gave no batch"
    raise ConfigError(msg)


def _call(spec: str) -> Any:
    """What the function of ``file.py:function`` or ``module:function`` returns."""
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        msg = f"{spec!r} is not of the form file.py:function or module:function"
        raise ConfigError(msg)
    try:
        found = getattr(_module(source), name)
        return found() if callable(found) and not isinstance(found, torch.nn.Module) else found
    except QGraphError:
        raise
    except Exception as error:
        msg = f"{spec}: {type(error).__name__}: {error}"
        raise ConfigError(msg) from error


def _module(source: str) -> Any:
    path = Path(source)
    if path.suffix != ".py":
        return importlib.import_module(source)
    if not path.is_file():
        msg = f"{source}: no such file"
        raise ConfigError(msg)
    name = f"qgraph_cli_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        msg = f"{source}: cannot be imported"
        raise ConfigError(msg)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
