"""What the facts come to, in sentences: the verdict first, what did not run where, and what the evidence leaves open.

Every sentence is made from the facts here; the template holds only what is true of any bundle.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from medcompile.page import number
from medcompile.report.facts import Facts
from medcompile.spec import GRAPH_VERIFIED, NOT_VERIFIED, Artifact, Evidence, Precision, Variant, Verdict

_IN_UNITS = {"perplexity": ", as a share of the original's", "kl": " nats per token"}


@dataclass(frozen=True)
class Finding:
    """What is shown of a variant on a target, over all of its graphs. lower: it is below fp32, so the budget is for it.

    verdict: the worst; None where some graph was not judged. ran: its evidence was made by running it on that target.
    """

    variant: str
    target: str
    lower: bool
    verdict: Verdict | None
    ran: bool
    sentence: str


@dataclass(frozen=True)
class Told:
    """The verdict in words. headline: one sentence; findings: those below fp32 first; not_run: what has no evidence of
    its own, with the reason; open: what the evidence does not cover."""

    headline: str
    findings: tuple[Finding, ...]
    not_run: tuple[str, ...]
    open: tuple[str, ...]


def tell(facts: Facts) -> Told:
    findings = tuple(_findings(facts))
    return Told(_headline(facts, findings), findings, tuple(_not_run(facts)), tuple(_open(facts)))


def is_lower(variant: Variant) -> bool:
    """True for a variant below fp32."""
    return variant.quantized or variant.float_dtype is not Precision.FLOAT32


def commands(facts: Facts) -> tuple[tuple[str, str], ...]:
    """How to come by the same again: what each step does, and the command."""
    place = f"engines/{shlex.quote(facts.name)}"
    versions: Mapping[str, str] = facts.provenance.get("versions", {})
    libraries = " ".join(shlex.quote(f"{name}=={version}") for name, version in sorted(versions.items()))
    found = [("Install the same versions", f"pip install {libraries}")] if libraries else []
    where = "where calibration/ holds the manifests of its data; its paths are relative to where it lies"
    recipes = [
        (f"Build it again from its recipe, {where}", f"medcompile build {place}/recipe.resolved.yaml -o rebuilt")
    ]
    if facts.searches:
        again = f"medcompile build {place}/recipe.found.yaml -o rebuilt"
        recipes.append(("Build what the search found, without searching again", again))
    return (
        *found,
        *recipes,
        (
            "Check every digest, and make the evidence again on this machine (the data is not in the bundle)",
            f"medcompile verify {place} --data MANIFEST.yaml",
        ),
        ("Write this page again", f"medcompile report {place}"),
    )


def settings(variant: Variant) -> str:
    """What its recipe says of a variant, beyond defaults."""
    plain = Variant(variant.name)
    apart = ("compute", "layers")
    said = {f.name: getattr(variant, f.name) for f in fields(Variant) if f.name not in apart}
    told = [f"{n} {' '.join(v) if isinstance(v, tuple) else v}" for n, v in said.items() if v != getattr(plain, n)]
    if variant.layers:
        told.append(f"{len(variant.layers)} rules that give layers other formats")
    if variant.compute:
        told.append("computed by the backend with " + " ".join(f"{n}={v}" for n, v in sorted(variant.compute.items())))
    return ", ".join(told) or "float32 throughout"


# ---- the verdict


def _headline(facts: Facts, findings: Sequence[Finding]) -> str:
    lower = [f for f in findings if f.lower]
    good = [f"{f.variant} on {f.target}" for f in lower if f.verdict is Verdict.NON_INFERIOR]
    if not lower:
        return f"{facts.name} holds no variant below fp32: there is nothing that the budget would be for."
    if not facts.judged:
        return "No variant below fp32 was judged: there is no evidence for or against any of them."
    if not good:
        return "No variant below fp32 is shown to be non-inferior to the original within the budget."
    others = len(lower) - len(good)
    rest = f" It is not shown of {others} other{'s' * (others > 1)} below fp32." if others else ""
    return f"Shown to be non-inferior to the original within the budget: {_listed(good)}.{rest}"


def _findings(facts: Facts) -> Iterable[Finding]:
    pairs: dict[tuple[str, str], list[Artifact]] = {}
    for artifact in facts.artifacts:
        pairs.setdefault((artifact.variant, artifact.target.name), []).append(artifact)
    ordered = sorted(pairs.items(), key=lambda pair: not is_lower(facts.variants[pair[0][0]]))
    for (variant, target), artifacts in ordered:
        verdict = _worst([a.verdict for a in artifacts])
        ran = all(a.ran for a in artifacts)
        lower = is_lower(facts.variants[variant])
        said = _sentence(f"{variant} on {target}", verdict, artifacts, several=len({a.graph for a in artifacts}) > 1)
        yield Finding(variant, target, lower, verdict, ran, said + ("" if ran else f" {_stood_in(artifacts)}"))


def _worst(verdicts: Sequence[Verdict | None]) -> Verdict | None:
    for worst in (Verdict.INFERIOR, None, Verdict.INCONCLUSIVE):
        if worst in verdicts:
            return worst
    return Verdict.NON_INFERIOR


def _sentence(who: str, verdict: Verdict | None, artifacts: Sequence[Artifact], *, several: bool) -> str:
    judged = [(a.graph, e) for a in artifacts for e in a.evidence if e.verdict is not None]
    if verdict is None:
        missing = [a.graph for a in artifacts if a.verdict is None]
        return f"{who} was not judged{f' ({_listed(missing)})' if several else ''}."
    said, verb = {
        Verdict.NON_INFERIOR: ("is shown to be non-inferior", "loses at most"),
        Verdict.INFERIOR: ("is inferior", "loses"),
        Verdict.INCONCLUSIVE: ("is not shown to be non-inferior", "may lose"),
    }[verdict]
    told: dict[str, list[str]] = {}
    for graph, e in judged:
        if e.verdict is verdict:
            lost = max(-e.difference if verdict is Verdict.INFERIOR else -e.lower, 0.0)
            margin = f"margin {number(e.margin)}{_IN_UNITS.get(e.metric, '')}{_power(e)}"
            named = f"{graph} {e.metric}" if several else e.metric
            told.setdefault(_basis(e), []).append(f"{number(lost, 3)} of {named} ({margin})")
    return f"{who} {said}. " + " ".join(f"{basis} it {verb} {_listed(parts)}." for basis, parts in told.items())


def _basis(e: Evidence) -> str:
    units = f"{number(e.units)} {e.unit}s"
    data = units if e.samples == e.units else f"{number(e.samples)} samples in {units}"
    return f"At {e.confidence * 100:.4g} % confidence, on {data},"


def _power(e: Evidence) -> str:
    """Of an open question: how likely this data would have answered it, and how much would."""
    if e.verdict is not Verdict.INCONCLUSIVE or e.power is None:
        return ""
    said = f"; had there been no loss, this would have shown it with a chance of {number(e.power, 2)}"
    enough = e.samples_needed if e.power < 0.8 else None
    return said if enough is None else f"{said}, and {number(enough)} samples with one of 0.8"


def _stood_in(artifacts: Sequence[Artifact]) -> str:
    if any(a.verified_on in (NOT_VERIFIED, "") for a in artifacts):
        return "It did not run, and neither did its graph."
    return "This is evidence about its graph, run on a CPU; the engine itself has not run."


# ---- what is missing


def _not_run(facts: Facts) -> Iterable[str]:
    for skipped in facts.provenance.get("skipped_targets", ()):
        yield f"{skipped['target']}: nothing is built for it. {skipped['reason']}"
    for skipped in facts.provenance.get("skipped", ()):
        yield f"{skipped['variant']} is not built for {skipped['target']}. {skipped['reason']}"
    for artifact in facts.artifacts:
        who = f"{artifact.variant} on {artifact.target.name}, {artifact.graph}"
        if artifact.verified_on == GRAPH_VERIFIED:
            yield f"{who}: its graph was run on a CPU in its place."
        elif not artifact.ran:
            yield f"{who}: neither it nor its graph was run on the acceptance data."


def _open(facts: Facts) -> Iterable[str]:
    if not any(d.role == "calibration" for d in facts.data) and any(
        v.needs_statistics for v in facts.variants.values()
    ):
        yield "No calibration data of its own is recorded, so ranges may come from the acceptance data itself."
    if any(d.phi == "present" for d in facts.data):
        yield "Some of the data holds patient information, as its manifest states. None of it is in this report."
    for d in facts.data:
        if d.role == "acceptance" and d.marked != "acceptance":
            yield f"{d.name}, which the evidence was made on, is marked as {d.marked or 'nothing'} by its manifest."
    unjudged = sorted({e.metric for a in facts.artifacts for e in a.evidence if e.verdict is None})
    if unjudged:
        yield f"Reported without a margin, and therefore not judged: {_listed(unjudged)}."
    if any(e.verdict is Verdict.INCONCLUSIVE for a in facts.artifacts for e in a.evidence):
        yield "Inconclusive means that this data can't tell whether the loss is within the margin."
    if not any("[" in e.metric and e.verdict is not None for a in facts.artifacts for e in a.evidence):
        yield "No margin was set for a single label or subgroup: a loss in one may be hidden in the whole."
    if any(not s.chosen for s in facts.searches):
        yield "A search confirmed no precision within the budget; what the bundle holds in its place is told above."
    if any(a.latency_ms is not None for a in facts.artifacts):
        yield (
            "Latencies are medians of a few runs at one shape on the machine that built or verified the artifact: "
            "they say which is faster there, not how fast it will be elsewhere."
        )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
