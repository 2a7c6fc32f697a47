"""The checkpoint format and the in-process reference model.

Importing this package lets transformers' Auto classes load checkpoints, and imports neither torch nor transformers:
`RoutedConfig` is registered when transformers loads its own (`model/config.py`), the model class with the first config.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pregate.model.checkpoint import CheckpointReader
    from pregate.model.config import LayerCut, RoutedConfig
    from pregate.model.modeling import RoutedForCausalLM
    from pregate.model.paths import Paths

__all__ = ["CheckpointReader", "LayerCut", "Paths", "RoutedConfig", "RoutedForCausalLM"]
_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_PUBLIC = {
    "CheckpointReader": "checkpoint",
    "LayerCut": "config",
    "Paths": "paths",
    "RoutedConfig": "config",
    "RoutedForCausalLM": "modeling",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"pregate.model.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'pregate.model' has no attribute {name!r}")


class _WhenAutoConfigLoads(importlib.abc.MetaPathFinder):
    """Imports `model/config.py`, which registers itself, right after transformers' list of configs; then is gone."""

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module("pregate.model.config")

        spec.loader.exec_module = execute_and_register
        return spec


if _AUTO_CONFIG in sys.modules:
    importlib.import_module("pregate.model.config")
else:
    sys.meta_path.insert(0, _WhenAutoConfigLoads())
