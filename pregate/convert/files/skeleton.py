"""A dense model without its weights: on the meta device until a layer, or what lies outside the layers, is loaded.

Shape letters: S windows, N tokens of a window, D hidden width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pregate.base.errors import UserError, in_one_line
from pregate.base.memory import give_back_heap
from pregate.convert.files.assembly import as_stored
from pregate.convert.files.dense import check_finite, dense_config
from pregate.convert.files.shards import DenseShards
from pregate.model.folder import ModelFolder
from pregate.model.gated_mlp import decoder_layers, find_gated_mlps
from pregate.model.gates import LinearGate

#: Tokens that run through a layer at a time, in whole windows: bounds what attention and FFN hold between.
SLICE_TOKENS = 2048


class Skeleton:
    """The model in `folder`, its parameters on the meta device but for what `loaded` holds at the time.

    Everything is refused with a UserError here, before any work: what transformers does not know, and a checkpoint
    whose tensors are not exactly those of the module (by name and shape; a tied head may be absent).
    """

    #: What the tensors' names begin with in the shards, before the model's own.
    prefix = ""

    def __init__(self, folder: ModelFolder, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.model: Any = self._without_weights().eval().requires_grad_(False)
        self.layers = decoder_layers(self.model)
        self.layers_name = next(name for name, module in self.model.named_modules() if module is self.layers)
        self.shards = DenseShards.of(folder)
        self._tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        self._check_names()
        make_buffers(self.model, device)
        for layer in self.layers:
            layer.forward = pass_through

    def _without_weights(self) -> Any:
        config = dense_config(self.folder)
        with torch.device("meta"):
            try:
                model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            except Exception as error:  # its families raise many kinds for values they cannot use
                raise self.folder.refuse(f"not a causal language model ({in_one_line(error)})") from error
        self.widths = [mlp.width for mlp in find_gated_mlps(model)]
        return model

    @property
    def whole(self) -> Any:
        """What is to be called for logits: the model itself."""
        return self.model

    def layer_names(self, index: int) -> list[str]:
        """Full names of the tensors of decoder layer `index`."""
        prefix = f"{self.layers_name}.{index}."
        return [name for name in self._names if name.startswith(prefix)]

    @property
    def outer_names(self) -> list[str]:
        """Names of all tensors outside the layers: embeddings, norms, head (a tied one under its one stored name)."""
        return [name for name in self._names if not name.startswith(f"{self.layers_name}.")]

    @property
    def embedding_names(self) -> list[str]:
        """Those of `outer_names` that grow with the vocabulary."""
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        of = {id(p) for end in ends if end is not None for p in end.parameters()}
        named = {name for name, p in self.model.named_parameters(remove_duplicate=False) if id(p) in of}
        return [name for name in self.outer_names if name in named]

    @contextmanager
    def loaded(self, names: Collection[str]) -> Iterator[None]:
        """Hold the named tensors on the device, in float32, for the length of the block.

        UserError for one that holds NaN or infinite values.
        """
        self.load(names)
        try:
            yield
        finally:
            self.drop(names)

    def load(self, names: Collection[str]) -> None:
        """Hold the named tensors on the device, in float32, until they are dropped; UserError as of `loaded`."""
        tensors = self.shards.read([self._stored[name] for name in names], self.device)
        check_finite(tensors, self.folder)
        self._assign(tensors, names)

    def drop(self, names: Collection[str]) -> None:
        """Let go of the named tensors."""
        self._assign(None, names)
        give_back_heap()

    def tensors(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The named tensors as they are now (meta where not loaded); they share the model's memory."""
        own = self.model.state_dict()
        return {name: own[name] for name in names}

    def stored(self, names: Collection[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The named tensors from the shards, weights in `dtype`, on the CPU; the model stays as it is."""
        found = {}
        for name in names:
            tensor = self.shards.read([self._stored[name]], torch.device("cpu"))[self._stored[name]]
            found[name] = as_stored(tensor, dtype)
        return found

    def _assign(self, tensors: dict[str, torch.Tensor] | None, names: Collection[str]) -> None:
        """Hang `tensors` (by stored name) in the model's places, or meta tensors for None."""
        own = self.model.state_dict()
        if tensors is None:
            new = {name: torch.empty_like(own[name], device="meta") for name in names}
        else:
            new = {name: tensors[self._stored[name]] for name in names}
        self.model.load_state_dict(new, strict=False, assign=True)
        self.model.tie_weights(recompute_mapping=False)

    def _check_names(self) -> None:
        own = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        groups: dict[str, set[str]] = {}
        for target, source in self._tied.items():
            groups.setdefault(source, {source}).add(target)
        have = self.shards.tensors
        start = self.prefix
        # A tied tensor may be stored under any of its names; it is read under the first that is there.
        names = {n: [start + c for c in (n, *sorted(groups.get(n, ())))] for n in own}
        self._stored = {n: next((c for c in those if c in have), those[0]) for n, those in names.items()}
        self._names = [name for name in own if name not in self._tied]
        for name in self._names:
            if self._stored[name] not in have:
                family = self.model.config.model_type
                known = next(iter(sorted(have)), "no tensor")
                raise self.folder.refuse(f"its weights lack {name} of family {family!r} (they have {known}, for one)")
            if have[self._stored[name]].shape != own[name]:
                shapes = f"{list(have[self._stored[name]].shape)}, its config says {list(own[name])}"
                raise self.folder.refuse(f"{name} has shape {shapes}")
        there = {n.removeprefix(start) for n in have if n.startswith(start)}
        self._check_rest(there - set(own), there & set(self._tied))

    def _check_rest(self, unknown: set[str], tied: set[str]) -> None:
        """Refuse tensors the model has no place for, and tied ones that differ from what they are tied to."""
        patterns = [r"rotary_emb\.inv_freq$", *(self.model._keys_to_ignore_on_load_unexpected or ())]
        foreign = sorted(n for n in unknown if not any(re.search(p, n) for p in patterns))
        if foreign:
            raise self.folder.refuse(f"{type(self.model).__name__} has no place for {foreign[0]}")
        for name in sorted(tied):
            stored, source = self.prefix + name, self._stored[self._tied[name]]
            if source != stored:
                both = self.shards.read([stored, source], torch.device("cpu"))
                if not torch.equal(both[stored], both[source]):
                    reason = f"its config ties {name} to {source}, but they differ; set tie_word_embeddings to false"
                    raise self.folder.refuse(reason)

    def enter(self, ids_SN: torch.Tensor) -> torch.Tensor:
        """Hidden states [S, N, D] that enter the first layer; the tensors of `outer_names` must be loaded."""
        parts: list[torch.Tensor] = []

        def record(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
            parts.append(hidden_states.clone())
            return hidden_states

        with with_forward(self.layers[0], record):
            for rows_SN in ids_SN.split(windows_per_slice(ids_SN.shape[1])):
                self.model.base_model(input_ids=rows_SN.to(self.device), use_cache=False)
        return torch.cat(parts)

    def run(self, index: int, hidden_SND: torch.Tensor) -> Iterator[torch.Tensor]:
        """Run windows through layer `index`, which must be loaded, some at a time; gives their new hidden states.

        The model itself is called, with every other layer passing its input through, so that it gets the masks and
        positions the model has for it.
        """
        layer = self.layers[index]
        for rows_SND in hidden_SND.split(windows_per_slice(hidden_SND.shape[1])):
            out: list[Any] = []

            def compute(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                out.append(type(layer).forward(layer, rows_SND, *args, **kwargs))  # noqa: B023 (called in this turn)
                return hidden_states

            with with_forward(layer, compute):
                self.model.base_model(inputs_embeds=rows_SND, use_cache=False)
            if not isinstance(out[0], torch.Tensor) or out[0].shape != rows_SND.shape:
                reason = f"{type(layer).__name__} returns more than hidden states; such layers cannot be streamed"
                raise self.folder.refuse(reason)
            yield out[0]

    def logits(self, hidden_SND: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits [N, V] of one window after the other from what the last layer gave; `outer_names` must be loaded."""
        for rows_ND in hidden_SND:

            def give(*_args: Any, **_kwargs: Any) -> torch.Tensor:
                return rows_ND[None]  # noqa: B023

            with with_forward(self.layers[-1], give):
                yield self.model(inputs_embeds=rows_ND[None], use_cache=False).logits[0]


@contextmanager
def with_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block `module` computes `forward`; afterwards what it did before."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def pass_through(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    """The forward of a layer that is not there."""
    return hidden_states


def windows_per_slice(window_tokens: int) -> int:
    """How many windows run through a layer at a time."""
    return max(1, SLICE_TOKENS // window_tokens)


def make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies, embedding scales) their values.

    As transformers itself does on loading: by the model's own initialisation of the module. UserError names a buffer
    that this does not fill.
    """
    stored = set(model.state_dict())
    for path, module in model.named_modules():
        names = [n for n, _ in module.named_buffers(recurse=False) if f"{path}.{n}".lstrip(".") not in stored]
        if isinstance(module, LinearGate) and names:  # a fixed number of experts needs none
            module.threshold, names = torch.zeros((), device=device), []
        for name in names:
            buffer = getattr(module, name)
            if buffer.is_floating_point():
                setattr(module, name, torch.full_like(buffer, torch.nan, device="cpu"))
        if names:
            model._init_weights(module)
        for name in names:
            buffer = getattr(module, name)
            if buffer.is_meta or buffer.isnan().any():
                family = f"model family {model.config.model_type!r} cannot be converted"
                raise UserError(f"{family}: buffer {path}.{name} is in no checkpoint, and not made by its module")
            setattr(module, name, buffer.to(device))
