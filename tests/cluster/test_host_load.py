"""When a load wants more hosts, or fewer."""

from pregate.cluster.host_load import HostLoad


class Run:
    """Hosts that compute a share of the time; what is wanted second by second."""

    def __init__(self, least=1, most=8, target=0.5) -> None:
        self.load, self.now_s, self.compute_s = HostLoad(least, most, target), 0.0, {}

    def go(self, num_hosts, busy, seconds):
        """Returns what was wanted, and after how many seconds; None where nothing was."""
        for second in range(seconds):
            found = self.load.want(
                [(str(host), self.compute_s.get(host, 0.0)) for host in range(num_hosts)], self.now_s
            )
            if found is not None:
                return found, second
            self.now_s += 1
            self.compute_s |= {host: self.compute_s.get(host, 0.0) + busy for host in range(num_hosts)}
        return None


def test_the_worked_examples():
    assert Run().go(2, 0.9, 30) == (4, 11)
    assert Run().go(4, 0.15, 90) == (2, 61)


def test_a_load_that_comes_and_goes_moves_nothing():
    run = Run()
    for _ in range(20):
        assert run.go(2, 0.9, 8) is None
        assert run.go(2, 0.1, 8) is None


def test_what_would_be_full_again_is_not_given_up():
    assert Run().go(2, 0.22, 200) is None  # one host would compute 0.44, more than 0.8 of the target
    assert Run().go(2, 0.18, 200) == (1, 61)


def test_bounds_hold_at_once_and_always():
    assert Run(most=3).go(2, 1.0, 30) == (3, 11)
    assert Run(least=2).go(2, 0.0, 200) is None
    assert Run(least=3).go(1, 0.0, 10) == (3, 1)
    assert Run(most=2).go(4, 1.0, 10) == (2, 1)


def test_a_host_that_is_new_or_came_back_is_looked_at_from_then_on():
    run = Run()
    assert run.go(2, 0.9, 9) is None
    run.compute_s[1] = 0.0  # another process: its clock began anew
    assert run.load.want([("0", 8.1), ("other", 0.0)], run.now_s) is None
    assert run.go(2, 0.9, 10) is None
    assert run.go(2, 0.9, 10)[0] == 4
