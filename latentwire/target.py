"""Targets: ``package.module:Name`` or ``file.py:Name``, the way a config names somebody's code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic

from latentwire.errors import ConfigError, WorkloadError

SCRIPT = "script"
"""The target of a run that a user's own script drives through a Session: there is nothing to import."""


def load_target(target: str) -> Any:
    """The class or function that the target names; imports its module.

    Raises:
        ConfigError: the target is not of the right form.
        WorkloadError: there is no such module, file or name.
    """
    if target == SCRIPT:
        raise WorkloadError("this run is driven by a script of its own: start that script again")
    module, name = _import_module(target)
    try:
        return getattr(module, name)
    except AttributeError:
        public = ", ".join(sorted(n for n in dir(module) if not n.startswith("_")))
        raise WorkloadError(
            f"workload.target: {module.__name__!r} has no {name!r}; it has: {public or 'nothing'}"
        ) from None


def options_model(target: str) -> type[pydantic.BaseModel] | None:
    """The pydantic model ``Options`` that stands beside the target, or None where there is none.

    Raises:
        ConfigError, WorkloadError: as ``load_target``.
    """
    model = _beside(target, "Options")
    return model if isinstance(model, type) and issubclass(model, pydantic.BaseModel) else None


def export_config(target: str) -> Callable[..., Any] | None:
    """The function ``export_config`` that stands beside the target, or None where there is none.

    Raises:
        ConfigError, WorkloadError: as ``load_target``.
    """
    return _function_beside(target, "export_config")


def footprint(target: str) -> Callable[..., Any] | None:
    """The function ``footprint`` that stands beside the target, or None where there is none.

    Raises:
        ConfigError, WorkloadError: as ``load_target``.
    """
    return _function_beside(target, "footprint")


def _function_beside(target: str, name: str) -> Callable[..., Any] | None:
    function = _beside(target, name)
    return function if callable(function) else None


def _beside(target: str, name: str) -> Any:
    return None if target == SCRIPT else getattr(_import_module(target)[0], name, None)


def _import_module(target: str) -> tuple[ModuleType, str]:
    module_name, separator, name = target.rpartition(":")
    is_module = all(part.isidentifier() for part in module_name.split("."))
    if not separator or not name.isidentifier() or not (is_module or module_name.endswith(".py")):
        raise ConfigError(f"workload.target: {target!r} is not of the form 'package.module:Name' or 'file.py:Name'")
    if module_name.endswith(".py"):
        return _import_file(Path(module_name)), name
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a console script does not have the working directory there
    try:
        return importlib.import_module(module_name), name
    except ModuleNotFoundError as error:
        raise WorkloadError(
            f"workload.target: cannot import {module_name!r} ({error}); install it, or run from the folder it is in"
        ) from error


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise WorkloadError(f"workload.target: there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # DataLoader workers import it by this name too
    module = importlib.import_module(path.stem)
    if Path(module.__file__ or "").resolve() != path:
        raise WorkloadError(
            f"workload.target: {path} would be imported as {path.stem!r}, which is already {module.__file__}; rename it"
        )
    return module
