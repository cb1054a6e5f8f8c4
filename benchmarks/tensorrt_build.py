"""What does a TensorRT-RTX engine cost to build, where there is no GPU? Time, size, memory, and layers by precision.

    python benchmarks/tensorrt_build.py [--minilm-ner FOLDER] [--out benchmarks/results/tensorrt_build.md]

BERT-base has 12 layers and random weights, exported, simplified, calibrated on random ids and lowered by medcompile's
own passes: what is measured here does not depend on what the weights say. Every engine is built three times, each in a
process of its own; the median counts, and how many of the three plans differ in bytes is told.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import resource
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from medcompile.backends import tensorrt
from medcompile.program import Context, Silent
from medcompile.spec import Axis, Precision, Profile, Variant

if TYPE_CHECKING:
    from medcompile.program import Feeds, Program

RUNS = 3
PROFILE = Profile("default", (Axis("batch", 1, 8, 64), Axis("sequence", 8, 128, 512)))
INT8 = Variant("int8", Precision.FLOAT16, Precision.INT8, Precision.INT8)
VARIANTS = (
    Variant("fp32"),
    Variant("fp16", Precision.FLOAT16),
    Variant("bf16", Precision.BFLOAT16),
    INT8,
    replace(INT8, name="int8, rest fp32", float_dtype=Precision.FLOAT32),
    Variant("int4", Precision.FLOAT16, Precision.INT4, block_size=128),
    Variant("fp8", Precision.FLOAT16, Precision.FLOAT8, Precision.FLOAT8),
)
HEADER = (
    "| model | variant | build s, wall | build s, CPU | engine MB | peak RSS MB | linear layers "
    "| rows: gemm, fused, other | different plans |"
)


def bert_base(folder: Path) -> Path:
    """A BERT-base checkpoint with random weights."""
    import transformers

    config = transformers.BertConfig(num_hidden_layers=12)
    transformers.set_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(config.vocab_size - 5))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


def calibrated(source: Path, task: str, scratch: Path) -> Program:
    """The checkpoint's graph of that task, simplified and calibrated on random ids."""
    import numpy as np

    from medcompile import cache, models, sources
    from medcompile.models import ModelOptions
    from medcompile.passes.calibrate import Calibrate
    from medcompile.passes.export import export
    from medcompile.passes.simplify import Simplify
    from medcompile.run_onnx import run_onnx

    checkpoint = sources.resolve(f"path:{source}", cache=scratch)
    options = ModelOptions(tasks=(task,), profiles=(PROFILE,))
    simplified = Simplify()(export(models.get("bert"), checkpoint, options), Context(scratch, Silent()))
    cache.write_program(simplified, scratch)
    random, vocabulary = np.random.default_rng(0), int(checkpoint.config["vocab_size"])

    def batches(graph: str) -> Iterator[Feeds]:
        for _ in range(4):
            ids = random.integers(1, vocabulary, (8, 16))
            yield {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}

    return Calibrate()(cache.read_program(scratch), Context(scratch, Silent(), None, batches, run_onnx))


def measure(model: str, program: Program, variant: Variant, scratch: Path) -> str:
    """A row of the table: one variant of the program's only graph."""
    import json

    from medcompile import onnx_files
    from medcompile.passes.cast import Cast
    from medcompile.passes.quantize import Quantize

    context = Context(scratch, Silent(), variant)
    typed = Cast(variant.float_dtype)(Quantize()(program, context), context)
    name, graph = next(iter(typed.graphs.items()))
    onnx_files.save({name: graph.model}, scratch)
    target = tensorrt.BACKEND.probe("tensorrt-rtx")
    engines, digests, cpu = [], set(), []
    for _ in range(RUNS):
        with TemporaryDirectory(dir=scratch) as out:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            engines.append(tensorrt.build_engine(scratch / f"{name}.onnx", graph.spec, variant, target, Path(out)))
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            plan = (Path(out) / tensorrt.PLAN).read_bytes()
            layers = json.loads((Path(out) / tensorrt.LAYERS).read_text(encoding="utf-8"))["layers"]
            digests.add(hashlib.sha256(plan).hexdigest())
    kinds = [layer["kind"] for layer in layers]
    gemms, fused = kinds.count("gemm"), kinds.count("runtime_fusion")
    cells = (
        model,
        variant.name,
        f"{statistics.median(e.seconds for e in engines):.1f}",
        f"{statistics.median(cpu):.1f}",
        f"{len(plan) / 1e6:.1f}",
        f"{statistics.median(e.peak_rss_bytes for e in engines) / 1e6:.0f}",
        engines[0].products,
        f"{gemms}, {fused}, {len(kinds) - gemms - fused}",
        f"{len(digests)} of {RUNS}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm-ner", type=Path, help="a trained checkpoint for token-classification, measured too")
    parser.add_argument("--out", type=Path, help="a Markdown file to write beside standard output")
    arguments = parser.parse_args()
    rows = []
    with TemporaryDirectory() as scratch:
        work = [("BERT-base", bert_base(Path(scratch) / "bert"), "embed", VARIANTS)]
        if arguments.minilm_ner:
            work.append(("minilm-ner", arguments.minilm_ner.absolute(), "token-classification", (INT8, VARIANTS[4])))
        for model, source, task, variants in work:
            folder = Path(scratch) / model
            (folder / "program").mkdir(parents=True)
            program = calibrated(source, task, folder / "program")
            for variant in variants:
                place = folder / variant.name.split(",", maxsplit=1)[0] / variant.float_dtype
                place.mkdir(parents=True)
                rows.append(measure(model, program, variant, place))
                print(rows[-1], file=sys.stderr)
    version = tensorrt.BACKEND.probe("tensorrt-rtx").version
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    text = "\n".join(
        [
            "# Building TensorRT-RTX engines without a GPU",
            "",
            f"TensorRT-RTX {version}, {platform.machine()}, {cores} cores ({_cpu()}), load {load:.1f} while it ran: "
            "where other work shared the cores, CPU seconds are nearer to what an idle machine needs.",
            f"Profile: batch 1, 8, 64; sequence 8, 128, 512. Median of {RUNS} builds. Engines are built here, not run.",
            "",
            HEADER,
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "Written by `python benchmarks/tensorrt_build.py`.",
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown CPU"


if __name__ == "__main__":
    main()
