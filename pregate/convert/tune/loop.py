"""`Tuner`: the training loop over a model in memory; no files.

Data on its way: rows -> batches [B, N] -> the path router's scores, where paths decide -> logits of student and
teacher [B, N, V] -> one loss -> AdamW on float32 weights -> thresholds and biases moved.

Shape letters: B rows of a batch, N tokens, P positions of all rows, V vocabulary, R routed experts of a layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pregate.base.errors import UserError
from pregate.convert.measure.scoring import Score
from pregate.convert.paths.training import rate_factor
from pregate.convert.progress import QUIET, Progress
from pregate.convert.text.batches import batches, padded
from pregate.convert.tune.balance import calibrate, check_biases, follow_thresholds, move_biases, set_thresholds
from pregate.convert.tune.data import BatchOrder, TuningRows
from pregate.convert.tune.forward import TuningPass, forecasts_masses
from pregate.convert.tune.losses import mixed_loss, next_tokens
from pregate.convert.tune.options import TuningSettings
from pregate.convert.tune.outputs import Outputs, hidden_error, path_offsets, path_scores, run_model
from pregate.convert.tune.parameters import changing_tensors, choose_trained, merge_low_rank, optimizer_of
from pregate.convert.tune.refit import refit
from pregate.model.modeling import RoutedForCausalLM

Record = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """What validation says: `active_share` of FFN neurons (None for a dense model), `imbalance` per routed layer."""

    perplexity: float
    active_share: float | None = None
    imbalance: tuple[float, ...] = ()

    def record(self) -> Record:
        share = {} if self.active_share is None else {"active_share": round(self.active_share, 4)}
        return {"validation_perplexity": round(self.perplexity, 4)} | share


@dataclass
class Counters:
    """How far a run is; with the tensors, all that it needs to go on. `seconds` of tuning, waiting not counted."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0
    worse_since: int = 0
    first: dict[str, Any] = field(default_factory=dict)
    refit: dict[str, Any] = field(default_factory=dict)


def imbalance(loads_R: torch.Tensor) -> float:
    """The busiest expert's tokens over the mean of all."""
    return round(float(loads_R.max() / loads_R.double().mean().clamp_min(1e-12)), 4)


