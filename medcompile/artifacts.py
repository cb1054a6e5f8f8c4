"""Artifacts: typed graphs built for targets and judged, as steps that the cache keeps; and the pairs that can't be.

Where the typed graphs come from is pipeline.py's business (from a recipe) or relower.py's (from a bundle).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medcompile import __version__, backends, cache, flips, manifest
from medcompile.errors import BackendError
from medcompile.spec import NOT_VERIFIED, Artifact, GraphSpec, Margin, Target, Variant
from medcompile.steps import Step, Steps
from medcompile.verify import DID_NOT_RUN, Trial

_ARTIFACT_VERSION = 4
_EVIDENCE_VERSION = 6


@dataclass(frozen=True)
class Made:
    """An artifact, the folder in the cache that holds its files, and the items that it decides otherwise, if known."""

    artifact: Artifact
    files: Path
    flips: flips.Flips | None = None

    def placed(self) -> dict[str, Path]:
        """Every file of it by its relative path in a bundle."""
        base = self.artifact.path.rpartition("/")[0]
        found = sorted(p for p in self.files.rglob("*") if p.is_file())
        return {f"{base}/{file.relative_to(self.files).as_posix()}": file for file in found}


Trials = Mapping[str, tuple[str, Callable[[], Trial]]]
"""By graph, a key over all that decides the judgement of its artifacts, and how to come by it."""


@dataclass
class Lowering:
    """Lowers variants for targets. trials: None judges nothing. skipped: what a target refused, with reason and fix."""

    steps: Steps
    graphs: Mapping[str, GraphSpec]
    budget: Sequence[Margin]
    trials: Trials | None
    skipped: list[dict[str, str]] = field(default_factory=list)

    def variant(self, variant: Variant, targets: Sequence[Target], typed: Step, *, needed: bool = True) -> list[Made]:
        """Every graph of the variant for every target that takes it; a target takes all graphs, or none of them.

        Raises BackendError if the variant is needed and no target takes it.
        """
        made: list[Made] = []
        refused: list[BackendError] = []
        for target in targets:
            try:
                built = {name: self._built(variant, target, spec, typed) for name, spec in self.graphs.items()}
            except _Refused as error:
                refused.append(error.why)
                told = {"variant": variant.name, "target": target.name}
                self.skipped.append(told | {"reason": error.why.message, "fix": error.why.fix})
                continue
            made += [self._judged(graph, built, variant, typed) for graph in built]
        if refused and not made and needed:
            raise refused[0]
        return made

    def notes(self) -> list[str]:
        """skipped, in words."""
        return [
            f"variant {s['variant']} is not built for {s['target']}: {s['reason']}\n  fix: {s['fix']}"
            for s in self.skipped
        ]

    def _label(self, variant: Variant, target: Target, graph: str) -> str:
        return f"{variant.name} for {target.name}" + (f": {graph}" if len(self.graphs) > 1 else "")

    def _built(self, variant: Variant, target: Target, spec: GraphSpec, typed: Step) -> _Built:
        backend = backends.get(target.backend)
        label = self._label(variant, target, spec.name)

        def make(folder: Path) -> None:
            (folder / "files").mkdir()
            graph = typed.folder / f"{spec.name}.onnx"
            try:
                built = backend.build(graph, spec, variant.on(spec.name), target, folder / "files")
            except BackendError as error:
                raise _Refused(error) from error
            (folder / "built.json").write_text(json.dumps(manifest.encode(built)), encoding="utf-8")

        key = cache.key("artifact", _ARTIFACT_VERSION, typed.key, spec, variant, target, __version__)
        made = self.steps.run(f"build {label}", key, make)
        built = manifest.decode(backends.Built, json.loads((made.folder / "built.json").read_text("utf-8")), label)
        artifact = Artifact(
            graph=spec.name,
            variant=variant.name,
            target=built.target,
            path=f"artifacts/{target.name}/{variant.name}/{spec.name}/{built.file}",
            sha256="",
            size_bytes=0,
            verified_on=NOT_VERIFIED,
            notes=built.notes,
        )
        return _Built(Made(artifact, made.folder / "files"), made.key, made.folder / "files" / built.file)

    def _judged(self, graph: str, built: Mapping[str, _Built], variant: Variant, typed: Step) -> Made:
        made, artifact = built[graph].made, built[graph].made.artifact
        if self.trials is None:
            return made
        trial_key, trial = self.trials[graph]
        label = self._label(variant, artifact.target, graph)

        def judge(folder: Path) -> None:
            backend = backends.get(artifact.target.backend)
            paths = {name: b.path for name, b in built.items()}
            graphs = {name: typed.folder / f"{name}.onnx" for name in built}
            found = trial().run(backend, paths, variant, artifact.target, graphs)
            judged = replace(
                artifact,
                evidence=found.evidence,
                latency_ms=found.latency_ms,
                verified_on=found.verified_on,
                notes=(*artifact.notes, f"{DID_NOT_RUN}{found.reason}") if found.reason else artifact.notes,
            )
            (folder / "evidence.json").write_text(json.dumps(manifest.encode(judged)), encoding="utf-8")
            (folder / flips.FILE).write_text(json.dumps(found.flips), encoding="utf-8")

        # An exam may run other graphs of the same variant and target beside this one.
        keys = {name: b.key for name, b in built.items()}
        key = cache.key("verify", _EVIDENCE_VERSION, graph, keys, trial_key, self.budget, __version__)
        judged = self.steps.run(f"verify {label}", key, judge)
        result = json.loads((judged.folder / "evidence.json").read_text(encoding="utf-8"))
        flipped = json.loads((judged.folder / flips.FILE).read_text(encoding="utf-8"))
        return Made(manifest.decode(Artifact, result, label), made.files, flipped)


@dataclass(frozen=True)
class _Built:
    """An artifact that nobody has judged yet, the key of the step that built it, and the file a backend loads."""

    made: Made
    key: str
    path: Path


class _Refused(BackendError):
    """A backend did not build; what it said is in why."""

    def __init__(self, why: BackendError) -> None:
        super().__init__(why.message, fix=why.fix)
        self.why = why
