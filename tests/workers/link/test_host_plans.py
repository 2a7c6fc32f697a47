from typing import Any

import numpy as np
import pytest

from pregate.workers.link.host_plans import GroupIndex, GroupKey, HostPlan


def i32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def worked_plan(**changes) -> HostPlan:
    """Layer 0: three rows as in `GroupIndex`; layer 1: nothing; layer 2: two rows, expert 0 takes both."""
    arrays: dict[str, Any] = {
        "num_rows": i32(3, 0, 2),
        "unit_offsets": i32(0, 2, 2, 3),
        "expert_ids": i32(1, 4, 0),
        "counts": i32(2, 2, 2),
        "pair_offsets": i32(0, 4, 4, 6),
        "row_index": i32(0, 2, 0, 1, 0, 1),
    }
    return HostPlan(step=7, **(arrays | changes))


def test_key_is_hashable_and_attempts_differ():
    key = GroupKey("abc", 1, 2, 3)
    assert key.next_attempt() == GroupKey("abc", 1, 2, 3, 1)
    assert len({key, key.next_attempt(), GroupKey("abc", 1, 2, 3, 0)}) == 2


def test_plan_layers_are_the_worked_example():
    plan = worked_plan()
    plan.check()
    first, empty, last = (plan.layer(layer) for layer in range(plan.num_layers))
    assert (first.expert_ids.tolist(), first.counts.tolist()) == ([1, 4], [2, 2])
    assert first.row_index.tolist() == [0, 2, 0, 1]
    assert (empty.num_pairs, last.num_pairs) == (0, 2)
    for index, num_rows in ((first, 3), (empty, 0), (last, 2)):
        index.check(num_rows)
    assert first.row_index.base is not None, "layers are views"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_rows": i32(2, 0, 2)}, "row the group does not have"),
        ({"num_rows": i32(3, 0)}, "over 2 layers"),
        ({"unit_offsets": i32(0, 2, 1, 3)}, "unit_offsets must rise"),
        ({"unit_offsets": i32(0, 1, 1, 3)}, "do not sum"),
        ({"pair_offsets": i32(0, 4, 4, 5)}, "pair_offsets must rise"),
        ({"counts": i32(3, 1, 2)}, None),  # still sums per layer: allowed
        ({"counts": i32(4, 0, 2)}, "positive count"),
        ({"counts": i32(2, 2)}, "positive count"),
        ({"expert_ids": i32(4, 1, 0)}, "ascend"),
        ({"expert_ids": i32(-1, 4, 0)}, "ascend"),
        ({"row_index": i32(0, 2, 0, 1, 0, -1)}, "row the group does not have"),
        ({"row_index": np.zeros(6, np.int64)}, "int32"),
    ],
)
def test_plan_check(changes, complaint):
    plan = worked_plan(**changes)
    if complaint is None:
        plan.check()
    else:
        with pytest.raises(ValueError, match=complaint):
            plan.check()


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        (GroupIndex(i32(4, 1), i32(2, 2), i32(0, 2, 0, 1)), "ascend"),
        (GroupIndex(i32(1, 4), i32(2, 1), i32(0, 2, 0, 1)), "sum to 3"),
        (GroupIndex(i32(1, 4), i32(2, 2), i32(0, 3, 0, 1)), "row the group does not have"),
        (GroupIndex(i32(1, 4), i32(4, 0), i32(0, 2, 0, 1)), "positive"),
        (GroupIndex(i32(1), i32(2, 2), i32(0, 2, 0, 1)), "one positive count per expert"),
    ],
)
def test_index_check(index, complaint):
    with pytest.raises(ValueError, match=complaint):
        index.check(3)
