"""What the attention kernels are compiled for, and which of them run, in which grid, for a batch of given shapes.

A step is planned from shapes alone, because what query_starts holds lies on the device; so every plan gives the right
answer for every ragged batch of its shapes, and shapes decide only how fast. Plain integers: no library, no device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medcompile.errors import BackendError

Kernel = Literal["write", "chunks", "steps", "splits", "reduce"]
Float = Literal["float16", "bfloat16", "float32"]

MAX_SPLITS = 16
"""A sequence's keys are shared out among so many programs at most; `reduce` joins their results."""
_NO_WINDOW = 1 << 30
_FEW_TOKENS = 4
"""With so many new tokens per sequence or fewer (decode, guessed tokens to verify) small tiles waste least."""
_PROGRAMS = 512
"""Enough programs to fill any GPU. Fixed, so that a result does not hang on which one it came from."""
_SPLIT_KEYS = 256
"""A program with fewer keys than this is not worth its launch."""
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_KEY_BYTES = 512
"""Larger keys leave no room for a tile of them in the memory of some GPUs."""
_STEP_ROWS = 16
_CHUNK_ROWS = 64
_TILE_ROWS: dict[Kernel, int] = {"chunks": _CHUNK_ROWS, "steps": _STEP_ROWS, "splits": _STEP_ROWS}


@dataclass(frozen=True)
class Face:
    """One model's attention as the kernels see it: whatever is the same in all its layers and steps.

    dtype: of q, k, v and the output. pool_dtype: of the pools, in which the products are made (sums are float32).
    Raises BackendError for what the kernels do not take.
    """

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: Float = "float16"
    pool_dtype: Float = "float16"

    def __post_init__(self) -> None:
        for wrong, what, fix in (
            (self.kv_heads < 1 or self.heads % self.kv_heads, "heads are no multiple of kv_heads", "check the model"),
            (self.head_dim % 8 or not 16 <= self.head_dim <= 256, f"head_dim {self.head_dim}", "16 to 256, by eights"),
            (self.key_bytes > _KEY_BYTES, f"head_dim {self.head_dim} in {self.pool_dtype}", "keep keys in float16"),
            (self.block_size not in (16, 32, 64), f"block size {self.block_size}", "set kv.block_size to 16 or 32"),
        ):
            if wrong:
                raise BackendError(f"the paged attention kernels do not take {what}", fix=fix)

    @property
    def group(self) -> int:
        """Query heads that share a key head, and with it a tile."""
        return self.heads // self.kv_heads

    def rows(self, kernel: Kernel) -> int:
        """Rows of a tile: its tokens times its group of heads, with some left over where they don't divide."""
        return max(_TILE_ROWS[kernel], power_of_two(self.group))

    def tokens(self, kernel: Kernel) -> int:
        """Tokens of a tile."""
        return self.rows(kernel) // self.group

    @property
    def key_bytes(self) -> int:
        """What a key takes in a kernel's memory."""
        return self.padded_dim * _ITEM_BYTES[self.pool_dtype]

    @property
    def padded_dim(self) -> int:
        return power_of_two(self.head_dim)


@dataclass(frozen=True)
class Launch:
    kernel: Kernel
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Step:
    """The launches of one step, in order. splits: programs that share a sequence's keys; 1 where nothing is joined.

    partial_bytes, stats_bytes: workspace for unjoined results, float32 [tokens, heads, splits, head_dim] and
    [tokens, heads, splits, 2] (the largest score and the sum of weights).
    """

    launches: tuple[Launch, ...]
    splits: int
    partial_bytes: int
    stats_bytes: int


def plan(face: Face, tokens: int, sequences: int, table: int) -> Step:
    """The launches for a batch of so many new tokens and sequences, and block-table entries per sequence."""
    write = Launch("write", (tokens, 1, 1))
    if tokens > _FEW_TOKENS * sequences:
        return Step((write, Launch("chunks", _grid(face, "chunks", tokens, sequences))), 1, 0, 0)
    tiles, kv_heads, _ = _grid(face, "splits", tokens, sequences)
    splits = min(MAX_SPLITS, -(-_PROGRAMS // (tiles * kv_heads)), -(-table * face.block_size // _SPLIT_KEYS))
    if splits == 1:
        return Step((write, Launch("steps", (tiles, kv_heads, 1))), 1, 0, 0)
    results = tokens * face.heads * splits * 4
    launches = (write, Launch("splits", (tiles, kv_heads, splits)), Launch("reduce", (tokens, face.heads, 1)))
    return Step(launches, splits, results * face.head_dim, results * 2)


def workspace_bytes(face: Face, tokens: int, sequences: int) -> int:
    """The largest that partial_bytes and stats_bytes come to together, for so many tokens and sequences at most."""
    return min(tokens, _FEW_TOKENS * sequences) * face.heads * MAX_SPLITS * 4 * (face.head_dim + 2)


def window(sliding_window: int) -> int:
    """The kernels' argument for the operator's attribute, whose 0 stands for no limit."""
    return sliding_window or _NO_WINDOW


def _grid(face: Face, kernel: Kernel, tokens: int, sequences: int) -> tuple[int, int, int]:
    """Tiles of a kernel: no fewer than the sequences need, however the tokens lie. A tile too many ends at once."""
    return tokens // face.tokens(kernel) + sequences, face.kv_heads, 1


def power_of_two(number: int) -> int:
    """The smallest that is not below number."""
    return 1 << (number - 1).bit_length()
