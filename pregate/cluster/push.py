"""`push`: a checkpoint to all nodes of a Ray cluster, through the object store, a few pieces at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions

from pregate.base.errors import PregateError, in_one_line
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
    begin with `~`. Returns what became of each node; what one has is left as it is."""
    with stage(say, "looking at what nodes have"):
        files = [file for folder in folders for file in _files(folder, to)]
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


def _files(folder: Path, to: Path | None) -> list[PushedFile]:
    """What is in a folder, hidden files aside: those are some tool's own."""
    target = folder if to is None else to / folder.name
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            found.append(PushedFile(str(path), str(target / name), file_sha256(path), path.stat().st_size))
    return found


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
    with open(file.source, "rb") as source:
        while len(piece := np.fromfile(source, np.uint8, PIECE_BYTES)):
            yield piece


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
