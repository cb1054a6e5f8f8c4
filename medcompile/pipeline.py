"""The pipeline: a recipe goes through the passes to a verified bundle. The only room that knows all the others.

Every step is cached by content: its key is a digest over what it was made from, so an unchanged build runs nothing,
a killed one goes on where it was, and a change re-runs from the first step that it touches.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile import (
    __version__,
    backends,
    beside,
    budget,
    bundle,
    cache,
    data,
    doctor,
    exams,
    flips,
    manifest,
    models,
    recipe,
    report,
    roles,
    search,
    sources,
    verify,
)
from medcompile.artifacts import Lowering, Made, Trials
from medcompile.beside import Beside
from medcompile.bundle import Bundle
from medcompile.errors import BackendUnavailable, BundleError, UsageError
from medcompile.models import ModelOptions
from medcompile.passes.calibrate import Calibrate
from medcompile.passes.cast import Cast
from medcompile.passes.clipping import Clipping, clippings
from medcompile.passes.export import VERSION as EXPORT_VERSION
from medcompile.passes.export import export
from medcompile.passes.layers import layers
from medcompile.passes.quantize import Quantize
from medcompile.passes.sensitivity import Sensitivity, sensitivity
from medcompile.passes.simplify import Simplify
from medcompile.program import Context, Progress, Silent
from medcompile.run_onnx import run_onnx
from medcompile.search import record
from medcompile.spec import GraphSpec, Margin, Target, Variant
from medcompile.steps import Step, Steps
from medcompile.workshop import Found, Workshop

if TYPE_CHECKING:
    from medcompile.program import Feeds

_COMPILER_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy", "tokenizers")
_REFERENCE_VERSION = 3


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
    folder = Path(cache_folder) if cache_folder else sources.default_cache()
    built = _prepared(path, overrides, offline, allow_phi, folder, progress or Silent())
    place = Path(out) if out else Path("engines") / built.job.name
    try:
        return built.run(place)
    except OSError as error:
        raise BundleError(
            f"{error.filename or place}: {error.strerror or error}",
            fix="name a folder that can be written and has room, with --out",
        ) from error


def answer(path: str, overrides: Sequence[str], offline: bool, allow_phi: bool, cache_folder: str) -> None:
    """Make the original's answers that build() with these arguments needs, and leave them in the cache."""
    _prepared(path, overrides, offline, allow_phi, Path(cache_folder), Silent()).answer()


def _prepared(
    path: Path | str, overrides: Sequence[str], offline: bool, allow_phi: bool, folder: Path, progress: Progress
) -> _Build:
    steps = Steps(cache.Cache(folder.absolute() / "build"), progress)
    return _Build(recipe.load(path, overrides), tuple(overrides), steps, folder, progress, offline, allow_phi)


