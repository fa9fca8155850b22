"""Config files as plain trees: YAML with ``base:`` inheritance, ``a.b=c`` overrides, and what differs between two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from latentwire.errors import ConfigError


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lines ``key: old -> new`` for every leaf that differs between two trees."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            lines += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}{key}.")
        return lines
    return [] if old == new else [f"{prefix.rstrip('.')}: {old} -> {new}"]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys in silence; half of a config would be dropped."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(
                    f"the key {key!r} stands twice in one mapping (line {node.start_mark.line + 1} on)"
                )
        return super().construct_mapping(node, deep)


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's mapping over that of its ``base:``, recursively.

    Args:
        path: a YAML file.
        seen: files whose base leads here.

    Raises:
        ConfigError: a file is missing, is not YAML, or its bases run in a circle.
    """
    if path.resolve() in seen:
        raise ConfigError(f"{path}: its base: leads back to itself ({' -> '.join(p.name for p in seen)})")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "no YAML file"
        raise ConfigError(f"there is no config {path}; {path.parent} has: {there}") from None
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:  # ValueError: not a date, not UTF-8
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, not {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: takes the name of one file, not {base!r}")
    return merge(read_tree(path.parent / base, (*seen, path.resolve())), tree)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, mapping by mapping; neither is changed."""
    merged = dict(below)
    for key, value in above.items():
        both_maps = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(dict(merged[key]), value) if both_maps else value
    return merged


def overridden(tree: Mapping[str, Any], override: str) -> dict[str, Any]:
    """The tree with its ``a.b`` set to the YAML value after ``=``.

    Raises:
        ConfigError: it has no such form, or the value is no YAML.
    """
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {override!r} is not of the form a.b=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
    return _with(tree, keys, value)


def _with(tree: Any, keys: list[str], value: Any) -> dict[str, Any]:
    below = dict(tree) if isinstance(tree, Mapping) else {}
    first, *rest = keys
    return below | {first: _with(below.get(first), rest, value) if rest else value}
