"""Peak memory of exporting large encoders: resident bytes above what the imports take, weights bound.

Each size runs in a fresh process. "imports" is everything that an export imports, taken by exporting a tiny model
first; the peak is then reset. Weights are random and lie in a safetensors file, as a checkpoint's would.

    python benchmarks/export_memory.py --out benchmarks/results/export_memory.md
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "BERT-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "1.1B": {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 16, "intermediate_size": 7424},
}
TASKS = ("embed", "fill-mask")
TARGET_MB = 300


def write_checkpoint(folder: Path, size: str) -> int:
    """A random BERT checkpoint in folder, written without holding more than one tensor. Returns its parameters."""
    import numpy as np

    shape = SIZES[size]
    config = shape | {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(words + [f"w{i}" for i in range(30522 - len(words))]) + "\n")
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        f"bert.embeddings.{name}_embeddings.weight": (rows, hidden)
        for name, rows in (("word", 30522), ("position", 512), ("token_type", 2))
    }
    layers = [f"bert.encoder.layer.{i}" for i in range(shape["num_hidden_layers"])]
    linears: dict[str, tuple[int, ...]] = {}
    linears |= {f"{at}.attention.self.{part}": (hidden, hidden) for at in layers for part in ("query", "key", "value")}
    linears |= {f"{at}.attention.output.dense": (hidden, hidden) for at in layers}
    linears |= {f"{at}.intermediate.dense": (inner, hidden) for at in layers}
    linears |= {f"{at}.output.dense": (hidden, inner) for at in layers}
    linears["cls.predictions.transform.dense"] = (hidden, hidden)
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    norms += [f"{at}.{part}.LayerNorm" for at in layers for part in ("attention.output", "output")]
    for name, sizes in linears.items():
        shapes |= {f"{name}.weight": sizes, f"{name}.bias": sizes[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    shapes["cls.predictions.bias"] = (30522,)
    header: dict[str, Any] = {}
    end = 0
    for name, sizes in shapes.items():
        start, end = end, end + 4 * int(np.prod(sizes))
        header[name] = {"dtype": "F32", "shape": sizes, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for sizes in shapes.values():
            random.standard_normal(sizes, np.float32).tofile(file)
    return end // 4


def measure(small: Path, folder: Path, out: Path) -> None:
    """Print, as JSON, megabytes and seconds of exporting folder, in this process."""
    from medcompile import onnx_files, sources
    from medcompile.models import ModelOptions, bert
    from medcompile.passes.export import export
    from medcompile.passes.simplify import Simplify
    from medcompile.program import Context, Program, Silent
    from medcompile.resources import peak_rss_bytes, reset_peak_rss
    from medcompile.spec import Axis, Profile

    profile = Profile("default", (Axis("batch", 1, 8, 64), Axis("sequence", 8, 128, 512)))
    options = ModelOptions(TASKS, (profile,))
    checkpoints = {path: sources.resolve(f"path:{path}") for path in (small, folder)}

    def exported(path: Path) -> Program:
        return export(bert.FAMILY, checkpoints[path], options)

    def written(program: Program, place: Path) -> None:
        place.mkdir()
        simplified = Simplify()(program, Context(place, Silent()))
        onnx_files.save({name: graph.model for name, graph in simplified.graphs.items()}, place)

    written(exported(small), out / "small")
    reset_peak_rss()
    base = peak_rss_bytes()
    started = time.perf_counter()
    program = exported(folder)
    middle = time.perf_counter()
    alone = peak_rss_bytes()
    written(program, out / "large")
    result = {
        "imports_mb": base / 1e6,
        "export_mb": (alone - base) / 1e6,
        "export_s": middle - started,
        "written_mb": (peak_rss_bytes() - base) / 1e6,
        "written_s": time.perf_counter() - middle,
        "file_mb": sum(p.stat().st_size for p in (out / "large").iterdir()) / 1e6,
    }
    print(json.dumps(result))


def report(rows: list[dict[str, Any]], hardware: str) -> str:
    lines = [
        "# Peak memory of an export",
        "",
        f"Two graphs each ({' and '.join(TASKS)}) of a BERT with random fp32 weights in one safetensors file.",
        "Megabytes (10^6) of peak resident memory above the process after its imports and one tiny export; a fresh",
        f"process for each size. Target: under {TARGET_MB}.",
        "",
        "| model | parameters | weights, MB | imports, MB | export alone, MB | s | with simplify and write, MB | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['size']} | {row['parameters'] / 1e6:,.0f} M | {row['parameters'] * 4 / 1e6:,.0f} "
        f"| {row['imports_mb']:.0f} | {row['export_mb']:.0f} | {row['export_s']:.1f} "
        f"| {row['written_mb']:.0f} | {row['written_s']:.1f} |"
        for row in rows
    ]
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers", "onnx-ir"))
    return "\n".join([*lines, "", f"{hardware}; {versions}.", "Made by `python benchmarks/export_memory.py`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    parser.add_argument(
        "--hardware", default="two cores of an AMD EPYC (Zen 4), 24 GiB", help="how to name this machine"
    )
    parser.add_argument("--scratch", type=Path, help="where weights are written (needs 11 GB)")
    parser.add_argument("--measure", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    rows = []
    for size in ("BERT-large", "1.1B"):
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            place = Path(scratch)
            write_checkpoint(place / "tiny", "tiny")
            parameters = write_checkpoint(place / "model", size)
            (place / "out").mkdir()
            command = [sys.executable, __file__, "--measure", *(str(place / n) for n in ("tiny", "model", "out"))]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"size": size, "parameters": parameters} | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], file=sys.stderr)
    text = report(rows, arguments.hardware)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
