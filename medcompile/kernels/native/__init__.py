"""Kernels of our own for CPUs, in C++: int4 products and paged attention, as operators for ONNX Runtime.

The sources beside this file are compiled when the package is installed, if a compiler is there; nothing else needs
them. One library holds every instruction set (AVX-512 VNNI, AVX2, any processor) and takes the best at run time.
Here is where the library is, and how weights are laid out for it; int4.h says what the layout means.
"""

from __future__ import annotations

import ctypes
import sysconfig
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile.errors import BackendUnavailable

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

DOMAIN = "medcompile.native"
ATTENTION_BLOCK = 32
"""Tokens in a block of the pools that PagedAttention takes."""
HEAD_DIM = 256
"""The widest head that PagedAttention takes."""
GROUP = 16
"""What a block of MatMulInt4's weights is a multiple of."""
COLUMNS = 32
"""Columns in a tile of packed weights."""
INSTRUCTION_SETS = ("for any processor", "AVX2", "AVX-512 VNNI")
"""By the library's numbers for them."""


@cache
def library() -> Path:
    """The compiled library. Raises BackendUnavailable where it was not compiled."""
    path = Path(__file__).with_name(f"_library{sysconfig.get_config_var('EXT_SUFFIX')}")
    if not path.is_file():
        raise BackendUnavailable(
            "medcompile was installed without its compiled kernels",
            fix="install a C++17 compiler (g++ or clang++) and medcompile again, or build with compute.kernels:"
            " onnxruntime",
        )
    return path


def available() -> bool:
    try:
        library()
    except BackendUnavailable:
        return False
    return True


def instruction_set() -> str:
    """The best of the library's that this processor has. Raises BackendUnavailable where there is no library."""
    return INSTRUCTION_SETS[ctypes.CDLL(str(library())).medcompile_best_isa()]


def pack(weight: Array, scale: Array) -> Array:
    """Lay out int4 weights for MatMulInt4.

    weight: int8 [k, n], -8 to 7; scale: float32 [k / block, n]. block is divisible by GROUP.
    Returns uint8 [tiles, bytes], a tile for each 32 columns.
    """
    import numpy as np

    (k, n), groups = weight.shape, len(scale)
    block, tiles = k // groups, -(-n // COLUMNS)
    shifted = np.full((k, tiles * COLUMNS), 8, np.uint8)
    shifted[:, :n] = weight + 8
    scales = np.zeros((groups, tiles * COLUMNS), np.float32)
    scales[:, :n] = scale
    halves = shifted.reshape(groups, block // 8, 2, 4, tiles, COLUMNS).transpose(4, 0, 1, 2, 5, 3)
    nibbles = halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)  # [tiles, groups, block / 8, column, 4]
    steps = np.ascontiguousarray(scales.reshape(groups, tiles, COLUMNS).swapaxes(0, 1)).view(np.uint8)
    packed = np.concatenate([steps, nibbles.reshape(tiles, groups, -1)], axis=2)
    return packed.reshape(tiles, -1)
