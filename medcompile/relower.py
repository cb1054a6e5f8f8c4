"""Relower: a finished bundle's typed graphs, built for other targets on another machine. `medcompile build --from`.

Needs neither the checkpoint nor torch: the graphs are in the bundle, and so are the reference's answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medcompile import __version__, backends, budget, bundle, cache, flips, report, sources, verify
from medcompile.artifacts import Lowering
from medcompile.bundle import Bundle
from medcompile.errors import BackendError, BundleError, DataError, PhiError, UsageError
from medcompile.program import Progress, Silent
from medcompile.steps import Step, Steps


def relower(
    place: Path | str,
    targets: Sequence[str],
    *,
    out: Path | str | None = None,
    data: Path | None = None,
    allow_phi: bool = False,
    cache_folder: Path | str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Add artifacts for targets to the bundle at place, or to a copy of it at out, and return the result.

    They are judged against the bundle's kept reference where its evaluation data is found: by the manifest data, or
    calibration/NAME.yaml here; else they carry no evidence, and a note says why. An artifact that the bundle has for
    the same target is replaced. Raises BundleError, BackendUnavailable, BackendError (no variant can be built
    for any of them), UsageError, DataError (data is given and is other data), and OverBudgetError as a build does.
    """
    found = bundle.read(place)
    told = progress or Silent()
    if not targets:
        raise UsageError("no target to build for", fix="name them: --targets tensorrt-rtx,openvino-cpu")
    probed = [backends.for_target(name).probe(name) for name in dict.fromkeys(targets)]
    notes: list[str] = []
    trials = _trials(found, data, allow_phi, notes)
    folder = Path(cache_folder) if cache_folder else sources.default_cache()
    steps = Steps(cache.Cache(folder.absolute() / "build"), told)
    lowering = Lowering(steps, found.graphs, found.budget, trials)
    made = [
        m for v in found.variants.values() for m in lowering.variant(v, probed, _typed(found, v.name), needed=False)
    ]
    if not made:
        raise BackendError(
            f"{found.name}: none of its variants can be built for {', '.join(t.name for t in probed)}\n"
            + "\n".join(f"{s['variant']} for {s['target']}: {s['reason']}" for s in lowering.skipped),
            fix=lowering.skipped[0]["fix"] + ", in the recipe, and build that again",
        )
    notes += lowering.notes()
    for note in notes:
        told.note(note)
    fresh = {(m.artifact.variant, m.artifact.target.name) for m in made}
    kept = [a for a in found.artifacts if (a.variant, a.target.name) not in fresh]
    files = {path: file for m in made for path, file in m.placed().items()}
    artifacts = [*kept, *(m.artifact for m in made)]
    flipped = {m.artifact.path: m.flips for m in made if m.flips is not None}
    try:
        with flips.renewed(found.root, flipped, [a.path for a in artifacts]) as told_flips:
            finished = bundle.rewrite(
                found,
                Path(out) if out else found.root,
                artifacts,
                files | told_flips,
                _provenance(found, [t.name for t in probed], lowering.skipped, notes),
                told=report.texts,
            )
    except OSError as error:
        raise BundleError(
            f"{error.filename or place}: {error.strerror or error}",
            fix="name a folder that can be written and has room, with --out",
        ) from error
    if trials is not None and not budget.is_kept(finished):
        raise budget.over_budget(finished, None, {})
    return finished


def _typed(found: Bundle, variant: str) -> Step:
    """The variant's typed graphs as a step that was done elsewhere; its key is over their digests."""
    folder = f"graphs/{variant}"
    digests = {path: found.files[path].sha256 for path in found.under(folder)}
    return Step(cache.key("graphs", digests), found.root / folder)


def _trials(
    found: Bundle, data: Path | None, allow_phi: bool, notes: list[str]
) -> dict[str, tuple[str, Callable[[], verify.Trial]]] | None:
    """What the artifacts are judged by. None, with a note that says why, where the data is not here."""
    try:
        dataset = verify.evaluation(found, data, allow_phi=allow_phi)
    except (UsageError, DataError) as error:
        if data is not None or isinstance(error, PhiError):
            raise
        notes.append(f"what was built from this bundle is not verified: {error.message}")
        return None

    def trial(graph: str) -> tuple[str, Callable[[], verify.Trial]]:
        kept = found.files[f"reference/{graph}.npz"].sha256
        assets = {path: found.files[path].sha256 for path in found.under("assets")}
        return cache.key("kept reference", kept, dataset.digest, assets), lambda: verify.trial(found, graph, dataset)

    return {graph: trial(graph) for graph in found.graphs}


def _provenance(
    found: Bundle, built: Sequence[str], skipped: Sequence[Mapping[str, str]], notes: Sequence[str]
) -> dict[str, Any]:
    """The bundle's, without what no longer holds of these targets, and with what was added."""

    def others(key: str) -> list[dict[str, str]]:
        return [s for s in found.provenance.get(key, ()) if s["target"] not in built]

    outdated = tuple(f"target {name} is not built" for name in built)
    kept = [n for n in found.provenance.get("notes", ()) if not n.startswith(outdated)]
    added = {"targets": list(built), "medcompile": __version__}
    return {
        **found.provenance,
        "skipped_targets": others("skipped_targets"),
        "skipped": [*others("skipped"), *skipped],
        "notes": list(dict.fromkeys([*kept, *notes])),
        "relowered": [*found.provenance.get("relowered", ()), added],
    }
