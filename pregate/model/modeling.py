"""`RoutedForCausalLM`: the in-process reference model that defines correct output.

It imports nothing of the router, the planner or the fast kernels, so that it stays an independent oracle.
"""

from __future__ import annotations

import importlib
import inspect
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from pregate.base.errors import CheckpointError, UserError
from pregate.model.adapter import is_adapter
from pregate.model.checkpoint import Manifest, open_shards, write_manifest
from pregate.model.config import RoutedConfig
from pregate.model.folder import read_folder
from pregate.model.gated_mlp import find_gated_mlps
from pregate.model.gates import Choice
from pregate.model.layers import FLOAT32_PARTS, GatePolicy, PathPolicy, RoutedMLP, RoutingPolicy, find_routed_mlps
from pregate.model.path_computer import PathComputer, PathState
from pregate.model.path_router import PathRouter
from pregate.model.paths import Paths
from pregate.model.read_check import Hashes
from pregate.model.read_gate import ReadNetwork
from pregate.model.shard_file import TORCH_NAMES, Shard


class RoutedForCausalLM(PreTrainedModel, GenerationMixin):
    """A transformers decoder whose FFNs are cut into a shared and routed experts.

    `parent` is the dense architecture with its MLPs replaced by `RoutedMLP`; `path_router` is there when the
    checkpoint has one, `read_network` with gate "read". Set `routing_policy` to override who chooses the experts
    (controls, oracles); None means what the checkpoint says. `experts_implementation` "eager", the default, is the
    reference; "fast", or an implementation of `kernels/expert_ffn.py` by name, runs the layers through the kernels'
    entry point instead.
    """

    config_class = RoutedConfig
    base_model_prefix = "parent"
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = set(FLOAT32_PARTS)  # noqa: RUF012
    #: False in a backbone: the routed experts live on hosts.
    hold_experts = True

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        self._fast: Any = None
        # transformers hands the name to the parent too, which has no experts of its own and does not know ours.
        config.text_config._experts_implementation_internal = None
        self.parent: Any = AutoModelForCausalLM.from_config(config.text_config)
        for slot, cut in zip(find_gated_mlps(self.parent), config.cuts, strict=True):
            mlp = RoutedMLP(slot.layer, slot.hidden_size, cut, config, self.hold_experts)
            mlp.parent_width = slot.width
            slot.replace(mlp)
        self.path_router = (
            PathRouter(config.router_shape, config.text_config.vocab_size, config.cuts, config.selection)
            if config.path_router is not None
            else None
        )
        self.read_network: ReadNetwork | None = None
        if config.gate == "read":
            width = config.text_config.hidden_size
            self.read_network = ReadNetwork(config.read_shape, width, config.cuts, config.selection)
            self.read_network.hang_in(self.routed_mlps)
        self.routing_policy: RoutingPolicy | None = None
        self.manifest: Manifest | None = None
        self._computer: PathComputer | None = None
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: so that loading sets every buffer of the parent that no shard holds.

        In a model it takes for custom code, transformers passes over modules without tensors of their own, and what
        those set in others (Falcon-H1's multipliers) stays uninitialised memory.
        """
        return False

    @property
    def routed_mlps(self) -> list[RoutedMLP]:
        return list(find_routed_mlps(self.parent).values())

    @property
    def deciding_router(self) -> PathRouter | None:
        """The path router, where it decides and does not only forecast."""
        return self.path_router if self.config.routing == "path" else None

    @property
    def is_partition(self) -> bool:
        """Whether no layer's experts overlap or leave neurons out, so that all together are the parent's FFNs."""
        return all(mlp.is_partition for mlp in self.routed_mlps)

    @property
    def path_computer(self) -> PathComputer:
        """The float64 runtime of the path router; ValueError when the checkpoint has none."""
        if self.path_router is None:
            raise UserError("this checkpoint has no path router; make one with `pregate decouple`")
        if self._computer is None:
            self._computer = PathComputer(self.path_router)
        return self._computer

    def forget_path_computer(self) -> None:
        """Let the next use of `path_computer`, which has a copy of the router's weights, take them as they are then."""
        self._computer = None

    def get_input_embeddings(self) -> nn.Module:
        return self.parent.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.parent.get_output_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the parent on `input_ids` [B, N] with routed FFNs; same contract as the parent's own forward.

        With path routing the state of the path router travels with `past_key_values`, which transformers calls `cache`
        from 5.24 on: either name is taken, and the parent is given its own.
        """
        past_key_values = past_key_values if cache is None else cache
        if past_key_values is None and (use_cache if use_cache is not None else self.config.text_config.use_cache):
            past_key_values = DynamicCache(config=self.config.text_config)
        policy = self.routing_policy
        if policy is None:
            by_path = self.config.routing == "path"
            policy = self._path_policy(input_ids, attention_mask, past_key_values) if by_path else GatePolicy()
        fast = self._fast_path()
        for mlp in self.routed_mlps:
            # A transformers decoder layer hands its MLP the hidden states and nothing else.
            mlp.policy, mlp.fast = policy, fast
        if fast is not None:
            fast.begin(policy)
        return self.parent(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=past_key_values is not None,
            **{self._cache_argument: past_key_values},
            **kwargs,
        )

    @cached_property
    def _cache_argument(self) -> str:
        """What the parent's forward calls its cache."""
        return "cache" if "cache" in inspect.signature(self.parent.forward).parameters else "past_key_values"

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As transformers asks: the name to use. What a name means is checked when the first forward needs it."""
        return requested_experts or "eager"

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Choose who runs the experts from the next forward on; see the class."""
        wanted = experts_implementation
        name = wanted.get("", self.config._experts_implementation) if isinstance(wanted, dict) else wanted
        self.config._experts_implementation_internal = self.get_correct_experts_implementation(name)
        self._fast = None

    def _fast_path(self) -> Any:
        """The fast path asked for, over the weights as they are now; None for the reference."""
        name = self.config._experts_implementation
        if name == "eager":
            return None
        if self.training and torch.is_grad_enabled():
            raise UserError.of("experts_implementation", name, "gives experts no gradients; allowed in training: eager")
        if self._fast is None or (self._fast.device, self._fast.dtype) != (self.device, self.dtype):
            # By name, so that importing the reference model reaches none of it.
            module = importlib.import_module("pregate.model.fast")
            chosen = "auto" if name == "fast" else name
            self._fast = module.FastExperts(chosen, self.routed_mlps, self.device, self.dtype)
        return self._fast

    def _path_policy(self, ids_BN: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None) -> PathPolicy:
        states, num_seen = getattr(cache, "pregate_path_states", (None, 0))
        if states is None:
            states = [self.path_computer.new_state() for _ in range(ids_BN.shape[0])]
        if cache is not None and cache.get_seq_length() != num_seen:
            raise ValueError(
                "past_key_values was not made by this model, or was cut: the path router's state is missing"
            )
        if len(states) != ids_BN.shape[0]:
            raise ValueError(f"path routing: {ids_BN.shape[0]} sequences but state of {len(states)}")
        paths, states = self.batch_paths(ids_BN, mask, states)
        if cache is not None:
            kept = (states, num_seen + ids_BN.shape[1])
            cache.pregate_path_states = kept  # pyright: ignore[reportAttributeAccessIssue]
        return PathPolicy.of(paths)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; beam search is refused with path routing, whose state does not follow reordering."""
        config = kwargs.get("generation_config") or self.generation_config
        num_beams = kwargs.get("num_beams", getattr(config, "num_beams", None)) or 1
        if self.config.routing == "path" and num_beams > 1:
            raise UserError.of("num_beams", num_beams, "beam search does not work with path routing; allowed: 1")
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def batch_paths(
        self, ids_BN: torch.Tensor, mask: torch.Tensor | None, states: list[PathState]
    ) -> tuple[Choice, list[PathState]]:
        """Paths of new tokens, ids int64 and weights [B, N, L, K], and the states after them.

        Padding gets no expert (-1).
        """
        num_new = ids_BN.shape[1]
        real_BN = (torch.ones_like(ids_BN) if mask is None else mask[:, -num_new:]).bool()
        rows = [ids[real].tolist() for ids, real in zip(ids_BN, real_BN, strict=True)]
        parts, states = self.path_computer.extend(states, rows)
        paths = Paths.concatenate(parts)  # row by row, as a mask picks them
        shape = (*ids_BN.shape, *paths.ids.shape[1:])
        ids = torch.full(shape, -1, dtype=torch.int64, device=ids_BN.device)
        ids[real_BN] = torch.from_numpy(paths.ids.astype("int64")).to(ids.device)
        if paths.weights is None:
            return Choice(ids), states
        weights = torch.zeros(shape, device=ids_BN.device)
        weights[real_BN] = torch.from_numpy(paths.weights).to(ids.device)
        return Choice(ids, weights), states

    def paths(self, token_ids: list[int]) -> Paths:
        """Paths [T, L, K] of one sequence from its token ids; no forward pass."""
        return self.path_computer.extend([self.path_computer.new_state()], [token_ids])[0][0]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write config, shards and the manifest with each file's sha256."""
        super().save_pretrained(save_directory, **kwargs)
        write_manifest(Path(save_directory), self.manifest or Manifest(method="unknown"))

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        parent: str | Path | None = None,
        hashes: bool | None = None,
        **kwargs: Any,
    ) -> RoutedForCausalLM:
        """Load a checkpoint folder, or an adapter with the dense model `parent` that it was made from.

        CheckpointError names the file that is missing, damaged or foreign. Of its generation_config.json it obeys the
        ids that end a text and the repetition penalty, as a server does. `hashes` False: the caller has compared its
        files with the manifest's hashes.
        """
        path = Path(pretrained_model_name_or_path)
        whole = Path(parent) if parent else None
        hashed = cls.hold_experts if hashes is None else hashes
        manifest, shards = open_shards(path, whole, Hashes.FIRST if hashed else Hashes.NONE)
        folder = read_folder(path, parent=whole)
        picking = {"eos_token_id": sorted(folder.eos_ids) or None, "repetition_penalty": folder.repetition_penalty}
        kwargs.setdefault("generation_config", GenerationConfig(**picking))
        source: Any = path
        if is_adapter(path):
            made = {name: _Unread(shard, name) for shard in shards for name in shard.tensors}
            kwargs |= {"config": kwargs.get("config") or RoutedConfig.from_pretrained(path), "state_dict": made}
            source = None
        loaded: Any = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        absent = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
        if absent:
            # transformers only warns, and goes on with random weights in their place.
            raise CheckpointError(f"{path}: the shards lack {absent[0]} ({len(absent)} tensors in all)")
        model.manifest = manifest
        return model


class _Unread:
    """A tensor of a shard, read when transformers takes all of it; so those of a model are never all there twice."""

    def __init__(self, shard: Shard, name: str) -> None:
        self._shard, self._name = shard, name
        self.dtype = getattr(torch, TORCH_NAMES[shard.tensors[name].dtype])

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, _everything: Any) -> torch.Tensor:
        return self._shard.read(self._name)


AutoModelForCausalLM.register(RoutedConfig, RoutedForCausalLM)
