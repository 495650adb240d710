# SPDX-License-Identifier: Apache-2.0
"""Passes and pipelines of other packages, found through entry points when they are asked for.

    [project.entry-points."qgraph.passes"]
    my-pass = "my_package:MyPass"            # a Pass class; the name is its `name`

    [project.entry-points."qgraph.pipelines"]
    my_int4 = "my_package:my_int4"           # a Pipeline, or a function that returns one

Nothing is imported before it is asked for, and nothing is registered.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from qgraph.errors import ConfigError
from qgraph.pipeline import Pass, Pipeline

PASSES = "qgraph.passes"
PIPELINES = "qgraph.pipelines"


def names(group: str) -> dict[str, str]:
    """Names that installed packages offer in a group, with the package of each; imports none.

    Raises:
        ConfigError: two packages offer the same name.
    """
    found: dict[str, str] = {}
    for point in entry_points(group=group):
        package = _package(point)
        if found.setdefault(point.name, package) != package:
            msg = f"{group} {point.name!r} is offered by both {found[point.name]} and {package}"
            raise ConfigError(msg)
    return found


def find_pass(name: str) -> type[Pass] | None:
    """The pass class of that name, or None.

    Raises:
        ConfigError: the package that offers it cannot be imported, or offers something else.
    """
    found = _load(PASSES, name)
    if found is None:
        return None
    point, value = found
    if not (isinstance(value, type) and issubclass(value, Pass) and value.name == name):
        msg = (
            f"{_package(point)} offers {point.value!r} as pass {name!r}, which is no Pass so named"
        )
        raise ConfigError(msg)
    return value


def find_pipeline(name: str) -> Pipeline | None:
    """The pipeline of that name, or None.

    Raises:
        ConfigError: as `find_pass`.
    """
    found = _load(PIPELINES, name)
    if found is None:
        return None
    point, value = found
    try:
        built = value if isinstance(value, Pipeline) else value()  # type: ignore[operator]
    except Exception as error:
        raise _broken(point, error) from error
    if not isinstance(built, Pipeline):
        msg = f"{_package(point)} offers {point.value!r} as pipeline {name!r}, which is no Pipeline"
        raise ConfigError(msg)
    return built


def _load(group: str, name: str) -> tuple[EntryPoint, object] | None:
    for point in entry_points(group=group, name=name):
        try:
            return point, point.load()
        except Exception as error:
            raise _broken(point, error) from error
    return None


def _broken(point: EntryPoint, error: Exception) -> ConfigError:
    return ConfigError(
        f"the package {_package(point)} offers {point.group} {point.name!r} = {point.value!r}, "
        f"which fails: {type(error).__name__}: {error}"
    )


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "(unknown)"
