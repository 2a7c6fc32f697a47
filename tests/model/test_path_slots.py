"""Paths extended token by token in slots are those of the whole text."""

import numpy as np
import pytest

from pregate.model.path_computer import PathComputer
from pregate.model.path_slots import PathSlots
from pregate.model.paths import Paths
from tests.model.random_routers import assert_same, prompt, route

#: Beginnings of three texts: shorter than the router's window, longer, and nothing of it.
BEGINNINGS, LENGTH = (5, 31, 1), 40


def begun(computer: PathComputer, slots: PathSlots, text: int) -> int:
    ids = prompt(LENGTH, text)[: BEGINNINGS[text]]
    return slots.put(computer.extend([computer.new_state()], [ids])[1][0], len(ids))


def rest_of(computer: PathComputer, text: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Paths of a whole text from where it was begun."""
    ids, weights = route(computer, prompt(LENGTH, text))
    return ids[BEGINNINGS[text] :], None if weights is None else weights[BEGINNINGS[text] :]


def test_every_kind_gives_the_paths_of_the_whole_text(every: PathComputer):
    """Three texts side by side, each from where it was begun, in a batch whose order changes."""
    slots = PathSlots(every, 2)
    slot_of = {text: begun(every, slots, text) for text in range(3)}
    found: dict[int, list[Paths]] = {text: [] for text in slot_of}
    for step in range(LENGTH):
        live = [text for text in slot_of if BEGINNINGS[text] + step < LENGTH]
        live = live[step % max(len(live), 1) :] + live[: step % max(len(live), 1)]
        if live:
            ids = [prompt(LENGTH, text)[BEGINNINGS[text] + step] for text in live]
            paths = slots.extend([slot_of[text] for text in live], ids)
            for row, text in enumerate(live):
                found[text].append(paths[row : row + 1])
    for text, parts in found.items():
        extended = Paths.concatenate(parts)
        assert_same((extended.ids, extended.weights), rest_of(every, text))


def test_a_slot_that_was_given_back_remembers_nothing(computer: PathComputer):
    slots = PathSlots(computer, 1)
    first = begun(computer, slots, 1)
    slots.release(first)
    again = begun(computer, slots, 2)
    assert again == first and slots.num_used == 1
    paths = Paths.concatenate([slots.extend([again], [token]) for token in prompt(LENGTH, 2)[BEGINNINGS[2] :]])
    assert_same((paths.ids, paths.weights), rest_of(computer, 2))


def test_a_slot_is_given_back_once(computer: PathComputer):
    slots = PathSlots(computer, 4)
    slot = begun(computer, slots, 0)
    slots.release(slot)
    with pytest.raises(AssertionError, match="released twice"):
        slots.release(slot)
