"""Rows of token ids in batches of like length, and padding.

Shape letters: B rows of a batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

#: Tokens of one batch, padding included: bounds the [B, N, V] logits in memory.
BATCH_TOKENS = 2048


def batches(rows: Sequence[list[int]], batch_tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Give the indexes of `rows` in batches of like length, each at most `batch_tokens` with padding.

    A single longer row is its own batch.
    """
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i)):
        if batch and (len(batch) + 1) * len(rows[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, int64 [B, N], of rows padded on the right with id 0."""
    longest = max(len(row) for row in rows)
    ids_BN = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask_BN = torch.zeros_like(ids_BN)
    for ids, mask, row in zip(ids_BN, mask_BN, rows, strict=True):
        ids[: len(row)] = torch.tensor(row)
        mask[: len(row)] = 1
    return ids_BN, mask_BN
