"""References to images: where the pixels are, and a digest of what they are, without decoding any.

Decoding and transforms are runtime/image.py's; which images a data set has is readers.py's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]
"""[height, width] or [height, width, 3]; uint8, uint16 or float."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image that has not been opened. Equal and hashed by content, wherever it lies.

    digest: sha256 hex of the file's bytes, or of an array's dtype, shape and values. The same picture as a file and as
    an array, or in two encodings, therefore has two digests. source: the file, or a view into an array in memory.
    """

    digest: str
    source: Path | Pixels = field(compare=False, repr=False)

    def open(self) -> Path | Pixels:
        """What runtime/image.py's ImageTransform.pixels takes."""
        return self.source

    def apart(self) -> ImageRef:
        """The same image, holding on to its own pixels alone and not to the whole array they are a view of."""
        return self if isinstance(self.source, Path) else ImageRef(self.digest, _locked(self.source.copy()))


def image_of(source: Path | Pixels) -> ImageRef:
    """A reference to the image in a file, which is read as a stream, or in an array. Raises OSError."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return ImageRef(hashlib.file_digest(file, "sha256").hexdigest(), source)
    content = hashlib.sha256(f"{source.dtype.str} {source.shape} ".encode())
    content.update(np.ascontiguousarray(source).data)
    return ImageRef(content.hexdigest(), _locked(source))


def _locked(pixels: Pixels) -> Pixels:
    pixels.flags.writeable = False
    return pixels
