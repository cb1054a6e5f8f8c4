"""What the search finds inside each margin, and whether a published alternative inside it would have been faster.

    python benchmarks/budget_search.py search FOLDER --models MODELS --data DATA [--only NAME] [--margin 0.01 ...]
                                       [--objective size]
    python benchmarks/budget_search.py plain FOLDER --models MODELS --data DATA --only minilm-ner
    python benchmarks/budget_search.py compare FOLDER --data DATA [--only minilm-ner] [--cpus 0] [--rounds 15]
    python benchmarks/budget_search.py table FOLDER [--out benchmarks/results/budget_search.md]

search: one build with optimize for each model and margin, its steps from a cache of FOLDER. plain: the time of a plain
int8 build from an empty cache, and of a search from one. compare: judges what was found as the alternatives were, and
times all of them in turns (budget_peers.py). FOLDER, MODELS and DATA are those of budget_peers.py, which goes first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from budget_models import MODELS, ROOT, Model, Places, settings, tuning
from budget_peers import machine, versions

from medcompile import bundle
from medcompile.search import record

PLAIN = "variants={int8: {weights: int8, activations: int8, symmetric: false}}"


def build(model: Model, places: Places, margin: float, out: Path, how: list[str], cache: Path) -> float:
    """Builds in a process of its own; returns seconds. What was built before stays."""
    changed = [*settings(model, places, margin), *how]
    command = [sys.executable, "-c", "from medcompile.cli import main; main()", "build", str(ROOT / model.recipe)]
    command += ["-o", str(out), "--cache", str(cache)]
    command += [word for change in changed for word in ("--set", change)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(done.stderr[-3000:])
    return time.perf_counter() - started


def searched(model: Model, places: Places, margin: float, objective: str) -> Path:
    return places.of(model) / f"search-{objective}" / f"{margin:g}"


def how(model: Model, places: Places, objective: str) -> list[str]:
    return ["variants=null", f"optimize={objective}", tuning(model, places)]


def search_all(model: Model, places: Places, objective: str, only: list[float]) -> None:
    for margin in [m for m in model.margins if not only or m in only]:
        out = searched(model, places, margin, objective)
        if (out / bundle.MANIFEST).is_file():
            continue
        seconds = build(model, places, margin, out, how(model, places, objective), places.work / "cache")
        for found in record.read(out / record.FILE):
            point = found.chosen or "nothing"
            print(
                f"{model.name} {margin:g} {found.target}: {point}, {found.seconds:.0f} of {seconds:.0f} s", flush=True
            )


def plain_all(model: Model, places: Places, objective: str) -> None:
    """From empty caches: the plain build, then the search."""
    told: dict[str, float] = {}
    for name, ways in (("plain", [PLAIN]), ("search", how(model, places, objective))):
        cache, out = places.of(model) / f"cost-{name}-cache", places.of(model) / f"cost-{name}"
        for folder in (cache, out):
            shutil.rmtree(folder, ignore_errors=True)
        one = ["targets=[openvino-cpu]"]
        told[name] = round(build(model, places, 0.01, out, [*ways, *one], cache), 1)
        shutil.rmtree(cache)
        print(model.name, name, told[name], "s", flush=True)
    (places.of(model) / "cost.json").write_text(json.dumps(told), encoding="utf-8")


def also(model: Model, places: Places) -> list[str]:
    folders = (f for f in sorted(places.of(model).glob("search-*/*")) if (f / bundle.MANIFEST).is_file())
    return [f"{folder.parent.name} {float(folder.name):.1%}={folder}" for folder in folders]


def compare(model: Model, places: Places, cpus: list[int], rounds: int) -> None:
    peers = [sys.executable, str(ROOT / "benchmarks/budget_peers.py")]
    common = [str(places.work), "--data", str(places.files), "--only", model.name, "--also", *also(model, places)]
    every = sorted(os.sched_getaffinity(0))
    subprocess.run([*peers, "judge", *common, "--cpus", *map(str, every)], check=True)
    subprocess.run([*peers, "time", *common, "--cpus", *map(str, cpus), "--rounds", str(rounds)], check=True)


def rows(model: Model, places: Places) -> Iterator[dict[str, Any]]:
    """One for each search: what it found, and the fastest alternative that its margin admits too."""
    listed = places.of(model) / "rows.json"
    peers = [sys.executable, str(ROOT / "benchmarks/budget_peers.py"), "table", str(places.work)]
    peers += ["--only", model.name, "--json", str(listed), "--also", *also(model, places)]
    subprocess.run(peers, check=True, stdout=subprocess.DEVNULL)
    every = json.loads(listed.read_text(encoding="utf-8"))["models"][model.name]["rows"]
    times = json.loads((places.of(model) / "timed.json").read_text(encoding="utf-8"))["times"]
    others = [r for r in every if "latency_ms" in r and not r["name"].startswith(("search-", "medcompile fp32"))]
    for words in also(model, places):
        name, _, path = words.partition("=")
        margin = f"{float(Path(path).name):g}"
        for found in record.read(Path(path) / record.FILE):
            own = next(
                (r for r in every if r["name"] == f"{name} {found.variant}, {found.target.partition('-')[0]}"), None
            )
            if own is None or "latency_ms" not in own:
                continue
            inside = [r for r in others if r["verdicts"][margin] == "non-inferior"]
            name_timed = own["same"] or own["name"]
            library = found.target.partition("-")[0]
            best = min(inside, key=_ms, default=None)
            same = min((r for r in inside if _library(r["name"]) == library), key=_ms, default=None)
            yield {
                "margin": margin,
                "objective": found.objective,
                "target": found.target,
                "found": found.chosen or "nothing confirmed",
                "formats": dict(found.point(found.chosen).formats) if found.chosen else {},
                "looks": f"{len(found.looks)} of {found.most_looks}",
                "ms": _ms(own),
                "mb": sum(own["size_bytes"].values()) / 1e6,
                "to_fp32": statistics.median(_ratios(times, name_timed, "medcompile fp32, openvino")),
                "verdict": own["verdicts"][margin],
                "seconds": found.seconds,
                "best": best["name"] if best else "none",
                "to_best": statistics.median(_ratios(times, name_timed, best["name"])) if best else None,
                "same": same["name"] if same else "none",
                "to_same": statistics.median(_ratios(times, name_timed, same["name"])) if same else None,
            }


def _ms(row: dict[str, Any]) -> float:
    return float(sum(row["latency_ms"].values()))


def _library(name: str) -> str:
    return "onnxruntime" if name.startswith("ONNX Runtime") or name.endswith(", onnxruntime") else "openvino"


def _ratios(times: dict[str, dict[str, list[float]]], one: str, other: str) -> list[float]:
    """By round, the time of one over that of the other, of all graphs together."""
    sums = [[sum(turn) for turn in zip(*times[name].values(), strict=True)] for name in (one, other)]
    return [a / b for a, b in zip(*sums, strict=True)]


def table(models: list[Model], places: Places) -> list[str]:
    lines = [
        "# What the search finds inside a budget",
        "",
        f"Made by `benchmarks/budget_search.py`, which says how. {machine()}; {versions()}.",
        "",
        "One bundle for each margin, searched for on two targets: which layers got which format; what it takes, beside",
        "our fp32 on OpenVINO; its size, without what OpenVINO compiled for the machine. inside: the verdict on the",
        "whole acceptance data at 95 %; the search itself asked for more, to allow for its looks. s: of the search,",
        "without what the cache had from margins before. best: the fastest alternative (budget_peers.md) that the same",
        "margin admits by the same test, on either library; then, on this one. Ratios are medians over rounds, all",
        "contenders in turns; below 1 the search's find is faster, and differences under some 5 % are noise.",
        "",
    ]
    for model in models:
        cost = places.of(model) / "cost.json"
        lines += [
            f"## {model.name}: {model.metric}",
            "",
            "| margin | objective | target | found | layers | looks | ms | to fp32 | MB | inside | s "
            "| best | to it | best of this library | to it |",
            "|" + "---|" * 15,
        ]
        shown = list(rows(model, places))
        for r in shown:
            layers = ", ".join(f"{n} {f}" for f, n in r["formats"].items())
            asked = f"{float(r['margin']):.1%} | {r['objective']} | {r['target']}"
            lines.append(
                f"| {asked} | {r['found']} | {layers} | {r['looks']} "
                f"| {r['ms']:.3f} | {r['to_fp32']:.3f} | {r['mb']:.1f} | {r['verdict']} | {r['seconds']:.0f} "
                f"| {r['best']} | {_told(r['to_best'])} | {r['same']} | {_told(r['to_same'])} |"
            )
        lines.append("")
        for margin in dict.fromkeys(r["margin"] for r in shown):
            own = [r for r in shown if r["margin"] == margin and r["formats"]]
            lines.append(f"- {float(margin):.1%}: {_summary(own)}")
        if cost.is_file():
            told = json.loads(cost.read_text(encoding="utf-8"))
            lines += ["", f"From empty caches, one target: plain int8 build {told['plain']:.0f} s, search "]
            lines[-1] += f"{told['search']:.0f} s: {told['search'] / told['plain']:.1f} times as long."
        lines.append("")
    missing = [name for name in MODELS if name not in {model.name for model in models}]
    return [*lines, *([f"Not compared yet: {', '.join(missing)}."] if missing else [])]


def _told(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


def _summary(found: list[dict[str, Any]]) -> str:
    """Of one margin's bundle: its fastest artifact beside the fastest alternative."""
    fastest = min(found, key=lambda r: float(r["ms"]), default=None)
    if fastest is None:
        return "nothing could be confirmed; the bundle holds float32."
    if fastest["to_best"] is None:
        return f"{fastest['target']} is the bundle's fastest; no alternative is inside."
    return f"{fastest['target']} is the bundle's fastest, {fastest['to_best']:.3f} times {fastest['best']}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("search", "plain", "compare", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--objective", choices=("latency", "size", "throughput"), default="latency")
    parser.add_argument("--margin", nargs="+", type=float, default=[], help="these of a model's margins alone")
    parser.add_argument("--cpus", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    whole = [p.resolve() if p else None for p in (given.models, given.data)]
    places = Places(given.folder.resolve(), *whole).prepared()
    models = [MODELS[name] for name in given.only]
    if given.step == "table":
        lines = table([m for m in models if (places.of(m) / "timed.json").is_file()], places)
        print("\n".join(lines))
        if given.out:
            given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for model in models:
        if given.step == "search":
            search_all(model, places, given.objective, given.margin)
        elif given.step == "plain":
            plain_all(model, places, given.objective)
        elif given.step == "compare":
            compare(model, places, given.cpus, given.rounds)


if __name__ == "__main__":
    main()
