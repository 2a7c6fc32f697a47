"""The order of copies to a device, held by a tape of what its streams are asked for: no CI has one."""

import numpy as np
import pytest
import torch

from pregate.kernels.weights import PlainLayout
from pregate.model.checkpoint import CheckpointReader
from pregate.workers.host.copies import IN_FLIGHT, Copies
from pregate.workers.host.store import UnitStore


class Tape:
    """Stands in for `torch.cuda`: notes what is asked of streams and events; copies end when they are waited for."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.num_events = 0
        tape = self

        class Event:
            def __init__(self) -> None:
                tape.num_events += 1
                self.name, self.ended = f"event {tape.num_events}", False

            def record(self, stream: object = None) -> None:
                tape.said.append(f"{'copies' if stream else 'compute'} record {self.name}")

            def query(self) -> bool:
                return self.ended

            def synchronize(self) -> None:
                tape.said.append(f"wait for {self.name}")
                self.ended = True

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self.device = device

            def wait_event(self, event: Event) -> None:
                tape.said.append(f"copies after {event.name}")

            def __enter__(self) -> None: ...

            def __exit__(self, *_: object) -> None: ...

        self.Event, self.Stream, self.stream = Event, Stream, lambda stream: stream


@pytest.fixture
def tape(monkeypatch) -> Tape:
    made = Tape()
    for name in ("Event", "Stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


def copy(copies: Copies, tape: Tape, slot: int) -> None:
    with copies.copying(slot):
        tape.said.append(f"copy {slot}")


def test_a_copy_begins_after_the_last_use_and_only_who_uses_its_slot_waits(tape):
    copies = Copies(torch.device("cuda"))
    copies.used()
    copy(copies, tape, 3)
    copy(copies, tape, 5)
    assert tape.said == [
        *("compute record event 1", "copies after event 1", "copy 3", "copies record event 2"),
        *("copies after event 1", "copy 5", "copies record event 3"),
    ]
    assert copies.wait_for([4]) == 0.0
    assert copies.wait_for([3, 4]) > 0.0
    assert tape.said[-1] == "wait for event 2"
    assert copies.wait_for([3]) == 0.0, "once"


def test_what_has_ended_is_not_waited_for_and_a_slot_is_waited_for_by_its_last_copy(tape):
    copies = Copies(torch.device("cuda"))
    copy(copies, tape, 3)
    copy(copies, tape, 3)
    assert copies.wait_for([3]) > 0.0
    assert tape.said[-1] == "wait for event 2"
    copy(copies, tape, 4)
    next(iter(copies._arriving.values())).synchronize()
    said = len(tape.said)
    assert copies.wait_for([4]) == 0.0 and len(tape.said) == said


def test_copies_under_way_are_bounded(tape):
    copies = Copies(torch.device("cuda"))
    for slot in range(IN_FLIGHT + 2):
        copy(copies, tape, slot)
    assert [line for line in tape.said if line.startswith("wait")] == ["wait for event 1", "wait for event 2"]
    assert sum(not event.query() for event in copies._arriving.values()) <= IN_FLIGHT


class CopiedLayout(PlainLayout):
    """Slots that nothing is read into without a copy, as those of a GPU."""

    def memory_of(self, weights, slot):
        return None


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_store_waits_for_the_copies_of_what_is_asked_for_and_without_tiers_for_all(
    tape, tiny_layerwise_checkpoint, share
):
    reader = CheckpointReader(tiny_layerwise_checkpoint)
    units = [(0, expert) for expert in range(4)]
    copies = Copies(torch.device("cuda"))
    store = UnitStore(reader, units, CopiedLayout(torch.float32, torch.device("cpu")), share=share, copies=copies)
    assert copies._arriving == {}, "the first are waited for"
    if share == 1:
        (load,) = store.rehome([*units, (0, 4)])
        store.carry_out(load)
        assert copies._arriving == {}, "nobody asks before a slot is used"
        return
    tape.said.clear()
    missing = np.flatnonzero(~store.held[0])[:1]
    store.lookup(0, missing)
    recorded, waited = tape.said[-2:]
    assert waited == "wait for " + recorded.removeprefix("copies record ")


def test_on_a_cpu_nothing_is_ordered():
    copies = Copies(torch.device("cpu"))
    copies.used()
    with copies.copying(0):
        pass
    assert copies.wait_for([0]) == 0.0