@dataclass
class _Build:
    """One build. Each step is a method; it returns what it made, fresh or from the cache."""

    job: recipe.Recipe
    overrides: tuple[str, ...]
    steps: Steps
    downloads: Path
    progress: Progress
    offline: bool
    allow_phi: bool
    notes: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    references: dict[tuple[str, str], Step] = field(default_factory=dict)
    beside: Beside | None = None

    def run(self, out: Path) -> Bundle:
        self.datasets  # noqa: B018  the cheap ways to fail come first
        targets = self.targets()
        with bundle.Writer(out) as writer, ExitStack() as ended:
            for task in self.options.tasks:
                for dataset in self.datasets.judging:  # data that can't judge is told before anything is built
                    exams.check(self.exam(task, dataset), self.job.budget)
            if self.is_answered_beside():
                self.beside = ended.enter_context(Beside(self.arguments()))
            found = self.searched(targets) if self.job.optimize else Found(self.job.variants, self.job.budget)
            lowered = {v.name: self.lowered(v) for v in found.variants}
            lowering = Lowering(
                self.steps, self.graphs, found.budget, self.trials(self.datasets.evaluation, found.budget)
            )
            made = [m for v in found.variants for m in lowering.variant(v, found.targets(v, targets), lowered[v.name])]
            for note in lowering.notes():
                self.note(note)
            finished = self.write(writer, made, lowered, lowering.skipped, found)
        if not budget.is_kept(finished):
            missed = budget.closest(finished)
            raise budget.over_budget(finished, missed, self.sensitivity(missed) if missed else {})
        return finished

    def searched(self, targets: Sequence[Target]) -> Found:
        """What optimize finds: float32, and for each target the variant that its search confirmed."""
        job = self.job
        assert job.optimize is not None and self.datasets.tuning is not None
        margins = search.at_looks(job.budget, job.search.confirmations)
        shop = Workshop(
            steps=self.steps,
            graphs=self.graphs,
            margins=margins,
            program=self.calibrated,
            lowered=self.lowered,
            quantize=self.quantize,
            batches=self.batches,
            tuning=self.trials(self.datasets.tuning, margins),
            acceptance=self.trials(self.datasets.evaluation, margins),
            progress=self.progress,
        )
        sizes = [len(d.items) for d in (self.datasets.evaluation, self.datasets.tuning)]
        return shop.search(job, targets, growth=sizes[0] / sizes[1])

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
            templates=tuple(model.templates or ()),
            block_size=self.job.kv.block_size if self.job.kv else 32,
        )

    @cached_property
    def family(self) -> models.Family:
        return models.get(self.job.model.family)

    @cached_property
    def graphs(self) -> dict[str, GraphSpec]:
        return {t: self.family.graph_spec(self.checkpoint, t, self.options) for t in self.options.tasks}

    @cached_property
    def datasets(self) -> roles.Datasets:
        return roles.read(self.job, allow_phi=self.allow_phi, note=self.note)

    def targets(self) -> list[Target]:
        """What can be built here. For every other target of the recipe the reason and the fix go into self.skipped."""
        found: list[Target] = []
        for name in self.job.targets:
            try:
                found.append(backends.for_target(name).probe(name))
            except (BackendUnavailable, UsageError) as error:  # UsageError: this version has no such backend
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
    def exported(self) -> Step:
        """Its weights are references into the checkpoint, so it is kept by place; what follows is not."""
        key = cache.key("export", EXPORT_VERSION, self.source_key, _versions(*_COMPILER_LIBRARIES))

        def fill(folder: Path) -> None:
            cache.write_program(export(self.family, self.checkpoint, self.options), folder)

        placed = cache.key(key, str(self.checkpoint.folder.resolve()))
        return Step(key, self.steps.run("export", placed, fill).folder)

    @cached_property
    def simplified(self) -> Step:
        versions = _versions("onnx-ir", "onnxscript")
        return self.steps.run_pass(Simplify(), self.exported, versions, self.batches)

    @cached_property
    def assets(self) -> Step:
        """assets/ holds what goes into the bundle; notes.json what the user should know."""

        def fill(folder: Path) -> None:
            (folder / "assets").mkdir()
            notes = self.family.assets(self.checkpoint, self.options, folder / "assets")
            (folder / "notes.json").write_text(json.dumps(notes), encoding="utf-8")

        step = self.steps.run("assets", cache.key("assets", 2, self.source_key, _versions("tokenizers")), fill)
        for note in json.loads((step.folder / "notes.json").read_text(encoding="utf-8")):
            self.note(note)
        return step

    def exam(self, graph: str, dataset: data.Dataset | None = None) -> exams.Exam:
        """The graph's exam on the evaluation data, or on other data."""
        assets = self.assets.folder / "assets"
        judged = dataset or self.datasets.evaluation
        return exams.of(graph, exams.Setting(self.graphs, assets, judged, lambda other: self.kept(other, judged)))

    def kept(self, graph: str, dataset: data.Dataset) -> Path:
        """The reference's answers to the graph's exam on that data."""
        return self.reference(graph, dataset).folder / f"{graph}.npz"

    def lowered(self, variant: Variant) -> Step:
        """The variant's typed graphs. Compute settings are the backends' business: variants that differ in them alone
        share one graph."""
        variant = replace(variant, compute={})
        step = self.calibrated if variant.needs_statistics else self.simplified
        label = variant.name
        if variant.quantized:
            versions = _versions("onnx-ir", "numpy")
            step = self.steps.run_pass(self.quantize, step, versions, self.batches, label=label, variant=variant)
        cast = Cast(variant.float_dtype, variant.keep, variant.graphs)
        return self.steps.run_pass(cast, step, _versions("onnx-ir", "ml-dtypes"), self.batches, label=label)

    @cached_property
    def calibrated(self) -> Step:
        calibration = self.datasets.calibration
        parts = (calibration.digest if calibration else "", self.batch, self.assets.key)
        versions = _versions("onnxruntime", "numpy")
        static = [v for v in self.job.variants if v.needs_statistics]
        graphs = tuple(g for g in self.graphs if self.job.optimize or any(v.on(g).needs_statistics for v in static))
        return self.steps.run_pass(Calibrate(graphs), self.simplified, versions, self.batches, parts=parts)

    @property
    def quantize(self) -> Quantize:
        wanted = self.job.calibration
        if wanted is None:
            return Quantize()
        if wanted.percentile is None:
            return Quantize(wanted.method)
        return Quantize(wanted.method, wanted.percentile)

    @property
    def batch(self) -> int:
        return self.job.calibration.batch if self.job.calibration else 8

    def batches(self, graph: str) -> Iterator[Feeds]:
        """Calibration feeds, a batch at a time; of the evaluation data where the recipe has no other."""
        return self.exam(graph, self.datasets.calibration).feeds(self.batch)

    def sensitivity(self, variant: Variant) -> dict[str, tuple[Sensitivity, ...]]:
        """By graph, which layers the variant hurts most. Asked only where it is over budget."""
        before = self.calibrated if variant.needs_statistics else self.simplified
        calibrated_on = self.datasets.calibration or self.datasets.evaluation

        def fill(folder: Path) -> None:
            context = Context(folder, self.progress, variant, self.batches, run_onnx)
            ranked = sensitivity(cache.read_program(before.folder), context, self.quantize, batches=1)
            (folder / "ranked.json").write_text(json.dumps(manifest.encode(ranked)), encoding="utf-8")

        parts = (before.key, self.quantize, variant, calibrated_on.digest, self.batch, __version__)
        step = self.steps.run(f"sensitivity {variant.name}", cache.key("sensitivity", *parts), fill)
        ranked = json.loads((step.folder / "ranked.json").read_text(encoding="utf-8"))
        return {g: tuple(manifest.decode(Sensitivity, s, g) for s in found) for g, found in ranked.items()}

    def reference(self, task: str, dataset: data.Dataset) -> Step:
        """The answers of the original torch model in fp32."""
        if (task, dataset.digest) not in self.references:
            self.references[task, dataset.digest] = self._reference(task, dataset)
        return self.references[task, dataset.digest]

    def answer(self) -> None:
        for dataset in self.datasets.judging:
            for task in self.options.tasks:
                self.reference(task, dataset)

    def is_answered_beside(self) -> bool:
        """Whether answers are missing, and worth a process of their own."""
        keys = [self.reference_key(t, d) for t in self.options.tasks for d in self.datasets.judging]
        missing = any(self.steps.cache.entry(key) is None for key in keys)
        return missing and beside.pays([self.checkpoint.folder / name for name in self.checkpoint.weights])

    def arguments(self) -> dict[str, object]:
        """answer()'s, for another process."""
        job, folder = self.job, str(self.downloads.absolute())
        told = {"path": str(job.path), "overrides": self.overrides, "cache_folder": folder}
        return told | {"offline": self.offline, "allow_phi": self.allow_phi}

    def reference_key(self, task: str, dataset: data.Dataset) -> str:
        parts = (self.source_key, task, dataset.digest, self.assets.key, _versions("torch", "transformers", "timm"))
        return cache.key("reference", _REFERENCE_VERSION, *parts)

    def _reference(self, task: str, dataset: data.Dataset) -> Step:
        def fill(folder: Path) -> None:
            exam = self.exam(task, dataset)
            with ExitStack() as opened:
                executors = {
                    graph: opened.enter_context(self.family.reference(self.checkpoint, graph, self.options))
                    for graph in exam.graphs
                }
                verify.write_reference(folder / f"{task}.npz", exam, exam.answers(executors))

        name = f"reference {task}" + (" for tuning" if dataset is self.datasets.tuning else "")
        return self.steps.run(name, self.reference_key(task, dataset), fill, self.beside)

    def trials(self, dataset: data.Dataset, margins: Sequence[Margin]) -> Trials:
        """By task, what artifacts are judged by on that data, and the key over all that decides it."""

        def trial(task: str) -> tuple[str, Callable[[], verify.Trial]]:
            key = self.reference(task, dataset).key
            return key, lambda: verify.Trial.of(self.exam(task, dataset), self.kept(task, dataset), margins)

        return {task: trial(task) for task in self.options.tasks}

    # ---- the end

    def write(
        self,
        writer: bundle.Writer,
        made: Sequence[Made],
        lowered: Mapping[str, Step],
        skipped: Sequence[Mapping[str, str]],
        found: Found,
    ) -> Bundle:
        for variant, step in lowered.items():
            for file in [*sorted(step.folder.glob("*.onnx")), step.folder / "weights.bin"]:
                shutil.copyfile(file, writer.path(f"graphs/{variant}/{file.name}"))
        for path, file in (placed for m in made for placed in m.placed().items()):
            shutil.copyfile(file, writer.path(path))
        assets = {}
        for file in sorted((self.assets.folder / "assets").iterdir()):
            assets[file.stem] = f"assets/{file.name}"
            shutil.copyfile(file, writer.path(assets[file.stem]))
        for task in self.options.tasks:
            shutil.copyfile(self.kept(task, self.datasets.evaluation), writer.path(f"reference/{task}.npz"))
        writer.path("recipe.resolved.yaml").write_text(recipe.resolved(self.job), encoding="utf-8")
        if found.searches:
            # The same bundle without a search: what was found, as if it had been written by hand.
            fixed = replace(self.job, optimize=None, tuning=None, variants=tuple(found.variants))
            writer.path("recipe.found.yaml").write_text(recipe.resolved(fixed), encoding="utf-8")
            record.write(writer.path(record.FILE), found.searches)
        table = {v: self.layers(step) for v, step in lowered.items()}
        writer.path("layers.json").write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if ranges := self.clipping(found.variants, lowered):
            text = json.dumps(manifest.encode(ranges), indent=1, sort_keys=True) + "\n"
            writer.path(report.CALIBRATION).write_text(text, encoding="utf-8")
        if flipped := {m.artifact.path: m.flips for m in made if m.flips is not None}:
            flips.write(writer.path(flips.FILE), flipped)
        artifacts = tuple(m.artifact for m in made)
        return writer.commit(
            bundle.Contents(
                name=self.job.name,
                family=self.family.name,
                tasks=self.options.tasks,
                graphs=self.graphs,
                variants={v.name: v for v in found.variants},
                artifacts=artifacts,
                budget=tuple(found.budget),
                assets=assets,
                provenance=self.provenance() | {"skipped": list(skipped)},
            ),
            report.texts,
        )

    def layers(self, lowered: Step) -> dict[str, list[dict[str, str]]]:
        program = cache.read_program(lowered.folder)
        return {name: layers(graph.model) for name, graph in program.graphs.items()}

    def clipping(
        self, variants: Sequence[Variant], lowered: Mapping[str, Step]
    ) -> dict[str, dict[str, list[Clipping]]]:
        """By variant and graph, where stored ranges cut what calibration saw; of variants that have any."""
        static = [v for v in variants if any(f.activations is not None and not f.dynamic for f in v.forms)]
        seen = cache.read_program(self.calibrated.folder).statistics if static else {}
        graphs = {v.name: cache.read_program(lowered[v.name].folder).graphs for v in static}
        return {
            v.name: {g: clippings(graph.model, seen.get(g, {}), v) for g, graph in graphs[v.name].items()}
            for v in static
        }

    def provenance(self) -> dict[str, Any]:
        """Where everything came from, by digest: enough to build the same again, and no word of the data."""
        return {
            "source": self.checkpoint.source,
            "revision": self.checkpoint.revision or "",
            "source_files": dict(self.checkpoint.files),
            "recipe_sha256": recipe.digest(self.job),
            **self.datasets.described(),
            "shared_items": data.shared_items([d for d in vars(self.datasets).values() if d is not None]),
            "machine": doctor.machine(),
            "versions": {"medcompile": __version__} | _versions(*_COMPILER_LIBRARIES, "onnxruntime", "openvino"),
            "skipped_targets": self.skipped,
            "notes": self.notes,
        }

    def note(self, message: str) -> None:
        if message not in self.notes:
            self.notes.append(message)
            self.progress.note(message)


def _versions(*distributions: str) -> dict[str, str]:
    """Versions of installed distributions; what is not installed is left out."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
