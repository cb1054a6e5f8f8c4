"""Tokens per second of a decoder of TinyLlama-1.1B's shape in int4: ours on both CPU backends, beside other engines.

    python benchmarks/decoder_models.py random CHECKPOINT
    python benchmarks/decoder_models.py build path:CHECKPOINT FOLDER --variants int4-g128 int4-g32
    python benchmarks/decoder_peers.py prepare CHECKPOINT MODELS PEERS
    python benchmarks/decoder_speed.py FOLDER [--checkpoint CHECKPOINT] [--models MODELS --peers PEERS] [--rounds 5]

Weights are random: speed does not depend on them. One process per contender, all alive, taking turns in random order;
the table has medians over the rounds, and ratios to a peer are medians of the ratios within each round. Ours is the
Generator, sampling and scheduling included, with speculation off; the others are driven by their own fastest calls
(decoder_peers.py). --write FILE stores the tables.

Prefill is one prompt of 512 tokens up to its first token. Decode starts from prompts of 128 tokens each. The share
of the limit is bytes of weights and of keys and values that a step at batch 1 must read, times steps per second, over
the memory bandwidth measured between the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS_SCRIPT = HERE / "decoder_peers.py"
PROMPT, PREFILL = 128, 512
KV_BYTES_PER_TOKEN = 2 * 22 * 4 * 64 * 2  # keys and values, layers, heads, width, bytes; twice that in float32


@dataclass
class Contender:
    """One process that answers `batch prompt tokens`. weight_bytes: read by each step; 0 where that is not known."""

    name: str
    command: list[str]
    weight_bytes: int = 0
    process: Any = None

    def start(self) -> None:
        pipe = subprocess.PIPE
        log = (Path(tempfile.gettempdir()) / f"{self.name.replace(' ', '_')}.log").open("w")
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{self.name} did not start; {log.name} says why")

    def ask(self, batch: int, prompt: int, tokens: int) -> list[float]:
        self.process.stdin.write(f"{batch} {prompt} {tokens}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} died at batch {batch}, prompt {prompt}")
        return list(json.loads(line))


def worker(folder: Path, target: str, variant: str, threads: int, step_tokens: int) -> None:
    """Ours. Prompts that no run had before, so that the prefix cache finds nothing."""
    sys.path.insert(0, str(HERE))
    import decoder_models
    import decoder_peers
    import numpy as np

    from medcompile.runtime.sampling import Sampling

    generator = decoder_models.open_generator(
        folder, target, variant, 256, threads=threads, step_tokens=step_tokens, guess=0
    )
    random = np.random.default_rng(0)

    def run(batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        prompts = random.integers(3, 31000, (batch, prompt))
        asked = Sampling(max_tokens=tokens + 1, ignore_eos=True)
        start = time.perf_counter()
        requests = [generator.submit(ids.tolist(), asked) for ids in prompts]
        while any(r.sequence.length == r.sequence.prompt_length for r in requests):
            generator.step()
        first, steps = time.perf_counter(), 0
        # Prompts end their prefill in different steps: only those in which all of them decode are counted.
        while tokens and all(r.finish_reason is None for r in requests):
            generator.step()
            steps += 1
        last = time.perf_counter()
        for request in requests:
            generator.cancel(request)
        return first - start, (last - first) / max(steps, 1)

    print("ready", flush=True)
    decoder_peers.answer(run)


def read_bandwidth(threads: int, megabytes: int = 256) -> float:
    """Bytes per second of so many threads that each read arrays of their own, larger than any cache, four times."""
    import numpy as np

    arrays = [np.ones(megabytes << 18, np.float32) for _ in range(threads)]

    def read(array: Any) -> None:
        for _ in range(4):
            np.dot(array, array)

    workers = [threading.Thread(target=read, args=(array,)) for array in arrays]
    start = time.perf_counter()
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    return 4 * sum(a.nbytes for a in arrays) / (time.perf_counter() - start)


def bandwidth_worker(threads: int) -> None:
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps([read_bandwidth(threads)]), flush=True)


def contenders(given: argparse.Namespace) -> list[Contender]:
    found = []
    for variant in given.variants:
        for target in given.targets:
            command = [sys.executable, __file__, str(given.folder), "--worker", target, variant]
            command += ["--threads", str(given.threads), "--step-tokens", str(given.step_tokens)]
            told = json.loads((given.folder / variant / target / "artifact.json").read_text())
            found.append(Contender(f"medcompile {target} {variant}", command, told["weight_bytes"]))

    def peer(name: str, python: Path, kind: str, path: Path, weight_bytes: int) -> None:
        command = [str(python), str(PEERS_SCRIPT), "worker", kind, str(path), str(given.threads)]
        found.append(Contender(name, command, weight_bytes))

    if given.checkpoint:
        weights = (given.checkpoint / "model.safetensors").stat().st_size - 32000 * 2048 * 2
        peer("transformers bf16", Path(sys.executable), "transformers", given.checkpoint, weights)
    if given.models:
        sizes = json.loads((given.models / "weight_bytes.json").read_text())
        for kind, names in {
            "llama": ("q4_0", "q4_k_m"),
            "openvino": ("openvino-int4-g128",),
            "onnxruntime": ("onnxruntime-int4",),
        }.items():
            for name in names:
                if name in sizes:
                    path = given.models / (f"{name}.gguf" if kind == "llama" else name)
                    title = {"llama": f"llama.cpp {name.upper()}", "openvino": "OpenVINO GenAI int4 g128"}
                    title["onnxruntime"] = "onnxruntime-genai int4 g32"
                    peer(title[kind], given.peers / kind / "bin/python", kind, path, sizes[name])
    return found


def measure(given: argparse.Namespace) -> list[str]:
    asked = [(1, PREFILL, 0), *((batch, PROMPT, given.tokens) for batch in given.batches)]
    every = contenders(given)
    memory = Contender(
        "memory", [sys.executable, __file__, "-", "--worker", "memory", "", "--threads", str(given.threads)]
    )
    for one in [*every, memory]:
        one.start()
    for one in every:  # first runs allocate, and pages come from the disk
        for batch, prompt, tokens in asked:
            one.ask(batch, prompt, min(tokens, 2))
    times: dict[tuple[str, int], list[float]] = {}
    peak: dict[str, float] = {}
    bandwidths: list[float] = []
    loads: list[float] = []
    order = random.Random(0)
    for round_ in range(given.rounds):
        for batch, prompt, tokens in asked:
            for one in order.sample(every, len(every)):
                prefill_s, step_s, peak[one.name] = one.ask(batch, prompt, tokens)
                times.setdefault((one.name, batch if tokens else 0), []).append(
                    batch / step_s if tokens else prompt / prefill_s
                )
            bandwidths += memory.ask(0, 0, 0)
            loads.append(os.getloadavg()[0])
        print(f"round {round_ + 1} of {given.rounds} done, load average {loads[-1]:.1f}", file=sys.stderr, flush=True)
    for one in [*every, memory]:
        one.process.stdin.close()
        one.process.wait()
    return tables(given, every, times, peak, bandwidths, loads)


def tables(
    given: argparse.Namespace,
    every: list[Contender],
    times: dict[tuple[str, int], list[float]],
    peak: dict[str, float],
    bandwidths: list[float],
    loads: list[float],
) -> list[str]:
    columns = [0, *given.batches]
    bandwidth = statistics.median(bandwidths)
    heads = ["prefill 512", *(f"decode, batch {b}" for b in given.batches)]
    lines = [
        f"{given.threads} threads, {given.rounds} rounds, {given.tokens} steps each, load average "
        f"{min(loads):.1f} to {max(loads):.1f} (this benchmark's own included). Memory read: median "
        f"{bandwidth / 1e9:.1f} GB/s, best {max(bandwidths) / 1e9:.1f} GB/s.",
        "",
        "Tokens per second, all sequences together: median (best).",
        "",
        "| contender | " + " | ".join(heads) + " | MB a step reads | share of the limit, batch 1 | peak MB |",
        "|---|" + "---|" * (len(columns) + 3),
    ]
    for one in every:
        cells = [f"{statistics.median(times[one.name, c]):.1f} ({max(times[one.name, c]):.1f})" for c in columns]
        moved = one.weight_bytes + KV_BYTES_PER_TOKEN * (PROMPT + given.tokens // 2)
        share = f"{moved * statistics.median(times[one.name, 1]) / bandwidth:.0%}" if 1 in columns else ""
        cells += [f"{moved / 1e6:.0f}", share, f"{peak[one.name]:.0f}"]
        lines.append(f"| {one.name} | " + " | ".join(cells) + " |")
    ours = [one for one in every if one.name.startswith("medcompile")]
    theirs = [one for one in every if one not in ours]
    for rival in theirs:
        lines += ["", f"Ratios to {rival.name}, medians of the ratios within each round:", ""]
        lines += ["| contender | " + " | ".join(heads) + " |", "|---|" + "---|" * len(columns)]
        for one in ours:
            cells = [
                f"{statistics.median(a / b for a, b in zip(times[one.name, c], times[rival.name, c], strict=True)):.2f}"
                for c in columns
            ]
            lines.append(f"| {one.name} | " + " | ".join(cells) + " |")
    return lines


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="for transformers")
    parser.add_argument("--models", type=Path, help="of the other engines")
    parser.add_argument("--peers", type=Path, help="a folder of virtual environments")
    parser.add_argument("--targets", nargs="+", default=["openvino-cpu", "onnxruntime-cpu"])
    parser.add_argument("--variants", nargs="+", default=["int4-g128", "int4-g32"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--step-tokens", type=int, default=256)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("TARGET", "VARIANT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the bandwidth's threads are its own
    if given.worker and given.worker[0] == "memory":
        bandwidth_worker(given.threads)
    elif given.worker:
        worker(given.folder, *given.worker, given.threads, given.step_tokens)
    else:
        lines = [
            "# A decoder of TinyLlama-1.1B's shape on a CPU",
            "",
            f"Made by `benchmarks/decoder_speed.py`, which says how; {cpu()}, Python {platform.python_version()}.",
            "",
            *measure(given),
        ]
        print("\n".join(lines))
        if given.write:
            given.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
