"""`RunningPaths`: the paths of the requests in the engine. A prompt's come with it or are computed once; then
every sampled token extends them, all sequences and all layers in one call.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch

from pregate.base.errors import ProtocolError
from pregate.model.packed_paths import PackedPaths
from pregate.model.path_computer import PathComputer, PathState
from pregate.model.path_slots import PathSlots
from pregate.model.paths import Paths
from pregate.router.engine.last_paths import LastPaths
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import PackedState, SubmitRequest


class RunningPaths:
    """Owns the path router's state of every sequence that has not ended, preempted ones too."""

    def __init__(self, computer: PathComputer) -> None:
        self.computer, self._slots = computer, PathSlots(computer)
        self._max_id = max(cut.num_routed for cut in computer.cuts) - 1
        self.last = LastPaths()

    @property
    def num_sequences(self) -> int:
        return self._slots.num_used

    def begin(self, sequence: Sequence, request: SubmitRequest) -> None:
        """Give `sequence` the paths of its prompt: those that came with the request, else computed now.

        ProtocolError for paths or a state of another prompt or model.
        """
        if request.paths is not None and request.path_state is not None:
            num_tokens = len(sequence.token_ids)
            request.paths.check(self.computer.cuts, num_tokens, PackedPaths.of(self.computer.no_paths(), self._max_id))
            sequence.paths, state = request.paths, self._state_of(request.path_state, num_tokens)
        else:
            (paths,), (state,) = self.computer.extend([self.computer.new_state()], [sequence.token_ids])
            sequence.paths = PackedPaths.of(paths, self._max_id)
        sequence.state_bytes = state.kept.nbytes
        sequence.path_slot = self._slots.put(state, len(sequence.token_ids))

    def _state_of(self, packed: PackedState, num_tokens: int) -> PathState:
        empty = self.computer.new_state().kept
        shape = (min(num_tokens, self.computer.config.window - 1), *empty.shape[1:])
        if packed.shape != shape:
            raise ProtocolError(f"path state of shape {packed.shape}; after this prompt it is {shape}")
        kept = np.frombuffer(packed.data, dtype="<f8").reshape(packed.shape)
        if not np.isfinite(kept).all():
            raise ProtocolError("path state: a value is not finite")
        counts = packed.counts
        wrong = len(counts) != self.computer.num_counts or min(counts, default=0) < 0
        if wrong or (counts and counts[-1] != num_tokens):
            raise ProtocolError(f"path state: counts {list(counts)} are not those of {num_tokens} tokens")
        kept, counts = torch.tensor(kept, dtype=torch.float64), torch.tensor(counts, dtype=torch.int64)
        return PathState(kept.to(empty.device), counts.to(empty.device))

    def extend(self, sequences: Many[Sequence]) -> Paths:
        """Fix the paths of the tokens just sampled, so that the next step is planned before its backbone starts; return
        them, of one token of each sequence."""
        if not sequences:
            return self.computer.no_paths()
        slots = [s.path_slot for s in sequences if s.path_slot is not None]
        paths = self._slots.extend(slots, [s.token_ids[-1] for s in sequences])
        for row, sequence in enumerate(sequences):
            assert sequence.paths is not None
            sequence.paths.append(paths[row : row + 1])
        return paths

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        if sequence.path_slot is not None:
            self._slots.release(sequence.path_slot)
            sequence.path_slot = None
        self.last.add(sequence)

    @staticmethod
    def of_step(pieces: Many[tuple[Sequence, int]]) -> Paths:
        """The paths of the next tokens of sequences: (sequence, how many)."""
        parts = []
        for sequence, num_tokens in pieces:
            assert sequence.paths is not None
            parts.append(sequence.paths.slice(sequence.num_computed, sequence.num_computed + num_tokens))
        return Paths.concatenate(parts)
