"""Configurations of models as JSON, both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from diptych.core.leaves import set_leaf
from diptych.models.table import config_class


def config_from_json(row: Mapping[str, Any]) -> tuple[str, Any]:
    """(family, Config) of a ``config.json``. Raises ``ValueError`` naming unknown families, fields and bad values."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    row = dict(row)
    name = row.pop("family", None)
    cls = config_class(str(name))
    for part in _dataclasses(cls):
        setattr(part, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010
    try:
        return str(name), TypeAdapter(cls).validate_python(row)
    except ValidationError as error:
        lines = [f"{name}.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError("bad model config: " + "; ".join(lines)) from error


def config_to_json(name: str, config: Any) -> dict:
    """The ``config.json`` of a model: its family and every field, as JSON has them (lists, not tuples)."""
    return {"family": name, **json.loads(json.dumps(asdict(config)))}


def changed(name: str, config: Any, changes: Mapping[str, Any]) -> Any:
    """The Config with leaves changed by dotted path, such as ``{"reading": "scripts"}``. Raises ``ValueError`` for
    a path that does not exist and for a value that does not fit."""
    if not changes:
        return config
    row = config_to_json(name, config)
    for path, value in changes.items():
        set_leaf(row, path, value, "config")
    return config_from_json(row)[1]


def _dataclasses(cls: type) -> set[type]:
    from dataclasses import fields, is_dataclass
    from typing import get_args, get_type_hints

    found, queue = set(), [cls]
    while queue:
        item = queue.pop()
        if isinstance(item, type) and is_dataclass(item) and item not in found:
            found.add(item)
            hints = get_type_hints(item)
            queue += [hints[f.name] for f in fields(item)]
        else:
            queue += get_args(item)
    return found
