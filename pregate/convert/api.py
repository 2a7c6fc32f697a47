"""What the command line calls of this package."""

from __future__ import annotations

from pregate.convert.conversion import convert
from pregate.convert.decouple import DecoupleOptions, decouple
from pregate.convert.evaluate import EvaluateOptions, evaluate
from pregate.convert.export import ExportOptions, export
from pregate.convert.options import ConvertOptions
from pregate.convert.progress import Progress, QuietProgress, RichProgress
from pregate.convert.read_me import read_me
from pregate.convert.read_me_options import ReadMeOptions

__all__ = [
    "ConvertOptions",
    "DecoupleOptions",
    "EvaluateOptions",
    "ExportOptions",
    "Progress",
    "QuietProgress",
    "ReadMeOptions",
    "RichProgress",
    "convert",
    "decouple",
    "evaluate",
    "export",
    "read_me",
]
