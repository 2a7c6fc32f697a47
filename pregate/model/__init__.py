"""The checkpoint format and the in-process reference model.

Importing this package registers `RoutedConfig` and `RoutedForCausalLM` with transformers' Auto classes.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from pregate.model.checkpoint import CheckpointReader
from pregate.model.config import LayerCut, RoutedConfig
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.paths import Paths

AutoConfig.register(RoutedConfig.model_type, RoutedConfig)
AutoModelForCausalLM.register(RoutedConfig, RoutedForCausalLM)

__all__ = ["CheckpointReader", "LayerCut", "Paths", "RoutedConfig", "RoutedForCausalLM"]
