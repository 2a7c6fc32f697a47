"""`push`: a checkpoint to all nodes of a Ray cluster, through the object store, a few pieces at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions

from pregate.base.errors import PregateError, UserError, in_one_line
from pregate.cluster.finding import gigabytes
from pregate.cluster.nodes import each_node
from pregate.cluster.pushed import PushedFile, Receiver
from pregate.cluster.stage import stage
from pregate.model.file_hashes import file_sha256

#: So much is in the object store of each node at a time.
PIECE_BYTES, PIECES = 16 * 2**20, 4
#: A node that gives no answer for so long has failed; hashing what it has takes it longer, by so many bytes a second.
NODE_TIMEOUT_S, HASHED_BYTES_S = 300.0, 5e7


@dataclass(eq=False)
class Node:
    """One node, and what became of it. `failure` "": it has every file."""

    name: str
    receiver: Any
    lacking: Sequence[str] = ()
    written_bytes: int = 0
    num_written: int = 0
    failure: str = ""

    def __str__(self) -> str:
        if self.failure:
            return f"{self.name}: FAILED: {self.failure}"
        if self.num_written < len(self.lacking):
            return f"{self.name}: has it now, on a disk that it shares with another node"
        if self.lacking:
            return f"{self.name}: {self.num_written} files written, {gigabytes(self.written_bytes)}"
        return f"{self.name}: has it already"


def push(folders: Sequence[Path], to: Path | None, say: Callable[[str], None]) -> list[Node]:
    """Copy folders to every node of the Ray this process is connected to: where they are here, or into `to`, which may
    begin with `~`. Returns what became of each node; what one has is left as it is.

    UserError for what cannot be copied.
    """
    with stage(say, "looking at what nodes have"):
        files = _files(folders, to)
        nodes = []
        for node, here in each_node():
            receiver = ray.remote(Receiver).options(max_restarts=0, **here).remote()
            nodes.append(Node(f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})", receiver))
        for node, lacking in _look(nodes, files):
            node.lacking = lacking
    for file in files:
        takers = [node for node in nodes if file.target in node.lacking and not node.failure]
        if takers:
            with stage(say, f"{file.target}, {gigabytes(file.num_bytes)}, to {len(takers)} nodes"):
                _send(file, takers)
    # What a node did not write, as another process was at it, is there by now where that was another node's.
    asked = [node for node in nodes if node.num_written < len(node.lacking) and not node.failure]
    for node, lacking in _look(asked, files):
        if lacking:
            node.failure = f"another process writes {lacking[0]}; when that has ended, the same command goes on"
    return nodes


def _files(folders: Sequence[Path], to: Path | None) -> list[PushedFile]:
    """What is in the folders, with what they link to. UserError for what cannot be read, or lie where it is to."""
    names = [folder.name for folder in folders]
    if to is not None and (twice := next((name for name in names if names.count(name) > 1), "")):
        sentence = f"--model and --parent are both called {twice}, and one place cannot be both; allowed: without --to"
        raise UserError.of("--to", to, sentence)
    found = []
    for folder in folders:
        target = folder if to is None else to / folder.name
        if to is not None and (source := _within(target, folders)):
            raise UserError.of("--to", to, f"lies in {source}, which is to be copied; allowed: a folder outside of it")
        for path in _contents(folder):
            try:
                digest, num_bytes = file_sha256(path), path.stat().st_size
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from error
            found.append(PushedFile(str(path), str(target / path.relative_to(folder)), digest, num_bytes))
    return found


def _within(target: Path, folders: Sequence[Path]) -> Path | None:
    """The folder that a copy on this node would lie in, and be a part of the next time; a folder itself it may be."""
    placed = Path(os.path.realpath(target.expanduser()))
    real = {folder: Path(os.path.realpath(folder)) for folder in folders}
    return next((f for f, r in real.items() if placed != r and placed.is_relative_to(r)), None)


def _contents(folder: Path) -> Iterator[Path]:
    """The files below a folder, in linked folders too; hidden ones aside, which are some tool's own."""
    seen = {}
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        seen[root] = (os.path.realpath(root), *seen.get(os.path.dirname(root), ()))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if loop := next((n for n in folders if os.path.realpath(os.path.join(root, n)) in seen[root]), ""):
            raise UserError(f"{os.path.join(root, loop)}: links to a folder that it is in; remove it")
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(root, name)
            if path.is_file():
                yield path
            elif path.is_symlink():
                raise UserError(f"{path}: links to {os.readlink(path)}, which is not there; a copy would lack it")


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _look(nodes: Sequence[Node], files: Sequence[PushedFile]) -> Iterator[tuple[Node, list[str]]]:
    """What nodes lack."""
    num_bytes = sum(file.num_bytes for file in files)
    return _answers({node: node.receiver.lacking.remote(files) for node in nodes}, num_bytes)


def _send(file: PushedFile, nodes: Sequence[Node]) -> None:
    """Let nodes write a file; those that are slow hold the others up, so that the object store stays small."""
    under_way = deque([{node: node.receiver.begin.remote(file) for node in nodes}])
    for piece in _pieces(file):
        held = ray.put(piece)
        under_way.append({node: node.receiver.write.remote(held) for node in nodes if not node.failure})
        if len(under_way) > PIECES:
            list(_answers(under_way.popleft()))
    under_way.append({node: node.receiver.end.remote(file) for node in nodes if not node.failure})
    for asked in under_way:
        for node, written in _answers(asked, file.num_bytes):
            if written:
                node.num_written, node.written_bytes = node.num_written + 1, node.written_bytes + file.num_bytes


def _pieces(file: PushedFile) -> Iterator[np.ndarray]:
    try:
        with open(file.source, "rb") as source:
            while len(piece := np.fromfile(source, np.uint8, PIECE_BYTES)):
                yield piece
    except OSError as error:
        raise PregateError(f"{file.source}: cannot be read any more: {error.strerror}") from error


def _answers(asked: Mapping[Node, Any], hashed_bytes: int = 0) -> Iterator[tuple[Node, Any]]:
    """Wait for what nodes were asked, and return who answered what; whoever fails or does not answer has failed."""
    timeout_s = NODE_TIMEOUT_S + hashed_bytes / HASHED_BYTES_S
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
    for node, reference in asked.items():
        try:
            yield node, ray.get(reference, timeout=0)
        except ray.exceptions.GetTimeoutError:
            node.failure = node.failure or f"no answer for {timeout_s:.0f} s"
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            said = cause.for_command_line if isinstance(cause, PregateError) else in_one_line(cause)
            node.failure = node.failure or said
