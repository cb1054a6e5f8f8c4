"""medcompile: a compiler for medical models.

Two calls: build() lowers a recipe into a bundle with evidence, load() runs a bundle without torch. Both are lazy,
so that importing this package costs milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["build", "load"]

if TYPE_CHECKING:
    from medcompile.pipeline import build
    from medcompile.runtime.session import load


def __getattr__(name: str) -> Any:
    if name == "build":
        from medcompile.pipeline import build

        return build
    if name == "load":
        from medcompile.runtime.session import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
