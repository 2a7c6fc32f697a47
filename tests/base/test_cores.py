import os
import threading

import pytest

from pregate.base.cores import pin


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_threads_started_after_keep_to_the_cores_and_others_do_not():
    mine, found = os.sched_getaffinity(0), []

    def pinned():
        pin(len(mine) + 1, 1)  # one past the first, round the whole machine
        inner = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        inner.start()
        inner.join()

    outer = threading.Thread(target=pinned)
    outer.start()
    outer.join()
    assert found == [{sorted(mine)[1 % len(mine)]}]
    assert os.sched_getaffinity(0) == mine
