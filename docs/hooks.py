"""What mkdocs does with these pages: tables made of the code itself, and links out of docs/ shown as paths."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in the tables; write a link's path behind its text, unless the text is the path."""
    markdown = markdown.replace("<!-- metrics -->", "\n".join(_metrics()))
    markdown = markdown.replace("<!-- serve options -->", "\n".join(_serve_options()))
    return _OUTSIDE.sub(lambda m: m[1] if m[1].strip("`").endswith(m[2]) else f"{m[1]} (`{m[2]}`)", markdown)


def _metrics() -> Iterator[str]:
    from pregate.base.metrics import METRICS

    yield from ("| name | kind | labels | |", "| --- | --- | --- | --- |")
    for metric in METRICS:
        yield f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.help} |"


def _serve_options() -> Iterator[str]:
    from pregate.base.options import user_options
    from pregate.cluster.config import RayAccess, ServeConfig
    from pregate.router.doors.grpc_options import GrpcOptions

    yield from ("| option | |", "| --- | --- |")
    for cls in (ServeConfig, GrpcOptions, RayAccess):
        for option in user_options(cls).values():
            yield f"| `{option.flag}` | {(option.info.description or '').replace('|', ' or ')} |"
