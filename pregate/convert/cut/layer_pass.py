"""One layer's turn: load it, see its FFN's inputs, cut it, run the windows through what it became.

Three groups of windows travel along, each by its own rows of hidden states: "calibration" and "routed" through the
cut layers, "dense" through the layers as they were. The last two are the same held-back windows.

Shape letters: S windows, N tokens of a window, D hidden width, T = S * N.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from pregate.convert.cut.layer_cut import cut_one
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.files.assembly import as_stored, round_to
from pregate.convert.files.skeleton import Skeleton, with_forward
from pregate.convert.measure.agreement import AgreementMeter, MeteredPolicy
from pregate.convert.progress import Progress
from pregate.model.config import RoutedConfig
from pregate.model.gated_mlp import GatedMLP, find_gated_mlp
from pregate.model.layers import GatePolicy, kept_float32


@dataclass
class LayerPass:
    """Takes the layers of a skeleton in order; `hidden_SND` by group, and the meter's tallies, change with each."""

    skeleton: Skeleton
    config: RoutedConfig
    options: ConvertOptions
    hidden_SND: dict[str, torch.Tensor]
    meter: AgreementMeter

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.options.dtype)

    @torch.no_grad()
    def run(self, index: int, progress: Progress) -> dict[str, torch.Tensor]:
        """Cut layer `index` and take the windows through it; returns its tensors as stored, by full name."""
        names = self.skeleton.layer_names(index)
        with self.skeleton.loaded(names):
            self._move("dense", index, progress)
            # From here on what will be stored counts: the cut is made from it, and figures are measured on it.
            round_to(self.skeleton.tensors(names).values(), self._dtype, f"layer {index}")
            mlp = find_gated_mlp(index, self.skeleton.layers[index])
            try:
                return self._cut(mlp, progress)
            finally:
                mlp.replace(mlp.module)

    def _cut(self, mlp: GatedMLP, progress: Progress) -> dict[str, torch.Tensor]:
        mlp.check(self.config.hidden_act)
        with progress.doing(f"layer {mlp.layer}, cutting"):
            routed = cut_one(mlp, self._ffn_inputs(mlp, progress), self.config, self.options).to(self.skeleton.device)
        self.config.layer_cuts[mlp.layer] = asdict(routed.cut)
        mlp.replace(routed)
        self._move("calibration", mlp.layer, progress)
        gate, routed.policy = routed.policy, MeteredPolicy(GatePolicy(), self.meter, None, None)
        self._move("routed", mlp.layer, progress)
        routed.policy = gate
        prefix = f"parent.{self.skeleton.layers_name}.{mlp.layer}."
        tensors = self.skeleton.layers[mlp.layer].state_dict(prefix=prefix)
        return {name: t if kept_float32(name) else as_stored(t, self._dtype) for name, t in tensors.items()}

    def _ffn_inputs(self, mlp: GatedMLP, progress: Progress) -> torch.Tensor:
        """What the FFN gets [T, D] on the calibration windows, in their order; it is not computed itself."""
        hidden_SND, done = self.hidden_SND["calibration"], 0
        x_TD = torch.empty(hidden_SND.shape[0] * hidden_SND.shape[1], mlp.hidden_size, device=self.skeleton.device)

        def keep(x: torch.Tensor) -> torch.Tensor:
            nonlocal done
            rows_TD = x.reshape(-1, x.shape[-1])
            x_TD[done : done + len(rows_TD)] = rows_TD
            done += len(rows_TD)
            return torch.zeros_like(x)

        with (
            with_forward(mlp.module, keep),
            progress.stage(f"layer {mlp.layer}, FFN inputs", len(hidden_SND)) as advance,
        ):
            for rows_SND in self.skeleton.run(mlp.layer, hidden_SND):
                advance(len(rows_SND))
        return x_TD

    def _move(self, group: str, index: int, progress: Progress) -> None:
        """Take a group's windows through the layer as it is now; their hidden states are overwritten."""
        hidden_SND = self.hidden_SND.get(group)
        if hidden_SND is not None:
            first = 0
            with progress.stage(f"layer {index}, {group} windows", len(hidden_SND)) as advance:
                for rows_SND in self.skeleton.run(index, hidden_SND):
                    hidden_SND[first : first + len(rows_SND)] = rows_SND
                    first += len(rows_SND)
                    advance(len(rows_SND))
