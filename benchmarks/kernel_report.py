"""The results of benchmarks/kernels.py on disk: written after every cell, so that a run that was cut off goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.kernel_tables import tables
from benchmarks.speedup_picture import draw
from pregate.kernels.tools.bench import ROUTINGS, SHAPES

#: What two runs must share for their cells to stand in one table.
SAME = ("versions", "hardware", "torch_threads", "instructions", "device", "dtype")
Key = tuple[str, int, int, str]


def key(cell: dict[str, Any]) -> Key:
    """What a cell measures: shape, tokens, percent active, routing."""
    return cell["shape"], cell["tokens"], cell["percent"], cell["routing"]


def _place(cell: dict[str, Any]) -> tuple[int, ...]:
    """Where a cell stands, whichever run measured it."""
    names = [shape.name for shape in SHAPES]
    return names.index(cell["shape"]), cell["tokens"], cell["percent"], ROUTINGS.index(cell["routing"])


class Report:
    """The cells measured so far and what they were measured with; in memory only where `path` is None."""

    def __init__(self, path: Path | None, around: dict[str, Any]) -> None:
        self._path, self._around = path, around
        self._cells: dict[Key, dict[str, Any]] = {}
        self._earlier_s = 0.0

    def resume(self) -> None:
        """Take over the cells in the file; SystemExit where it is missing or was measured with something else."""
        if self._path is None or not self._path.exists():
            raise SystemExit(f"--resume: --out {self._path} is no file of results")
        try:
            old = json.loads(self._path.read_text())
        except json.JSONDecodeError as error:
            raise SystemExit(f"--resume: --out {self._path} is no file of results") from error
        for name in SAME:
            if old.get(name) != self._around[name]:
                raise SystemExit(f"--resume: {name} was {old.get(name)} and is {self._around[name]}; measure anew")
        self._cells = {key(cell): cell for cell in old["cells"]}
        self._earlier_s = old["seconds"]
        first = ("command", "date", "load_average", "ceilings")
        self._around |= {name: old[name] for name in first} | {"resumed": self._around["date"]}

    def __contains__(self, wanted: object) -> bool:
        return wanted in self._cells

    def add(self, cell: dict[str, Any], taken_s: float) -> None:
        """Keep a cell and write the file; `taken_s` seconds of this run so far."""
        self._cells[key(cell)] = cell
        self._write(self.whole(taken_s))

    def _write(self, whole: dict[str, Any]) -> None:
        """The file whole or not at all: a run that is cut while it writes must leave what was there."""
        if self._path is not None:
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(whole, indent=1) + "\n")
            part.replace(self._path)

    def finish(self, taken_s: float) -> None:
        """Write the file, and tables and a picture beside it."""
        whole = self.whole(taken_s)
        if self._path is not None and self._cells:
            self._write(whole)
            self._path.with_suffix(".svg").write_text(draw(whole))
            self._path.with_suffix(".md").write_text(tables(whole))

    def whole(self, taken_s: float) -> dict[str, Any]:
        """Everything, as the file holds it."""
        return {
            **self._around,
            "load_average_after": os.getloadavg()[0],
            "seconds": round(self._earlier_s + taken_s),
            "cells": sorted(self._cells.values(), key=_place),
        }
