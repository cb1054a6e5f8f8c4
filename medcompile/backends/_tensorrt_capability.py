"""Which nodes of a graph a parser takes, as Polygraphy's capability query finds them: asked for when a parse failed.

Runs in the build's own process (_tensorrt_build.py), after its outcome is written: a fault in here costs the report
alone. Without polygraphy there is no report.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_SHOWN_NODES = 5


def parts(library: str, graph: Path) -> list[list[int]]:
    """The nodes that the parser takes, by index, as the parts in which they hang together. Empty if unknown."""
    if find_spec("polygraphy") is None:
        return []
    if library == "tensorrt_rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is imported
    from polygraphy.tools.inspect.subtool.capability import supports_model

    # The flag beside each part says whether the whole graph would do; a node that won't is in no part.
    return [[int(index) for index in nodes] for nodes, _ in supports_model(str(graph))[1]]


def words(parts: Sequence[Sequence[int]], nodes: Sequence[str]) -> str:
    """The report in one line. nodes: the graph's, in its order, in words. Empty where there is no report."""
    if not parts:
        return ""
    taken = {index for part in parts for index in part}
    refused = [node for index, node in enumerate(nodes) if index not in taken]
    more = f" and {len(refused) - _SHOWN_NODES} more" if len(refused) > _SHOWN_NODES else ""
    return (
        f"Polygraphy: the parser takes {len(nodes) - len(refused)} of {len(nodes)} nodes, in {len(parts)} "
        f"{'part' if len(parts) == 1 else 'parts'}; not {', '.join(refused[:_SHOWN_NODES]) or 'the whole'}{more}"
    )
