"""Published alternatives to the search, on the same models and data: where they land, how fast and how large they are.

    python benchmarks/budget_peers.py make FOLDER --models MODELS --data DATA [--only minilm-ner] [--cpus 0]
    python benchmarks/budget_peers.py judge FOLDER --data DATA [--only minilm-ner] [--cpus 0]
    python benchmarks/budget_peers.py time FOLDER --only minilm-ner [--cpus 0 1] [--rounds 15] [--also NAME=BUNDLE ...]
    python benchmarks/budget_peers.py table FOLDER [--json peers.json] [--out benchmarks/results/budget_peers.md]

make: our fp32 bundle, the yardstick, and plain round-to-nearest variants of ours; then each alternative
(budget_alternatives.py) in a process of its own, with what it took: calibration and its own validation, without the
export that all start from. judge: every one through our exam on the acceptance data, by our test, at each margin.
time: one process per contender, pinned to the same cores, taking turns in random order at the shape that a build
times. On one core CPU time is taken, which a machine shared with others leaves nearly as it is; on several, wall time.
--also adds what a search found. Steps that were done are not repeated: name what shall be done anew with --again.
MODELS and DATA: see budget_models.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from budget_alternatives import Alternative, Timed, alternatives, files, fingerprint, load, make, ones
from budget_exports import export
from budget_models import MODELS, Model, Places, Questions, plain, yardstick

from medcompile import backends, bundle, exams, verify
from medcompile.backends import Executor
from medcompile.bundle import Bundle
from medcompile.exams.decoder import BLOCKS, FreshSequence
from medcompile.spec import Artifact, Evidence, GraphSpec, Margin, Verdict

Prepared = tuple[Callable[[], object], Callable[[], object]]
RTN = {
    "rtn-int8": "{weights: int8, activations: int8, symmetric: false, method: rtn}",
    "rtn-int8-bf16": "{weights: int8, activations: int8, symmetric: false, method: rtn, compute: {float: bfloat16}}",
    "rtn-int8-symmetric": "{weights: int8, activations: int8, method: rtn}",
    "rtn-int8-dynamic": "{weights: int8, activations: int8, dynamic: true}",
    "rtn-int8-weights": "{weights: int8}",
    "rtn-int4-g32": "{weights: int4, block_size: 32}",
}
_BF16 = "compute: {float: bfloat16, dynamic_group: 32, kv: bfloat16}"
RTN_DECODER = {
    "rtn-int8": "{weights: int8}",
    "rtn-int8-bf16": f"{{weights: int8, {_BF16}}}",
    "rtn-int4-g32": "{weights: int4, block_size: 32}",
    "rtn-int4-g32-bf16": f"{{weights: int4, block_size: 32, {_BF16}}}",
    "rtn-int4-g128": "{weights: int4, block_size: 128}",
    "rtn-int4-g128-bf16": f"{{weights: int4, block_size: 128, {_BF16}}}",
    "rtn-int8-dynamic": "{weights: int8, activations: int8, dynamic: true}",
}
WORST = (Verdict.INFERIOR, Verdict.INCONCLUSIVE, Verdict.NON_INFERIOR)


# ---- contenders


@dataclass(frozen=True)
class Contender:
    """source: a published alternative and its folder, or a bundle with the artifacts of one variant on one target.

    same: the contender that computes just the same, as where accuracy control had nothing to restore; it stands for it.
    """

    name: str
    source: tuple[Alternative, Path] | tuple[Bundle, tuple[Artifact, ...]]
    made: Mapping[str, Any]
    same: str = ""

    def executors(self, specs: Mapping[str, GraphSpec], threads: int | None) -> dict[str, Executor]:
        first, second = self.source
        if isinstance(first, Alternative):
            assert isinstance(second, Path)
            return dict(load(first, second, specs, threads))
        assert not isinstance(second, Path)
        found: dict[str, Executor] = {}
        for a in second:
            backend, how = backends.get(a.target.backend), first.variants[a.variant].on(a.graph)
            path, spec = first.root / a.path, first.graphs[a.graph]
            if backends.is_paged(spec):
                found[a.graph] = FreshSequence(spec.name, backends.load_decoder(backend, path, how, threads, BLOCKS))
            else:
                found[a.graph] = backend.load(path, spec, how, a.target, threads)
        return found

    def size(self, graph: str) -> int:
        first, second = self.source
        if isinstance(first, Alternative):
            assert isinstance(second, Path)
            return sum(path.stat().st_size for path in files(first, second, graph))
        assert not isinstance(second, Path)
        return sum(first.files[path].size for path in self._loaded(first, second, graph))

    def digest(self) -> str:
        """Of a bundle's: equal for those that are loaded from the same bytes, as searches for two margins may find."""
        first, second = self.source
        assert isinstance(first, Bundle)
        assert not isinstance(second, Path)
        paths = [path for a in second for path in self._loaded(first, second, a.graph)]
        return "".join(first.files[path].sha256 for path in paths)

    @staticmethod
    def _loaded(found: Bundle, artifacts: tuple[Artifact, ...], graph: str) -> list[str]:
        """Without what OpenVINO compiled for this machine alone."""
        folder = found.folder_of(next(a for a in artifacts if a.graph == graph))
        return [path for path in found.under(folder) if not path.endswith((".blob", ".machine"))]


