"""Kernels of our own for CPUs, in C++: integer products and attention, as operators for ONNX Runtime.

The sources beside this file are compiled when the package is installed, if a compiler is there; nothing else needs
them. One library holds every instruction set (AVX-512 VNNI, AVX2, any processor) and takes the best at run time.
Here is where the library is, and how weights are laid out for it; products.h says what the layout means.
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
"""The widest head that the attentions take."""
GROUP = 16
"""What a block of a product's weights is a multiple of."""
LONGEST = 1 << 16
"""The longest rows that a product takes: sums of so many products fit 32 bits."""
COLUMNS = 32
"""Columns in a tile of packed weights."""
INSTRUCTION_SETS = ("for any processor", "AVX2", "AVX-512 VNNI", "AVX-512 VNNI and BF16")
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


def pack(weight: Array, scale: Array, bits: int) -> Array:
    """Lay out weights of 4 or 8 bits for the products.

    weight: int8 [k, n], -8 to 7 for 4 bits; scale: float32 [k / block, n]. block is divisible by GROUP.
    Returns uint8 [tiles, bytes], a tile for each 32 columns.
    """
    import numpy as np

    (k, n), groups = weight.shape, len(scale)
    block, tiles, zero = k // groups, -(-n // COLUMNS), 1 << (bits - 1)
    shifted = np.full((k, tiles * COLUMNS), zero, np.uint8)
    shifted[:, :n] = weight.astype(np.int16) + zero
    scales = np.zeros((groups, tiles * COLUMNS), np.float32)
    scales[:, :n] = scale
    fours = shifted.reshape(groups, block // 4, 4, tiles, COLUMNS).transpose(3, 0, 1, 4, 2)
    # Now [tiles, groups, block / 4, column, 4]; of 4 bits two fours of rows share their bytes.
    codes = fours if bits == 8 else fours[:, :, 0::2] | (fours[:, :, 1::2] << 4)
    steps = np.ascontiguousarray(scales.reshape(groups, tiles, COLUMNS).swapaxes(0, 1)).view(np.uint8)
    packed = np.concatenate([steps, codes.reshape(tiles, groups, -1)], axis=2)
    return packed.reshape(tiles, -1)
