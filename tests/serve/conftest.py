"""What the tests of the server share."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """Coroutines marked anyio run on asyncio, as the server does."""
    return "asyncio"
