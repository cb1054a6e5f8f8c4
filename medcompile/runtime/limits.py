"""What every reader of images holds its images to: their size, the frame chosen, and 8 bits per channel."""

from __future__ import annotations

from typing import Any

import numpy as np

from medcompile.errors import InputError

Array = np.ndarray[Any, Any]

PIXELS_LIMIT = 89_478_485
"""Pixels of one image or frame, at most: Pillow's own limit. Beyond it a small file could claim all memory."""


def stretched(values: Array, keep: Array | None = None) -> Array:
    """values as uint8 by their own range: the smallest to 0, the largest to 255; flat ones to 0.

    keep: bool, those that count for the range; the others are clipped to it.
    """
    counted = values if keep is None else values[keep]
    if not counted.size:
        return np.zeros(values.shape, np.uint8)
    low, high = counted.min(), counted.max()
    span = float(high) - float(low)
    if span == 0:
        return np.zeros(values.shape, np.uint8)
    if keep is None and values.itemsize <= 2 and values.size > 1 << 16:
        # More pixels than values that can occur: work each out once, and look the pixels up.
        return stretched(np.arange(int(low), int(high) + 1))[values.astype(np.int32) - int(low)]
    fractions = (values - np.float64(low)) * (255 / span)
    return np.rint(np.clip(fractions, 0, 255, out=fractions)).astype(np.uint8)


def check_size(width: int, height: int, name: str) -> None:
    """Raises InputError for an image without pixels, or with more than PIXELS_LIMIT."""
    if width < 1 or height < 1:
        raise InputError(f"{name}: {width} x {height} pixels", fix="pass an image that has pixels")
    if width * height > PIXELS_LIMIT:
        raise InputError(
            f"{name}: {width} x {height} pixels, above the limit of {PIXELS_LIMIT:,}",
            fix="cut or downscale it first; one this large may also be a decompression bomb",
        )


def check_frame(count: int, frame: int | None, name: str) -> int:
    """The frame to read out of count. Raises InputError where it is unclear or absent."""
    if frame is None and count > 1:
        raise InputError(f"{name}: {count} frames, and none was chosen", fix=f"pass frame=, 0 to {count - 1}")
    if frame is not None and not 0 <= frame < count:
        raise InputError(f"{name}: no frame {frame}", fix=f"pass frame=, 0 to {count - 1}, or leave it out")
    return frame or 0
