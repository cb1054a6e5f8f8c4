"""What it costs to come from a checkpoint to int8: time and peak memory of our build and of others' flows.

    python benchmarks/build_cost.py CHECKPOINT [--rounds 3] [--python NAME=PATH ...] [--write FILE]

CHECKPOINT: a BERT-base, say (encoder_speed.py build leaves one). Every flow is a process of its own that starts with
nothing cached, and they take turns. Ours is `medcompile build` of one int8 variant for one target, with the evidence:
the original's answers and the result's on 64 texts, and the test. Others export and quantize, as their documentation
has it, and check nothing: Optimum's dynamic int8 (ORTModel export, ORTQuantizer), Olive's (OnnxConversion,
OnnxDynamicQuantization), and NNCF's post-training quantization of OpenVINO's conversion of the torch model, on 128
texts, the same that our static variant sees. Memory: the most that the process and those it started held, each by
itself. --python gives a flow that needs another interpreter its own (optimum, olive, nncf).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEXTS, LENGTH = 128, 128
RECIPE = """
schema_version: 1
name: cost
model: {{family: bert, tasks: [embed], source: "path:{checkpoint}"}}
shapes: {{batch: [1, 8, 64], sequence: [8, 128, 512]}}
calibration: {{data: biomedical-sentences, samples: {texts}}}
evaluation: {{data: clinical-notes, samples: 64}}
budget: {{cosine: {{max_drop: 0.5}}}}
variants: {{int8: {variant}}}
targets: [{target}]
"""
VARIANTS = {
    "onnxruntime-cpu": "{weights: int8, activations: int8, dynamic: true}",
    "openvino-cpu": "{weights: int8, activations: int8, symmetric: false, compute: {float: bfloat16}}",
}
FLOWS = {
    "medcompile-onnxruntime": "medcompile build, int8 dynamic, ONNX Runtime, verified",
    "optimum": "Optimum, export and dynamic int8",
    "olive": "Olive, conversion and dynamic int8",
    "medcompile-openvino": "medcompile build, int8 static, OpenVINO, verified",
    "nncf": "OpenVINO conversion and NNCF",
}
RIVALS = {"optimum": "medcompile-onnxruntime", "olive": "medcompile-onnxruntime", "nncf": "medcompile-openvino"}


# ---- the flows, each in its own process


def ours(checkpoint: Path, out: Path, target: str) -> None:
    import medcompile

    recipe = out / "cost.yaml"
    recipe.write_text(
        RECIPE.format(checkpoint=checkpoint, texts=TEXTS, variant=VARIANTS[target], target=target), encoding="utf-8"
    )
    os.chdir(ROOT)  # where calibration/ is
    built = medcompile.build(recipe, out=out / "bundle", cache_folder=out / "cache")
    assert all(a.evidence for a in built.artifacts)


def optimum(checkpoint: Path, out: Path) -> None:
    from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    ORTModelForFeatureExtraction.from_pretrained(checkpoint, export=True).save_pretrained(out)
    settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    ORTQuantizer.from_pretrained(out, file_name="model.onnx").quantize(save_dir=out, quantization_config=settings)


def olive(checkpoint: Path, out: Path) -> None:
    from olive import run

    run(
        {
            "input_model": {"type": "HfModel", "model_path": str(checkpoint), "task": "feature-extraction"},
            "passes": {
                "export": {"type": "OnnxConversion", "use_dynamo_exporter": True},
                "int8": {"type": "OnnxDynamicQuantization"},
            },
            "output_dir": str(out / "model"),
            "cache_dir": str(out / "cache"),
            "evaluate_input_model": False,
        }
    )


def nncf(checkpoint: Path, out: Path) -> None:
    import nncf as library
    import openvino
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    model = AutoModel.from_pretrained(checkpoint, local_files_only=True).eval()
    with (ROOT / "calibration/biomedical-sentences.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(TEXTS), strict=False)]
    items = [dict(tokenizer(t, truncation=True, max_length=LENGTH, return_tensors="pt")) for t in texts]
    converted = openvino.convert_model(model, example_input=items[0])
    del model
    names = {name for i in converted.inputs for name in i.get_names()}
    feeds = [{k: v.numpy() for k, v in item.items() if k in names} for item in items]
    done = library.quantize(converted, library.Dataset(feeds), model_type=library.ModelType.TRANSFORMER)
    openvino.save_model(done, out / "int8.xml", compress_to_fp16=False)


def worker(flow: str, checkpoint: Path, out: Path) -> None:
    if flow.startswith("medcompile-"):
        ours(checkpoint, out, f"{flow.removeprefix('medcompile-')}-cpu")
    else:
        {"optimum": optimum, "olive": olive, "nncf": nncf}[flow](checkpoint, out)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"peak_mb": [peak / 1e3 for peak in peaks]}))


# ---- the comparison


def run(flow: str, checkpoint: Path, python: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        command = [python, __file__, str(checkpoint), "--worker", flow, "--out", scratch]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        elapsed = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{flow}: {done.stderr[-2000:]}")
    return {"seconds": elapsed, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    checkpoint = given.checkpoint.resolve()
    if given.worker:
        worker(given.worker, checkpoint, given.out)
        return
    pythons = dict(entry.split("=", 1) for entry in given.python)
    found: dict[str, list[dict[str, Any]]] = {flow: [] for flow in given.flows}
    for turn in range(given.rounds):
        for flow in given.flows if turn % 2 == 0 else given.flows[::-1]:
            found[flow].append(run(flow, checkpoint, pythons.get(flow, sys.executable)))
            print(f"round {turn + 1}, {flow}: {found[flow][-1]}", file=sys.stderr, flush=True)
    lines = [
        "# From a checkpoint to int8\n",
        f"Made by `benchmarks/build_cost.py`, which says how; {checkpoint.name}, {len(os.sched_getaffinity(0))} cores, "
        f"{given.rounds} rounds, medians.\n",
        "| flow | seconds | peak MB, process (its children) | ours: times as fast, share of its memory |",
        "|---|---|---|---|",
    ]
    for flow, runs in found.items():
        seconds = statistics.median(r["seconds"] for r in runs)
        peaks = [statistics.median(r["peak_mb"][k] for r in runs) for k in (0, 1)]
        told = ""
        if (own := found.get(RIVALS.get(flow, ""))) is not None:
            faster = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs, own, strict=True))
            memory = statistics.median(max(b["peak_mb"]) / max(a["peak_mb"]) for a, b in zip(runs, own, strict=True))
            told = f"{faster:.2f}, {memory:.2f}"
        lines.append(f"| {FLOWS[flow]} | {seconds:.1f} | {peaks[0]:.0f} ({peaks[1]:.0f}) | {told} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if given.write:
        given.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