class Tuner:
    """Tunes `model` (a `RoutedForCausalLM`, or a dense model) in place on `rows.training`.

    `teacher`, a dense model, is needed where `settings.wants_teacher`. `record` is called with each
    step's figures, and with those of each evaluation on `rows.held_back`. Call `run`, then `finish`. Everything is
    float32; on a GPU (or with `precision` bfloat16) matrix products are bfloat16 and weights float32 still.
    UserError where the model's router has no bias that `balance` could move.
    """

    def __init__(
        self,
        model: Any,
        rows: TuningRows,
        settings: TuningSettings,
        teacher: Any = None,
        record: Callable[[Record], None] | None = None,
        progress: Progress = QUIET,
    ) -> None:
        self.model, self.rows, self.settings, self.teacher = model.eval(), rows, settings, teacher
        self.routed = isinstance(model, RoutedForCausalLM)
        self.device: torch.device = model.device
        if self.routed and settings.balance == "bias":
            check_biases(model)
        self.trained = choose_trained(model, settings)
        self.optimizer = optimizer_of(self.trained, settings)
        self.counters = Counters()
        self.changing = changing_tensors(model, self.trained, settings.refit)
        self.best: dict[str, torch.Tensor] = {}
        self.offsets: dict[int, torch.Tensor] = {}
        self.merged: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._order = BatchOrder(rows.training, settings.batch_tokens, settings.seed)
        self._record, self._progress = record or (lambda _record: None), progress
        #: With the path router at rest, its scale aside, paths stay, and so do the thresholds they were chosen by.
        at_rest = self.routed and model.config.routing == "path" and not settings.router
        self._moves = self.routed and (not at_rest or settings.balance == "bias")
        half = settings.precision == "bfloat16" or (settings.precision == "auto" and self.device.type == "cuda")
        self.precision = torch.bfloat16 if half else torch.float32

    @property
    def is_refitted(self) -> bool:
        """Whether down projections are as a fit in closed form left them, or were tuned from there."""
        return self.counters.refit.get("kept", False)

    @property
    def share_done(self) -> float:
        """How much of the budget is used; 1 when early stopping ends the run."""
        counters, patience = self.counters, self.settings.patience
        if patience and counters.worse_since >= patience:
            return 1.0
        return min(1.0, self.settings.share_done(counters.step, counters.tokens, counters.seconds))

    def run(self, num_steps: int | None = None, after_step: Callable[[], None] | None = None) -> None:
        """Tune to the end of the budget, or `num_steps` further; `after_step` is called after each.

        It evaluates before the first step, every `eval_every` and after the last.
        """
        if self.counters.step == 0 and not self.best:
            self.measure()
        stop = math.inf if num_steps is None else self.counters.step + num_steps
        while self.share_done < 1 and self.counters.step < stop:
            with self._timed():
                figures = self._step()
            self._record(self._counted() | figures)
            if self.counters.step % self.settings.eval_every == 0 or self.share_done >= 1:
                self.measure()
            if after_step is not None:
                after_step()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time that the block takes."""
        begun, begun_cpu = time.monotonic(), time.process_time()
        yield
        self.counters.seconds += time.monotonic() - begun
        self.counters.cpu_seconds += time.process_time() - begun_cpu

    def _counted(self) -> Record:
        counters = self.counters
        return {"step": counters.step, "tokens": counters.tokens, "seconds": round(counters.seconds, 2)}

    def _autocast(self) -> AbstractContextManager:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    @torch.enable_grad()
    def _step(self) -> Record:
        """One optimizer step; its figures are means over the step's tokens."""
        settings, counters = self.settings, self.counters
        factor = rate_factor(counters.step, settings.warmup_steps, self.share_done)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        first = counters.step * settings.accumulate
        parts = [self._order.batch(first + i) for i in range(settings.accumulate)]
        num_tokens = sum(len(row) - 1 for rows in parts for row in rows)
        passes, sums, loss = [], torch.zeros(2, dtype=torch.float64, device=self.device), 0.0
        for rows in parts:
            part_loss, part_sums, tuning_pass = self._losses(rows, num_tokens)
            part_loss.backward()
            passes += [] if tuning_pass is None else [tuning_pass]
            sums, loss = sums + part_sums, loss + part_loss.detach()
        if not math.isfinite(loss):
            reason = f"the loss is {float(loss)} at step {counters.step + 1}; a lower rate, with --restart, may help"
            raise UserError.of("--learning-rate", settings.model_learning_rate, reason)
        for parameters in (self.trained.model, self.trained.router):
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._settle(passes)
        counters.step, counters.tokens = counters.step + 1, counters.tokens + num_tokens
        cross_entropy, kl = (sums / num_tokens).tolist()
        figures = {"loss": float(loss), "cross_entropy": cross_entropy, "kl": kl}
        return figures | {"learning_rate": settings.model_learning_rate * factor}

    def _losses(self, rows: list[list[int]], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, TuningPass | None]:
        """One batch's share of the step's loss, its summed cross-entropy and KL, and what its pass gathered."""
        settings = self.settings
        ids_BN, mask_BN = (t.to(self.device) for t in padded(rows))
        targets_P, real_T = next_tokens(ids_BN, mask_BN), mask_BN.flatten().bool()
        theirs, matched = Outputs(), self.teacher is not None and settings.matching > 0
        if self.teacher is not None:
            with torch.no_grad(), self._autocast():
                theirs = run_model(self.teacher, ids_BN, None, matched)
        with self._autocast():
            mass = self.routed and settings.router and settings.router_mass > 0 and forecasts_masses(self.model)
            gathered = {"mass": mass, "balance": settings.balance == "loss"}
            tuning_pass = self._pass(ids_BN, mask_BN, **gathered, straight_through=settings.straight_through)
            ours = run_model(self.model, ids_BN, tuning_pass, matched, settings.gradient_checkpointing)
        loss, sums = mixed_loss(ours.logits, targets_P, theirs.logits, settings.kl_share, num_tokens)
        share = float((targets_P >= 0).sum()) / num_tokens
        if matched:
            loss = loss + share * settings.matching * hidden_error(ours.hidden, theirs.hidden, real_T)
        if tuning_pass is not None and tuning_pass.mass_errors:
            loss = loss + share * settings.router_mass * torch.stack([*tuning_pass.mass_errors.values()]).mean()
        if tuning_pass is not None and tuning_pass.balance_terms:
            loss = loss + share * settings.balance_loss * torch.stack([*tuning_pass.balance_terms.values()]).mean()
        return loss, sums, tuning_pass

    def _pass(self, ids_BN: torch.Tensor, mask_BN: torch.Tensor, **gathered: bool) -> TuningPass | None:
        if not self.routed:
            return None
        scores_TS = path_scores(self.model, ids_BN)
        held_T = path_offsets(self.model, scores_TS, ids_BN)
        return TuningPass(self.model, mask_BN.flatten().bool(), scores_TS, self.offsets, held_T, **gathered)

    def _settle(self, passes: list[TuningPass]) -> None:
        """Move thresholds and balancing biases by what the passes of a step saw."""
        if not passes:
            return
        if self._moves:
            mean = {n: torch.stack([p.limits[n] for p in passes]).mean() for n in passes[0].limits}
            follow_thresholds(self.model, mean)
        if self.settings.balance == "bias":
            loads = {n: torch.stack([p.loads[n] for p in passes]).sum(dim=0) for n in passes[0].loads}
            move_biases(self.model, loads, passes[0].spreads, self.settings.balance_rate, self.offsets)

    def measure(self) -> Evaluation:
        """Evaluate, keep the tensors if they are the best so far, and record."""
        counters = self.counters
        with self._timed():
            if self._moves and (counters.step or counters.refit):
                set_thresholds(self.model, self.rows.training, self._progress)
            found = self.evaluate()
            if not counters.first:
                counters.first = asdict(found)
            counters.worse_since += 1
            if found.perplexity < counters.best:
                counters.best, counters.best_step, counters.worse_since = found.perplexity, counters.step, 0
                self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.changing.items()}
        self._record(self._counted() | found.record())
        return found

    def refit(self) -> None:
        """Fit the down projections in closed form before the first step; undone where validation says it harms."""
        before = self.measure()
        with self._timed():
            parent = None if self.model.is_partition else self.teacher
            left = refit(self.model, self.rows.training, self._progress, parent)
        self.counters.refit = {"missing_left": [round(x, 4) for x in left]}
        found = self.measure()
        self.counters.refit |= {"validation_perplexity": round(found.perplexity, 4), "kept": True}
        if not found.perplexity < before.perplexity:
            self.restore(self.best)
            self.counters.refit["kept"], self.counters.worse_since = False, 0
            self._progress.note(f"the fit is undone: validation perplexity {found.perplexity:.4f} after it")

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Validation by the routing as it is now, in float32; the protocol of `scoring.score_rows`."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        loads: dict[int, torch.Tensor] = {}
        active, total, num_tokens = 0.0, 0, 0
        rows = self.rows.held_back
        with self._progress.stage("validating (rows)", len(rows)) as advance:
            for batch in batches(rows, self.settings.batch_tokens):
                ids_BN, mask_BN = (t.to(self.device) for t in padded([rows[i] for i in batch]))
                tuning_pass = self._pass(ids_BN, mask_BN)
                logits_PV = run_model(self.model, ids_BN, tuning_pass).logits
                sums += mixed_loss(logits_PV, next_tokens(ids_BN, mask_BN), None, 0.0, 1)[1]
                num_tokens += int(mask_BN[:, 1:].sum())
                if tuning_pass is not None:
                    active, total = active + tuning_pass.active_neurons, total + tuning_pass.all_neurons
                    for layer, loads_R in tuning_pass.loads.items():
                        loads[layer] = loads.get(layer, torch.zeros_like(loads_R)) + loads_R
                advance(len(batch))
        uneven = tuple(map(imbalance, loads.values()))
        return Evaluation(Score(sums[0].item(), num_tokens).perplexity, active / total if total else None, uneven)

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set every tensor that tuning changes to a snapshot's."""
        for name, tensor in self.changing.items():
            tensor.copy_(tensors[name])

    def finish(self, keep_best: bool = True, dtype: torch.dtype = torch.float32) -> None:
        """Leave the model as the best evaluation found it (or as it is), low-rank changes merged, nothing to train.

        Merged weights are what `dtype` can hold; `merged` keeps the changes.
        """
        if keep_best:
            self.restore(self.best)
        moved = (self.counters.best_step if keep_best else self.counters.step) or self.is_refitted
        if self.routed and moved and self.model.config.selection == "threshold":
            calibrate(self.model, self.rows.training, self._progress)  # for the oracles too, whose masses have changed
        self.merged = merge_low_rank(self.model, dtype)
        if self.routed:
            self.model.forget_path_computer()
        self.model.requires_grad_(False)
