"""Kernels compiled once for all tests of them."""

from __future__ import annotations

import pytest

from medcompile.kernels.compiled import Kernels
from medcompile.kernels.launches import Face


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    pytest.importorskip("triton")
    from medcompile.kernels import ptx

    return ptx.compile_kernels(Face(4, 2, 32, 16), (80,))
