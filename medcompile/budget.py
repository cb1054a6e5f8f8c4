"""The budget: whether a finished bundle keeps it, and which layers to look at where it does not.

How an artifact is judged is verify.py's and metrics'; how layers are ranked is passes/sensitivity.py's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from medcompile.bundle import Bundle
from medcompile.errors import OverBudgetError
from medcompile.passes.sensitivity import Sensitivity
from medcompile.spec import Precision, Variant, Verdict

_SHOWN = 3


def is_kept(finished: Bundle) -> bool:
    """False if lower precision was asked for and none of it is non-inferior, in every graph, on any target."""
    lower = {v.name for v in finished.variants.values() if is_lower(v)}
    verdicts: dict[tuple[str, str], set[Verdict | None]] = defaultdict(set)
    for artifact in finished.artifacts:
        if artifact.variant in lower:
            verdicts[artifact.variant, artifact.target.name].add(artifact.verdict)
    return not lower or any(found == {Verdict.NON_INFERIOR} for found in verdicts.values())


def is_lower(variant: Variant) -> bool:
    """True for a variant below fp32."""
    return variant.quantized or variant.float_dtype is not Precision.FLOAT32


def closest(finished: Bundle) -> Variant | None:
    """The quantized variant that misses the budget by the least: the one whose layers are worth a look."""

    def short(variant: Variant) -> float:
        """What the worst lower bound of its best target lacks to the margin."""
        by_target: dict[str, list[float]] = defaultdict(list)
        for artifact in finished.artifacts:
            if artifact.variant == variant.name:
                lacks = [-e.margin - e.lower for e in artifact.evidence if e.margin is not None]
                by_target[artifact.target.name] += lacks
        return min((max(lacks) for lacks in by_target.values() if lacks), default=float("inf"))

    return min((v for v in finished.variants.values() if v.quantized), key=short, default=None)


def over_budget(
    finished: Bundle, missed: Variant | None, layers: Mapping[str, Sequence[Sensitivity]]
) -> OverBudgetError:
    """The error to raise. layers: by graph, what quantizing each group of layers as missed does alone, most first."""
    several = len(finished.graphs) > 1
    found = "\n".join(
        f"  {a.variant} on {a.target.name}{f', {a.graph}' if several else ''}: {a.verdict or 'not judged'}"
        for a in finished.artifacts
        if is_lower(finished.variants[a.variant])
    )
    hurt = keep = ""
    if missed is not None:
        hurt = "".join(
            f"\n  {missed.name} hurts {graph} most in {', '.join(map(_told, ranked[:_SHOWN]))}"
            for graph, ranked in layers.items()
        )
        named = [_layer(node) for ranked in layers.values() for s in ranked[:1] for node in s.nodes]
        keep = f"keep them in float (variants.{missed.name}.keep: [{', '.join(named)}]), " if named else ""
    return OverBudgetError(
        f"{finished.root}: built, but no variant below fp32 is shown to be non-inferior\n{found}{hurt}",
        fix=f"{keep}widen the budget, or judge on more data; `medcompile inspect` has the evidence",
        bundle=str(finished.root),
    )


def _told(sensitivity: Sensitivity) -> str:
    more = f" and {len(sensitivity.nodes) - 1} beside it" if len(sensitivity.nodes) > 1 else ""
    return f"{_layer(sensitivity.nodes[0])}{more} (output moves by {sensitivity.error:.1%})"


def _layer(node: str) -> str:
    return node.removesuffix("/MatMul")
