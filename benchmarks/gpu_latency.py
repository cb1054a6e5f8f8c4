"""BERT-base on a GPU: our engines beside torch and ONNX Runtime, all of them in one run, taking turns.

    python benchmarks/gpu_latency.py [--rounds 10] [--batches 1 8 64] [--out FILE]

Weights are random (speed does not depend on them), masks full, sequences 128 tokens. What is timed is what an app
waits for: token ids in host memory to pooled embeddings in host memory, copies and synchronization included. One
process per contender on the same GPU, one of them at work at a time, in random order within each round; ratios are
medians of the ratios to torch eager within each round. A contender that can't run is listed with its reason.

--device cpu tries this script out where there is no GPU, with targets that run on a CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SEQUENCE = 128
TARGETS = {"cuda": ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda"), "cpu": ("onnxruntime-cpu",)}
EAGER = "torch eager fp16"
Run = Callable[[dict[str, Any]], Any]


def contenders(device: str) -> list[str]:
    ours = [f"{target} {variant}" for target in TARGETS[device] for variant in ("fp16", "int8")]
    return [EAGER, "torch.compile fp16", *ours]


# ---- what is compared


def prepare(folder: Path) -> None:
    """The checkpoint, its typed graphs in fp16 and int8, and their spec, under folder."""
    from tensorrt_build import INT8, bert_base, calibrated

    from medcompile import onnx_files
    from medcompile.passes.cast import Cast
    from medcompile.passes.quantize import Quantize
    from medcompile.program import Context, Silent
    from medcompile.spec import Precision, Variant

    (folder / "program").mkdir()
    program = calibrated(bert_base(folder / "bert"), "embed", folder / "program")
    for variant in (Variant("fp16", Precision.FLOAT16), replace(INT8, name="int8")):
        typed = folder / variant.name
        typed.mkdir()
        context = Context(typed, Silent(), variant)
        lowered = Quantize()(program, context) if variant.quantized else program
        graph = Cast(variant.float_dtype)(lowered, context).graphs["embed"]
        onnx_files.save({"embed": graph.model}, typed)
        (typed / "face.txt").write_text(repr((graph.spec, variant)), encoding="utf-8")


def ours(folder: Path, target: str, variant: str) -> Run:
    from medcompile import backends, spec

    names = {**vars(spec), **{type(p).__name__: type(p) for p in spec.Precision}}
    text = (folder / variant / "face.txt").read_text(encoding="utf-8")
    for precision in spec.Precision:  # the repr of an enum is no expression
        text = text.replace(repr(precision), f"Precision.{precision.name}")
    face, settings = eval(text, names)  # written by prepare()
    backend = backends.for_target(target)
    here = backend.probe(target)
    out = folder / f"{target} {variant}"
    out.mkdir()
    built = backend.build(folder / variant / "embed.onnx", face, settings, here, out)
    executor = backend.load(out / built.file, face, settings, built.target, None)
    return lambda feeds: executor.run(feeds)["embedding"]


def torchs(folder: Path, device: str, compiled: bool) -> Run:
    """transformers' BertModel in fp16 with the attention that it chooses (SDPA), and the same pooling as ours."""
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(folder / "bert", dtype=torch.float16, add_pooling_layer=False)
    model = model.to(device).eval()

    def embed(*tensors: torch.Tensor) -> torch.Tensor:
        hidden = model(**dict(zip(INPUTS, tensors, strict=True))).last_hidden_state
        mask = tensors[1].unsqueeze(-1).to(hidden.dtype)
        return ((hidden * mask).sum(1) / mask.sum(1)).float()

    if compiled:
        embed = torch.compile(embed, mode="reduce-overhead")

    def run(feeds: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return embed(*(torch.from_numpy(feeds[name]).to(device) for name in INPUTS)).cpu().numpy()

    return run


# ---- one process per contender


def worker(folder: Path, device: str, contender: str) -> None:
    """Says `ready` or why not; then answers a batch size and a count with that many times in ms and an embedding."""
    import numpy as np

    from medcompile.errors import MedcompileError

    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print; the answers must be alone
    try:
        kind, _, variant = contender.rpartition(" ")
        run = torchs(folder, device, "compile" in kind) if kind.startswith("torch") else ours(folder, kind, variant)
        run(_feeds(1))
    except (MedcompileError, ImportError, RuntimeError, AssertionError) as error:  # the latter two: torch's
        print(f"missing: {' '.join(str(error).split())[:300] or type(error).__name__}", file=answers, flush=True)
        return
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        batch, count = map(int, line.split())
        feeds, times, result = _feeds(batch), [], None
        for _ in range(count):
            start = time.perf_counter()
            result = run(feeds)
            times.append((time.perf_counter() - start) * 1e3)
        first = np.asarray(result)[0].astype(float).tolist()
        print(json.dumps({"times": times, "embedding": first}), file=answers, flush=True)


def _feeds(batch: int) -> dict[str, Any]:
    import numpy as np

    ids = np.random.default_rng(1).integers(1000, 28000, (batch, SEQUENCE))
    return dict(zip(INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))


@dataclass
class Running:
    process: subprocess.Popen[str]

    def ask(self, batch: int, count: int) -> dict[str, list[float]]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch} {count}\n")
        self.process.stdin.flush()
        answer: dict[str, list[float]] = json.loads(self._line())
        return answer

    def state(self) -> str:
        return self._line().strip() or f"missing: its process ended with status {self.process.wait()}"

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


