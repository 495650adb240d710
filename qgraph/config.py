# SPDX-License-Identifier: Apache-2.0
"""Pipelines as TOML, YAML or JSON files, and back.

Either a named pipeline with options, or its passes one by one:

    pipeline = "w4a8"                name = "mine"
    [options]                        [[passes]]
    scope = ["linear", "matmul"]     pass = "plan-sites"
                                     weight_bits = 4
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qgraph.errors import ConfigError, unknown_name
from qgraph.pipeline import Pass, Pipeline
from qgraph.pipelines import make_pass, pipeline

FORMATS = ("toml", "yaml", "json")
_NONE = {"none": True}  # TOML has no null


def to_data(item: Pipeline) -> dict[str, Any]:
    """A pipeline as plain data; options that have their default are left out."""
    return {"name": item.name, "passes": [_pass_data(p) for p in item]}


def from_data(data: Any) -> Pipeline:
    """Read plain data.

    Raises:
        ConfigError: unknown keys, passes or options.
    """
    if not isinstance(data, Mapping):
        msg = f"a configuration is a table, got {type(data).__name__}"
        raise ConfigError(msg)
    allowed = {"pipeline", "options"} if "pipeline" in data else {"name", "passes"}
    for key in data:
        if key not in allowed:
            raise unknown_name("configuration key", str(key), allowed)
    if "pipeline" in data:
        options = data.get("options", {})
        return pipeline(str(data["pipeline"]), **{k: _value(v) for k, v in options.items()})
    passes = data.get("passes")
    if not isinstance(passes, list) or not all(isinstance(p, Mapping) for p in passes):
        msg = "a configuration names a pipeline, or lists passes, each with its name as 'pass'"
        raise ConfigError(msg)
    return Pipeline(str(data.get("name", "custom")), tuple(map(_make, passes)))


def dumps(item: Pipeline, form: str = "toml") -> str:
    """The text of a configuration file.

    Raises:
        ConfigError: an unknown format, or YAML without PyYAML.
    """
    if form not in FORMATS:
        raise unknown_name("configuration format", form, FORMATS)
    data = to_data(item)
    if form == "json":
        return json.dumps(data, indent=2) + "\n"
    if form == "yaml":
        return str(_yaml().safe_dump(data, sort_keys=False))
    lines = [f"name = {_toml(data['name'])}"]
    for entry in data["passes"]:
        lines += ["", "[[passes]]", *(f"{key} = {_toml(value)}" for key, value in entry.items())]
    return "\n".join(lines) + "\n"


def loads(text: str, form: str = "toml") -> Pipeline:
    """Read the text of a configuration file.

    Raises:
        ConfigError: it is not of that format, or names what there is not.
    """
    if form not in FORMATS:
        raise unknown_name("configuration format", form, FORMATS)
    if form == "yaml":
        yaml = _yaml()
        try:
            return from_data(yaml.safe_load(text))
        except yaml.YAMLError as error:
            msg = f"not YAML: {error}"
            raise ConfigError(msg) from error
    try:
        return from_data(json.loads(text) if form == "json" else tomllib.loads(text))
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        msg = f"not {form.upper()}: {error}"
        raise ConfigError(msg) from error


def read(path: str | Path) -> Pipeline:
    """Read a configuration file; its ending tells the format.

    Raises:
        ConfigError: it cannot be read.
    """
    where = Path(path)
    form = {".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}.get(where.suffix)
    if form is None:
        msg = f"{where}: the ending of a configuration is .toml, .yaml or .json"
        raise ConfigError(msg)
    try:
        return loads(where.read_text(encoding="utf-8"), form)
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{where}: cannot be read: {error}"
        raise ConfigError(msg) from error


def _pass_data(item: Pass) -> dict[str, Any]:
    data: dict[str, Any] = {"pass": item.name}
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if field.init and repr(value) != repr(_default(field)):
            data[field.name] = _plain(value, f"{item.name}.{field.name}")
    return data


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any, where: str) -> Any:
    if value is None:
        return _NONE
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    msg = f"{where} is a {type(value).__name__}, which no configuration file can hold"
    raise ConfigError(msg)


def _value(data: Any) -> Any:
    """Lists become tuples, as passes are frozen."""
    if data == _NONE:
        return None
    if isinstance(data, list):
        return tuple(_value(item) for item in data)
    if isinstance(data, Mapping):
        return {str(key): _value(item) for key, item in data.items()}
    return data


def _make(entry: Mapping[str, Any]) -> Pass:
    if "pass" not in entry:
        msg = f"an entry of 'passes' has no 'pass': {dict(entry)}"
        raise ConfigError(msg)
    return make_pass(str(entry["pass"]), {k: _value(v) for k, v in entry.items() if k != "pass"})


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{json.dumps(k)} = {_toml(v)}' for k, v in value.items())} }}"
    return json.dumps(value)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        msg = "YAML configurations need PyYAML; install it, or use TOML"
        raise ConfigError(msg) from error
    return yaml
