# SPDX-License-Identifier: Apache-2.0
"""A quantized model as one file: graph, tensors, report and sample inputs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from qgraph.artifact import container
from qgraph.artifact.checks import check_quantizers
from qgraph.artifact.damage import as_damage, damaged
from qgraph.artifact.graph import decode_graph, encode_graph
from qgraph.artifact.values import decode, encode
from qgraph.atomic import write_file
from qgraph.calibration.loader import Signature
from qgraph.errors import CalibrationError
from qgraph.graph.verify import Sample
from qgraph.report.report import Report

VERSION = 1


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a file held.

    Attributes:
        graph_module: the quantized graph.
        report: of its compilation.
        sample: inputs that checks use.
        versions: of qgraph's file format and of torch when it was written.
    """

    graph_module: GraphModule
    report: Report
    sample: Sample
    versions: dict[str, str]


def write(path: str | os.PathLike[str], module: GraphModule, report: Report, sample: Sample) -> int:
    """Write a quantized graph; return the file's size in bytes.

    The same model gives the same bytes: the times of steps are left out. An older file is only
    replaced by a whole new one.

    Raises:
        ExportError: something in the graph cannot be saved, or the path not be written to.
    """
    graph, tensors = encode_graph(module)
    leaves, _ = pytree.tree_flatten((sample.args, sample.kwargs))
    inputs: list[Any] = []
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            tensors[f"sample.{number}"] = leaf.detach().contiguous()
            inputs.append({"tensor": number})
        else:
            inputs.append({"value": encode(leaf)})
    manifest = {
        "version": VERSION,
        "torch": str(torch.__version__),
        "graph": graph,
        "sample": inputs,
        "report": report.without_times().to_dict(),
    }
    return write_file(path, container.chunks(manifest, tensors))


def read(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Loaded:
    """Read a file that `write` wrote, and check all of it. No code of the file's is run.

    Raises:
        ArtifactError: missing, foreign, damaged, hostile, or of a newer version.
    """
    content = container.read(path)
    manifest, target = content.manifest, torch.device(device)
    if manifest.get("version") != VERSION:
        msg = (
            f"{os.fspath(path)}: file version {str(manifest.get('version'))[:20]!r}; this qgraph "
            f"reads version {VERSION}"
        )
        raise damaged(msg)
    kinds = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)
    with as_damage(f"{os.fspath(path)}: malformed", *kinds):
        tensors = {n: t for n, t in content.tensors.items() if n.startswith("t.")}
        module = decode_graph(manifest["graph"], tensors, target)
        check_quantizers(module)
        sample = _sample(manifest["sample"], content.tensors, module, target)
        report = _report(manifest["report"])
        _check_entries(manifest, content.tensors)
        versions = {"file": str(VERSION), "torch": str(manifest.get("torch"))}
        return Loaded(module, report, sample, versions)


def _check_entries(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Nothing may be in a file that no reader looks at."""
    unknown = manifest.keys() - {"version", "torch", "graph", "sample", "report", "digests"}
    unknown |= manifest["graph"].keys() - {"nodes", "symbols", "calling", "strides", "trace"}
    stored = {f"t.{n['tensor']}" for n in manifest["graph"]["nodes"] if n["op"] == "get_attr"}
    inputs = {f"sample.{i['tensor']}" for i in manifest["sample"] if "tensor" in i}
    unknown |= tensors.keys() - stored - inputs
    if unknown:
        raise damaged(f"the file holds the unknown {sorted(unknown)[:3]}")


def _report(data: dict[str, Any]) -> Report:
    """Read the report; what it would write must be what was read, so that no value is another."""
    report = Report.from_dict(data)
    if not _covers(report.to_dict(), data):
        raise damaged("the report holds values of other types than its own")
    return report


def _covers(written: Any, read: Any) -> bool:
    """Whether all that was read is written again; what was missing may have a default."""
    if isinstance(written, dict) and isinstance(read, dict):
        return all(key in written and _covers(written[key], read[key]) for key in read)
    if isinstance(written, list) and isinstance(read, list):
        return len(written) == len(read) and all(map(_covers, written, read))
    kinds = {float if type(value) is int else type(value) for value in (written, read)}
    return len(kinds) == 1 and bool(written == read)


def _sample(
    inputs: Any, tensors: dict[str, Tensor], module: GraphModule, device: torch.device
) -> Sample:
    leaves: list[Any] = []
    for item in inputs:
        ((kind, content),) = item.items()
        if kind == "tensor":
            leaves.append(tensors[f"sample.{content}"].to(device))
        elif kind == "value":
            leaves.append(decode(content, {}, device))
        else:
            raise damaged(f"an input is given as {str(kind)[:80]!r}")
    info = getattr(module.graph._codegen, "pytree_info", None)
    if info is None:
        args, kwargs = tuple(leaves), {}
    else:
        args, kwargs = pytree.tree_unflatten(leaves, info.in_spec)
    with as_damage("the sample inputs do not fit", CalibrationError):
        Signature.of(module).check(args, kwargs, batch=0)
    return Sample(args, kwargs)