def contenders(model: Model, places: Places, also: list[str]) -> dict[str, Contender]:
    """Everything that was made and can be run, by name: ours, published ones, what a search found."""
    place, found = places.of(model), []
    for ours in ("bundle", "plain"):
        found += _of_bundle("medcompile", bundle.read(place / ours, check=False), plain=True)
    graphs, seen = list(bundle.read(place / "bundle", check=False).graphs), dict[str, str]()
    for alternative in alternatives(model):
        folder = place / "made" / alternative.made
        told = _told(folder)
        if told is not None and not told.get("error"):
            first = seen.setdefault(fingerprint(alternative, folder, graphs), alternative.name)
            same = first if first != alternative.name else ""
            made = {**told, "margin": alternative.margin}
            found.append(Contender(alternative.name, (alternative, folder), made, same))
    for words in also:
        name, _, path = words.partition("=")
        searched = _of_bundle(name, bundle.read(path, check=False))
        for contender in [c for c in searched if not c.name.startswith(f"{name} fp32,")]:
            first = seen.setdefault(contender.digest(), contender.name)
            found.append(replace(contender, same=first if first != contender.name else ""))
    return {contender.name: contender for contender in found}


def _of_bundle(name: str, found: Bundle, plain: bool = False) -> list[Contender]:
    """plain: ours, of which those that differ in OpenVINO's settings alone stand once on ONNX Runtime."""
    pairs: dict[tuple[str, str], list[Artifact]] = {}
    for a in found.artifacts:
        if a.target.backend == "openvino" or not plain or not found.variants[a.variant].compute:
            pairs.setdefault((a.variant, a.target.backend), []).append(a)
    return [
        Contender(f"{name} {variant}, {library}", (found, tuple(artifacts)), {})
        for (variant, library), artifacts in pairs.items()
    ]


def _told(made: Path) -> dict[str, Any] | None:
    path = made / "made.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# ---- make


def make_all(model: Model, places: Places, again: list[str], cpus: list[int]) -> None:
    place = places.of(model)
    yardstick(model, places)
    plain(model, places, RTN_DECODER if model.metric == "perplexity" else RTN)
    for name in dict.fromkeys(["exported", *(a.made for a in alternatives(model))]):
        out = place / "made" / name
        if _told(out) is not None and name not in again:
            continue
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "one", str(places.work), "--models", str(places.models)]
        command += ["--data", str(places.files), "--only", model.name, "--made", name, "--cpus", *map(str, cpus)]
        with (out / "log.txt").open("w", encoding="utf-8") as log:
            failed = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        if failed:
            lines = [li for li in (out / "log.txt").read_text(encoding="utf-8").splitlines() if li.strip()]
            why = {"error": lines[-1][:300] if lines else f"ended with {failed}"}
            (out / "made.json").write_text(json.dumps(why), encoding="utf-8")
        print(model.name, name, _told(out), flush=True)


