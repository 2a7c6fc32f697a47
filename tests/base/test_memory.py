import pytest

from pregate.base.errors import PregateError
from pregate.base.memory import out_of_memory_fails


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 51 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_lacks_memory_fails_and_does_not_end_the_engine(error):
    with pytest.raises(PregateError, match="out of memory"), out_of_memory_fails():
        raise error


def test_a_defect_stays_one():
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_fails():
        raise RuntimeError("shapes do not match")
