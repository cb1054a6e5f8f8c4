"""The workshop: what a search asks of a build, for one target after another. Every answer is a step in the cache.

What is tried next, and why, is search's; where the steps of a build come from is pipeline.py's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from medcompile import __version__, backends, bundle, cache, onnx_files
from medcompile.artifacts import Lowering, Made, Trials
from medcompile.errors import UsageError
from medcompile.passes.linear import linear_groups
from medcompile.passes.output_error import output_error
from medcompile.passes.quantize import Quantize
from medcompile.passes.sensitivity import sensitivities
from medcompile.program import Context, Progress
from medcompile.recipe import Recipe
from medcompile.resources import available_cores
from medcompile.run_onnx import run_onnx
from medcompile.runtime.parallel import load_streamed
from medcompile.search import Searcher
from medcompile.search.cost import FLOAT, CostModel, fitted, scaled
from medcompile.search.line import Group
from medcompile.search.menu import format_of, menus
from medcompile.search.record import Search
from medcompile.spec import Axis, Evidence, GraphSpec, Margin, Profile, Target, Variant
from medcompile.steps import Step, Steps
from medcompile.verify import loaded, one_run

if TYPE_CHECKING:
    import onnx_ir as ir

    from medcompile.program import Feeds

REFERENCE = Variant("fp32")
"""What every bundle that was searched for holds beside what was found: the yardstick."""

_TURNS, _TURNS_S = 9, 3.0  # of a long run: so many turns, or so long
_MANY_TURNS, _MANY_S = 500, 1.0  # of a short one, whose times differ by more
_WARM = 3
_LARGEST_BATCH = 16


@dataclass(frozen=True)
class Found:
    """The variants of a bundle, and by variant the targets that it is for (all, where it is not there)."""

    variants: Sequence[Variant]
    budget: Sequence[Margin]
    searches: tuple[Search, ...] = ()
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def targets(self, variant: Variant, every: Sequence[Target]) -> list[Target]:
        return [t for t in every if t.name in self.only.get(variant.name, [t.name])]


@dataclass
class Workshop:
    """What the benches of all targets share. margins: as each look at the acceptance data needs them. program: the
    calibrated one. tuning, acceptance: what artifacts are judged by on the data of either role."""

    steps: Steps
    graphs: Mapping[str, GraphSpec]
    margins: Sequence[Margin]
    program: Step
    lowered: Callable[[Variant], Step]
    quantize: Quantize
    batches: Callable[[str], Iterator[Feeds]]
    tuning: Trials
    acceptance: Trials
    progress: Progress

    def search(self, job: Recipe, targets: Sequence[Target], growth: float) -> Found:
        """Search for every target. Of each comes what its search confirmed, or else looked at last."""
        assert job.optimize is not None
        searches: list[Search] = []
        only: dict[str, list[str]] = {}
        variants: list[Variant] = [REFERENCE]
        decoder = any(backends.is_paged(spec) for spec in self.graphs.values())
        for target in targets:
            name = f"optimized-{target.name}" if len(targets) > 1 else "optimized"
            searcher = Searcher(
                bench=Bench(self, target, job.optimize, job.search.batches),
                target=target.name,
                objective=job.optimize,
                menus=menus(target, backends.floats(target), job.optimize, decoder=decoder),
                most_looks=job.search.confirmations,
                growth=growth,
                most_points=job.search.points,
                told=lambda line, where=target.name: self.progress.note(f"search, {where}: {line}"),  # type: ignore[misc]
                variant=name,
                reference=REFERENCE.name,
                elsewhere=self._measured_elsewhere(job, target),
            )
            record = searcher.run()
            if record.looks:
                variants.append(record.point(record.looks[-1].point).variant)
                only[name] = [target.name]
            searches.append(record)
        return Found(tuple(variants), tuple(self.margins), tuple(searches), only)

    def _measured_elsewhere(self, job: Recipe, target: Target) -> CostModel | None:
        """A cost model from bundles that ran on that target where it is. None if it is here, or none was named.

        Raises UsageError if none of the bundles ran there.
        """
        if target.present or not job.search.measured:
            return None
        points = []
        for place in job.search.measured:
            found = bundle.read(job.path.parent / place if not Path(place).is_dir() else Path(place))
            points += measured_points(found, target.name)
        if not any(set(shares) == {FLOAT} for by_graph, _ in points for shares in by_graph.values()):
            raise UsageError(
                f"none of {', '.join(job.search.measured)} holds a variant in float that ran on {target.name}",
                fix="run `medcompile verify` of such a bundle on that machine, and bring it here",
            )
        model = fitted(points, f"fitted to {len(points)} bundles' times, measured on {target.name} elsewhere")
        return scaled(model, list(self.graphs))


def measured_points(found: bundle.Bundle, target: str) -> list[tuple[dict[str, dict[str, float]], dict[str, float]]]:
    """Of each variant that ran on the target: by graph, shares of its linear work by format, and milliseconds."""
    points = []
    exact = next(v for v in found.variants.values() if not v.quantized)
    works = {}
    for graph in found.graphs:
        model = onnx_files.load(found.root / f"graphs/{exact.name}/{graph}.onnx")
        works[graph] = {node: work for group in _groups(model) for node, work in group.items()}
    for name, variant in found.variants.items():
        ran = [a for a in found.artifacts if (a.variant, a.target.name) == (name, target) and a.ran and a.latency_ms]
        shares: dict[str, dict[str, float]] = {}
        for artifact in ran:
            own, total = variant.on(artifact.graph), sum(works[artifact.graph].values())
            parts = shares.setdefault(artifact.graph, {})
            for node, work in works[artifact.graph].items():
                format_ = format_of(own.for_node(node)) if own.quantized else FLOAT
                parts[format_] = parts.get(format_, 0.0) + work / total
        if ran:
            points.append((shares, {a.graph: a.latency_ms or 0.0 for a in ran}))
    return points


@dataclass
class Bench:
    """search.Workbench on a build, for one target."""

    shop: Workshop
    target: Target
    objective: str
    batches: int
    yardstick: tuple[Variant, Mapping[str, float]] | None = None

    @property
    def here(self) -> bool:
        return self.target.present

    def groups(self) -> Mapping[Group, Mapping[str, float]]:
        found: dict[Group, dict[str, float]] = {}
        for name, graph in cache.read_program(self.shop.program.folder).graphs.items():
            for group in _groups(graph.model):
                found.setdefault(tuple(group), {})[name] = float(sum(group.values()))
        return found

    def cost(self, variant: Variant) -> Mapping[str, float]:
        """Size in bytes; or milliseconds, as a ratio to the first variant asked about, the two timed in turns."""
        made = self._made(variant)
        if self.objective == "size":
            return {m.artifact.graph: float(_bytes(m)) for m in made}
        if self.yardstick is not None and self.yardstick[0] == variant:
            return self.yardstick[1]
        yardstick = self.yardstick
        beside = self._made(yardstick[0]) if yardstick else made
        typed = [self.shop.lowered(v).key for v in (variant, yardstick[0] if yardstick else variant)]
        parts = (typed, variant, yardstick and yardstick[0], self.target, self.objective, self.shop.graphs, _one_core())

        def fill(folder: Path) -> None:
            times = {
                m.artifact.graph: self._raced(variant, m, yardstick and yardstick[0], b)
                for m, b in zip(made, beside, strict=True)
            }
            (folder / "times.json").write_text(json.dumps(times), encoding="utf-8")

        step = self.shop.steps.run(f"time {variant.name} on {self.target.name}", cache.key("timed", 3, parts), fill)
        times: dict[str, list[float]] = json.loads((step.folder / "times.json").read_text(encoding="utf-8"))
        if yardstick is None:
            self.yardstick = (variant, {graph: own for graph, (own, _) in times.items()})
            return self.yardstick[1]
        return {graph: yardstick[1][graph] * own / other for graph, (own, other) in times.items()}

    def size(self, variant: Variant) -> int:
        return sum(_bytes(m) for m in self._made(variant))

    def error(self, variant: Variant) -> float:
        typed = self.shop.lowered(variant)

        def fill(folder: Path) -> None:
            exact, lower = (cache.read_program(step.folder) for step in (self.shop.program, typed))
            found = output_error(exact, lower, self._spread, run_onnx, self.batches)
            (folder / "error.json").write_text(json.dumps(found), encoding="utf-8")

        key = cache.key("output error", 2, self.shop.program.key, typed.key, self.batches, __version__)
        step = self.shop.steps.run(f"compare {variant.name}", key, fill)
        found: float = json.loads((step.folder / "error.json").read_text(encoding="utf-8"))
        return found

    def errors(self, formats: Mapping[str, Variant]) -> Mapping[Group, Mapping[str, float]]:
        def fill(folder: Path) -> None:
            context = Context(folder, self.shop.progress, None, self._spread, run_onnx)
            program = cache.read_program(self.shop.program.folder)
            squares: dict[Group, dict[str, float]] = {}
            for rows in sensitivities(program, context, self.shop.quantize, formats, self.batches).values():
                for row in rows:
                    own = squares.setdefault(row.nodes, {})
                    for name, error in row.errors.items():
                        own[name] = own.get(name, 0.0) + error**2
            table = [[list(group), {f: s**0.5 for f, s in own.items()}] for group, own in squares.items()]
            (folder / "errors.json").write_text(json.dumps(table), encoding="utf-8")

        # Where floats are kept and computed has no part in it, so that menus share the answer.
        plain = {name: replace(v, name=name, compute={}) for name, v in formats.items()}
        key = cache.key("sensitivities", 2, self.shop.program.key, plain, self.batches, self.shop.quantize, __version__)
        step = self.shop.steps.run(f"sensitivity of {', '.join(formats)}", key, fill)
        table = json.loads((step.folder / "errors.json").read_text(encoding="utf-8"))
        return {tuple(group): own for group, own in table}

    def _spread(self, graph: str) -> Iterator[Feeds]:
        """Calibration batches that lie evenly among all: they come sorted by length, and the first are the shortest."""
        total = sum(1 for _ in self.shop.batches(graph))
        count = min(self.batches, total)
        chosen = {(2 * i + 1) * total // (2 * count) for i in range(count)}
        return (feeds for i, feeds in enumerate(self.shop.batches(graph)) if i in chosen)

    def tuning(self, variant: Variant) -> tuple[Evidence, ...]:
        return self._judged(variant, self.shop.tuning)

    def acceptance(self, variant: Variant) -> tuple[Evidence, ...]:
        return self._judged(variant, self.shop.acceptance)

    def _judged(self, variant: Variant, trials: Trials) -> tuple[Evidence, ...]:
        return tuple(e for m in self._made(variant, trials) for e in m.artifact.evidence)

    def _made(self, variant: Variant, trials: Trials | None = None) -> list[Made]:
        lowering = Lowering(self.shop.steps, self.shop.graphs, self.shop.margins, trials)
        return lowering.variant(variant, [self.target], self.shop.lowered(variant))

    def _raced(self, variant: Variant, made: Made, other: Variant | None, beside: Made) -> tuple[float, float]:
        """Milliseconds of one run of either, taking turns; where there is no other, of the one twice."""
        graph = made.artifact.graph
        spec, profile = self.shop.graphs[graph], self._profile(self.shop.graphs[graph])
        backend = backends.get(self.target.backend)
        with ExitStack() as opened:
            runs = []
            for v, m in ((variant, made), (other, beside)) if other is not None else ((variant, made),):
                path = m.files / m.artifact.path.rpartition("/")[2]
                opening = load_streamed if self.objective == "throughput" and not backends.is_paged(spec) else loaded
                executor = opened.enter_context(opening(backend, path, spec, v.on(graph), self.target, None))
                runs.append(one_run(executor, spec, profile))
            times: list[list[float]] = [[] for _ in runs]
            warm = time.perf_counter()
            for turn in range(_WARM):
                if turn == 0 or time.perf_counter() - warm < _MANY_S:
                    for run in runs:
                        run()
            clock = time.process_time if _one_core() else time.perf_counter
            started = time.perf_counter()
            while more_turns(len(times[0]), time.perf_counter() - started):
                for run, taken in zip(runs, times, strict=True):
                    start = clock()
                    run()
                    taken.append(clock() - start)
        rows = 1 if self.objective == "latency" else profile.axes[0].opt
        typical = [undisturbed(taken) * 1000 / rows for taken in times]
        return typical[0], typical[-1]

    def _profile(self, spec: GraphSpec) -> Profile:
        """What is timed: the opt shape; for throughput with the largest batch, but no more than 16 rows."""
        profile = spec.profiles[0]
        if self.objective == "latency":
            return profile
        first, *rest = profile.axes
        many = min(first.max, max(_LARGEST_BATCH, first.opt))
        return Profile(profile.name, (Axis(first.name, first.min, many, first.max), *rest))


def more_turns(taken: int, seconds: float) -> bool:
    """Whether two runs that are timed in turns have not had enough of them."""
    return taken < 3 or (taken < _TURNS and seconds < _TURNS_S) or (taken < _MANY_TURNS and seconds < _MANY_S)


def undisturbed(taken: Sequence[float]) -> float:
    """The tenth percentile: what others on the machine do to a run only ever adds to its time."""
    return sorted(taken)[len(taken) // 10]


def _one_core() -> bool:
    """Whether a run has one thread: then its CPU time is its time, without what others on the machine take from it."""
    return available_cores() == 1


def _groups(model: ir.Model) -> Iterator[dict[str, int]]:
    """Every group of linear layers as node name -> number of weights."""
    for group in linear_groups(model):
        works = {}
        for node in group.nodes:
            weight = node.inputs[1]
            assert weight is not None and weight.shape is not None
            works[node.name or ""] = int(weight.shape.numpy()[0] * weight.shape.numpy()[1])
        yield works


def _bytes(made: Made) -> int:
    return sum(file.stat().st_size for file in made.placed().values())
