"""Who owns which block of the KV cache, and which blocks hold equal beginnings of prompts. Pure bookkeeping: no torch.

A slot is one token's place in every layer; a block is `block_size` neighbouring slots. A sequence has a table of
blocks: its token at position p lies in slot table[p // block_size] * block_size + p % block_size.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

#: What a full block is known by: the block before it (for the first the tenant's salt) and its own tokens. Compared
#: whole, so no two contents are ever taken for one.
Content = tuple["int | str", tuple[int, ...]]


class BlockAllocator:
    """Blocks 0 .. num_blocks - 1, each free, owned by one or more sequences, or idle: nobody's, but known by content.

    Idle blocks are found again by `match`, and taken, the longest idle first, when no other is free. A new sequence
    begins a lane of `lane_blocks` blocks of which nothing is owned, and grows into the block after its last one while
    that is nobody's: a batch whose sequences lie so is read without a copy (`step_layout.py`). Where every lane has
    idle blocks, the one that was idle for longest gives way.
    """

    def __init__(self, num_blocks: int, block_size: int, lane_blocks: int = 1) -> None:
        if num_blocks < 1 or block_size < 1 or lane_blocks < 1:
            sizes = f"{num_blocks} blocks of {block_size} slots in lanes of {lane_blocks}"
            raise ValueError(f"KV cache: {sizes}; all must be 1 or more")
        self.num_blocks, self.block_size, self.lane_blocks = num_blocks, block_size, lane_blocks
        self._free = dict.fromkeys(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._owners = [0] * num_blocks
        self._lane_owned, self._lane_idle = ([0] * -(-num_blocks // lane_blocks) for _ in range(2))
        self._block_of: dict[Content, int] = {}
        self._content_of: dict[int, Content] = {}
        #: A number of its own for what a block holds now: what is known as its successor is not, once it is taken anew.
        self._holds = [0] * num_blocks
        self._num_contents = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, idle ones too."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_shared(self) -> int:
        """Blocks that more than one sequence owns."""
        return sum(count > 1 for count in self._owners)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Append blocks to `table` until it holds `num_tokens` tokens; False, and nothing, where too few are left."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            table.append(self._take(table[-1] + 1 if table else self._lane_start()))
        return True

    def release(self, table: list[int]) -> None:
        """Give up a sequence's blocks, the last first, so that the beginning of a prompt stays longest."""
        while table:
            block = table.pop()
            assert self._owners[block] > 0, f"block {block} was released twice"
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            lane = block // self.lane_blocks
            self._lane_owned[lane] -= 1
            if block in self._content_of:
                self._idle[block] = None
                self._lane_idle[lane] += 1
            else:
                self._free[block] = None

    # --- equal beginnings ---

    def match(self, token_ids: Sequence[int], salt: str) -> list[int]:
        """Own and return the blocks that hold `token_ids` from their beginning: full ones, and at least one token is
        left over, since its logits are wanted."""
        table: list[int] = []
        before: int | str = salt
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            block = self._block_of.get((before, tuple(token_ids[start : start + self.block_size])))
            if block is None:
                break
            if not self._owners[block]:
                del self._idle[block]
                self._lane_idle[block // self.lane_blocks] -= 1
                self._lane_owned[block // self.lane_blocks] += 1
            self._owners[block] += 1
            table.append(block)
            before = self._holds[block]
        return table

    def publish(self, table: Sequence[int], place: int, token_ids: Sequence[int], salt: str) -> None:
        """Let others find what the block at `place` of `table` holds: full, never written again. Those before it must
        be published or matched; where another block is known by this content, this one stays its owner's alone."""
        block, start = table[place], place * self.block_size
        before = salt if place == 0 else self._holds[table[place - 1]]
        content = before, tuple(token_ids[start : start + self.block_size])
        known = self._block_of.setdefault(content, block)
        if known == block:
            self._content_of[block] = content
            self._num_contents += 1
            self._holds[block] = self._num_contents
        else:
            self._holds[block] = self._holds[known]

    # --- one block ---

    def _lane_start(self) -> int:
        """The first block of a lane of which nothing is owned: an empty one, else that of the longest idle block; -1
        where there is none."""
        unused = zip(self._lane_owned, self._lane_idle, strict=True)
        lane = next((n for n, (owned, idle) in enumerate(unused) if not owned and not idle), None)
        if lane is None:
            lanes = (block // self.lane_blocks for block in self._idle)
            lane = next((n for n in lanes if not self._lane_owned[n]), None)
        return -1 if lane is None else lane * self.lane_blocks

    def _take(self, wanted: int) -> int:
        """Own `wanted` if it is nobody's, else any free block, else the one idle for longest."""
        if wanted in self._free or wanted in self._idle:
            block = wanted
        elif self._free:
            block = next(reversed(self._free))
        else:
            block = next(iter(self._idle))
        lane = block // self.lane_blocks
        if block in self._idle:
            del self._idle[block], self._block_of[self._content_of.pop(block)]
            self._lane_idle[lane] -= 1
        else:
            del self._free[block]
        self._holds[block], self._owners[block] = 0, 1
        self._lane_owned[lane] += 1
        return block

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """AssertionError unless every block is free, idle, or owned as often as `tables` name it, and nothing else."""
        owners = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a sequence has a block twice"
            for block in table:
                owners[block] += 1
        assert owners == self._owners, "owners are not those that have the block"
        unowned = [block for block, count in enumerate(owners) if not count]
        assert sorted([*self._free, *self._idle]) == unowned, "KV blocks were lost or doubled"
        assert not set(self._free) & set(self._content_of), "a free block is known by what it held"
        for blocks, counts in (
            (self._idle, self._lane_idle),
            ([b for b, n in enumerate(owners) if n], self._lane_owned),
        ):
            lanes = Counter(block // self.lane_blocks for block in blocks)
            assert [lanes[lane] for lane in range(len(counts))] == counts, "lanes are counted wrongly"
        assert {b: c for c, b in self._block_of.items()} == self._content_of, "contents and blocks disagree"
