"""Encoders at work on ragged texts, tokenization inside the clock, beside the tools that people run them with.

    python benchmarks/encoder_work.py build FOLDER --data DATA --ner CHECKPOINT
    python benchmarks/encoder_work.py run FOLDER --data DATA [--rounds 6] [--python NAME=PATH ...] [--write FILE]

build: two MiniLM of six layers through `medcompile build`, in int8: the one of recipes/quickstart.yaml for embeddings,
and CHECKPOINT, which finds diseases (benchmarks/ner.yaml). run: `medcompile bench --clock text` of both on sentences
of ncbi-disease, conversations of mts-dialog and notes of aci-bench, so many texts in one call; DATA is what
MEDCOMPILE_DATA names. Others are used as their documentation has it, with the best of their batch sizes 1, 8 and 32
(bench/peers); --python gives those that need another interpreter theirs. Embeddings of texts beyond the model's
window are those of their beginning with the others, and of all their windows with us, who then compute more. Entities
of such texts depend on where windows are cut, with the pipeline's stride or ours: on notes of aci-bench our own float32
agrees with the pipeline's to an F1 of 0.87, and all that differs lies behind the first window. Ratios
are medians within a round, with their 95 % intervals, of texts/s to each contender's. What has a bench.json in FOLDER
is not run again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from encoder_speed import BF16, benched, told_ratio

import medcompile
from medcompile.bench import results

ROOT = Path(__file__).resolve().parent.parent
OURS = ("medcompile:int8-bf16@openvino-cpu", "medcompile:int8-dynamic@onnxruntime-cpu")
PIPELINES = ("transformers_pipeline", "optimum")
SENTENCES = ("sentence_transformers", "sentence_transformers_onnx", "sentence_transformers_openvino")
TITLES = {"minilm": "Embeddings (MiniLM, 6 layers)", "ner": "Entities (MiniLM, 6 layers, diseases)"}
PEERS = {"minilm": (*PIPELINES, *SENTENCES), "ner": PIPELINES}
WORK = {"ncbi-disease-devel": 512, "mts-dialogues": 256, "aci-bench": 16}
"""Manifests of calibration/, and how many of their texts are one call."""


def build(folder: Path, checkpoint: Path, data: Path) -> None:
    os.environ["MEDCOMPILE_DATA"] = str(data.resolve())
    variant = f"variants.int8-bf16={BF16}"
    dynamic = "variants.int8-dynamic={weights: int8, activations: int8, dynamic: true}"
    plans = {
        "minilm": (ROOT / "recipes/quickstart.yaml", []),
        "ner": (
            ROOT / "benchmarks/ner.yaml",
            [f"model.source=path:{checkpoint.resolve()}", "budget={f1: {max_drop: 0.05}}"],
        ),
    }
    for name, (recipe, settings) in plans.items():
        if not (folder / name).exists():
            overrides = [*settings, variant, dynamic, f"name={name}"]
            built = medcompile.build(recipe, overrides=overrides, out=folder / name, cache_folder=folder / "cache")
            for artifact in built.artifacts:
                print(name, artifact.variant, artifact.target.name, artifact.verdict, *artifact.notes)


def run(folder: Path, model: str, work: str, given: argparse.Namespace) -> results.Bench:
    words = ["--clock", "text", "--shapes", str(WORK[work]), "--data", str(ROOT / f"calibration/{work}.yaml")]
    words += ["--backends", ",".join([*PEERS[model], *OURS]), "--reference", "transformers_pipeline"]
    words += ["--rounds", str(given.rounds), "--threads", str(given.threads), "--no-limits"]
    words += [part for name in given.python for part in ("--python", name)]
    environment = os.environ | {"MEDCOMPILE_DATA": str(given.data.resolve())}
    return benched(folder / model, folder / f"bench-{model}-{work}", words, environment)


def table(bench: results.Bench, work: str) -> Iterator[str]:
    """A row for each contender: texts/s, how many times as many ours are, memory, and how far answers agree."""
    timings = [(entry, entry.timing(bench.shapes[0].name)) for entry in bench.entries]
    ran = [(entry, timing) for entry, timing in timings if timing is not None and timing.p50]
    ours = {entry.name: timing for entry, timing in ran if entry.name in OURS}
    heads = [f"{name.partition(':')[2]} to it" for name in ours]
    yield f"### {work}: {WORK[work]} texts in a call\n"
    yield f"| contender | texts/s | {' | '.join(heads)} | peak MB | answers as the reference's |"
    yield "|---" * (4 + len(heads)) + "|"
    for entry, timing in ran:
        cells = [told_ratio(timing, own) for own in ours.values()]
        accuracy = timing.accuracy
        agree = ""
        if accuracy is not None:
            vectors = accuracy.cosine_mean is not None
            agree = f"cosine {accuracy.cosine_mean:.4f}" if vectors else f"F1 {accuracy.agreement:.3f}"
        rate = WORK[work] / (timing.p50 / 1000)
        cells += [f"{timing.peak_mb or 0:.0f}", agree]
        yield f"| {entry.title} | {rate:.1f} | {' | '.join(cells)} |"
    yield ""
    for entry, timing in timings:
        if timing is None or not timing.p50:
            yield f"{entry.title}: not run, {entry.missing.reason if entry.missing else entry.error}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    built, ran = steps.add_parser("build"), steps.add_parser("run")
    for each in (built, ran):
        each.add_argument("folder", type=Path)
        each.add_argument("--data", type=Path, required=True)
    built.add_argument("--ner", type=Path, required=True)
    ran.add_argument("--rounds", type=int, default=6)
    ran.add_argument("--threads", type=int, default=2)
    ran.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    ran.add_argument("--models", nargs="+", choices=TITLES, default=list(TITLES))
    ran.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    ran.add_argument("--write", type=Path)
    given = parser.parse_args()
    if given.step == "build":
        build(given.folder, given.ner, given.data)
        return
    lines = ["# Encoders at work on a CPU\n", "Made by `benchmarks/encoder_work.py`, which says how.\n"]
    for model in given.models:
        for work in given.work:
            bench = run(given.folder, model, work, given)
            if len(lines) == 2:
                lines.append(
                    f"{bench.machine['cpu']} ({bench.machine['instructions']}), {given.threads} threads, "
                    f"{given.rounds} rounds.\n"
                )
            if work == given.work[0]:
                lines.append(f"## {TITLES[model]}\n")
            lines += table(bench, work)
    text = "\n".join(lines)
    print(text)
    if given.write:
        given.write.write_text(text)


if __name__ == "__main__":
    main()
