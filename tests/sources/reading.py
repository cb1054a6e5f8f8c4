"""What the tests of sources share: the error that a source ends in, and the values behind a reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medcompile.errors import SourceError
from medcompile.sources import TensorRef, resolve, tensors


def fault(source: str, **how: Any) -> SourceError:
    """The error that resolving and reading a source ends in."""
    with pytest.raises(SourceError) as caught:
        tensors(resolve(source, **how))
    assert caught.value.fix and source.split("\0", maxsplit=1)[0] in str(caught.value)
    return caught.value


def values(ref: TensorRef) -> np.ndarray[Any, Any]:
    with ref.file.open("rb") as file:
        file.seek(ref.offset)
        raw = file.read(ref.nbytes)
    if ref.dtype == "bfloat16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(ref.shape)
    return np.frombuffer(raw, ref.dtype).reshape(ref.shape)
