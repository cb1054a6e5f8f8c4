"""Answers as bytes: JSON of plain values and of numpy rows, which are written in as few digits as float32 needs."""

from __future__ import annotations

from typing import Any

import orjson


def dumps(value: Any) -> bytes:
    """One JSON document in UTF-8, without a line break in it."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
