# SPDX-License-Identifier: Apache-2.0
"""Run an exported file on onnxruntime with the model's own signature."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from qgraph.backends.onnx.capabilities import SESSION_CONFIG
from qgraph.backends.onnx.safety import check_bytes, check_file
from qgraph.backends.onnx.signature import Signature, load
from qgraph.errors import ArtifactError, InputError

_CODE_TYPES = {
    "uint8": onnx.TensorProto.UINT8, "int16": onnx.TensorProto.INT16,
    "uint16": onnx.TensorProto.UINT16, "int32": onnx.TensorProto.INT32,
}  # fmt: skip


class Session:
    """An exported model, callable like the model it came from.

    Session settings that keep the written meaning are read from the file and set.

    Args:
        source: path or bytes of an ONNX file that `export` wrote.
        threads: threads inside one op; None lets onnxruntime choose.

    Raises:
        ArtifactError: the file is damaged, foreign, or hostile.

    Attributes:
        signature: names and structure of inputs and outputs.
    """

    def __init__(
        self, source: str | os.PathLike[str] | bytes, *, threads: int | None = None
    ) -> None:
        self._source = source if isinstance(source, bytes) else str(source)
        self._threads = threads
        model = check_bytes(source) if isinstance(source, bytes) else check_file(Path(source))
        texts = {p.key: p.value for p in model.metadata_props}
        if "qgraph" not in texts:
            msg = "the file has no qgraph metadata; it was written by something else"
            raise ArtifactError(msg)
        self.signature: Signature
        self.signature, data = load(texts["qgraph"])
        self._codes = read_codes(data.get("codes", {}))
        self._config = read_config(data.get("session", {}))
        self._session = self._start(self._source)
        self._probe: onnxruntime.InferenceSession | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; arguments and result as in the traced model.

        Raises:
            InputError: the arguments do not fit the signature.
        """
        results = self._run(self._session, list(self.signature.output_names), args, kwargs)
        return self.signature.unflatten([torch.from_numpy(np.array(r)) for r in results])

    def codes(self, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        """Codes of every activation quantizer: quantize node -> array, as the simulator has them.

        Runs a copy of the file whose intermediate codes are extra outputs. A quantizer that the
        exporter merged with an equal one has no codes of its own and is left out.
        """
        if self._probe is None:
            self._probe = self._start(self._with_codes())
        shown = {output.name for output in self._probe.get_outputs()}
        names = [name for name, entry in self._codes.items() if entry["value"] in shown]
        values = [str(self._codes[name]["value"]) for name in names]
        found = self._run(self._probe, values, args, kwargs)
        return {
            name: array.astype(np.int32) - int(self._codes[name]["shift"])
            for name, array in zip(names, found, strict=True)
        }

    def feed(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arrays that a call hands to onnxruntime, by input name.

        Raises:
            InputError: the arguments do not fit the signature.
        """
        tensors = self.signature.flatten(args, kwargs)
        return {i.name: _array(t) for i, t in zip(self.signature.inputs, tensors, strict=True)}

    def _with_codes(self) -> bytes:
        if isinstance(self._source, bytes):
            model = onnx.load_from_string(self._source)
        else:
            model = onnx.load(self._source)
        present = {o.name for o in model.graph.output}
        computed = {name for node in model.graph.node for name in node.output}
        for entry in self._codes.values():
            if entry["value"] not in present and entry["value"] in computed:
                present.add(entry["value"])
                model.graph.output.append(
                    onnx.helper.make_tensor_value_info(
                        entry["value"], _CODE_TYPES[entry["dtype"]], None
                    )
                )
        return bytes(model.SerializeToString())

    def _start(self, source: bytes | str) -> onnxruntime.InferenceSession:
        try:
            return onnxruntime.InferenceSession(
                source, session_options(self._config, threads=self._threads),
                providers=["CPUExecutionProvider"],
            )  # fmt: skip
        except Exception as error:
            if type(error).__module__.startswith("onnxruntime"):
                msg = f"onnxruntime refuses the file: {error}"
                raise ArtifactError(msg) from error
            raise

    def _run(
        self, session: onnxruntime.InferenceSession, outputs: Sequence[str],
        args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> list[np.ndarray]:  # fmt: skip
        feed = self.feed(*args, **kwargs)
        try:
            return session.run(outputs, feed)  # type: ignore[no-any-return]
        except Exception as error:
            if type(error).__module__.startswith("onnxruntime"):
                msg = f"onnxruntime could not run these inputs: {error}"
                raise InputError(msg) from error
            raise


def read_config(data: object) -> dict[str, str]:
    """Session settings of a file; only those that a file may set are accepted.

    Raises:
        ArtifactError: any other setting.
    """
    if not isinstance(data, dict) or not set(data) <= set(SESSION_CONFIG):
        msg = f"the file asks for session settings {data!r}; allowed: {sorted(SESSION_CONFIG)}"
        raise ArtifactError(msg)
    return {**SESSION_CONFIG, **{str(k): str(v) for k, v in data.items()}}


def read_codes(data: object) -> dict[str, dict[str, Any]]:
    """Where a file keeps the codes of each quantize node.

    Raises:
        ArtifactError: the record is damaged.
    """
    try:
        return {
            str(name): {
                "value": str(entry["value"]),
                "shift": int(entry["shift"]),
                "dtype": min({str(entry["dtype"])} & _CODE_TYPES.keys()),
            }
            for name, entry in data.items()  # type: ignore[attr-defined]
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        msg = f"the file's record of codes is damaged: {error!r}"
        raise ArtifactError(msg) from error


def session_options(
    config: dict[str, str] | None = None, *, threads: int | None = None
) -> onnxruntime.SessionOptions:
    """Options that keep the written meaning; idle threads do not spin."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    for key, value in {**SESSION_CONFIG, **(config or {})}.items():
        options.add_session_config_entry(key, value)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _array(tensor: Tensor) -> Any:
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()
