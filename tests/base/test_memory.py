import pytest

from pregate.base.errors import PregateError
from pregate.base.memory import out_of_memory_fails


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 51 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),  # of mmap
    ],
)
def test_what_lacks_memory_fails_and_does_not_end_the_engine(error):
    with pytest.raises(PregateError, match="out of memory"), out_of_memory_fails():
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), OSError(2, "no such file")])
def test_a_defect_stays_one(error):
    with pytest.raises(type(error), match=str(error.args[-1])), out_of_memory_fails():
        raise error
