"""`PackedRoute`: the paths of a prompt, as doors give them out."""

from __future__ import annotations

from dataclasses import dataclass

from pregate.router.link.messages import RouteReply


@dataclass(frozen=True)
class PackedRoute:
    """Paths of a prompt: `ids` int16 little-endian of `shape` (tokens, layers, k), -1 padding at the end of a row."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    ids: bytes
    shape: tuple[int, int, int]
    exact: bool
    version: str

    @classmethod
    def of(cls, token_ids: tuple[int, ...], tokens: tuple[str, ...], reply: RouteReply) -> PackedRoute:
        """The paths of these tokens, which `reply` has."""
        paths = reply.paths.slice(0, reply.paths.num_tokens)
        num_tokens, num_layers, num_columns = paths.ids.shape
        ids = paths.ids.astype("<i2", copy=False).tobytes()
        return cls(token_ids, tokens, ids, (num_tokens, num_layers, num_columns), paths.exact, reply.version)
