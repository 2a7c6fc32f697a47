"""`pregate push`: what a node takes in and what it refuses; and on a Ray of two nodes."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from pregate.base.errors import PregateError, UserError
from pregate.cli.main import main
from pregate.cli.push import PushOptions
from pregate.cluster import push
from pregate.cluster.pushed import PushedFile, Receiver
from tests.cluster.ray_nodes import ray_nodes

WORDS = b"seven loaves and one that was broken"


@pytest.fixture
def file(tmp_path):
    digest = hashlib.sha256(WORDS).hexdigest()
    return PushedFile("/there/weights", str(tmp_path / "model" / "weights"), digest, len(WORDS))


def taken_in(receiver: Receiver, file: PushedFile, *pieces: bytes) -> bool:
    receiver.begin(file)
    for piece in pieces:
        receiver.write(memoryview(piece))
    return receiver.end(file)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_name_when_its_hash_fits(file):
    receiver = Receiver()
    assert receiver.lacking([file]) == [file.target]
    receiver.begin(file)
    receiver.write(memoryview(WORDS[:9]))
    assert names_in(file.path.parent) == [".weights.partial"]
    receiver.write(memoryview(WORDS[9:]))
    assert receiver.end(file)
    assert names_in(file.path.parent) == ["weights"]
    assert file.path.read_bytes() == WORDS
    assert receiver.lacking([file]) == []


def test_what_came_damaged_is_not_kept_and_may_come_again(file):
    receiver = Receiver()
    with pytest.raises(PregateError, match="what came is not what was sent; was /there/weights changed"):
        taken_in(receiver, file, WORDS[:-1], b"?")
    assert names_in(file.path.parent) == []
    assert taken_in(receiver, file, WORDS)


def test_what_a_killed_process_left_is_begun_anew(file):
    file.path.parent.mkdir()
    file.path.with_name(".weights.partial").write_bytes(b"x" * 1000)
    assert taken_in(Receiver(), file, WORDS)
    assert file.path.read_bytes() == WORDS


@pytest.mark.parametrize("other", [b"other", WORDS.upper()])
def test_another_file_is_left_as_it_is(file, other):
    file.path.parent.mkdir()
    receiver = Receiver()
    receiver.begin(file)
    file.path.write_bytes(other)
    with pytest.raises(PregateError, match="weights is there and is another file; move it away"):
        receiver.lacking([file])
    receiver.write(memoryview(WORDS))
    with pytest.raises(PregateError, match="another file"):
        receiver.end(file)
    assert file.path.read_bytes() == other
    assert names_in(file.path.parent) == ["weights"]


def test_room_is_looked_at_before_anything_is_written(file):
    files = [replace(file, target=f"{file.target}-{n}", num_bytes=shutil.disk_usage("/tmp").total) for n in range(2)]
    with pytest.raises(PregateError, match=r"has no room: [\d.]+ GB needed, [\d.]+ GB free"):
        Receiver().lacking(files)
    assert not file.path.parent.exists()


def test_of_two_that_write_one_file_the_second_leaves_it_to_the_first(file):
    first, second = Receiver(), Receiver()
    first.begin(file)
    assert not taken_in(second, file, b"what another sends")
    first.write(memoryview(WORDS))
    assert first.end(file)
    assert file.path.read_bytes() == WORDS


def test_a_parent_goes_with_its_adapter():
    given = {"adapter": Path("/a/small"), "parent": Path("/b/dense"), "to": Path("~/models")}
    made = PushOptions(**given)
    assert made.folders == [Path("/a/small"), Path("/b/dense")]
    assert made.target == Path("~/models")
    with pytest.raises(UserError, match="parent /b: needs adapter"):
        PushOptions(model=Path("/a"), parent=Path("/b"))


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "inner" / "words").write_bytes(WORDS)
    return folder


def refused(*folders: Path, to: Path | None = None) -> str:
    """What is said of folders that cannot be copied; Ray is not asked."""
    with pytest.raises(UserError) as error:
        push.push(folders, to, lambda what: None)
    return str(error.value)


@pytest.mark.parametrize("inside", ["", "inner", "new/folder"])
def test_a_place_in_what_is_copied_is_refused(model, inside):
    (model.parent / "link").symlink_to(model)
    for to in (model / inside, model.parent / "link" / inside):
        assert refused(model, to=to) == (
            f"to {to}: lies in {model}, which is to be copied; allowed: a folder outside of it"
        )


def test_two_folders_of_one_name_have_no_place_together(model, tmp_path):
    other = tmp_path / "other" / "model"
    shutil.copytree(model, other)
    assert refused(model, other, to=tmp_path / "to").startswith(f"to {tmp_path}/to: model and parent are both called")


def test_what_a_link_leads_to_is_copied_and_one_that_leads_nowhere_is_refused(model, tmp_path):
    (model / "inner").rename(tmp_path / "kept")
    (model / "inner").symlink_to(tmp_path / "kept")
    assert [str(path.relative_to(model)) for path in push._contents(model)] == ["config.json", "inner/words"]
    (model / "weights").symlink_to("blobs/none")
    assert refused(model) == f"{model}/weights: links to blobs/none, which is not there; a copy would lack it"
    (model / "weights").unlink()
    (tmp_path / "kept" / "again").symlink_to(model)
    assert refused(model) == f"{model}/inner/again: links to a folder that it is in; remove it"


@pytest.fixture(scope="module")
def homes():
    """The homes of two nodes of a Ray on this machine that this process is connected to, and what ends the second."""
    with ray_nodes({"num_cpus": 1}, {"num_cpus": 1}) as (cluster, nodes, folder):
        yield *(folder / f"home-{n}" for n in range(2)), lambda: cluster.remove_node(nodes[1])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.ray
def test_every_node_gets_a_copy_and_what_one_has_is_left_alone(homes, tiny_path_checkpoint, capsys, monkeypatch):
    one, two, _ = homes
    monkeypatch.setattr(push, "PIECE_BYTES", 50_000)
    command = ["push", "--model", str(tiny_path_checkpoint), "--to", "~/models", "--ray-address", "auto"]
    assert main(command) == 0
    copies = [home / "models" / tiny_path_checkpoint.name for home in (one, two)]
    original = contents(tiny_path_checkpoint)
    assert max(map(len, original.values())) > 2 * push.PIECE_BYTES
    assert [contents(copy) for copy in copies] == [original] * 2
    assert capsys.readouterr().out.count(f": {len(original)} files written, ") == 2
    written = {path: path.stat().st_mtime_ns for copy in copies for path in copy.rglob("*")}
    assert main(command) == 0
    assert capsys.readouterr().out.count(": has it already") == 2
    assert written == {path: path.stat().st_mtime_ns for copy in copies for path in copy.rglob("*")}

    (copies[1] / "config.json").write_text("{}")
    shutil.rmtree(copies[0])
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert ": FAILED: " in out
    assert f"1 of 2 nodes have no whole copy: node {ray.nodes()[1]['NodeManagerAddress']}" in err
    assert f"{copies[1]}/config.json is there and is another file" in err
    assert (copies[1] / "config.json").read_text() == "{}"
    assert contents(copies[0]) == original


@pytest.mark.ray
def test_a_folder_that_nodes_share_is_written_once(homes, tiny_path_checkpoint, tmp_path):
    nodes = push.push([tiny_path_checkpoint], tmp_path, lambda what: None)
    assert not [node for node in nodes if node.failure], nodes
    assert contents(tmp_path / tiny_path_checkpoint.name) == contents(tiny_path_checkpoint)
    assert contents(tmp_path).keys() == {
        f"{tiny_path_checkpoint.name}/{name}" for name in contents(tiny_path_checkpoint)
    }


@pytest.mark.ray
def test_a_node_that_is_lost_meanwhile_is_named_and_the_others_get_theirs(homes, tiny_path_checkpoint):
    one, _, lose_the_second = homes
    said = []

    def say(what):
        if what.endswith("to 2 nodes") and not said:
            said.append(what)
            lose_the_second()

    nodes = push.push([tiny_path_checkpoint], Path("~/again"), say)
    assert said
    assert sorted(bool(node.failure) for node in nodes) == [False, True]
    assert contents(one / "again" / tiny_path_checkpoint.name) == contents(tiny_path_checkpoint)
