"""The pipeline: a recipe goes through the passes to a verified bundle. The only room that knows all the others.

Every step is cached by content: its key is a digest over what it was made from, so an unchanged build runs nothing,
a killed one goes on where it was, and a change re-runs from the first step that it touches.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile import __version__, backends, bundle, cache, data, manifest, models, recipe, sources, verify
from medcompile.bundle import Bundle
from medcompile.errors import BackendUnavailable, OverBudgetError
from medcompile.models import ModelOptions
from medcompile.passes.calibrate import Calibrate
from medcompile.passes.cast import Cast
from medcompile.passes.export import VERSION as EXPORT_VERSION
from medcompile.passes.export import export
from medcompile.passes.layers import layers
from medcompile.passes.quantize import Quantize
from medcompile.passes.simplify import Simplify
from medcompile.program import Context, Pass, PassRecord, Progress, Silent
from medcompile.resources import peak_rss_bytes, reset_peak_rss
from medcompile.run_onnx import run_onnx
from medcompile.runtime.encoder import Encoder
from medcompile.runtime.text import TextAssets, read_json
from medcompile.spec import Artifact, Evidence, GraphSpec, Precision, Target, TensorSpec, Variant, Verdict

if TYPE_CHECKING:
    import numpy as np

    from medcompile.program import Feeds

_COMPILER_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy", "tokenizers")
_REFERENCE_VERSION = 1
_ARTIFACT_VERSION = 1
_EVIDENCE_VERSION = 1


def build(
    path: Path | str,
    *,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    offline: bool = False,
    allow_phi: bool = False,
    cache_folder: Path | str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Compile the recipe at path into a bundle at out (engines/<name> by default), and return it.

    overrides: `key.path=value` settings laid over the recipe. offline: fetch nothing. allow_phi: read data whose
    manifest says phi: present. Raises RecipeError, SourceError, DataError, PassError or BackendError and leaves no
    bundle; OverBudgetError after writing one in which no quantized or 16-bit variant is non-inferior.
    """
    job = recipe.load(path, overrides)
    folder = Path(cache_folder) if cache_folder else sources.default_cache()
    built = _Build(job, cache.Cache(folder / "build"), folder, progress or Silent(), offline, allow_phi)
    return built.run(Path(out) if out else Path("engines") / job.name)


@dataclass(frozen=True)
class _Step:
    """A finished step: its key, and the cache folder that holds its result."""

    key: str
    folder: Path


