import pytest

from benchmarks.cuts import cut_of, in_order, label


def test_a_name_is_read_back():
    assert label((8, 3, 2)) == "S3A2E8"
    for cut in ((8, 3, 2), (16, 0, 12)):
        assert cut_of(label(cut)) == cut
    assert label(None) == ""
    with pytest.raises(ValueError, match="cut A2E8: not of the form"):
        cut_of("A2E8")


def test_fewer_experts_come_first_and_then_more_shared_ones():
    names = ["S2A2E16", "S1A1E8", "S3A3E8", "S10A2E16"]
    assert sorted(names, key=in_order) == ["S3A3E8", "S1A1E8", "S10A2E16", "S2A2E16"]