# ---- the table


def compare(folder: Path, device: str, batches: list[int], rounds: int, runs: int) -> tuple[list[str], bool]:
    """The table, and whether there is anything in it."""
    running, missing = {}, []
    for contender in contenders(device):
        arguments = [sys.executable, __file__, "--worker", contender, "--folder", str(folder), "--device", device]
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running[contender] = Running(process)
        state = running[contender].state()
        print(f"{contender}: {state}", file=sys.stderr)
        if state != "ready":
            missing.append(f"- {contender}: {state.removeprefix('missing: ')}")
            running.pop(contender).close()
    lines = [
        "| batch | contender | p50 ms | p99 ms | texts/s | speed against torch eager | cosine to torch eager |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch in batches:
        lines += _rows(running, batch, rounds, runs)
    for each in running.values():
        each.close()
    return [*lines, "", "Not in the table:", "", *(missing or ["- none"])], bool(running)


def _rows(running: dict[str, Running], batch: int, rounds: int, runs: int) -> list[str]:
    embeddings = {name: each.ask(batch, 10)["embedding"] for name, each in running.items()}  # warm, graphs captured
    times: dict[str, list[list[float]]] = {name: [] for name in running}
    for _ in range(rounds):
        for name in random.sample(list(running), len(running)):
            times[name].append(running[name].ask(batch, runs)["times"])
    rows = []
    for name in running:
        every = sorted(t for taken in times[name] for t in taken)
        p99 = every[min(len(every) - 1, round(0.99 * len(every)))]
        speed = cosine = "-"
        if EAGER in running:
            pairs = zip(times[EAGER], times[name], strict=True)
            speed = f"{statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs):.2f}"
            cosine = f"{_cosine(embeddings[EAGER], embeddings[name]):.5f}"
        throughput = 1e3 * batch / statistics.mean(every)
        rows.append(
            f"| {batch} | {name} | {statistics.median(every):.3f} | {p99:.3f} | {throughput:.0f} | {speed} | {cosine} |"
        )
        print(rows[-1], file=sys.stderr)
    return rows


def _cosine(first: list[float], second: list[float]) -> float:
    dot = sum(a * b for a, b in zip(first, second, strict=True))
    return float(dot / (sum(a * a for a in first) * sum(b * b for b in second)) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", type=int, default=50, help="of each contender, in a round")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--device", choices=TARGETS, default="cuda")
    parser.add_argument("--out", type=Path, help="a Markdown file to write beside standard output")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.folder, given.device, given.worker)
        return
    with TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        table, good = compare(Path(scratch), given.device, given.batches, given.rounds, given.runs)
    head = f"BERT-base, random weights, {SEQUENCE} tokens, host to host, {given.rounds} rounds of {given.runs} runs."
    text = "\n".join([head, "", *table, ""])
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
