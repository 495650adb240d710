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
        return Loaded(
            graph_module=module,
            report=Report.from_dict(manifest["report"]),
            sample=_sample(manifest["sample"], content.tensors, module, target),
            versions={"file": str(VERSION), "torch": str(manifest.get("torch"))},
        )


def _sample(
    inputs: Any, tensors: dict[str, Tensor], module: GraphModule, device: torch.device
) -> Sample:
    leaves: list[Any] = []
    for item in inputs:
        ((kind, content),) = item.items()
        if kind == "tensor":
            leaves.append(tensors[f"sample.{int(content)}"].to(device))
        else:
            leaves.append(decode(content, {}, device))
    info = getattr(module.graph._codegen, "pytree_info", None)
    if info is None:
        return Sample(tuple(leaves), {})
    args, kwargs = pytree.tree_unflatten(leaves, info.in_spec)
    return Sample(args, kwargs)
