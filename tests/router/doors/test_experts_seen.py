"""What hosts say of experts that come and go arrives in the answer, in the model's info and in `pregate status`."""

from pregate.cli.main import main
from tests.router.running import door, engine_thread, socket_folder
from tests.router.serving import engine_of, hosts_here


def test_hits_misses_and_waiting_are_told_in_the_answer_and_in_a_table(tiny_path_checkpoint, capsys):
    path = tiny_path_checkpoint
    hosts = hosts_here(path, 2, resident_experts=0.4)
    with engine_of(path, hosts) as engine, socket_folder() as folder:
        endpoint = f"ipc://{folder}/engine.sock"
        with engine_thread(engine, endpoint), door(endpoint, path, engine_first=True) as front:
            first = front.client.complete("O wind", 8, ignore_eos=True)
            second = front.client.complete("The harbour", 8, ignore_eos=True)
            told = front.client.model_info().hosts
            assert main(["status", "--target", front.target]) == 0
    assert first.unit_misses > 0 and first.stall_s > 0
    assert [host.host_id for host in told] == [0, 1]
    assert sum(host.hits for host in told) == first.unit_hits + second.unit_hits
    assert sum(host.misses for host in told) == first.unit_misses + second.unit_misses
    assert all(host.read_bytes > 0 and host.num_units <= 4 for host in told)
    table = capsys.readouterr().out
    assert "hit rate" in table and f"{sum(host.misses for host in told)}" in table
