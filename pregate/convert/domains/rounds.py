"""Read-ME's continual training (arXiv 2410.19123, section 3.3): the router and the experts in turn, in rounds.

A stage starts its optimizer anew, so what lies between two stages is the model's tensors and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from pregate.convert.domains.options import ReadMeOptions
from pregate.convert.domains.tied_rows import tied_rows
from pregate.convert.measure.scoring import score_rows
from pregate.convert.paths.targets import TargetPool
from pregate.convert.paths.training import TrainingOptions, first_and_last, train
from pregate.convert.progress import Progress
from pregate.convert.tune.data import TuningRows
from pregate.convert.tune.loop import Tuner
from pregate.convert.tune.options import TuningSettings
from pregate.model.modeling import RoutedForCausalLM


def num_stages(options: ReadMeOptions) -> int:
    """Stages of all rounds: the router's in each, and the experts' where they have steps."""
    return options.rounds * (2 if options.steps else 1)


@dataclass
class Rounds:
    """The stages of `options` on a `model` in memory; `pool` has the router's targets for the documents trained on.

    `held_back`: rows measured on after every stage. `teacher`: the dense parent, needed with `kl_share`. `length`:
    tokens of a full document. `figures`: one record per stage done.
    """

    model: RoutedForCausalLM
    pool: TargetPool
    held_back: list[list[int]]
    options: ReadMeOptions
    length: int
    teacher: Any = None
    figures: list[dict[str, Any]] = field(default_factory=list)

    def run_stage(self, index: int, progress: Progress) -> None:
        """Run stage `index`, counted from 0 through all rounds; a router's stage comes first in each."""
        stages = 2 if self.options.steps else 1
        round_index, place = divmod(index, stages)
        run, name = ((self._train_router, "router"), (self._tune_experts, "experts"))[place]
        figures = {"round": round_index + 1, "stage": name} | run(round_index, progress)
        perplexity = score_rows(self.model, self.held_back, progress=progress).perplexity
        self.figures.append(figures | {"perplexity": round(perplexity, 4)})

    def _train_router(self, round_index: int, progress: Progress) -> dict[str, float]:
        """Everything but the router frozen; distillation from the targets of the dense parent."""
        options, router = self.options, self.model.path_router
        assert router is not None
        settings = TrainingOptions(
            steps=options.router_steps,
            seed=options.seed + round_index,
            target=options.loss,
            batch_tokens=options.router_batch * self.length,
            piece_tokens=options.batch_tokens,
            learning_rate=options.router_learning_rate * options.decay**round_index,
            weight_decay=options.weight_decay,
            warmup_share=0.0,
        )
        router.requires_grad_(True)
        losses = train(router, None, self.pool, settings, progress)
        router.requires_grad_(False)
        self.model.forget_path_computer()
        return first_and_last(losses)

    def _tune_experts(self, round_index: int, progress: Progress) -> dict[str, float]:
        """The router frozen; the language-model loss moves everything else (as the released code does)."""
        options, losses = self.options, []
        tied = self.model.routed_mlps if options.tie_overlap else []
        rows = TuningRows(self.pool.rows, self.held_back)

        def record(figures: dict[str, float]) -> None:
            losses.extend([figures["loss"]] if "loss" in figures else [])

        with tied_rows(tied), progress.stage(f"tuning, round {round_index + 1}", options.steps) as advance:
            tuner = Tuner(self.model, rows, self._settings(round_index), self.teacher, record, progress)
            tuner.run(after_step=lambda: advance(1))
        self.model.requires_grad_(False)
        return first_and_last(losses)

    def _settings(self, round_index: int) -> TuningSettings:
        options = self.options
        step_tokens = options.batch * self.length
        batch_tokens = min(step_tokens, max(options.batch_tokens, self.length))
        return TuningSettings(
            router=False,
            kl_share=options.kl_share,
            hidden_match=0.0,  # not among Read-ME's losses
            learning_rate=options.learning_rate * options.decay**round_index,
            weight_decay=options.weight_decay,
            router_mass=0.0,
            steps=options.steps,
            warmup_steps=0,
            batch_tokens=batch_tokens,
            accumulate=max(1, round(step_tokens / batch_tokens)),
            eval_every=options.steps,
            seed=options.seed + round_index,
        )

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that training changes, and all else, by name; a tied weight once."""
        return {name: p.data for name, p in self.model.named_parameters()} | dict(self.model.named_buffers())

    def restore(self, tensors: dict[str, torch.Tensor], figures: list[dict[str, Any]]) -> None:
        """Go on where `tensors` were taken, after the stages that `figures` are of."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        self.model.forget_path_computer()
        self.figures = list(figures)