@dataclass
class _Build:
    """One build. Each step is a method; it returns what it made, fresh or from the cache."""

    job: recipe.Recipe
    steps: cache.Cache
    downloads: Path
    progress: Progress
    offline: bool
    allow_phi: bool
    notes: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def run(self, out: Path) -> Bundle:
        self.datasets  # noqa: B018  the cheap ways to fail come first
        targets = self.targets()
        simplified = self.run_pass(Simplify(), self.exported, ("onnx-ir", "onnxscript"))
        lowered = {v.name: self.lowered(v, simplified) for v in self.job.variants}
        artifacts = [
            self.artifact(variant, target, task, lowered[variant.name])
            for variant in self.job.variants
            for target in targets
            for task in self.options.tasks
        ]
        with bundle.Writer(out) as writer:
            finished = self.write(writer, artifacts, lowered)
        _check_budget(finished)
        return finished

    # ---- what is built from

    @cached_property
    def checkpoint(self) -> sources.Checkpoint:
        model = self.job.model
        return sources.resolve(
            model.source,
            model.revision,
            base=self.job.path.parent,
            cache=self.downloads,
            offline=self.offline,
            progress=self.progress,
        )

    @cached_property
    def options(self) -> ModelOptions:
        model = self.job.model
        return ModelOptions(
            tasks=tuple(model.tasks),
            profiles=self.job.profiles,
            pooling=model.pooling,
            normalize=model.normalize,
            max_length=model.max_length,
            labels=tuple(model.labels or ()),
        )

    @cached_property
    def family(self) -> models.Family:
        return models.get(self.job.model.family)

    @cached_property
    def graphs(self) -> dict[str, GraphSpec]:
        return {t: self.family.graph_spec(self.checkpoint, t, self.options) for t in self.options.tasks}

    @cached_property
    def datasets(self) -> tuple[data.Dataset | None, data.Dataset]:
        """Calibration and evaluation data, disjoint."""
        evaluation = self._dataset(self.job.evaluation.data, self.job.evaluation.samples)
        wanted = self.job.calibration
        if wanted is None:
            return None, evaluation
        calibration, dropped = data.without_overlap(self._dataset(wanted.data, wanted.samples), evaluation)
        if dropped:
            self.note(f"{dropped} calibration items also stand in the evaluation data and were left out")
        return calibration, evaluation

    def _dataset(self, name: str, limit: int | None) -> data.Dataset:
        return data.read(data.load_manifest(self.job.manifests[name]), limit=limit, allow_phi=self.allow_phi)

    def targets(self) -> list[Target]:
        """What can be built here. For every other target of the recipe the reason and the fix go into self.skipped."""
        found: list[Target] = []
        for name in self.job.targets:
            try:
                found.append(backends.for_target(name).probe(name))
            except BackendUnavailable as error:
                self.skipped.append({"target": name, "reason": error.message, "fix": error.fix})
                self.note(f"target {name} is not built: {error}")
        if not found:
            reasons = "\n".join(f"{s['target']}: {s['reason']}" for s in self.skipped)
            raise BackendUnavailable(
                f"none of the recipe's targets can be built here\n{reasons}", fix=self.skipped[0]["fix"]
            )
        return found

    # ---- steps

    @cached_property
    def source_key(self) -> str:
        return cache.key(self.checkpoint.files, self.checkpoint.kind, self.job.model.family, self.options)

    @cached_property
    def exported(self) -> _Step:
        key = cache.key("export", EXPORT_VERSION, self.source_key, _versions(*_COMPILER_LIBRARIES))
        return self.step("export", key, lambda folder: cache.write_program(self._exported_program(), folder))

    def _exported_program(self) -> Any:
        return export(self.family, self.checkpoint, self.options)

    @cached_property
    def assets(self) -> _Step:
        """assets/ holds what goes into the bundle; notes.json what the user should know."""

        def fill(folder: Path) -> None:
            (folder / "assets").mkdir()
            notes = self.family.assets(self.checkpoint, self.options, folder / "assets")
            (folder / "notes.json").write_text(json.dumps(notes), encoding="utf-8")

        step = self.step("assets", cache.key("assets", 1, self.source_key, _versions("tokenizers")), fill)
        for note in json.loads((step.folder / "notes.json").read_text(encoding="utf-8")):
            self.note(note)
        return step

    @cached_property
    def text(self) -> TextAssets:
        return TextAssets.read(self.assets.folder / "assets")

    @cached_property
    def labels(self) -> list[str]:
        path = self.assets.folder / "assets/labels.json"
        return [str(name) for name in read_json(path, list)] if path.is_file() else []

    def lowered(self, variant: Variant, simplified: _Step) -> _Step:
        """The variant's typed graphs."""
        step = simplified
        calibration = self.job.calibration
        if variant.needs_statistics:
            step = self.calibrated(simplified)
        if variant.quantized:
            method = calibration.method if calibration else "mse"
            step = self.run_pass(Quantize(method), step, ("onnx-ir", "numpy"), variant)
        return self.run_pass(Cast(variant.float_dtype, variant.keep), step, ("onnx-ir", "ml-dtypes"))

    def calibrated(self, simplified: _Step) -> _Step:
        calibration, _ = self.datasets
        digest = calibration.digest if calibration else ""
        batch = self.job.calibration.batch if self.job.calibration else 0
        return self.run_pass(Calibrate(), simplified, ("onnxruntime", "numpy"), parts=(digest, batch, self.assets.key))

    def batches(self, graph: str) -> Iterator[Feeds]:
        """Calibration feeds, made by the runtime's own encoder, so that they are what the model will see."""
        calibration, _ = self.datasets
        if calibration is None or self.job.calibration is None:
            return
        spec = self.graphs[graph]
        recorder = _Recorder(spec)
        encoder = Encoder(self.text, {graph: recorder}, {graph: spec}, self.labels)
        asked = verify.questions(graph, calibration.items, self.text)
        size = self.job.calibration.batch
        for start in range(0, len(asked), size):
            verify.predict(encoder, graph, asked[start : start + size])
            yield from recorder.take()

    def reference(self, task: str) -> _Step:
        """The answers of the original torch model in fp32."""
        _, evaluation = self.datasets
        parts = (self.source_key, task, evaluation.digest, self.assets.key, _versions("torch", "transformers"))

        def fill(folder: Path) -> None:
            with self.family.reference(self.checkpoint, task, self.options) as executor:
                encoder = Encoder(self.text, {task: executor}, self.graphs, self.labels)
                asked = verify.questions(task, evaluation.items, self.text)
                verify.write_reference(folder / f"{task}.npz", asked, verify.predict(encoder, task, asked))

        return self.step(f"reference {task}", cache.key("reference", _REFERENCE_VERSION, *parts), fill)

    def artifact(self, variant: Variant, target: Target, task: str, lowered: _Step) -> tuple[Artifact, Path]:
        """One graph built for one target and judged: the artifact, and the cache folder its files are in."""
        backend = backends.get(target.backend)
        spec = self.graphs[task]
        label = f"{variant.name} for {target.name}" + (f": {task}" if len(self.options.tasks) > 1 else "")

        def make(folder: Path) -> None:
            (folder / "files").mkdir()
            built = backend.build(lowered.folder / f"{task}.onnx", spec, variant, target, folder / "files")
            (folder / "built.json").write_text(json.dumps(manifest.encode(built)), encoding="utf-8")

        key = cache.key("artifact", _ARTIFACT_VERSION, lowered.key, spec, variant, target, __version__)
        made = self.step(f"build {label}", key, make)
        built = manifest.decode(backends.Built, json.loads((made.folder / "built.json").read_text("utf-8")), label)
        reference = self.reference(task)
        _, evaluation = self.datasets

        def judge(folder: Path) -> None:
            asked = verify.questions(task, evaluation.items, self.text)
            expected, asked = verify.read_reference(reference.folder / f"{task}.npz", task, asked)
            with backend.load(made.folder / "files" / built.file, spec, variant, built.target, None) as executor:
                encoder = Encoder(self.text, {task: executor}, self.graphs, self.labels)
                answers = verify.predict(encoder, task, asked)
                evidence = verify.judge(task, self.job.budget, expected, answers, asked, self.labels)
                latency = verify.latency_ms(executor, spec)
            result = {"evidence": [manifest.encode(e) for e in evidence], "latency_ms": latency}
            (folder / "evidence.json").write_text(json.dumps(result), encoding="utf-8")

        key = cache.key("verify", _EVIDENCE_VERSION, made.key, reference.key, self.job.budget, __version__)
        judged = self.step(f"verify {label}", key, judge)
        result = json.loads((judged.folder / "evidence.json").read_text(encoding="utf-8"))
        for note in built.notes:
            self.note(f"{label}: {note}")
        artifact = Artifact(
            graph=task,
            variant=variant.name,
            target=built.target,
            path=f"artifacts/{target.name}/{variant.name}/{task}/{built.file}",
            sha256="",
            size_bytes=0,
            evidence=tuple(manifest.decode(Evidence, e, label) for e in result["evidence"]),
            verified_on=f"{built.target.device} {built.target.arch}",
            latency_ms=result["latency_ms"],
        )
        return artifact, made.folder / "files"

    # ---- the end

    def write(
        self, writer: bundle.Writer, artifacts: Sequence[tuple[Artifact, Path]], lowered: Mapping[str, _Step]
    ) -> Bundle:
        for variant, step in lowered.items():
            for file in [*sorted(step.folder.glob("*.onnx")), step.folder / "weights.bin"]:
                shutil.copyfile(file, writer.path(f"graphs/{variant}/{file.name}"))
        for artifact, files in artifacts:
            base = str(Path(artifact.path).parent)
            for file in sorted(p for p in files.rglob("*") if p.is_file()):
                shutil.copyfile(file, writer.path(f"{base}/{file.relative_to(files).as_posix()}"))
        assets = {}
        for file in sorted((self.assets.folder / "assets").iterdir()):
            assets[file.stem] = f"assets/{file.name}"
            shutil.copyfile(file, writer.path(assets[file.stem]))
        for task in self.options.tasks:
            shutil.copyfile(self.reference(task).folder / f"{task}.npz", writer.path(f"reference/{task}.npz"))
        writer.path("recipe.resolved.yaml").write_text(recipe.resolved(self.job), encoding="utf-8")
        table = {v: self.layers(step) for v, step in lowered.items()}
        writer.path("layers.json").write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        evidence = [
            {"variant": a.variant, "target": a.target.name, "graph": a.graph, "verdict": a.verdict}
            | {"evidence": [manifest.encode(e) for e in a.evidence]}
            for a, _ in artifacts
        ]
        writer.path("evidence.json").write_text(json.dumps(evidence, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return writer.commit(
            bundle.Contents(
                name=self.job.name,
                family=self.family.name,
                tasks=self.options.tasks,
                graphs=self.graphs,
                variants={v.name: v for v in self.job.variants},
                artifacts=tuple(a for a, _ in artifacts),
                budget=self.job.budget,
                assets=assets,
                provenance=self.provenance(),
            )
        )

    def layers(self, lowered: _Step) -> dict[str, list[dict[str, str]]]:
        program = cache.read_program(lowered.folder)
        return {name: layers(graph.model) for name, graph in program.graphs.items()}

    def provenance(self) -> dict[str, Any]:
        """Where everything came from, by digest: enough to build the same again, and no word of the data."""
        calibration, evaluation = self.datasets
        return {
            "source": self.checkpoint.source,
            "revision": self.checkpoint.revision or "",
            "source_files": dict(self.checkpoint.files),
            "recipe_sha256": recipe.digest(self.job),
            "calibration": _described(calibration),
            "evaluation": _described(evaluation),
            "versions": {"medcompile": __version__} | _versions(*_COMPILER_LIBRARIES, "onnxruntime", "openvino"),
            "skipped_targets": self.skipped,
            "notes": self.notes,
        }

    # ---- the machinery of steps

    def run_pass(
        self, pass_: Pass, before: _Step, libraries: Sequence[str], variant: Variant | None = None, parts: object = ()
    ) -> _Step:
        """Run a pass over the program that the step before left, unless its result is in the cache."""
        key = cache.key(before.key, pass_.name, pass_, variant, parts, _versions(*libraries))

        def fill(folder: Path) -> None:
            program = cache.read_program(before.folder)
            assert program.stage >= pass_.needs, f"{pass_.name} needs {pass_.needs.name}, got {program.stage.name}"
            result = pass_(program, Context(folder, self.progress, variant, self.batches, run_onnx))
            assert result.stage is pass_.gives, f"{pass_.name} gave {result.stage.name}"
            cache.write_program(result, folder)

        return self.step(pass_.name + (f" {variant.name}" if variant else ""), key, fill)

    def step(self, name: str, key: str, fill: Callable[[Path], None]) -> _Step:
        """The cache's entry for key, filled now if it is not there."""
        folder = self.steps.entry(key)
        started = time.perf_counter()
        if folder is None:
            self.progress.begin(name)
            reset_peak_rss()
            folder = self.steps.put(key, fill)
            self.progress.end(PassRecord(name, key, time.perf_counter() - started, peak_rss_bytes(), cached=False))
        else:
            self.progress.end(PassRecord(name, key, 0.0, 0, cached=True))
        return _Step(key, folder)

    def note(self, message: str) -> None:
        if message not in self.notes:
            self.notes.append(message)
            self.progress.note(message)


class _Recorder:
    """An executor that keeps what it is fed and answers zeros."""

    def __init__(self, spec: GraphSpec) -> None:
        self._spec = spec
        self._fed: list[Feeds] = []

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.outputs

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        self._fed.append(feeds)
        batch, sequence = feeds["input_ids"].shape
        sizes = {"batch": batch, "sequence": sequence}
        return {t.name: np.zeros([sizes.get(str(d), d) for d in t.shape], t.dtype) for t in self._spec.outputs}

    def take(self) -> list[Feeds]:
        taken, self._fed = self._fed, []
        return taken

    def close(self) -> None:
        self._fed = []

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _versions(*distributions: str) -> dict[str, str]:
    """Versions of installed distributions; what is not installed is left out."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _described(dataset: data.Dataset | None) -> dict[str, Any] | None:
    if dataset is None:
        return None
    m = dataset.manifest
    return {
        "name": dataset.name,
        "role": dataset.role,
        "digest": dataset.digest,
        "items": len(dataset.items),
        "licence": m.licence,
        "phi": m.phi,
        "source": m.source,
    }


def _check_budget(finished: Bundle) -> None:
    """Raise OverBudgetError if lower precision was asked for and none of it is non-inferior on any target."""
    lower = {v.name for v in finished.variants.values() if v.quantized or v.float_dtype is not Precision.FLOAT32}
    if not lower:
        return
    passed = {
        (a.variant, a.target.name)
        for a in finished.artifacts
        if a.variant in lower and a.verdict is Verdict.NON_INFERIOR
    } - {
        (a.variant, a.target.name) for a in finished.artifacts if a.verdict in (Verdict.INFERIOR, Verdict.INCONCLUSIVE)
    }
    if passed:
        return
    found = ", ".join(
        f"{a.variant} on {a.target.name}: {a.verdict or 'not judged'}" for a in finished.artifacts if a.variant in lower
    )
    raise OverBudgetError(
        f"{finished.root}: built, but no variant below fp32 is shown to be non-inferior ({found})",
        fix="look at `medcompile inspect`; keep fragile layers in float, widen the budget, or judge on more data",
        bundle=str(finished.root),
    )