def make_one(model: Model, places: Places, name: str) -> None:
    place = places.of(model)
    questions, out = Questions(model, places, bundle.read(place / "bundle")), place / "made" / name
    start, before = time.perf_counter(), time.process_time()
    if name == "exported":
        assert places.models is not None
        export(places.models / model.checkpoint, questions.bundle.graphs, out)
    else:
        make(questions, name, place / "made" / "exported", out)
    told = {"seconds": round(time.perf_counter() - start, 2), "cpu_s": round(time.process_time() - before, 2)}
    (out / "made.json").write_text(json.dumps(told), encoding="utf-8")


# ---- judge


def judge_all(
    model: Model, places: Places, again: list[str], cpus: list[int], also: list[str], only: str | None
) -> None:
    found = bundle.read(places.of(model) / "bundle")
    questions = Questions(model, places, found)
    trials = {graph: verify.trial(found, graph, questions.acceptance) for graph in found.graphs}
    folder = places.of(model) / "judged"
    folder.mkdir(exist_ok=True)
    for name, contender in contenders(model, places, also).items():
        path = folder / f"{_file_name(name)}.json"
        if contender.same or (path.is_file() and name not in again) or name != (only or name):
            continue
        start = time.perf_counter()
        executors = contender.executors(found.graphs, len(cpus))
        told = {graph: _judged(model, trial, executors) for graph, trial in trials.items()}
        path.write_text(json.dumps(told, indent=1), encoding="utf-8")
        for executor in executors.values():
            executor.close()
        first = {graph: f"{e['difference']:+.5f} ({e['lower']:+.5f})" for graph, e in told.items()}
        print(f"{model.name}: {name}: {first}, {time.perf_counter() - start:.0f} s", flush=True)


def _judged(model: Model, trial: verify.Trial, executors: Mapping[str, Executor]) -> dict[str, Any]:
    exam = trial.exam
    answers = exam.answers({name: executors[name] for name in exam.graphs})
    by_margin: dict[str, Evidence] = {}
    others: list[Evidence] = []
    for margin in model.margins:
        asked, *others = exams.judge(exam, [Margin(model.metric, margin)], trial.reference, answers)
        by_margin[f"{margin:g}"] = asked
    one = by_margin[f"{model.margins[0]:g}"]
    return {
        **{key: getattr(one, key) for key in ("reference", "value", "difference", "lower", "samples", "discordant")},
        "method": one.method,
        "verdicts": {margin: e.verdict for margin, e in by_margin.items()},
        "power": {margin: e.power for margin, e in by_margin.items()},
        "others": {e.metric: e.value for e in others},
    }


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


# ---- time


def prepared(executor: Executor, spec: GraphSpec) -> Prepared:
    """What is timed is what verify.latency_ms() times: one run at the first profile's opt shape."""
    sizes = {axis.name: axis.opt for axis in spec.profiles[0].axes}
    if isinstance(executor, Timed):
        return executor.timed(sizes)
    if isinstance(executor, FreshSequence):
        return (lambda: None), executor.timed(sizes["sequences"])
    feeds = ones(spec, sizes)
    return (lambda: None), (lambda: executor.run(feeds))


def worker(model: Model, places: Places, name: str, also: list[str], cpus: list[int]) -> None:
    """Answers `graph count` on stdin with that many times in ms."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    specs = bundle.read(places.of(model) / "bundle", check=False).graphs
    executors = contenders(model, places, also)[name].executors(specs, len(cpus))
    runs = {graph: prepared(executor, specs[graph]) for graph, executor in executors.items()}
    # On one core, with one thread, a run takes its CPU time, but for what others on a shared machine take from it.
    clock = time.process_time if len(cpus) == 1 else time.perf_counter
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        graph, count = line.split()
        before, run = runs[graph]
        times = []
        for _ in range(int(count)):
            before()
            start = clock()
            run()
            times.append((clock() - start) * 1e3)
        print(json.dumps(times), file=replies, flush=True)


def time_all(model: Model, places: Places, rounds: int, also: list[str], cpus: list[int]) -> None:
    """Writes timed.json: by contender and graph, the median ms of each round, which belong together across them."""
    names = [name for name, contender in contenders(model, places, also).items() if not contender.same]
    graphs = list(bundle.read(places.of(model) / "bundle", check=False).graphs)
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cpus))}
    processes = {}
    for name in names:
        command = [sys.executable, __file__, "worker", str(places.work), "--only", model.name, "--contender", name]
        command += ["--cpus", *map(str, cpus), *(["--also", *also] if also else [])]
        processes[name] = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )
    for name, process in processes.items():
        assert process.stdout.readline() == "ready\n", name  # type: ignore[union-attr]

    def ask(name: str, graph: str, count: int) -> list[float]:
        process = processes[name]
        process.stdin.write(f"{graph} {count}\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return list(json.loads(process.stdout.readline()))  # type: ignore[union-attr]

    load_before = os.getloadavg()[0]
    times: dict[str, dict[str, list[float]]] = {name: {graph: [] for graph in graphs} for name in names}
    for graph in graphs:
        counts = {}
        for name in names:
            first = min(ask(name, graph, 2))
            counts[name] = max(2, min(30, round(60 / first)))
        for _ in range(rounds):
            for name in random.sample(names, len(names)):
                times[name][graph].append(round(statistics.median(ask(name, graph, counts[name])), 4))
    for process in processes.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
    told = {"cpus": len(cpus), "rounds": rounds, "load": [load_before, os.getloadavg()[0]], "times": times}
    (places.of(model) / "timed.json").write_text(json.dumps(told), encoding="utf-8")


# ---- told


def rows(model: Model, places: Places, also: list[str]) -> list[dict[str, Any]]:
    """One row per alternative, those that failed with their error. to_fp32: to our fp32 on OpenVINO, by round."""
    place = places.of(model)
    timed = place / "timed.json"
    times = json.loads(timed.read_text(encoding="utf-8"))["times"] if timed.is_file() else {}
    found = []
    there = contenders(model, places, also)
    for alternative in alternatives(model):
        told = _told(place / "made" / alternative.made)
        if told and told.get("error"):
            found.append({"name": alternative.name, "error": told["error"]})
    for name, contender in there.items():
        path = place / f"judged/{_file_name(contender.same or name)}.json"
        if not path.is_file():
            continue
        judged = json.loads(path.read_text(encoding="utf-8"))
        row: dict[str, Any] = {"name": name, "graphs": judged, "same": contender.same}
        made = contender.made
        row |= {"made_s": made.get("seconds"), "made_cpu_s": made.get("cpu_s"), "made_for": made.get("margin")}
        row["size_bytes"] = {graph: contender.size(graph) for graph in judged}
        row["verdicts"] = {
            f"{m:g}": next(v for v in WORST if v in {g["verdicts"][f"{m:g}"] for g in judged.values()})
            for m in model.margins
        }
        if own := times.get(contender.same or name):
            base = times["medcompile fp32, openvino"]
            row["latency_ms"] = {g: statistics.median(t) for g, t in own.items()}
            row["best_ms"] = {g: min(t) for g, t in own.items()}
            row["to_fp32"] = {
                g: round(statistics.median(a / b for a, b in zip(t, base[g], strict=True)), 4) for g, t in own.items()
            }
        found.append(row)
    return found


def table(model: Model, places: Places, also: list[str]) -> list[str]:
    """Markdown. A column per margin: non-inferior there, or not shown to be."""
    heads = " | ".join(f"{100 * m:g} %" for m in model.margins)
    lines = [
        f"## {model.name}",
        "",
        f"Tuning: {model.tuning[0]}; acceptance: {model.acceptance[0]}; {_timed_how(model, places)}.",
        "",
        f"| alternative | graph | {model.metric} | difference | lower | {heads} | ms | to fp32 | MB | made in, CPU s |",
        "|---|---|---|---|---|" + "---|" * (len(model.margins) + 4),
    ]
    unmade = {}
    for row in sorted(rows(model, places, also), key=lambda r: sum(r.get("latency_ms", {"": 1e9}).values())):
        if "error" in row:
            unmade[row["name"]] = row["error"]
            continue
        for graph, g in row["graphs"].items():
            marks = " | ".join({"non-inferior": "yes", "inferior": "no"}.get(v, "-") for v in g["verdicts"].values())
            ms, ratio = (f"{row[k][graph]:.3g}" if k in row else "" for k in ("latency_ms", "to_fp32"))
            size = f"{row['size_bytes'][graph] / 1e6:.2f}"
            seconds = "" if row["made_cpu_s"] is None else f"{row['made_cpu_s']:.0f}"
            name = f"{row['name']}, same as {row['same']}" if row["same"] else row["name"]
            lines.append(
                f"| {name} | {graph} | {g['value']:.5f} | {g['difference']:+.5f} | {g['lower']:+.5f} "
                f"| {marks} | {ms} | {ratio} | {size} | {seconds} |"
            )
    lines += ["", *(f"Not made: {name}: {why}" for name, why in unmade.items())]
    folder = places.of(model) / "judged"
    there = contenders(model, places, also).items()
    missing = [name for name, c in there if not (folder / f"{_file_name(c.same or name)}.json").is_file()]
    return [*lines, *([f"Made, but not judged yet: {'; '.join(missing)}."] if missing else []), ""]


def _timed_how(model: Model, places: Places) -> str:
    path = places.of(model) / "timed.json"
    if not path.is_file():
        return "not timed"
    told = json.loads(path.read_text(encoding="utf-8"))
    how = "CPU time on one core" if told["cpus"] == 1 else f"wall time on {told['cpus']} cores"
    return f"{how}, medians of {told['rounds']} rounds in turn"


def tell(models: list[Model], places: Places, also: list[str], as_json: Path | None, out: Path | None) -> None:
    lines = [
        "# Published alternatives to the search",
        "",
        f"Made by `benchmarks/budget_peers.py`, which says how each came about. {machine()}; {versions()}.",
        "Differences to the original torch model on the acceptance data, with the lower bound of 95 %; a loss is",
        "negative, perplexity's as a share. Under each margin: yes, shown to lose less; no, shown to lose more; -,",
        "neither. ms: one run at the shape that builds are tuned for. to fp32: time to our fp32 on OpenVINO.",
        "",
        *(line for model in models for line in table(model, places, also)),
    ]
    print("\n".join(lines))
    if out:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if as_json:
        told = {
            m.name: {
                "metric": m.metric,
                "margins": m.margins,
                "timed": _timed_how(m, places),
                "rows": rows(m, places, also),
            }
            for m in models
        }
        whole = {"machine": machine(), "versions": versions(), "models": told}
        as_json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def machine() -> str:
    """Cores, their make, and what of it decides how fast low precision is."""
    told: dict[str, str] = {}
    for row in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = row.partition(":")
        told.setdefault(key.strip(), value.strip())
    known = {"avx512f": "AVX512", "avx512_vnni": "VNNI", "avx512_bf16": "BF16", "amx_int8": "AMX"}
    flags = told.get("flags", "").split()
    there = ", ".join(name for flag, name in known.items() if flag in flags)
    return f"{os.cpu_count()} cores of an {told.get('model name', platform.machine())} ({there})"


def versions() -> str:
    tools = ("nncf", "openvino", "onnxruntime", "torch", "transformers")
    return ", ".join(f"{name} {version(name)}" for name in tools)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("make", "judge", "time", "table", "one", "worker"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=BUNDLE")
    parser.add_argument("--cpus", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--made")
    parser.add_argument("--contender", help="judge this one alone")
    given = parser.parse_args()
    whole = [p.resolve() if p else None for p in (given.models, given.data)]
    places = Places(given.folder.resolve(), *whole)
    models = [MODELS[name] for name in given.only]
    if given.step == "table":
        tell([m for m in models if (places.of(m) / "judged").is_dir()], places, given.also, given.json, given.out)
        return
    os.sched_setaffinity(0, given.cpus)
    for model in models:
        if given.step == "make":
            make_all(model, places.prepared(), given.again, given.cpus)
        elif given.step == "one":
            make_one(model, places.prepared(), given.made)
        elif given.step == "judge":
            judge_all(model, places.prepared(), given.again, given.cpus, given.also, given.contender)
        elif given.step == "time":
            time_all(model, places, given.rounds, given.also, given.cpus)
        else:
            worker(model, places, given.contender, given.also, given.cpus)


if __name__ == "__main__":
    main()
